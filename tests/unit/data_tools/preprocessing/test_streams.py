"""The corpus is the same whatever form the documents have, and damaged files are reported."""

import bz2
import gzip
import io
import json
import sys

import pytest

from data_tools.preprocessing import batches
from tests.support.packed_files import PACK, parquet_table, zstd
from tests.unit.data_tools.preprocessing.conftest import FLAGS


@pytest.mark.parametrize(
    "name, pack",
    [
        *((f"a.{suffix}", pack) for suffix, pack in PACK.items() if suffix != "parquet"),
        ("two-members.gz", lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:])),
        ("two-frames.zst", lambda data: zstd(data[:1000]) + zstd(data[1000:])),
        ("streams.bz2", lambda data: bz2.compress(data[:1000]) + bz2.compress(data[1000:])),
        ("no-suffix", gzip.compress),
        ("a.parquet", lambda data: parquet_table(list(map(json.loads, data.splitlines())))),
        ("windows.jsonl", lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")),
        ("blank.jsonl", lambda data: b"\n" + data.replace(b"\n", b"\n \t\n").rstrip()),
        ("-", bytes),
    ],
)
def test_every_form_gives_the_same_corpus(name, pack, plain, expected, preprocess, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(batches, "BATCH_BYTES", 1500)
    (tmp_path / name).write_bytes(pack(plain.read_bytes()))
    with open(tmp_path / name, "rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        made = preprocess("--input", "-" if name == "-" else tmp_path / name, *FLAGS, workers=2)
    assert made.content() == expected
