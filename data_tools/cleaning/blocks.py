"""Blocks for datatrove's pipelines: a reader and writers of text, and a filter by identified language.

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import GopherQualityFilter
from data_tools.cleaning.blocks import CorpusWriter, TextReader

flags = "--language-key language --original-languages en --tokenizer-type HuggingFaceTokenizer …".split()
steps = [TextReader(["text/el"]), GopherQualityFilter(), CorpusWriter("data/el", flags)]
LocalPipelineExecutor(steps, tasks=8, logging_dir="logs").run()
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers.base import BaseReader
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.pipeline.writers.parquet import ParquetWriter
from datatrove.utils.typeshelper import StatHints

from data_tools.cleaning.tally import EXAMPLES, Example, Tally, clipped
from data_tools.preprocessing.batches import Batch, FileRange, ReadCursor, Reader
from data_tools.preprocessing.shares import shares_of
from moelpr.languages import canonical
from moelpr.process.errors import UserError
from moelpr.text.documents import BadLine, is_blank, json_type, parse, text_of
from moelpr.text.language_id import UNDETECTED, Detector, FastTextModel
from moelpr.text.sources import Form, find_files, open_source
from moelpr.text.tables import open_table

LANGUAGE = "language"
PARQUET_COLUMNS = (LANGUAGE, "metadata")  # next to that of the text


class TextReader(BaseReader):
    """Reads what `moelpr data preprocess` reads; each task an equal share of the bytes, so large files are split.

    The other keys of a document become its metadata; its language is the canonical code under "language".

    Args:
        inputs: Files, folders and patterns.
        text_key: Key of the text.
        language: Language of all documents.
        language_key: Key of a document's language, which must be there; if None, "language" is used where it is.
        removed: Writes malformed lines (their text as it is) and counts them; if None, the first one is an error.
    """

    name = "moelpr's text"

    def __init__(
        self,
        inputs: Sequence[str],
        text_key: str = "text",
        language: str | None = None,
        language_key: str | None = None,
        removed: DiskWriter | None = None,
    ) -> None:
        super().__init__(text_key=text_key)
        self.language = canonical(language) if language else None
        self.language_key = language_key
        self.removed = removed
        self.sources = [open_source(file, number) for number, file in enumerate(find_files(list(inputs)))]
        self.columns: list[list[str]] = []
        for source in self.sources:
            self.columns.append([])
            if source.form is Form.PARQUET:
                keys = [text_key, *([language_key] if language_key else [])]
                with open_table(source, keys, texts=keys) as file:
                    self.columns[-1] = file.schema_arrow.names

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents of a task's share."""
        yield from data or ()
        with tempfile.TemporaryDirectory() as spool:
            reader = Reader(list(shares_of(self.sources, rank, world_size)), self.columns, None, Path(spool))
            for whole in reader.batches(ReadCursor()):
                for batch in whole.pieces():
                    for index, item in enumerate(batch.items()):
                        line = _bytes_of(item) if isinstance(item, FileRange) else item
                        if isinstance(line, bytes) and is_blank(line):
                            continue
                        try:
                            document = self.document(line)
                        except BadLine as error:
                            if self.removed is None:
                                raise UserError(f"{batch.where(index)}: {error}; fix or remove the line") from None
                            text = line.decode(errors="replace") if isinstance(line, bytes) else str(line)
                            bad = Document(text, batch.where(index), metadata={"filter_reason": str(error)})
                            self.removed.write(bad, rank)
                            continue
                        document.id = _place(batch, index)
                        self.stat_update(StatHints.total)
                        yield document
                whole.discard()
        if self.removed is not None:
            self.removed.close()

    def document(self, item: bytes | dict[str, Any]) -> Document:
        """The document of a line or row; raises `BadLine` if it has no text, or no language where it must have one."""
        key = self.language_key or LANGUAGE
        found = item if isinstance(item, dict) else parse(item, [self.text_key, key])
        text = text_of(found, self.text_key)
        if not text:
            raise BadLine(f'the key "{self.text_key}" is empty')
        metadata = {name: _as_json(value) for name, value in found.items() if name != self.text_key}
        if self.language is not None:
            metadata[LANGUAGE] = self.language
        elif isinstance(metadata.get(key), str):
            metadata[LANGUAGE] = canonical(metadata[key])
        elif self.language_key:
            raise BadLine(f'the language key "{key}" contains {json_type(metadata.get(key))}, not a language')
        else:
            metadata.pop(LANGUAGE, None)
        return Document(text, "", metadata=metadata)


def _place(batch: Batch, index: int) -> str:
    """The file and line, or row, of a document; the lines before a later part of a file are not counted."""
    source, start, _ = batch.share
    if source.form is Form.LINES and start:
        return f"{source.path}, line {index + 1} from byte {start:,}"
    return batch.where(index)


