"""How much text files hold, and how many tokens it has, estimated from a sample in about a second."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from moelpr.base.errors import UserError, first_line
from moelpr.data.text.documents import BadLine, is_blank, parse, text_of
from moelpr.data.text.filters import Filter
from moelpr.data.text.sources import Form, Source, find_files, open_source
from moelpr.data.text.streams import name_damaged, open_stream
from moelpr.data.text.tables import open_table, rows_of

_PLACES = 24
_DOCUMENTS = 24  # per place
_TOKENIZED_CHARACTERS = 1024  # per document
_PLAIN_BYTES = 1 << 19  # to read at a place
_UNPACKED_BYTES = 1 << 22  # to read of an archive, from its start
_LONGEST_S = 1.5


class TextEstimate(NamedTuple):
    """The number of files, their size on disk, and estimates of their documents and tokens, one of which ends each."""

    files: int
    bytes: int
    documents: int
    tokens: int


class _Density(NamedTuple):
    """Documents and tokens per byte of a file."""

    documents: float = 0.0
    tokens: float = 0.0


def estimate(
    paths: Sequence[Path | str], json_key: str, tokenizer_folder: Path | str, filter: Filter | None = None
) -> TextEstimate:
    """Estimate the documents and tokens of files, folders and patterns, from places spread over their bytes.

    Of the documents, those that `filter` keeps.

    Raises:
        UserError: A file is missing, unreadable or damaged, there is no text, or the folder has no tokenizer.
    """
    sources = [open_source(file) for file in find_files([str(path) for path in paths])]
    counter = _Counter(json_key, _token_counter(Path(tokenizer_folder)), filter)
    total, started = sum(source.bytes for source in sources), time.monotonic()
    densities: dict[tuple[Source, int], _Density] = {}  # an archive counts at 0
    places = []
    for source, start in _spread(sources, total):
        place = source, start if source.form in (Form.LINES, Form.PARQUET) else 0
        if place not in densities:
            if densities and time.monotonic() - started > _LONGEST_S:
                break
            sample = _rows if source.form is Form.PARQUET else _lines
            with name_damaged(source):
                densities[place] = sample(source, place[1], counter)
        places.append(densities[place])
    documents, tokens = (total * sum(values) / max(len(places), 1) for values in zip(_Density(), *places, strict=True))
    if not documents:
        names = ", ".join(map(str, paths))
        raise UserError(f'{names} contains no documents with text under "{json_key}"; pass JSON lines or Parquet')
    return TextEstimate(len(sources), total, round(documents), round(tokens + documents))


def _spread(sources: list[Source], total: int) -> Iterator[tuple[Source, int]]:
    """Yield places, evenly over the files' bytes, in an order of which any first part is spread as well."""
    for index in sorted(range(_PLACES), key=lambda index: f"{index:05b}"[::-1]):
        offset = total * (2 * index + 1) // (2 * _PLACES)
        for source in sources:
            if offset < source.bytes:
                yield source, offset
                break
            offset -= source.bytes


def _lines(source: Source, start: int, count: "_Counter") -> _Density:
    """Sample lines around `start`, or at the beginning of an archive."""
    is_plain = source.form is Form.LINES
    with open_stream(source) as (stream, tell):
        if is_plain and start > _PLAIN_BYTES:
            stream.seek(start)
            stream.readline(_UNPACKED_BYTES)
        lines, size = [], 0
        reads = [(0, 0)]  # where the stream has read the next bytes of the file: unpacked and packed bytes before
        while size < (_PLAIN_BYTES if is_plain else _UNPACKED_BYTES) and (line := stream.readline(_UNPACKED_BYTES)):
            if tell() > reads[-1][1]:
                reads.append((size, tell()))
            lines.append(line)
            size += len(line)
        if not stream.read(1):
            reads = [(0, 0), (size, source.bytes)]
        elif len(reads) < 3:
            reads.append((size, tell()))
    (unpacked, packed), (_, first) = reads[-1], reads[len(reads) > 2]
    per_byte = 1.0 if is_plain else unpacked / max(packed - first, 1)
    documents = [line for line in lines if not is_blank(line)]
    sampled = documents[:: len(documents) // _DOCUMENTS + 1]
    if not sampled:
        return _Density()
    number, tokens = count(sampled)
    return _Density(
        per_byte * len(documents) / size * number / len(sampled),
        per_byte * sum(map(len, documents)) / size * tokens / sum(map(len, sampled)),
    )


def _rows(source: Source, start: int, count: "_Counter") -> _Density:
    """Sample rows of the row group around `start`."""
    key, columns = count.key, [count.key, *(count.filter.columns if count.filter else ())]
    with open_table(source, columns) as file:
        metadata = file.metadata
        groups = range(metadata.num_row_groups)
        paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
        if key not in paths:
            raise UserError(f"the column {key} of {source.path} is nested, not text; name another one")
        column = paths.index(key)
        group = min(len(groups) * start // source.bytes, len(groups) - 1)
        rows = [row for row, _ in islice(rows_of(file, [group], columns), _DOCUMENTS)] if groups else []
        if not rows:
            return _Density()
        size = sum(metadata.row_group(group).column(column).total_uncompressed_size for group in groups)
        number, tokens = count(rows)
        num_bytes = sum(len(row[key].encode()) for row in rows if isinstance(row[key], str))
        return _Density(
            metadata.num_rows / source.bytes * number / len(rows), size / source.bytes * tokens / max(num_bytes, 1)
        )


class _Counter(NamedTuple):
    """Counts documents that have text and are kept, and their tokens."""

    key: str
    count_tokens: Callable[[str], int]
    filter: Filter | None

    def __call__(self, items: Sequence[bytes | dict[str, Any]]) -> tuple[int, float]:
        number, tokens = 0, 0.0
        for item in items:
            with suppress(BadLine):  # preprocessing reports it
                document = parse(item, []) if isinstance(item, bytes) else item
                text = text_of(document, self.key)
                if self.filter is None or self.filter.keeps(document):
                    part = text[:_TOKENIZED_CHARACTERS]
                    tokens += self.count_tokens(part) * len(text) / max(len(part), 1)
                    number += 1
        return number, tokens


def _token_counter(folder: Path) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text, without those that a tokenizer adds around it."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library has no class of its own
            path = folder / "tokenizer.json"
            raise UserError(f"{path} is no tokenizer ({first_line(error)}); download it again") from error
        tokenizer.no_truncation()
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return lambda text: len(model.encode(text))
    raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model; pass the folder of a tokenizer")
