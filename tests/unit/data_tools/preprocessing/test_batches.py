"""Lines and rows are counted, found again by a resumed job, and named where they are malformed."""

import bz2
import gzip
import io
import json
import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_tools.preprocessing import batches, inputs, parsing
from data_tools.preprocessing.batches import Batch, LongLine, ReadCursor, Reader, Share, shares_of
from data_tools.preprocessing.inputs import sample_documents
from moelpr.base.errors import UserError
from moelpr.data.text.sources import Form, Source, open_source
from tests.support.packed_files import PACK, zstd
from tests.unit.data_tools.preprocessing.conftest import FLAGS

ONE = ("--language", "original")


def reader_of(path: Path | str, *columns: str) -> Reader:
    source = open_source(str(path))
    return Reader([Share(source, 0, source.bytes)], [[*columns]], None)


def test_empty_file_is_ignored_with_a_note(plain: Path, expected, preprocess, tmp_path, capsys) -> None:
    (empty := tmp_path / "empty.jsonl.gz").touch()
    assert preprocess("--input", empty, plain, *FLAGS).content() == expected
    assert f"note: {empty} is empty" in capsys.readouterr().err


@pytest.mark.parametrize("num_shards", [1, 2, 5, 40])
def test_shards_cover_all_lines_and_every_archive_once(num_shards: int) -> None:
    sizes = [(Form.LINES, 50), (Form.GZIP, 9), (Form.LINES, 0), (Form.PARQUET, 31), (Form.ZSTD, 10)]
    sources = [Source(f"{index}", *form_and_size) for index, form_and_size in enumerate(sizes)]
    shares = [share for shard in range(num_shards) for share in shares_of(sources, shard, num_shards)]
    archives = [sources[1], sources[4]]
    assert [share for share in shares if share.source in archives] == [Share(file, 0, file.bytes) for file in archives]
    for name, size in (("0", 50), ("3", 31)):
        split = [(share.start, share.stop) for share in shares if share.source.path == name]
        assert split[0][0] == 0 and split[-1][1] == size
        assert all(stop == start for (_, stop), (start, _) in zip(split[:-1], split[1:], strict=True))
    assert [share.source.path for share in shares] == sorted(share.source.path for share in shares)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.integers(0, 150), min_size=1, max_size=30), has_end=st.booleans(), shards=st.integers(1, 3))
def test_lines_are_read_from_any_place(lines, has_end, shards, tmp_path, monkeypatch) -> None:
    """Lines shorter and longer than a batch, and too long for a document."""
    monkeypatch.setattr(batches, "BATCH_BYTES", 40)
    monkeypatch.setattr(batches, "DOCUMENT_BYTES", 100)
    expected = [bytes([97 + number % 26]) * length for number, length in enumerate(lines)] + [b"end"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(expected) + b"\n" * has_end)
    source = Source(str(path), Form.LINES, path.stat().st_size)
    actual: list[object] = []
    for shard in range(shards):
        shares = list(shares_of([source], shard, shards))
        reader = Reader(shares, [[]], None)
        read = [batch for batch in reader.batches(ReadCursor())]
        items = [item for batch in read for item in batch.items()]
        done = 0
        for batch in read:
            done += len([*batch.items()])
            assert [item for later in reader.batches(batch.after) for item in later.items()] == items[done:]
        actual += items
    sizes = [len(line) + (number + 1 < len(expected) or has_end) for number, line in enumerate(expected)]
    pairs = zip(expected, sizes, strict=True)
    assert actual == [LongLine(size) if size > 100 else line for line, size in pairs]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("flags", [(), ("--max-samples", "5")])
