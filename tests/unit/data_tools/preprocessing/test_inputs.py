"""The corpus is the same whatever form the documents have, damaged files are reported, and samples are fair."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data_tools.corpus import Corpus
from data_tools.preprocessing import inputs
from data_tools.preprocessing.inputs import Form, Share, Source, find_files, open_source, sample_documents, shares_of
from moelpr.errors import UserError

FLAGS = ("--language-key", "lang", "--original-languages", "en,es,zh", "--append-eod")


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


def table(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=7)
    return file.getvalue()


@pytest.fixture
def rows(sentences: dict[str, str]) -> list[dict[str, Any]]:
    names = list(sentences)
    return [{"text": " ".join([sentences[names[i % 5]]] * (i % 4)), "n": i, "lang": names[i % 5]} for i in range(61)]


@pytest.fixture
def expected(rows, write_lines, preprocess, hf_tokenizer, corpus_bytes) -> list[bytes]:
    """The corpus of the rows as plain JSON lines."""
    path = write_lines("plain.jsonl", rows)
    return corpus_bytes(f"{preprocess(hf_tokenizer, '--input', path, *FLAGS, out='plain/a')}_text_document")


@pytest.mark.parametrize(
    "name, pack",
    [
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", zstd),
        ("a.jsonl.bz2", bz2.compress),
        ("a.jsonl.xz", lzma.compress),
        ("two-members.gz", lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:])),
        ("two-frames.zst", lambda data: zstd(data[:1000]) + zstd(data[1000:])),
        ("no-suffix", gzip.compress),
        ("a.parquet", None),
        ("windows.jsonl", lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")),
        ("blank.jsonl", lambda data: b"\n" + data.replace(b"\n", b"\n \t\n").rstrip()),
    ],
)
def test_every_form_gives_the_same_corpus(
    name: str,
    pack: Callable[[bytes], bytes] | None,
    rows,
    expected,
    preprocess,
    hf_tokenizer,
    corpus_bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inputs, "BATCH_BYTES", 1500)
    plain = (tmp_path / "plain.jsonl").read_bytes()
    (tmp_path / name).write_bytes(table(rows) if pack is None else pack(plain))
    prefix = preprocess(hf_tokenizer, "--input", tmp_path / name, *FLAGS, workers=2)
    assert corpus_bytes(f"{prefix}_text_document") == expected


def test_standard_input_gives_the_same_corpus(
    rows, expected, preprocess, hf_tokenizer, corpus_bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "plain.jsonl", "rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        prefix = preprocess(hf_tokenizer, "--input", "-", *FLAGS)
    assert corpus_bytes(f"{prefix}_text_document") == expected


def test_files_of_a_mixed_folder_are_read_by_name(
    rows, expected, preprocess, hf_tokenizer, corpus_bytes, tmp_path: Path
) -> None:
    folder = tmp_path / "crawl"
    (folder / "2").mkdir(parents=True)
    pieces = ["".join(json.dumps(row) + "\n" for row in rows[i : i + 16]).encode() for i in range(0, 61, 16)]
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(pieces[0]))
    (folder / "2" / "a.parquet").write_bytes(table(rows[16:32]))
    (folder / "3.jsonl").write_bytes(pieces[2])
    (folder / "4.json.zst").write_bytes(zstd(pieces[3]))
    for name in ("README.md", "_SUCCESS", ".hidden.jsonl"):
        (folder / name).write_text("not data")
    prefix = preprocess(hf_tokenizer, "--input", folder, *FLAGS)
    assert corpus_bytes(f"{prefix}_text_document") == expected


def test_a_folder_is_read_with_its_links_and_without_what_is_hidden_or_of_a_corpus(tmp_path: Path) -> None:
    """A job may write its corpus, and what is unfinished, into the folder that it reads."""
    folder = tmp_path / "data"
    for name in ("a.jsonl", ".el.unfinished/state.json", ".ipynb_checkpoints/a.jsonl", "el.manifest.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").touch()
    (folder / "part2").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert find_files([str(folder)]) == [f"{folder}/a.jsonl", f"{folder}/part2/b.jsonl"]


def test_of_two_names_of_a_folder_the_first_counts_on_every_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "v1").mkdir(parents=True)
    (tmp_path / "data" / "v1" / "a.jsonl").touch()
    (tmp_path / "data" / "latest").symlink_to("v1")
    walk = os.walk

    def in_another_order(*words: Any, **options: Any) -> Any:
        for path, folders, names in walk(*words, **options):
            folders.sort(reverse=True)
            yield path, folders, names

    found = find_files([str(tmp_path / "data")])
    monkeypatch.setattr(os, "walk", in_another_order)
    assert find_files([str(tmp_path / "data")]) == found == [f"{tmp_path}/data/latest/a.jsonl"]


def test_a_pipe_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    """It was reported as empty, and its text was lost."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is not a file; .*--input -"):
        open_source(str(tmp_path / "pipe"))