def _as_json(value: Any) -> Any:
    """A value of a table as one of JSON: dates, bytes and decimals become text."""
    return value if value is None or isinstance(value, str | int | float | list | dict) else str(value)


def _bytes_of(line: FileRange) -> bytes:
    with open(line.path, "rb") as file:
        file.seek(line.start)
        return file.read(line.num_bytes)


class LanguageIdentifier(BaseFilter):
    """Writes the identified language into the metadata, and removes documents of other languages than asked for.

    Args:
        identifier: Finds the language of a text.
        languages: Canonical codes to keep; if empty, all.
        checks_stated: Whether to remove documents whose stated language is another than the identified one.
    """

    name = "language identification"

    def __init__(
        self,
        identifier: FastTextModel | Detector,
        languages: Iterable[str] = (),
        checks_stated: bool = False,
        removed: DiskWriter | None = None,
    ) -> None:
        super().__init__(removed)
        self.identifier, self.languages, self.checks_stated = identifier, frozenset(languages), checks_stated

    def filter(self, doc: Document) -> tuple[bool, str | None]:
        stated = doc.metadata.get(LANGUAGE)
        found = doc.metadata[LANGUAGE] = self.identifier.language(doc.text)
        if found == UNDETECTED:
            return False, "uncertain"
        if self.languages and found not in self.languages:
            return False, "other language"
        if self.checks_stated and found != stated:
            return False, f"stated as {stated}"
        return True, None


class _Counted(DiskWriter):
    """A writer that counts what it writes by language, and leaves its counts in `tallies`/RANK.json."""

    def __init__(self, *arguments: Any, tallies: Path, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.tallies, self.tally, self.rank = tallies, Tally(), 0

    def write(self, document: Document, rank: int = 0, **options: Any) -> None:
        self.rank = rank
        language = document.metadata.get(LANGUAGE, UNDETECTED)
        self.tally.add(language, len(document.text))
        if sum(example.language == language for example in self.tally.examples) < EXAMPLES:
            why = document.metadata.get("filter_reason", "")
            if gram := document.metadata.get("contaminated_ngram"):
                why = f'"{gram}" is in {document.metadata["contaminated_task"]}'
            self.tally.examples.append(Example(language, document.id, clipped(document.text), why))
        super().write(document, rank, **options)

    def close(self) -> None:
        super().close()
        if self.tally.languages:
            self.tally.write_file(self.tallies / f"{self.rank:05d}.json")
        self.tally = Tally()


class JsonLines(_Counted, JsonlWriter):
    """Writes FOLDER/RANK.jsonl.zst: the text under its key, and the metadata as the other keys."""

    def __init__(self, folder: Path, tallies: Path, text_key: str = "text") -> None:
        super().__init__(str(folder), compression="zstd", tallies=tallies)
        self.adapter = lambda document: {text_key: document.text} | document.metadata


class Parquet(_Counted, ParquetWriter):
    """Writes FOLDER/RANK.parquet: the text under its key, the language, and the other metadata as JSON."""

    def __init__(self, folder: Path, tallies: Path, text_key: str = "text") -> None:
        import pyarrow

        schema = pyarrow.schema([(name, pyarrow.string()) for name in (text_key, *PARQUET_COLUMNS)])
        super().__init__(str(folder), compression="zstd", schema=schema, max_file_size=-1, tallies=tallies)

        def row(document: Document) -> dict[str, Any]:
            others = {name: value for name, value in document.metadata.items() if name != LANGUAGE}
            values = document.text, document.metadata.get(LANGUAGE), json.dumps(others, ensure_ascii=False, default=str)
            return dict(zip((text_key, *PARQUET_COLUMNS), values, strict=True))

        self.adapter = row


class CorpusWriter(PipelineStep):
    """Tokenizes the documents of a task with `moelpr data preprocess`; `moelpr data merge` joins the corpora.

    Args:
        output_prefix: Task I writes the corpus `output_prefix`-I_text_document.
        flags: Flags of preprocess for tokenizer and language; documents have their language under "language".
    """

    type, name = "writer", "moelpr's corpus"

    def __init__(self, output_prefix: str, flags: Sequence[str]) -> None:
        super().__init__()
        self.output_prefix, self.flags = output_prefix, list(flags)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
            for document in data:
                line = {"text": document.text} | document.metadata
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
                yield document
            file.flush()
            if not os.path.getsize(file.name):
                return
            command = [sys.executable, "-m", "moelpr", "data", "preprocess", "--input", file.name, "--overwrite"]
            command += ["--output-prefix", f"{self.output_prefix}-{rank:05d}", "--workers", "1", *self.flags]
            if (
                done := subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            ).returncode:
                raise UserError(done.stderr.strip().rpartition("error: ")[2])