def test_long_documents_are_left_out_and_counted(form, flags, preprocess, tmp_path, monkeypatch, capsys) -> None:
    """Also as the first and the last document, side by side, and although malformed lines stop the job."""
    monkeypatch.setattr(batches, "BATCH_BYTES", 300)
    for module in (batches, parsing):
        monkeypatch.setattr(module, "DOCUMENT_BYTES", 1000)
    long = {"text": "a long text " * 200}
    rows = [long, {"text": "one"}, {"text": "two " * 200}, long, long, {"text": "three"}, long]
    path = tmp_path / f"a.{form}"
    path.write_bytes(PACK[form]("".join(f"{json.dumps(row)}\n" for row in rows).encode()))
    expected = preprocess([row for row in rows if row is not long], *ONE, out="short/a").content()
    if flags:
        monkeypatch.setattr(inputs, "sample_documents", lambda *_: ([np.array([0, 1, 2, 5, 6])], []))
    made = preprocess("--input", path, *ONE, *flags, workers=2)
    assert made.content() == expected
    numbers = [1, 7] if flags else [1, 4, 5, 7]
    places = [f"{path}, row {number}" if form == "parquet" else f"{path}:{number}" for number in numbers]
    listed = Path(f"{made.prefix}.skipped.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in listed] == places
    assert made.manifest().skipped_lines == len(numbers)
    assert f"{len(numbers)} lines were skipped" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"1 lines were skipped .*lines.jsonl:1: a document of 2,413 bytes"):
        preprocess([long], *ONE, out="only/a")


@pytest.mark.parametrize("kept", [1000, 999])
def test_a_file_that_becomes_shorter_while_it_is_read_ends_the_job(tmp_path, monkeypatch, kept) -> None:
    """Lines of 10 bytes; it was read in a loop without an end."""
    monkeypatch.setattr(batches, "BATCH_BYTES", 500)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"123456789\n" * 200)
    read = reader_of(path).batches(ReadCursor())
    assert next(read).num_bytes == 500
    os.truncate(path, kept)
    with pytest.raises(UserError, match="shorter than when the job started"):
        list(read)


@pytest.mark.parametrize("change", ["rewritten", "replaced", "appended"])
def test_only_appended_lines_may_change_a_file_while_it_is_read(change, preprocess, write_lines, monkeypatch) -> None:
    path = write_lines("a.jsonl", [{"text": "a"}] * 10)
    batches, new = Reader.batches, write_lines("new.jsonl", [{"text": "a"}] * 11)

    def changing(self: Reader, cursor: ReadCursor) -> Iterator[Batch]:
        yield from batches(self, cursor)
        if change == "appended":
            with path.open("a") as file:
                file.write('{"text": "b"}\n')
        elif change == "rewritten":
            path.write_text(path.read_text().replace('"a"', '"b"'))
        elif new.exists():
            new.replace(path)

    flags = ("--input", path, "--language", "expanded", "--tokenizer-backend", "reference")  # read once
    monkeypatch.setattr(Reader, "batches", changing)
    if change == "appended":
        assert preprocess(*flags).corpus().num_documents == 10
        return
    with pytest.raises(UserError, match=r"a\.jsonl has changed while it was read"):
        preprocess(*flags)
    assert not list(path.parent.glob("out/*.idx"))


