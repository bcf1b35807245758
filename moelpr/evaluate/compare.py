"""Several models on the same text, loaded one after another; results are cached as they come.

Besides their scores, there are continuations: a prompt from each language's text, continued by each model.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from moelpr.checkpoints import checkpoint_chain
from moelpr.errors import UserError
from moelpr.evaluate.models import LoadedModel, is_megatron, open_model, read_max_positions, require_hf
from moelpr.evaluate.scoring import LanguageScore, Settings, score_each
from moelpr.files import atomic_file, make_folder, parse_json
from moelpr.model_spec import FILE_NAME
from moelpr.run_folder import HF_FOLDER

Json = dict[str, Any]

_VERSION = {"format_version": 2}
CACHE_FOLDER = "parts"
PROMPT_WORDS = 7
PROMPT_CHARACTERS = 10  # in scripts without spaces between words
_NO_SPACES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")  # kana, Han, Thai
_PROMPT = "continuation "  # before a language: a continuation's name in the cache


@dataclass(frozen=True)
class Comparison:
    """What several models do on the same text."""

    models: dict[str, Path]
    settings: Settings  # the same windows for all models
    scores: dict[str, dict[str, LanguageScore]]  # model -> language -> score
    continuation_tokens: int  # maximum length of a continuation; 0 for none
    # language -> "prompt" from a document, "reference": how the document continues, "by_model": model -> continuation
    continuations: dict[str, Json]

    def scores_on(self, language: str) -> dict[str, LanguageScore]:
        """Model -> score on one language."""
        return {model: scores[language] for model, scores in self.scores.items()}


def compare_models(
    models: Mapping[str, Path],
    documents: Mapping[str, Sequence[str]],
    settings: Settings | None = None,
    *,
    continuation_tokens: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    cache: "ResultCache | None" = None,
) -> Comparison:
    """Score every model on every language, in windows of the same length, so that no model gets more context.

    Args:
        models: name -> directory.
        documents: language -> texts.
        continuation_tokens: length of the continuations of a prompt per language, in tokens; 0: none.
        device, dtype: see `moelpr.evaluate.models.load_model`.
        cache: where results are kept, and those of an earlier run are read.

    Raises:
        UserError: before a model is opened, if a setting does not fit a model.
    """
    settings = (settings or Settings()).resolve({name: read_max_positions(path) for name, path in models.items()})
    cache = cache or ResultCache(None)
    if continuation_tokens:
        require_hf(models, "--continuations")
    prompts = {language: choose_prompt(texts) for language, texts in documents.items()} if continuation_tokens else {}
    # Not the batch size, which only affects speed.
    windows = {"sequence_length": settings.sequence_length, "context": settings.context}
    keys: dict[str, Json] = {
        language: {**windows, "text": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
        for language, texts in documents.items()
    }
    for language, (prompt, _) in prompts.items():
        keys[_PROMPT + language] = {"prompt": prompt, "tokens": continuation_tokens}

    def measure(name: str, missing: list[str]) -> Iterator[tuple[str, Json]]:
        with open_model(models[name], device, dtype) as loaded:
            texts = {language: documents[language] for language in missing if language in documents}
            for language, score in score_each(loaded, texts, settings, name):
                yield language, asdict(score)
            for part in missing[len(texts) :]:
                prompt, _ = prompts[part.removeprefix(_PROMPT)]
                yield part, {"text": continue_prompt(loaded, prompt, continuation_tokens)}

    results = {}
    for name, directory in models.items():
        of = {"model": fingerprint_model(directory), "dtype": dtype}
        model_keys = {part: {**of, **key} for part, key in keys.items()}
        results[name] = cache.complete(name, model_keys, partial(measure, name))
    scores = {
        name: {language: LanguageScore.from_json(found[language]) for language in documents}
        for name, found in results.items()
    }
    continuations = {
        language: {
            "prompt": prompt,
            "reference": reference,
            "by_model": {name: found[_PROMPT + language]["text"] for name, found in results.items()},
        }
        for language, (prompt, reference) in prompts.items()
    }
    return Comparison(dict(models), settings, scores, continuation_tokens, continuations)


def choose_prompt(documents: Sequence[str]) -> tuple[str, str]:
    """The first words of the first document whose line continues for as long again, or else of the longest one.

    Returns these words, and the rest of the line as reference.
    """
    best = ("", "")
    for document in documents:
        line = document.strip().split("\n", 1)[0]
        words = list(re.finditer(r"\S+", line))[:PROMPT_WORDS]
        cut = words[-1].end() if words else 0
        if len(_NO_SPACES.findall(line[:40])) > 10:
            cut = PROMPT_CHARACTERS
        prompt, reference = line[:cut].rstrip(), line[cut:].strip()
        if len(reference) >= len(prompt) > 0:
            return prompt, reference
        best = max(best, (prompt, reference), key=lambda parts: len(parts[0]) + len(parts[1]))
    return best


@torch.inference_mode()
def continue_prompt(loaded: LoadedModel, prompt: str, max_new_tokens: int) -> str:
    """Continue `prompt` with the most likely token each time, at most `max_new_tokens`, up to EOS or a line break.

    `loaded` must be a Hugging Face model.
    """
    from transformers import GenerationConfig

    pad_id = loaded.eos_id if loaded.eos_id is not None else loaded.start_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=loaded.eos_id,
        pad_token_id=pad_id,
    )
    ids = [loaded.start_id, *loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    inputs = torch.tensor([ids], device=loaded.device)
    output = loaded.model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    # Decoded together with the prompt, because some tokenizers drop a leading space.
    prompt_text = loaded.tokenizer.decode(ids[1:], skip_special_tokens=True)
    text = loaded.tokenizer.decode(output[0, 1:].tolist(), skip_special_tokens=True)[len(prompt_text) :]
    line = next((line for line in text.split("\n") if line.strip()), "")
    return line.rstrip("\ufffd ")  # the last character may be incomplete


class ResultCache:
    """Results in an evaluation's folder, one file each (`parts/MODEL/NAME.json`), so that a rerun resumes.

    Each file records what it was computed from, and a checksum. A result with a different key or checksum is not used,
    but computed again.
    """

    def __init__(self, folder: Path | None):
        """`folder` is the evaluation's --output; None caches nothing."""
        if folder and folder.exists() and not folder.is_dir():
            raise UserError(f"--output {folder} is a file; pass a folder")
        if folder and folder.is_dir() and any(folder.iterdir()) and not (folder / CACHE_FOLDER).is_dir():
            raise UserError(f"--output {folder} is not an evaluation folder; choose another")
        if folder:
            make_folder(folder)  # now, and not when the first result is there
        self._folder = folder and folder / CACHE_FOLDER
        if self._folder:
            make_folder(self._folder)  # now, because measuring takes long

    def read(self, model: str, name: str, key: Json) -> Json | None:
        """The result computed from exactly `key`, or None, also if the file is damaged."""
        try:
            content = parse_json(self._path(model, name).read_bytes()) if self._folder else {}
            is_wanted = content["of"] == {**_VERSION, **key} and content["crc32"] == _checksum(content["result"])
            return content["result"] if is_wanted else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, model: str, name: str, key: Json, result: Json) -> None:
        if self._folder:
            with atomic_file(self._path(model, name)) as temporary:
                content = {"of": {**_VERSION, **key}, "result": result, "crc32": _checksum(result)}
                temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def complete(
        self, model: str, keys: Mapping[str, Json], measure: Callable[[list[str]], Iterable[tuple[str, Json]]]
    ) -> dict[str, Json]:
        """Results of a model: the cached ones, and those that `measure` yields, which are cached as they come.

        Args:
            keys: name of a result -> what it is computed from.
            measure: yields (name, result) for the names that are missing, which it gets in the order of `keys`.
        """
        found = {name: result for name, key in keys.items() if (result := self.read(model, name, key)) is not None}
        if missing := [name for name in keys if name not in found]:
            for name, result in measure(missing):
                found[name] = result
                self.write(model, name, keys[name], result)
        return found

    def _path(self, model: str, name: str) -> Path:
        assert self._folder
        return self._folder / quote(model, safe="") / f"{quote(name, safe='')}.json"


def _checksum(result: Json) -> str:
    return f"{zlib.crc32(json.dumps(result).encode()):08x}"


def fingerprint_model(directory: Path) -> str:
    """A digest of its files' names, sizes and times; the weights are too large to be read."""
    if is_megatron(directory):
        folders = [directory / HF_FOLDER, *checkpoint_chain(directory)]
        return fingerprint_files([directory / FILE_NAME, *(file for folder in folders for file in folder.rglob("*"))])
    return fingerprint_files(file for file in directory.iterdir() if file.suffix != ".md")


def fingerprint_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()
