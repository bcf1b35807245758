"""Estimates are near the truth for every form of file, and cost as little for much text as for little."""

import gzip
import json
import random
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from moelpr.base.errors import UserError
from moelpr.data.text import estimate as estimates
from moelpr.data.text.estimate import estimate
from tests.support.packed_files import PACK, parquet_table

TOKENS = 90  # the average of a document


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose tokens are words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def documents(count: int) -> list[dict[str, str]]:
    """Documents of very different lengths, in words of different lengths."""
    choice = random.Random(0)

    def text() -> str:
        number = min(int(choice.expovariate(1 / TOKENS)) + 1, 2000)
        return " ".join(format(choice.getrandbits(choice.choice((12, 30, 60))), "x") for _ in range(number))

    return [{"id": f"{number}", "text": text()} for number in range(count)]


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("count", [40, 10_000])
def test_documents_and_tokens_are_near_the_truth(suffix: str, count: int, tokenizer: Path, tmp_path: Path) -> None:
    rows = documents(count)
    size = 0
    for part in range(2):
        size += (tmp_path / f"{part}.{suffix}").write_bytes(PACK[suffix](lines(rows[part::2])))
    actual = estimate([tmp_path], "text", tokenizer)
    tokens = sum(len(row["text"].split()) + 1 for row in rows)
    assert (actual.files, actual.bytes) == (2, size)
    assert actual.documents == pytest.approx(count, rel=0.15)
    assert actual.tokens == pytest.approx(tokens, rel=0.15)


def test_much_text_takes_no_longer_than_little(tokenizer: Path, tmp_path: Path) -> None:
    """Sparse files of 100 GB: one line without an end each."""
    for number in range(20):
        with open(tmp_path / f"{number}.jsonl", "wb") as file:
            file.truncate(5 << 30)
    (tmp_path / "a.jsonl").write_bytes(lines(documents(1000)))
    started = time.process_time()
    with pytest.raises(UserError, match="contains no documents"):
        estimate([tmp_path], "text", tokenizer)
    assert time.process_time() - started < 4


def test_text_that_is_missing_empty_or_unreadable_is_one_sentence(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    cut = gzip.compress(lines(documents(3)))[:-9]
    for name, content, message in (
        ("missing.jsonl", None, "missing.jsonl can't be read"),
        ("empty.jsonl", b"", 'empty.jsonl contains no documents with text under "text"'),
        ("blank.jsonl", b"\n\n", "blank.jsonl contains no documents"),
        ("cut.jsonl.gz", cut, "cut.jsonl.gz .gzip. is damaged"),
        ("other.parquet", parquet_table([{"body": "a"}]), "other.parquet has no column text; its columns are body"),
        ("folder", None, "the folder .*folder contains no"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            estimate([tmp_path / name], "text", tokenizer)
    with pytest.raises(UserError, match="folder has neither tokenizer.json nor tokenizer.model"):
        estimate([tmp_path / "blank.jsonl"], "text", tmp_path / "folder")
    (tmp_path / "folder" / "tokenizer.json").write_text("")
    with pytest.raises(UserError, match="tokenizer.json is no tokenizer .*; download it again"):
        estimate([tmp_path / "blank.jsonl"], "text", tmp_path / "folder")


def test_the_first_places_are_spread_over_all_files(tmp_path: Path) -> None:
    """Time may end before the last place."""
    (tmp_path / "a").write_bytes(bytes(100))
    (tmp_path / "b").write_bytes(bytes(300))
    sources = [estimates.open_source(str(tmp_path / name)) for name in "ab"]
    actual = [start + 100 * source.path.endswith("b") for source, start in estimates._spread(sources, 400)]
    assert sorted(actual) == [400 * (2 * index + 1) // 48 for index in range(24)]
    for first in (6, 12):
        borders = [0, *sorted(actual[:first]), 400]
        assert max(b - a for a, b in zip(borders[:-1], borders[1:], strict=True)) < 150