def test_names_folders_and_patterns_expand_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.jsonl", "b/1.jsonl", "b/x/3.jsonl.xz", "a[1].jsonl", "c.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert find_files(["c.txt", "b", "a[1].jsonl"]) == [
        "c.txt",
        "b/1.jsonl",
        "b/2.jsonl",
        "b/x/3.jsonl.xz",
        "a[1].jsonl",
    ]
    assert find_files(["**/*.jsonl"]) == ["a[1].jsonl", "b/1.jsonl", "b/2.jsonl"]
    with pytest.raises(UserError, match=r"no file matches --input nothing-\*; check the pattern"):
        find_files(["nothing-*"])


@pytest.mark.parametrize("num_shards", [1, 2, 5, 40])
def test_shards_cover_all_lines_and_every_archive_once(num_shards: int) -> None:
    forms = [Form.LINES, Form.GZIP, Form.LINES, Form.PARQUET, Form.ZSTD]
    sources = [
        Source(f"{index}", form, size) for index, (form, size) in enumerate(zip(forms, (50, 9, 0, 31, 10), strict=True))
    ]
    shares = [share for shard in range(num_shards) for share in shares_of(sources, shard, num_shards)]
    assert [share for share in shares if share.source.form is not Form.LINES] == [
        Share(source, 0, source.bytes) for source in sources if source.form is not Form.LINES
    ]
    plain = [(share.start, share.stop) for share in shares if share.source.path == "0"]
    assert plain[0][0] == 0 and plain[-1][1] == 50
    assert all(stop == start for (_, stop), (start, _) in zip(plain[:-1], plain[1:], strict=True))
    assert [share.source.path for share in shares] == sorted(share.source.path for share in shares)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (
            "a.gz",
            lambda data: gzip.compress(data)[:-20],
            r"a\.gz \(gzip\) is damaged or truncated \(Compressed file ended",
        ),
        ("a.gz", lambda data: gzip.compress(data)[:300] + b"x" * 400, r"a\.gz \(gzip\) is damaged or truncated"),
        ("a.zst", lambda data: zstd(data)[:-20], r"a\.zst \(zstd\) is damaged or truncated"),
        ("a.bz2", lambda data: bz2.compress(data)[:-20], r"a\.bz2 \(bzip2\) is damaged or truncated"),
        ("a.xz", lambda data: lzma.compress(data)[:-20], r"a\.xz \(xz\) is damaged or truncated"),
        (
            "a.parquet",
            lambda data: table([{"text": "a", "lang": "en"}])[:-20],
            r"a\.parquet \(Parquet\) is damaged or truncated",
        ),
        ("a.jsonl", lambda data: data.decode().encode("utf-16"), r"a\.jsonl is UTF-16"),
        ("a.jsonl", lambda data: data + bytes(100), r"a\.jsonl:62: NUL bytes"),
        ("a.json", lambda data: b'[{"text": "a"}]', r"a\.json:1: .* a list"),
    ],
)
def test_damaged_file_stops_the_job_and_leaves_nothing(
    name: str, damage: Callable[[bytes], bytes], message: str, rows, expected, preprocess, hf_tokenizer, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(damage((tmp_path / "plain.jsonl").read_bytes()))
    with pytest.raises(UserError, match=message):
        preprocess(hf_tokenizer, "--input", tmp_path / name, *FLAGS)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_damaged_archive_is_not_skipped(rows, expected, preprocess, hf_tokenizer, tmp_path: Path) -> None:
    """It is unknown how many documents it has lost, so the fraction of malformed lines is unknown too."""
    (tmp_path / "a.gz").write_bytes(gzip.compress((tmp_path / "plain.jsonl").read_bytes())[:-20])
    with pytest.raises(UserError, match=r"a\.gz .* is damaged"):
        preprocess(hf_tokenizer, "--input", tmp_path / "a.gz", *FLAGS, "--on-error", "skip", "--max-bad-share", "1")


def test_empty_file_is_ignored_with_a_note(
    rows, expected, preprocess, hf_tokenizer, corpus_bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty.jsonl.gz").touch()
    prefix = preprocess(hf_tokenizer, "--input", tmp_path / "empty.jsonl.gz", tmp_path / "plain.jsonl", *FLAGS)
    assert corpus_bytes(f"{prefix}_text_document") == expected
    assert "note: " + str(tmp_path / "empty.jsonl.gz") + " is empty" in capsys.readouterr().err


def test_missing_column_is_reported(preprocess, hf_tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(table([{"content": "a", "lang": "en"}]))
    with pytest.raises(UserError, match=r"a\.parquet has no column text; its columns are content, lang"):
        preprocess(hf_tokenizer, "--input", tmp_path / "a.parquet", *FLAGS)


def test_bad_row_is_reported_by_number(preprocess, hf_tokenizer, tmp_path: Path) -> None:
    rows = [{"text": "a", "lang": "en"}] * 20 + [{"text": None, "lang": "en"}]
    (tmp_path / "a.parquet").write_bytes(table(rows))
    with pytest.raises(UserError, match=r'a\.parquet, row 21: the key "text"'):
        preprocess(hf_tokenizer, "--input", tmp_path / "a.parquet", *FLAGS)


def test_a_row_that_is_not_utf_8_is_skipped_alone(preprocess, hf_tokenizer, tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"\xff", "ä".encode()], pyarrow.binary()).view(pyarrow.string())
    rows = pyarrow.table({"text": texts, "lang": ["en"] * 3})
    parquet.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'a\.parquet, row 2: the key "text"'):
        preprocess(hf_tokenizer, "--input", tmp_path / "a.parquet", "--language", "expanded")
    flags = ("--language", "expanded", "--on-error", "skip", "--max-bad-share", "0.5")
    prefix = preprocess(hf_tokenizer, "--input", tmp_path / "a.parquet", *flags)
    assert Corpus(f"{prefix}_text_document").num_documents == 2


def test_lines_before_malformed_ones_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 100 GB with malformed lines in many places would take days."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{number}\n" for number in range(1000)))
    content, read = path.read_bytes(), []
    monkeypatch.setattr(inputs, "open", lambda *words: Counted(open(*words), read), raising=False)
    starts = [0, *(place + 1 for place, byte in enumerate(content) if byte == ord("\n"))]
    assert [inputs._lines_before(str(path), starts[number]) for number in (*range(1, 1001, 9), 500)] == [
        *range(1, 1001, 9),
        500,
    ]
    assert sum(read) < 2 * len(content)


