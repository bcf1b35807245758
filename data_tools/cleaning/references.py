"""Text that must not be trained on: the evaluation's own and benchmarks', as an index of datatrove's n-grams."""

import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import regex
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer

from moelpr.process.errors import UserError
from moelpr.process.versions import install_command
from moelpr.text.reading import read_documents

# Scripts that write no spaces between words: each character counts as a word.
_DENSE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"


class Words(WordTokenizer):
    """Splits any language into words without a model; datatrove's own tokenizers download theirs."""

    _PATTERN = regex.compile(rf"[{_DENSE}]|[\w--[{_DENSE}]]+", regex.V1)

    def word_tokenize(self, text: str) -> list[str]:
        return self._PATTERN.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(match.start(), match.end()) for match in self._PATTERN.finditer(text)]


def write_index(folder: Path, name: str, texts: Iterable[str], config: NGramsDecontConfig) -> tuple[int, int]:
    """Write the n-grams of texts for datatrove's `NGramsDecontFilter`.

    datatrove's own indexer needs lighteval, whatever it reads.

    Returns:
        The number of texts, and of those that are too short to have an n-gram.
    """
    hash_text, words = create_hash_func(config.hash_config), Words()
    hashes: set[int] = set()
    texts_read = short = 0
    for text in texts:
        found = [" ".join(gram) for gram in ngrams(words.word_tokenize(simplify_text(text)), config.n_grams)]
        hashes.update(map(hash_text, found))
        texts_read, short = texts_read + 1, short + (not found)
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(name).name
    while (file := folder / f"{name}.index.hashes").exists():
        name += "'"
    # numpy's `tofile` says nothing of a disk that fills.
    file.write_bytes(np.array(sorted(hashes), dtype=config.hash_config.np_descr).tobytes())
    return texts_read, short


def texts_of(reference: str, json_key: str) -> Iterator[str]:
    """Yield the texts of a file, or of a benchmark of the installed lm-evaluation-harness.

    Raises:
        UserError: There is neither, or its data are not on this machine.
    """
    if Path(reference).exists():
        yield from read_documents(reference, json_key)
        return
    if find_spec("lm_eval") is None:
        raise UserError(
            f"{reference} is no file, and benchmarks need lm-evaluation-harness; correct the path, or run "
            f"{install_command('eval')}"
        )
    from moelpr.evaluate.harness import load_tasks

    print(
        f"reading {reference} with lm-evaluation-harness, which downloads data that it has not cached", file=sys.stderr
    )
    try:
        _, found = load_tasks([reference], None)
    except UserError as error:
        raise UserError(
            f"--decontaminate: {str(error).split(';')[0]}; correct it, or pass the file of its text"
        ) from None
    for task in _leaves(found[reference]):
        for document in task.eval_docs:
            yield " ".join(str(part) for part in (task.doc_to_text(document), *_answers(task, document)))


def _leaves(tasks: Any) -> Iterator[Any]:
    """Yield the tasks of groups."""
    for task in tasks:
        if hasattr(task, "eval_docs"):
            yield task
        else:
            yield from _leaves(task.get_all_tasks() if hasattr(task, "get_all_tasks") else task.values())


def _answers(task: Any, document: Any) -> list[Any]:
    """The right answers of a benchmark's question."""
    target = task.doc_to_target(document)
    choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else None
    if choices is not None and isinstance(target, int):
        return [choices[target]] if 0 <= target < len(choices) else []
    return target if isinstance(target, list) else [target]
