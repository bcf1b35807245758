"""The input of a job: the part of its files that it reads, and which documents of them."""

import hashlib
import os
import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.preprocessing.batches import ReadCursor, Reader, Share, shares_of
from data_tools.preprocessing.parsing import DocumentParser, LongDocument
from data_tools.preprocessing.registry import Dataset
from moelpr.base.errors import UserError
from moelpr.data.text.documents import FIX_OR_SKIP, BadLine, is_blank
from moelpr.data.text.sources import Form, Source, download
from moelpr.data.text.streams import BLOCK_BYTES, name_damaged, open_stream
from moelpr.data.text.tables import open_table

_SAMPLE_PLACES = 16
_SAMPLE_CHARACTERS = 1 << 15  # per place


class Inputs:
    """The input of a job.

    Args:
        parser: Reads the texts of the documents.
        shard: Index of the job among `num_shards` that share the files.
        max_samples: Number of documents to sample of each dataset; None for all.

    Attributes:
        sources: All input files.
        shares: The job's part of them.
        notes: Messages for the user.

    Raises:
        UserError: A file can't be read, or has another checksum than the registry states.
    """

    def __init__(
        self,
        datasets: list[Dataset],
        parser: DocumentParser,
        shard: int,
        num_shards: int,
        max_samples: int | None,
        seed: int,
    ) -> None:
        self.sources = [source for dataset in datasets for source in dataset.sources]
        shares = list(shares_of(self.sources, shard, num_shards))
        files = download([share.source for share in shares])
        self.shares = [share._replace(source=file) for share, file in zip(shares, files, strict=True)]
        named = [source for source in self.sources if source.form is not Form.STREAM]
        self.notes = [f"{source.path} is empty" for source in named if not source.bytes]
        self._parser, columns, texts = parser, parser.columns(), parser.text_columns()
        for source, *_ in self.shares:
            _verify_checksum(source)
            if source.form is Form.PARQUET:
                with name_damaged(source), open_table(source, columns[source.dataset], texts[source.dataset]):
                    pass  # it has the columns
        self._chosen: list[NDArray[np.int64]] | None = None
        if max_samples is not None:
            names = [dataset.name for dataset in datasets]
            self._chosen, notes = sample_documents(self.shares, names, max_samples, seed)
            self.notes += notes
        self._states = [
            None if source.form is Form.STREAM or source.uri else _state_of(source) for source in self.sources
        ]

    def reader(self) -> Reader:
        """Return a reader of the job's part."""
        return Reader(self.shares, self._parser.columns(), self._chosen)

    def described(self) -> list[Any]:
        """Return values of JSON that change if a file is changed or replaced."""
        return [_described(*pair) for pair in zip(self.sources, self._states, strict=True)]

    def check_unchanged(self) -> None:
        """Check that the files are those that were there at the start: parts of both would be in the corpus.

        Lines may have been appended to plain JSON lines; they are not read.
        """
        for source, before in zip(self.sources, self._states, strict=True):
            if before is None:
                continue
            now = _state_of(source)
            has_grown = source.form is Form.LINES and now.st_size > before.st_size
            if now.st_ino != before.st_ino or not (has_grown or _described(source, now) == _described(source, before)):
                raise UserError(
                    f"{source.path} has changed while it was read, so the corpus would contain parts of two versions; "
                    "start again when nothing writes it"
                )

    def check_first_documents(self) -> None:
        """Read the first document of each file: what is wrong with all of a file shows before the work starts."""
        for share in self.shares if self._chosen is None else ():
            reader = Reader([share], self._parser.columns(), None)
            batch = None if share.source.form is Form.STREAM else next(reader.batches(ReadCursor()), None)
            for index, item in enumerate(batch.items() if batch else ()):
                try:
                    if self._parser.texts(item, share.source.dataset) is not None:
                        break
                except LongDocument:
                    continue
                except BadLine as error:
                    assert batch is not None
                    raise UserError(f"{batch.where(index)}: {error}; {FIX_OR_SKIP}") from None

    def sample_texts(self) -> list[str]:
        """Return some texts from all over the input, to compare tokenizer libraries on; malformed lines are ignored."""
        texts: list[str] = []
        places = _spread([share for share in self.shares if share.source.form is not Form.STREAM])
        reader = Reader(places, self._parser.columns(), None)
        for index, place in enumerate(places):
            batch = next(reader.batches(ReadCursor(index)), None)
            if batch is None or batch.share.source != place.source:
                continue
            characters = 0
            for item in batch.items():
                try:
                    parsed = self._parser.texts(item, batch.share.source.dataset) or []
                except BadLine:
                    continue
                texts += [text.tagged.text[:_SAMPLE_CHARACTERS] for text in parsed]
                characters += sum(len(text.tagged.text) for text in parsed)
                if characters >= _SAMPLE_CHARACTERS:
                    break
        return texts


