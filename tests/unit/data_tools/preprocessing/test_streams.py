"""The corpus is the same whatever form the documents have, and damaged files are reported."""

import bz2
import gzip
import io
import json
import lzma
import sys
from pathlib import Path

import pytest

from data_tools.preprocessing import batches
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
    name, pack, rows, expected, preprocess, hf_tokenizer, corpus_bytes, tmp_path, monkeypatch
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