class Counted:
    """A file that appends the length of what is read to a list."""

    def __init__(self, file: Any, read: list[int]) -> None:
        self.file, self.lengths = file, read

    def read(self, *size: int) -> bytes:
        piece = self.file.read(*size)
        self.lengths.append(len(piece))
        return piece

    def __enter__(self) -> "Counted":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_bad_line_of_an_archive_is_reported_by_number(
    rows, expected, preprocess, hf_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "BATCH_BYTES", 500)
    lines = (tmp_path / "plain.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"".join([*lines[:40], b"\n", b"oops\n", *lines[40:]])))
    with pytest.raises(UserError, match=r"a\.gz:42: not JSON"):
        preprocess(hf_tokenizer, "--input", tmp_path / "a.gz", *FLAGS)


BLANK = b"\n \t\r\n" * 100_000


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
    with pytest.raises(UserError, match="blank:400002: not JSON"):
        preprocess(hf_tokenizer, "--input", path, *FLAGS, out="bad/a")


def test_blank_lines_are_not_read_one_by_one(tmp_path: Path) -> None:
    """16 kB of zstd contain 512 million of them, which took minutes."""

    class Counted(io.BufferedReader):
        calls = 0

        def readline(self, size: int | None = -1) -> bytes:
            Counted.calls += 1
            return super().readline(size)

    reader = inputs.Reader([], [], None, tmp_path)
    found = list(reader._lines(Counted(io.BytesIO(BLANK + b"{}\n" + BLANK)), inputs.ReadCursor()))
    assert [(content, line) for content, _, _, line, _ in found] == [(b"{}\n", 200_001)]
    assert Counted.calls < 1000


def test_a_resumed_job_skips_the_blank_lines_it_has_read(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"1\n" + BLANK + b"2\n" + BLANK + b"3\n"))
    reader = inputs.Reader([Share(open_source(str(tmp_path / "a.gz")), 0, 1)], [], None, tmp_path)
    with gzip.open(tmp_path / "a.gz") as stream:
        cursors = [inputs.ReadCursor(0, *item[2:]) for item in reader._lines(stream, inputs.ReadCursor())]
    for index, cursor in enumerate(cursors):
        items = [line for batch in reader.batches(cursor) for line in batch.content]
        assert items == [b"1\n", b"2\n", b"3\n"][index + 1 :]