def _spread(shares: list[Share]) -> list[Share]:
    """Return places to sample, evenly over the shares' bytes; an archive can be read only from its start."""
    total = sum(share.stop - share.start for share in shares)
    offsets = [total * index // _SAMPLE_PLACES for index in range(_SAMPLE_PLACES)]
    places, begin = [], 0
    for share in shares:
        starts = [share.start + offset - begin for offset in offsets]
        inside = [share._replace(start=start) for start in starts if share.start <= start < share.stop]
        places += inside if share.source.form is Form.LINES else [share] * bool(inside)
        begin += share.stop - share.start
    return places


def sample_documents(
    shares: list[Share], names: list[str], max_samples: int, seed: int
) -> tuple[list[NDArray[np.int64]], list[str]]:
    """Sample `max_samples` documents of each dataset, without replacement.

    Reads every file once to count its documents; memory is needed only for those chosen.

    Args:
        shares: Complete files.
        names: Dataset names; the sample depends only on a dataset's name, its documents and the seed.

    Returns:
        The chosen documents of each share, counted from 0, ascending; and a note for each dataset that has no more.
    """
    counts = [_count_documents(share) for share in shares]
    chosen = [np.zeros(0, np.int64) for _ in shares]
    notes = []
    for dataset, name in enumerate(names):
        members = [index for index, share in enumerate(shares) if share.source.dataset == dataset]
        total = sum(counts[index] for index in members)
        if total <= max_samples:
            label = f"the dataset {name}" if name else "the input"
            notes.append(f"{label} contains {total:,} documents, so --max-samples {max_samples:,} takes all of them")
        sampled = np.sort(random.Random(f"{seed} {name}").sample(range(total), min(max_samples, total)))
        start = 0
        for index in members:
            first, last = np.searchsorted(sampled, [start, start + counts[index]])
            chosen[index] = sampled[first:last] - start
            start += counts[index]
    return chosen, notes


def _count_documents(share: Share) -> int:
    """Count the rows, or the lines that are not blank, of a complete file."""
    with name_damaged(share.source):
        if share.source.form is Form.PARQUET:
            with open_table(share.source, []) as file:
                return int(file.metadata.num_rows)
        with open_stream(share.source) as (stream, _):
            documents, at_line_start = 0, True
            while piece := stream.readline(BLOCK_BYTES):
                documents += at_line_start and not is_blank(piece)
                at_line_start = piece.endswith(b"\n")
            return documents


def _verify_checksum(source: Source) -> None:
    """Compare a file with the SHA-1 that its registry states, if it states one."""
    if source.sha1 is None:
        return
    with open(source.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha1").hexdigest()
    if digest != source.sha1:
        raise UserError(
            f"{source.path} has SHA-1 {digest}, its registry expects {source.sha1}; copy it again or correct file_sha1"
        )


def _state_of(source: Source) -> os.stat_result:
    try:
        return os.stat(source.path)
    except OSError as error:
        raise UserError(f"can't read {source.path} ({error.strerror})") from error


def _described(source: Source, state: os.stat_result | None) -> Any:
    if source.uri:
        return [source.path, source.bytes, source.version]
    return source.path if state is None else [os.path.abspath(source.path), state.st_size, state.st_mtime_ns]
