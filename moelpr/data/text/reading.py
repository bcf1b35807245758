"""The documents of files, whatever their form."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from moelpr.base.errors import UserError
from moelpr.data.text.documents import BadLine, is_blank, parse, text_of
from moelpr.data.text.sources import Form, Source, download, find_files, open_source
from moelpr.data.text.streams import name_damaged, open_stream
from moelpr.data.text.tables import open_table, rows_of


def read_documents(path: Path | str, json_key: str = "text", max_documents: int | None = None) -> list[str]:
    """The texts under `json_key` in JSON lines or Parquet, at most `max_documents`; blank lines are skipped.

    Args:
        path: A file, perhaps compressed, a folder, a pattern, or "-" for standard input.

    Raises:
        UserError: A file is missing or damaged, there are no documents, or a line is unusable; the message names it.
    """
    documents: list[str] = []
    for file in find_files([str(path)]):
        [source] = download([open_source(file)])
        with name_damaged(source):
            for place, item in _items(source, json_key):
                if len(documents) == max_documents:
                    return documents
                if not (text := _text(item, json_key, place)):
                    raise UserError(f'{place}: "{json_key}" is empty; remove it')
                documents.append(text)
    if not documents:
        raise UserError(f"{path} contains no documents; pass JSON lines, one object per line, or Parquet")
    return documents


def check_form(path: Path | str, json_key: str) -> None:
    """Raise a UserError unless the first document of a local file has text under the key."""
    source = open_source(str(path))
    with name_damaged(source):
        for place, item in islice(_items(source, json_key), 1):
            _text(item, json_key, place)


def _items(source: Source, json_key: str) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    """Yield the lines or rows, each with its place for messages."""
    if source.form is Form.PARQUET:
        with open_table(source, [json_key]) as file:
            rows = (row for row, _ in rows_of(file, range(file.num_row_groups), [json_key]))
            yield from ((f"{source.path}, row {number}", row) for number, row in enumerate(rows, start=1))
        return
    with open_stream(source) as (stream, _):
        for number, line in enumerate(stream, start=1):
            if not is_blank(line):
                yield f"{source.path}, line {number}", line


def _text(item: bytes | dict[str, Any], json_key: str, place: str) -> str:
    try:
        document = item if isinstance(item, dict) else parse(item, [json_key])
        if json_key not in document:
            columns = ", ".join(document) or "none"
            raise UserError(
                f'{place} has no key "{json_key}" (keys: {columns}); pass the key of the text as --json-key, or in '
                "languages.yaml as json_key"
            )
        return text_of(document, json_key)
    except BadLine as error:
        raise UserError(f"{place}: {error}; correct the line: text is JSON lines or Parquet") from error
