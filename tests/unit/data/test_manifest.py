"""Manifests round-trip, damage is reported, and tokenizers are recognized wherever they were saved."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from moelpr.base.errors import UserError
from moelpr.data import manifest
from moelpr.data.manifest import FileRecord, LanguageCount, Manifest, Source, TokenizerRecord, manifest_path

MANIFEST = Manifest(
    tokenizer=TokenizerRecord("SentencePieceTokenizer", "τ.model", 100, None, False, "sentencepiece:1", "2"),
    append_eod=True,
    sources=[Source("a.jsonl", 10, None, 2), Source("-", None, None, 1)],
    languages={"el": LanguageCount("expanded", 3, 40, 90)},
    documents=3,
    tokens=40,
    skipped_lines=0,
    files={name: FileRecord(80, "ab", "cd") for name in ("bin", "idx", "lang")},
)


def test_manifest_round_trips(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path / "a")
    assert Manifest.read(tmp_path / "a") == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["a.manifest.json"]
    assert Manifest.read(tmp_path / "b") is None


def test_the_file_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """Its format_version comes last, and texts are UTF-8."""
    MANIFEST.write(tmp_path / "a")
    text = manifest_path(tmp_path / "a").read_text("utf-8")
    assert text.endswith(',\n  "format_version": 1\n}\n') and f'"moelpr_version": "{MANIFEST.moelpr_version}"' in text
    assert '"model": "τ.model"' in text and list(json.loads(text))[0] == "tokenizer"


@pytest.mark.parametrize("change", [{"sources": [{"path": "a"}]}, {"tokens": -1}, {"format_version": 2}, {"files": []}])
def test_damaged_manifest_is_reported(change: dict[str, Any], tmp_path: Path) -> None:
    manifest_path(tmp_path / "a").write_text(json.dumps(MANIFEST.as_json() | change))
    with pytest.raises(UserError, match=rf"a\.manifest\.json: {next(iter(change))}.*; rebuild .*, or remove it"):
        Manifest.read(tmp_path / "a")


@pytest.fixture
def long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """200 blocks, the last one partial; 4 of them are a sample."""
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 16)
    monkeypatch.setattr(manifest, "SAMPLED_BLOCKS", 4)
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 12 + bytes(range(120)))
    return tmp_path / "a.bin"


def test_a_sample_reads_other_blocks_at_each_call_and_no_more(long_file: Path) -> None:
    actual = FileRecord.of(long_file)
    assert len(actual.block_crc32) == 8 * 200
    content = long_file.read_bytes()
    noticed = 0
    for _ in range(400):
        assert actual.matches_sample(long_file)
    long_file.write_bytes(content[:400] + bytes(64) + content[464:])  # 4 blocks of 200
    for _ in range(400):
        noticed += not actual.matches_sample(long_file)
    # 1 - (196/200 · 195/199 · 194/198 · 193/197) = 7.8%; the bounds are 5 standard deviations away.
    assert 4 < noticed < 59
    assert not actual.matches(long_file)
    long_file.write_bytes(bytes(len(content)))
    assert not actual.matches_sample(long_file)
    for other in (content[:-1], content + b"a"):
        long_file.write_bytes(other)
        assert not actual.matches_sample(long_file)


def test_every_block_is_sampled_in_time(long_file: Path) -> None:
    actual, content = FileRecord.of(long_file), long_file.read_bytes()
    for start in (0, 1600, len(content) - 1):
        long_file.write_bytes(content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :])
        assert not all(actual.matches_sample(long_file) for _ in range(1000))  # all pass with probability 2e-9


def test_wrong_checksums_of_blocks_are_noticed(long_file: Path) -> None:
    actual = FileRecord.of(long_file)
    for wrong in ("", "x", actual.block_crc32[:-8], actual.block_crc32[8:]):
        assert not dataclasses.replace(actual, block_crc32=wrong).matches(long_file)
