"""Text that a base model writes by itself, in batches that a killed job does not repeat."""

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pydantic_core
from pydantic.dataclasses import dataclass

from moelpr.process.errors import UserError
from moelpr.store import records
from moelpr.store.journal import Journal
from moelpr.store.records import STRICT, Record
from moelpr.store.yaml_files import read_mapping

PROMPTS = Path(__file__).with_name("prompts.yaml")
CODE, OWN_CHOICE = "code", "und"
# Batches without a text that is new, after which the model is taken to have no more.
_MOST_IN_VAIN = 20


@dataclass(frozen=True, config=STRICT)
class GeneratedText(Record):
    """How `moelpr data generate` made the texts in its folder.

    Attributes:
        model: The folder of the model.
        settings: Flags, prompts included.
        documents: Documents by language.
        repeated: Texts that were left out because they had been written before.
        short: Texts that were left out because they are short.
        versions: Versions of packages.
    """

    FILE_NAME: ClassVar[str] = "generated.manifest.json"  # as a corpus's, it is not read as text
    ASCII: ClassVar[bool] = False

    model: str
    settings: dict[str, object]
    documents: dict[str, int] = field(default_factory=dict)
    repeated: int = 0
    short: int = 0
    versions: dict[str, str] = field(default_factory=dict)


class Batch(NamedTuple):
    """What is complete after a batch: the sizes of the files, and counts of the whole job."""

    number: int
    bytes: dict[str, int]
    documents: dict[str, int]
    repeated: int
    short: int
    in_vain: int


def read_prompts(path: Path, languages: list[str]) -> dict[str, list[str]]:
    """Read the prompts of languages, or of all if none are named; each list is tried as often as every other.

    Raises:
        UserError: The file is no list of prompts, or has none for one of the languages.
    """
    what = "restore it, or write a list of beginnings for each language"
    found = records.validate(dict[str, list[str]], read_mapping(path, "list of prompts"), str(path), what)
    if missing := [name for name in languages or found if not found.get(name)]:
        raise UserError(f"{path} has no prompts in {missing[0]}, only in {', '.join(found)}; pass --prompts with some")
    return {name: found[name] for name in languages or found}


def generate(
    journal: Journal,
    prompts: Mapping[str, list[str]],
    write: Callable[[str, int], list[tuple[str, int]]],
    language_of: Callable[[str], str] | None,
    number: int,
    min_tokens: int,
    seed: int,
) -> Iterator[Batch]:
    """Write texts into files LANGUAGE.jsonl in the journal's folder, until there are enough; yield after each batch.

    Args:
        prompts: Language -> beginnings.
        write: Continues a prompt with a seed: several texts and their numbers of tokens.
        language_of: Identifies the language of a text; None: it is that of its prompt.
        number: Number of texts.
        min_tokens: A shorter text is left out.
    """
    done = journal.last(Batch) or Batch(0, {}, {}, 0, 0, 0)
    for file in journal.folder.glob("*.jsonl"):
        os.truncate(file, done.bytes.get(file.name, 0))
    yield done
    seen = {_digest(text) for name in done.bytes for text in _texts(journal.folder / name)}
    while sum(done.documents.values()) < number and done.in_vain < _MOST_IN_VAIN:
        language = [*prompts][done.number % len(prompts)]
        draw = random.Random(f"{seed} {done.number}")
        prompt = draw.choice(prompts[language])
        documents, repeated, short = Counter(done.documents), done.repeated, done.short
        content: dict[str, bytes] = {}
        for text, tokens in write(prompt, draw.getrandbits(32)):
            if tokens < min_tokens:
                short += 1
            elif (digest := _digest(text)) in seen:
                repeated += 1
            elif documents.total() < number:
                seen.add(digest)
                found = language if language == CODE or language_of is None else language_of(text)
                documents[found] += 1
                line = pydantic_core.to_json({"text": text, "language": found, "prompt": prompt}) + b"\n"
                content[f"{found}.jsonl"] = content.get(f"{found}.jsonl", b"") + line
        sizes = dict(done.bytes)
        for name, new in content.items():
            with open(journal.folder / name, "ab") as target:
                target.write(new)
                os.fsync(target.fileno())
            sizes[name] = sizes.get(name, 0) + len(new)
        in_vain = 0 if content else done.in_vain + 1
        done = Batch(done.number + 1, sizes, dict(documents), repeated, short, in_vain)
        journal.add(done)
        yield done


def _digest(text: str) -> bytes:
    """The same for texts that differ in white space and case only."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=12).digest()


def _texts(path: Path) -> Iterator[str]:
    with open(path, "rb") as lines:
        yield from (pydantic_core.from_json(line)["text"] for line in lines)


def writer(loaded: Any, batch_size: int, max_tokens: int, temperature: float, top_p: float) -> Callable[..., Any]:
    """Return the function that lets a loaded model continue a prompt, or its start token if that is empty."""
    import torch
    from transformers import GenerationConfig

    settings = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0, "max_new_tokens": max_tokens}
    ends = {"eos_token_id": loaded.eos_id, "pad_token_id": loaded.eos_id or 0}
    loaded.model.generation_config = GenerationConfig(**settings, **ends)  # transformers fills gaps from the model's

    special = {*loaded.tokenizer.all_special_ids}

    def write(prompt: str, seed: int) -> list[tuple[str, int]]:
        torch.manual_seed(seed)
        start = [loaded.start_id, *loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        ids = torch.tensor([start] * batch_size, device=loaded.device)
        with torch.inference_mode():
            found = loaded.model.generate(ids, attention_mask=torch.ones_like(ids)).tolist()
        texts = []
        for row in found:
            tokens = row[len(start) :]
            tokens = tokens[: tokens.index(loaded.eos_id)] if loaded.eos_id in tokens else tokens
            found_tokens = [token for token in tokens if token not in special]  # those of a prompt are part of the text
            text = loaded.tokenizer.decode([*start[1:], *found_tokens]).removesuffix("\ufffd")
            texts.append((text.strip(), len(tokens)))
        return texts

    return write