def test_a_line_with_only_a_byte_order_mark_is_blank(preprocess, tmp_path: Path) -> None:
    (path := tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf\r\n{"text": "a"}\n\xef\xbb\xbf')
    for flags in ((), ("--max-samples", "1")):
        assert preprocess("--input", path, *ONE, *flags, "--overwrite").corpus().num_documents == 1


def test_lines_before_malformed_ones_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 100 GB with malformed lines in many places would take days."""
    path, read = tmp_path / "a.jsonl", []
    path.write_text("".join(f"{number}\n" for number in range(1000)))

    class Counted(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            read.append(piece := super().read(size))
            return piece

    monkeypatch.setattr(batches, "open", lambda name, mode: Counted(io.FileIO(name)), raising=False)
    content, numbers = path.read_bytes(), [*range(1, 1001, 9), 500]
    starts = [0, *(place + 1 for place, byte in enumerate(content) if byte == ord("\n"))]
    assert [batches._lines_before(str(path), starts[number]) for number in numbers] == numbers
    assert 0 < len(b"".join(read)) < 2 * len(content)


BLANK = b"\n \t\r\n" * 1000


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd, bz2.compress])
def test_lines_after_many_blank_ones_are_found_and_counted(pack, plain: Path, expected, preprocess, tmp_path) -> None:
    first, *others = plain.read_bytes().splitlines(keepends=True)
    (path := tmp_path / "blank").write_bytes(pack(BLANK + first + BLANK + b"".join(others) + BLANK))
    assert preprocess("--input", path, *FLAGS).content() == expected
    source = open_source(str(path))
    chosen, _ = sample_documents([Share(source, 0, source.bytes)], [""], 61, 0)
    assert chosen[0].tolist() == list(range(61))
    path.write_bytes(pack(BLANK + first + BLANK + b"oops\n"))
    with pytest.raises(UserError, match="blank:4002: not JSON"):
        preprocess("--input", path, *FLAGS, out="bad/a")


def test_a_resumed_job_skips_the_blank_lines_it_has_read(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"1\n" + BLANK + b"2\n" + BLANK + b"3\n"))
    reader = reader_of(tmp_path / "a.gz")
    with gzip.open(tmp_path / "a.gz") as stream:
        cursors = [ReadCursor(0, *item[2:]) for item in reader._lines(stream, ReadCursor())]
    for index, cursor in enumerate(cursors):
        items = [line for batch in reader.batches(cursor) for line in batch.content]
        assert items == [b"1\n", b"2\n", b"3\n"][index + 1 :]


@pytest.mark.parametrize("largest", [0, 2000, 1 << 24], ids=["none", "some", "all"])
@pytest.mark.parametrize("num_shards", [1, 2, 5, 30])
def test_row_groups_are_read_once_by_any_number_of_shards_and_from_every_cursor(
    largest: int, num_shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether workers read them, as named by the main process, or the latter because they are large."""
    monkeypatch.setattr(batches, "ROW_GROUP_BYTES", largest)
    monkeypatch.setattr(batches, "BATCH_BYTES", 900)
    sizes = [1, 40, 0, 7, 7, 90, 3, 1, 1, 30, 64, 65]
    texts = [f"{number} " * (number % 17) for number in range(sum(sizes))]
    schema = pyarrow.schema([("n", pyarrow.int64()), ("text", pyarrow.string())])
    with parquet.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for size, stop in zip(sizes, accumulate(sizes), strict=True):
            numbers = range(stop - size, stop)
            rows = [{"n": number, "text": texts[number]} for number in numbers]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema), row_group_size=max(size, 1))
    source = open_source(str(tmp_path / "a.parquet"))
    actual, num_read, file_bytes = [], 0, 0
    for shard in range(num_shards):
        reader = Reader(list(shares_of([source], shard, num_shards)), [["text"]], None)
        whole = list(reader.batches(ReadCursor()))
        for index, batch in enumerate(whole):
            rows = [row["text"] for piece in batch.pieces() for row in piece.items()]
            assert rows == [row["text"] for row in batch.items()]
            places = [piece.where(i) for piece in batch.pieces() for i, _ in enumerate(piece.items())]
            assert places == [f"{source.path}, row {len(actual) + 1 + i}" for i in range(len(rows))]
            assert places == [batch.where(i) for i in range(len(rows))]
            actual += rows
            num_read += sum(1 for _ in batch.pieces())
            assert [other.after for other in reader.batches(batch.after)] == [b.after for b in whole[index + 1 :]]
        file_bytes += sum(batch.file_bytes for batch in whole)
    assert actual == texts
    assert num_read >= 8
    assert abs(file_bytes - source.bytes) <= num_shards * len(sizes)
    # A cursor in the midst of a row group, as a job has left it that had read it by rows.
    left = reader_of(source.path, "text").batches(ReadCursor(0, 20, 20, 20))
    rest = [row["text"] for batch in left for row in batch.items()]
    assert rest == texts[20:]


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    """pandas writes a million rows into one; without a buffer, all of its text was in memory."""
    content = os.urandom(12_000_000).hex()
    texts = [content[start : start + 2400] for start in range(0, len(content), 2400)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False)
    del content, texts
    before = pyarrow.total_allocated_bytes()
    largest = 0
    for batch in reader_of(tmp_path / "a.parquet", "text").batches(ReadCursor()):
        assert not isinstance(batch.content, batches.RowGroups)
        largest = max(largest, pyarrow.total_allocated_bytes() - before)
    assert 0 < largest < 8_000_000
