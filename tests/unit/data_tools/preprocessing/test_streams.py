"""The corpus is the same whatever form the documents have, and damaged files are reported."""

import bz2
import gzip
import io
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
