"""The language of each document of a corpus, line by line in a file, and the bits that follow."""

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_tools.corpus.corpus_writer import append_runs
from data_tools.corpus.tokenized import joined_runs
from data_tools.preprocessing.tagging import LanguageGroups
from data_tools.tagging.tokens import document_lengths
from moelpr.base.errors import UserError
from moelpr.data.corpus_index import CorpusIndex
from moelpr.data.language_bits import LanguageBitsWriter
from moelpr.data.manifest import LanguageCount
from moelpr.data.text.documents import BadLine
from moelpr.data.text.remote import is_remote
from moelpr.data.text.sources import open_source

_LONGEST_LINE = 256  # no name of a language is longer; a file without line breaks must not fill the memory


def languages_in(path: str, groups: LanguageGroups) -> Iterator[str]:
    """Yield the language on each line of a file.

    Raises:
        UserError: The file can't be opened, or a line is no language, or none that is listed.
    """
    known: dict[bytes, str] = {}
    with _opened(path) as file:
        for number in count(1):
            if not (line := file.readline(_LONGEST_LINE)):
                return
            if line not in known:
                try:
                    known[line] = _language(line, groups)
                except BadLine as error:
                    raise UserError(f"{path}, line {number:,}: {error}") from None
            yield known[line]


def _opened(path: str) -> BinaryIO:
    if is_remote(path):
        return open_source(path).open()
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(
            f"{path} can't be opened ({error.strerror}); pass a file with one language per document and line"
        ) from error


def _language(line: bytes, groups: LanguageGroups) -> str:
    try:
        name = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        name = ""
    if not name or not name.isprintable() or len(line) == _LONGEST_LINE:
        raise BadLine(f"{line[:40]!r} is not a language; write one code per line, such as el")
    try:
        return groups.checked(name)
    except BadLine as error:
        raise BadLine(f"{error}; add it to one of them") from None


def write_bits(
    path: Path, index: CorpusIndex, languages: Iterator[str], groups: LanguageGroups, source: str
) -> dict[str, LanguageCount]:
    """Write the .lang of a corpus, and return the counts by language.

    Args:
        languages: The language of each document.
        source: Where they come from, for error messages.

    Raises:
        UserError: There are fewer or more languages than documents.
    """
    documents = len(index.document_starts) - 1
    numbers: dict[str, int] = {}
    counts: dict[str, LanguageCount] = {}
    with LanguageBitsWriter(path) as writer:
        done = 0
        for lengths in document_lengths(index):
            codes = list(islice(languages, len(lengths)))
            done += len(codes)
            if len(codes) < len(lengths):
                raise UserError(
                    f"{source} contains {done:,} languages, but the corpus contains {documents:,} documents, "
                    "empty ones included; write one language per document, in their order"
                )
            found = np.fromiter((numbers.setdefault(code, len(numbers)) for code in codes), np.int64, len(codes))
            for code in [*numbers][len(counts) :]:
                counts[code] = LanguageCount(groups.bit(code))
            num_documents = np.bincount(found, minlength=len(numbers)).tolist()
            num_tokens = np.bincount(found, lengths, len(numbers)).astype(np.int64).tolist()
            for of_one, documents_more, tokens_more in zip(counts.values(), num_documents, num_tokens, strict=True):
                of_one.add(documents_more, tokens_more, 0)  # the size of the text is unknown
            is_original = np.array([language.bit == "original" for language in counts.values()], np.uint8)
            append_runs(writer, joined_runs(is_original[found], lengths))
        writer.finalize()
    if next(languages, None) is not None:
        raise UserError(
            f"{source} contains more languages than the {documents:,} documents of the corpus; write one per document"
        )
    return dict(sorted(counts.items()))
