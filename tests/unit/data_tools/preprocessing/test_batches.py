"""Lines and rows are counted, found again by a resumed job, and named where they are malformed."""

import bz2
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_tools.corpus.corpus import Corpus
from data_tools.preprocessing import batches, inputs, parsing
from data_tools.preprocessing.batches import Batch, LongLine, ReadCursor, Reader, Share, shares_of
from data_tools.preprocessing.inputs import sample_documents
from moelpr.base.errors import UserError
from moelpr.data.manifest import Manifest
from moelpr.data.text.sources import Form, Source, open_source
from tests.support.packed_files import zstd

FLAGS = ("--language-key", "lang", "--original-languages", "en,es,zh", "--append-eod")


def test_empty_file_is_ignored_with_a_note(rows, expected, preprocess, hf_tokenizer, corpus_bytes, tmp_path, capsys):
    (tmp_path / "empty.jsonl.gz").touch()
    prefix = preprocess(hf_tokenizer, "--input", tmp_path / "empty.jsonl.gz", tmp_path / "plain.jsonl", *FLAGS)
    assert corpus_bytes(f"{prefix}_text_document") == expected
    assert "note: " + str(tmp_path / "empty.jsonl.gz") + " is empty" in capsys.readouterr().err


@pytest.mark.parametrize("num_shards", [1, 2, 5, 40])
def test_shards_cover_all_lines_and_every_archive_once(num_shards: int) -> None:
    forms = [Form.LINES, Form.GZIP, Form.LINES, Form.PARQUET, Form.ZSTD]
    sources = [
        Source(f"{index}", form, size) for index, (form, size) in enumerate(zip(forms, (50, 9, 0, 31, 10), strict=True))
    ]
    shares = [share for shard in range(num_shards) for share in shares_of(sources, shard, num_shards)]
    archives = [source for source in sources if source.form in (Form.GZIP, Form.ZSTD)]
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
def test_long_documents_are_left_out_and_counted(
    form, flags, preprocess, hf_tokenizer, corpus_bytes, write_lines, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Also as the first and the last document, side by side, and although malformed lines stop the job."""
    monkeypatch.setattr(batches, "BATCH_BYTES", 300)
    for module in (batches, parsing):
        monkeypatch.setattr(module, "DOCUMENT_BYTES", 1000)
    long = {"text": "a long text " * 200}
    rows = [long, {"text": "one"}, {"text": "two " * 200}, long, long, {"text": "three"}, long]
    short = write_lines("short.jsonl", [row for row in rows if row is not long])
    path = tmp_path / f"a.{form}"
    content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    if form == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(content) if form == "jsonl.gz" else content)
    expected = preprocess(hf_tokenizer, "--input", short, "--language", "original", out="short/a")
    if flags:
        monkeypatch.setattr(inputs, "sample_documents", lambda *_: ([np.array([0, 1, 2, 5, 6])], []))
    prefix = preprocess(hf_tokenizer, "--input", path, "--language", "original", *flags, workers=2)
    assert corpus_bytes(f"{prefix}_text_document") == corpus_bytes(f"{expected}_text_document")
    numbers = [1, 7] if flags else [1, 4, 5, 7]
    places = [f"{path}, row {number}" if form == "parquet" else f"{path}:{number}" for number in numbers]
    listed = Path(f"{prefix}.skipped.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in listed] == places
    assert Manifest.read(f"{prefix}_text_document").skipped_lines == len(numbers)
    assert f"{len(numbers)} lines were skipped" in capsys.readouterr().err
    only = write_lines("only.jsonl", [long])
    with pytest.raises(UserError, match=r"1 lines were skipped .*only.jsonl:1: a document of 2,413 bytes"):
        preprocess(hf_tokenizer, "--input", only, "--language", "original", out="only/a")


@pytest.mark.parametrize("kept", [1000, 999])
def test_a_file_that_becomes_shorter_while_it_is_read_ends_the_job(tmp_path, monkeypatch, kept) -> None:
    """Lines of 10 bytes; it was read in a loop without an end."""
    monkeypatch.setattr("data_tools.preprocessing.batches.BATCH_BYTES", 500)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"123456789\n" * 200)
    source = open_source(str(path))
    batches = Reader([Share(source, 0, 2000)], [[]], None).batches(ReadCursor())
    assert next(batches).num_bytes == 500
    os.truncate(path, kept)
    with pytest.raises(UserError, match="shorter than when the job started"):
        list(batches)


@pytest.mark.parametrize("change", ["rewritten", "replaced", "appended"])
def test_a_file_that_changes_while_it_is_read_gives_no_corpus_unless_lines_are_appended(
    preprocess, hf_tokenizer, write_lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
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
        prefix = preprocess(hf_tokenizer, *flags)
        assert Corpus(f"{prefix}_text_document").num_documents == 10
        return
    with pytest.raises(UserError, match=r"a\.jsonl has changed while it was read"):
        preprocess(hf_tokenizer, *flags)
    assert not list((tmp_path / "out").glob("*.idx"))


def test_a_line_with_only_a_byte_order_mark_is_blank(preprocess, hf_tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf\r\n{"text": "a"}\n\xef\xbb\xbf')
    for flags in ((), ("--max-samples", "1")):
        prefix = preprocess(
            hf_tokenizer, "--input", tmp_path / "a.jsonl", "--language", "expanded", *flags, "--overwrite"
        )
        assert Corpus(f"{prefix}_text_document").num_documents == 1


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


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd, bz2.compress, lzma.compress])
def test_lines_after_many_blank_ones_are_found_and_counted(
    pack: Callable[[bytes], bytes], rows, expected, preprocess, hf_tokenizer, corpus_bytes, tmp_path: Path
) -> None:
    plain = (tmp_path / "plain.jsonl").read_bytes()
    middle = plain.index(b"\n") + 1
    path = tmp_path / "blank"
    path.write_bytes(pack(BLANK + plain[:middle] + BLANK + plain[middle:] + BLANK))
    prefix = preprocess(hf_tokenizer, "--input", path, *FLAGS)
    assert corpus_bytes(f"{prefix}_text_document") == expected
    source = open_source(str(path))
    chosen, _ = sample_documents([Share(source, 0, source.bytes)], [""], 61, 0)
    assert chosen[0].tolist() == list(range(61))
    path.write_bytes(pack(BLANK + plain[:middle] + BLANK + b"oops\n"))
    with pytest.raises(UserError, match="blank:4002: not JSON"):
        preprocess(hf_tokenizer, "--input", path, *FLAGS, out="bad/a")


def test_a_resumed_job_skips_the_blank_lines_it_has_read(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"1\n" + BLANK + b"2\n" + BLANK + b"3\n"))
    reader = Reader([Share(open_source(str(tmp_path / "a.gz")), 0, 1)], [], None)
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
    reader = Reader([Share(source, 0, source.bytes)], [["text"]], None)
    rest = [row["text"] for batch in reader.batches(ReadCursor(0, 20, 20, 20)) for row in batch.items()]
    assert rest == texts[20:]


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    """pandas writes a million rows into one; without a buffer, all of its text was in memory."""
    content = os.urandom(12_000_000).hex()
    texts = [content[start : start + 2400] for start in range(0, len(content), 2400)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False)
    del content, texts
    before = pyarrow.total_allocated_bytes()
    largest = 0
    source = open_source(str(tmp_path / "a.parquet"))
    for batch in Reader([Share(source, 0, source.bytes)], [["text"]], None).batches(ReadCursor()):
        assert not isinstance(batch.content, batches.RowGroups)
        largest = max(largest, pyarrow.total_allocated_bytes() - before)
    assert 0 < largest < 8_000_000
