"""The published code's registry (dataset_info.json), and sampling documents from its datasets."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.preprocessing import batches, job
from moelpr.base.errors import UserError
from tests.unit.data_tools.preprocessing.conftest import stop_after


@pytest.fixture
def registry(write_lines, tmp_path: Path) -> Path:
    """Four datasets: one with its checksum, a compressed one, a folder, and one without a language."""
    hu = write_lines("data/hu.jsonl", [{"text": f"magyar szöveg {i}"} for i in range(40)])
    el = write_lines("data/el.jsonl", [{"content": f"ελληνικό κείμενο {i}"} for i in range(30)])
    (tmp_path / "data/el.jsonl.gz").write_bytes(gzip.compress(el.read_bytes()))
    for part in range(3):
        write_lines(f"data/en/{part}.jsonl", [{"text": f"English text {part} {i}"} for i in range(20)])
    sha1 = hashlib.sha1(hu.read_bytes()).hexdigest()
    entries: dict[str, Any] = {
        "hu_1b": {"file_name": "hu.jsonl", "file_sha1": sha1, "language": "new", "columns": {"prompt": "text"}},
        "el8b": {"file_name": "el.jsonl.gz", "language": "expanded", "columns": {"prompt": "content"}},
        "en": {"file_name": "en", "language": "old"},
        "hub": {"hf_hub_url": "someone/something", "language": "old"},
        "no_language": {"file_name": "hu.jsonl"},
    }
    path = tmp_path / "data/dataset_info.json"
    path.write_text(json.dumps(entries))
    return path


def change(registry: Path, name: str, **words: Any) -> None:
    entries = json.loads(registry.read_text())
    entries[name].update(words)
    registry.write_text(json.dumps(entries))


def test_a_job_is_not_resumed_with_another_language_of_a_dataset(registry, preprocess, monkeypatch) -> None:
    """Otherwise the first part of a corpus would have one bit, and the rest the other."""
    monkeypatch.setattr(job, "SAVE_EVERY_S", 0)
    monkeypatch.setattr(batches, "BATCH_BYTES", 200)
    words = ("--dataset-info", registry, "--dataset", "hu_1b", "--resume")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_after(patched, 1, KeyboardInterrupt)
        preprocess(*words)
    change(registry, "hu_1b", language="old")
    with pytest.raises(UserError, match="different entries of --dataset-info"):
        preprocess(*words)


def test_datasets_are_read_in_order_with_their_languages_and_keys(registry: Path, preprocess) -> None:
    made = preprocess("--dataset-info", registry, "--dataset", "en,hu_1b,el8b")
    corpus, manifest = made.corpus(), made.manifest()
    assert corpus.num_documents == 60 + 40 + 30
    assert [int(corpus.document(index)[1].min()) for index in (0, 59, 60, 99, 100)] == [1, 1, 0, 0, 0]
    counts = {name: (count.bit, count.documents) for name, count in manifest.languages.items()}
    assert counts == {"en": ("original", 60), "hu_1b": ("expanded", 40), "el8b": ("expanded", 30)}
    names = [(Path(source.path).name, bool(source.sha1)) for source in manifest.sources]
    assert names == [*((f"{part}.jsonl", False) for part in range(3)), ("hu.jsonl", True), ("el.jsonl.gz", False)]


def test_files_may_be_in_another_folder_than_the_registry(registry, preprocess, tmp_path) -> None:
    flags = ("--dataset-dir", tmp_path / "data", "--dataset", "hu_1b")
    beside = preprocess(*flags, out="beside/a")
    registry.rename(tmp_path / "registry.json")
    moved = preprocess("--dataset-info", tmp_path / "registry.json", *flags)
    assert [made.corpus().num_documents for made in (beside, moved)] == [40, 40]


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("hu1b", {}, "dataset hu1b; .*hu_1b"),
        ("hub", {}, r"the dataset hub in .*: file_name is missing"),
        ("hu_1b", {"language": "hu"}, "language should be 'old', .* got 'hu'"),
        ("hu_1b", {"file_name": "gone.jsonl"}, r"gone\.jsonl does not exist"),
        ("en", {"file_sha1": "0" * 40}, "remove file_sha1"),
        ("hu_1b,hu_1b", {}, "names a dataset twice"),
        ("el8b,hu_1b", {"file_sha1": "0" * 40}, r"hu\.jsonl has SHA-1 [0-9a-f]{40}, .* 0{40}"),
    ],
)
def test_unusable_entry_is_reported(name, changes, message, registry, preprocess, tmp_path) -> None:
    if changes:
        change(registry, name.rpartition(",")[2], **changes)
    with pytest.raises(UserError, match=message):
        preprocess("--dataset-info", registry, "--dataset", name)
    assert not (tmp_path / "out").exists()


def test_max_samples_applies_to_each_dataset(registry, preprocess, capsys) -> None:
    def drawn(out: str, seed: int) -> tuple[dict[str, int], list[bytes]]:
        flags = ("--dataset-info", registry, "--dataset", "en,hu_1b,el8b", "--max-samples", "35", "--seed", seed)
        made = preprocess(*flags, out=out)
        corpus, counts = made.corpus(), {name: count.documents for name, count in made.manifest().languages.items()}
        return counts, [corpus.document(index)[0].tobytes() for index in range(corpus.num_documents)]

    counts, documents = drawn("one/a", 1)
    assert counts == {"en": 35, "hu_1b": 35, "el8b": 30}
    assert "the dataset el8b contains 30 documents, so --max-samples 35" in capsys.readouterr().err
    assert len(set(documents)) == 100
    assert drawn("same/a", 1)[1] == documents
    other = drawn("other/a", 2)[1]
    assert set(other) != set(documents) and other[-30:] == documents[-30:]