def test_a_changed_page_of_a_table_is_noticed(preprocess, hf_tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = pyarrow.Table.from_pylist([{"text": "Turn on the light", "lang": "en"}])
    parquet.write_table(
        rows, path, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Turn on the", b"Turn in the", 1))
    with pytest.raises(UserError, match=r"a\.parquet \(Parquet\) is damaged .*CRC"):
        preprocess(hf_tokenizer, "--input", path, *FLAGS)


def test_zstd_cut_at_a_block_is_noticed(preprocess, hf_tokenizer, tmp_path: Path) -> None:
    """The library keeps to the frame's end, also where a block ends: only whole frames can be lost without a trace."""
    lines = b"".join(
        json.dumps({"text": f"{number} {number**7}", "lang": "en"}).encode() + b"\n" for number in range(20_000)
    )
    packed = zstd(lines)
    start, borders = 9 + (not packed[4] & 32), []  # after a header with 4 bytes of content size
    while start < len(packed):
        borders.append(start)
        start += 3 + (int.from_bytes(packed[start : start + 3], "little") >> 3)
    assert start == len(packed) and len(borders) > 2
    for border in borders:
        (tmp_path / "a.zst").write_bytes(packed[:border])
        with pytest.raises(UserError, match=r"a\.zst \(zstd\) is damaged or truncated"):
            preprocess(hf_tokenizer, "--input", tmp_path / "a.zst", *FLAGS)


def test_form_is_detected_by_content(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b"{}"))
    assert open_source(str(tmp_path / "a.jsonl")).form is Form.GZIP
    (tmp_path / "b.gz").write_bytes(b'{"text": "plain"}')
    assert open_source(str(tmp_path / "b.gz")).form is Form.LINES


def test_each_document_has_the_same_chance(write_lines) -> None:
    """Over 2,000 seeds each of 20 documents in two files is drawn 500 times, give or take 5 standard deviations."""
    paths = [write_lines(f"{name}.jsonl", [{"text": "a"}] * count) for name, count in (("a", 12), ("b", 8))]
    sources = [open_source(str(path)) for path in paths]
    shares = [Share(source, 0, source.bytes) for source in sources]
    times: Counter[int] = Counter()
    for seed in range(2000):
        [first, second], notes = sample_documents(shares, ["name"], 5, seed)
        assert notes == [] and len(first) + len(second) == 5
        times.update([*first.tolist(), *(12 + second).tolist()])
    assert set(times) == set(range(20))
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in times.values())
