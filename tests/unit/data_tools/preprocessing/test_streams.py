"""The corpus is the same whatever form the documents have, and damaged files are reported."""

import bz2
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.preprocessing import batches
from moelpr.base.errors import UserError
from tests.support.packed_files import parquet_table, zstd

FLAGS = ("--language-key", "lang", "--original-languages", "en,es,zh", "--append-eod")


@pytest.mark.parametrize(
    "name, pack",
    [
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", zstd),
        ("a.jsonl.bz2", bz2.compress),
        ("a.jsonl.xz", lzma.compress),
        ("two-members.gz", lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:])),
        ("two-frames.zst", lambda data: zstd(data[:1000]) + zstd(data[1000:])),
        ("streams.bz2", lambda data: bz2.compress(data[:1000]) + bz2.compress(data[1000:])),
        ("streams.xz", lambda data: lzma.compress(data[:1000]) + bytes(8) + lzma.compress(data[1000:]) + bytes(4)),
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
    monkeypatch.setattr(batches, "BATCH_BYTES", 1500)
    plain = (tmp_path / "plain.jsonl").read_bytes()
    (tmp_path / name).write_bytes(parquet_table(rows) if pack is None else pack(plain))
    prefix = preprocess(hf_tokenizer, "--input", tmp_path / name, *FLAGS, workers=2)
    assert corpus_bytes(f"{prefix}_text_document") == expected


def test_standard_input_gives_the_same_corpus(
    rows, expected, preprocess, hf_tokenizer, corpus_bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "plain.jsonl", "rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        prefix = preprocess(hf_tokenizer, "--input", "-", *FLAGS)
    assert corpus_bytes(f"{prefix}_text_document") == expected


def test_files_of_a_mixed_folder_are_read_by_name(rows, expected, preprocess, hf_tokenizer, corpus_bytes, tmp_path):
    folder = tmp_path / "crawl"
    (folder / "2").mkdir(parents=True)
    pieces = ["".join(json.dumps(row) + "\n" for row in rows[i : i + 16]).encode() for i in range(0, 61, 16)]
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(pieces[0]))
    (folder / "2" / "a.parquet").write_bytes(parquet_table(rows[16:32]))
    (folder / "3.jsonl").write_bytes(pieces[2])
    (folder / "4.json.zst").write_bytes(zstd(pieces[3]))
    for name in ("README.md", "_SUCCESS", ".hidden.jsonl"):
        (folder / name).write_text("not data")
    prefix = preprocess(hf_tokenizer, "--input", folder, *FLAGS)
    assert corpus_bytes(f"{prefix}_text_document") == expected


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
        ("a.bz2", lambda data: bz2.compress(data) + b"BZx" + bz2.compress(data)[3:], r"a\.bz2 \(bzip2\) is damaged"),
        ("a.xz", lambda data: lzma.compress(data) + gzip.compress(data), r"a\.xz \(xz\) is damaged"),
        (
            "a.parquet",
            lambda data: parquet_table([{"text": "a", "lang": "en"}])[:-20],
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
