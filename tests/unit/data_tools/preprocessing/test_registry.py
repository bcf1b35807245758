"""dataset_info.json as the published code has it, and drawing documents from its datasets."""

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_tools.corpus import Corpus
from data_tools.preprocessing.sampling import draw_documents
from data_tools.preprocessing.sources import Share, open_source
from moelpr.data.manifest import Manifest
from moelpr.errors import UserError


@pytest.fixture
def registry(write_lines, tmp_path: Path) -> Path:
    """Four datasets: one with its checksum, a compressed one, a folder, and one without a language."""
    hu = write_lines("data/hu.jsonl", [{"text": f"magyar szöveg {i}"} for i in range(40)])
    el = write_lines("data/el.jsonl", [{"content": f"ελληνικό κείμενο {i}"} for i in range(30)])
    (tmp_path / "data/el.jsonl.gz").write_bytes(gzip.compress(el.read_bytes()))
    for part in range(3):
        write_lines(f"data/en/{part}.jsonl", [{"text": f"English text {part} {i}"} for i in range(20)])
    entries: dict[str, Any] = {
        "hu_1b": {
            "file_name": "hu.jsonl",
            "file_sha1": hashlib.sha1(hu.read_bytes()).hexdigest(),
            "language": "new",
            "columns": {"prompt": "text"},
        },
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


def test_datasets_are_read_in_order_with_their_languages_and_keys(registry: Path, preprocess, hf_tokenizer) -> None:
    prefix = preprocess(hf_tokenizer, "--dataset-info", registry, "--dataset", "en,hu_1b,el8b")
    corpus = Corpus(f"{prefix}_text_document")
    assert corpus.num_documents == 60 + 40 + 30
    assert [int(corpus.document(index)[1].min()) for index in (0, 59, 60, 99, 100)] == [1, 1, 0, 0, 0]
    manifest = Manifest.read(f"{prefix}_text_document")
    assert manifest is not None
    assert {name: (count.bit, count.documents) for name, count in manifest.languages.items()} == {
        "en": ("original", 60),
        "hu_1b": ("expanded", 40),
        "el8b": ("expanded", 30),
    }
    assert [(Path(source.path).name, source.sha1 is None) for source in manifest.sources] == [
        ("0.jsonl", True),
        ("1.jsonl", True),
        ("2.jsonl", True),
        ("hu.jsonl", False),
        ("el.jsonl.gz", True),
    ]


def test_files_may_lie_elsewhere_than_the_registry(registry: Path, preprocess, hf_tokenizer, tmp_path: Path) -> None:
    moved = tmp_path / "registry.json"
    registry.rename(moved)
    flags = ("--dataset-info", moved, "--dataset-dir", tmp_path / "data", "--dataset", "hu_1b")
    prefix = preprocess(hf_tokenizer, *flags)
    assert Corpus(f"{prefix}_text_document").num_documents == 40
    moved.rename(registry)
    again = preprocess(hf_tokenizer, "--dataset-dir", tmp_path / "data", "--dataset", "hu_1b", out="again/a")
    assert Corpus(f"{again}_text_document").num_documents == 40


def test_another_file_than_the_registrys_stops_the_job(
    registry: Path, preprocess, hf_tokenizer, tmp_path: Path
) -> None:
    with open(tmp_path / "data/hu.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"hu\.jsonl has the SHA-1 [0-9a-f]{40}, its registry says [0-9a-f]{40}"):
        preprocess(hf_tokenizer, "--dataset-info", registry, "--dataset", "el8b,hu_1b")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, words, said",
    [
        ("hu1b", {}, "has no dataset hu1b; it has hu_1b"),
        ("hub", {}, "the dataset hub in .*: it has no file_name; nothing is downloaded"),
        ("no_language", {}, 'its language is null; "old" .original. or "new"'),
        ("hu_1b", {"language": "hu"}, 'its language is "hu"'),
        ("hu_1b", {"file_name": "gone.jsonl"}, r"there is no .*gone\.jsonl"),
        ("hu_1b", {"file_sha1": "abc"}, 'its file_sha1 is "abc"; 40 hexadecimal digits'),
        ("en", {"file_sha1": "0" * 40}, "a folder, which has no SHA-1"),
        ("en", {"columns": {"prompt": None}}, 'its columns hold no "prompt"'),
        ("en", {"formatting": "sharegpt"}, 'its formatting is "sharegpt"'),
        ("hu_1b,hu_1b", {}, "names a dataset twice"),
    ],
)
def test_an_entry_that_cant_be_used_is_told(
    name: str, words: dict[str, Any], said: str, registry: Path, preprocess, hf_tokenizer
) -> None:
    if words:
        change(registry, name, **words)
    with pytest.raises(UserError, match=said):
        preprocess(hf_tokenizer, "--dataset-info", registry, "--dataset", name)


@pytest.mark.parametrize(
    "content, said", [("{", "is not JSON"), ("[]", "does not hold a JSON object"), (None, "can't be read")]
)
def test_a_registry_that_is_none_is_told(
    content: str | None, said: str, preprocess, hf_tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "dataset_info.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        preprocess(hf_tokenizer, "--dataset-info", path, "--dataset", "a")


def test_so_many_documents_are_drawn_from_each_dataset(
    registry: Path, preprocess, hf_tokenizer, capsys: pytest.CaptureFixture
) -> None:
    def drawn(out: str, seed: int) -> tuple[dict[str, int], list[bytes]]:
        flags = ("--dataset-info", registry, "--dataset", "en,hu_1b,el8b", "--max-samples", "35", "--seed", seed)
        prefix = f"{preprocess(hf_tokenizer, *flags, out=out)}_text_document"
        manifest, corpus = Manifest.read(prefix), Corpus(prefix)
        assert manifest is not None
        counts = {name: count.documents for name, count in manifest.languages.items()}
        return counts, [corpus.document(index)[0].tobytes() for index in range(corpus.num_documents)]

    counts, documents = drawn("one/a", 1)
    assert counts == {"en": 35, "hu_1b": 35, "el8b": 30}
    assert "the dataset el8b holds 30 documents, so --max-samples 35 takes all of them" in capsys.readouterr().err
    assert len(set(documents)) == 100
    assert drawn("same/a", 1)[1] == documents
    other = drawn("other/a", 2)[1]
    assert set(other) != set(documents) and other[-30:] == documents[-30:]


def test_each_document_has_the_same_chance(write_lines) -> None:
    """Over 2,000 seeds each of 20 documents in two files is drawn 500 times, give or take 5 standard deviations."""
    paths = [write_lines(f"{name}.jsonl", [{"text": "a"}] * count) for name, count in (("a", 12), ("b", 8))]
    sources = [open_source(str(path)) for path in paths]
    shares = [Share(source, 0, source.bytes) for source in sources]
    times: Counter[int] = Counter()
    for seed in range(2000):
        [first, second], notes = draw_documents(shares, ["name"], 5, seed)
        assert notes == [] and len(first) + len(second) == 5
        times.update([*first.tolist(), *(12 + second).tolist()])
    assert set(times) == set(range(20))
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in times.values())


def test_blank_lines_are_no_documents_to_draw(preprocess, hf_tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([b"", b'{"text": "aa"}', b"  ", b'{"text": "b"}', b"", b""]))
    flags = ("--language", "original", "--max-samples", "2")
    assert (
        Corpus(f"{preprocess(hf_tokenizer, '--input', tmp_path / 'a.jsonl', *flags)}_text_document").num_documents == 2
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--dataset", "a"], "--dataset needs --dataset-info"),
        (["--dataset-info", "a", "--input", "b", "--language", "original"], "need --dataset, the names"),
        (["--dataset", "a", "--dataset-dir", "b", "--json-keys", "text"], "--json-keys is for --input"),
        (["--dataset", "a", "--dataset-dir", "b", "--language", "original"], "leave --language out"),
        (["--input", "-", "--language", "original", "--max-samples", "3"], "standard input can be neither"),
        (["--input", "-", "-", "--language", "original"], "can be read only once"),
        (["--input", "a", "--language", "original", "--max-samples", "0"], "--max-samples 0 must be at least 1"),
        (["--input", "a", "--language", "original", "--max-samples", "1", "--num-shards", "2"], "exclude each other"),
    ],
)
def test_flags_that_contradict_each_other_stop_the_job(flags: list[str], said: str, preprocess, hf_tokenizer) -> None:
    with pytest.raises(UserError, match=said):
        preprocess(hf_tokenizer, *flags)
