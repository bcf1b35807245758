"""Random documents: as many as requested, complete, each at most once, the same for the same seed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_tools import sample_data
from data_tools.corpus.corpus import Corpus
from moelpr.base.errors import UserError
from moelpr.base.settings import call
from moelpr.data.manifest import LanguageCount, Manifest, Source
from tests.unit.data_tools.conftest import corpus_bytes, write_mixed_corpus


def documents_of(language: str, first_id: int, count: int = 60) -> list[tuple[str, list[int]]]:
    """Document i is i + 1 times the id first_id + i, every tenth empty: a token says where it came from."""
    return [(language, [] if i % 10 == 9 else [first_id + i] * (i + 1)) for i in range(count)]


@pytest.fixture
def inputs(make_corpus: Callable[..., Path]) -> list[str]:
    return [str(make_corpus(name, documents_of(name, first))) for name, first in {"en": 0, "es": 60, "el": 120}.items()]


def sample(output: Path, inputs: list[str], *words: str) -> list[np.ndarray]:
    """Token ids of each document drawn."""
    call(sample_data.main, ["--input", *inputs, "--output-prefix", str(output), *words])
    corpus = Corpus(output)
    corpus.verify()
    return [corpus.document(index)[0] for index in range(corpus.num_documents)]


def test_each_language_gives_its_number_of_complete_documents(inputs: list[str], tmp_path: Path) -> None:
    actual = sample(tmp_path / "out", inputs, "--original-documents", "20", "--expanded-documents", "30")
    numbers = [int(ids[0]) for ids in actual]
    assert numbers == sorted(set(numbers))  # the inputs' order, none twice
    assert [sum(low <= number < low + 60 for number in numbers) for low in (0, 60, 120)] == [20, 20, 30]
    for ids in actual:
        assert len(ids) == ids[0] % 60 + 1 and (ids == ids[0]).all()
    assert numbers[:20] != list(range(20)), "not the first ones"
    for index, ids in enumerate(actual):
        assert (Corpus(tmp_path / "out").document(index)[1] == (ids[0] < 120)).all()


def test_same_seed_gives_the_same_sample(inputs: list[str], tmp_path: Path) -> None:
    words = ["--original-documents", "20", "--expanded-documents", "20"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        sample(tmp_path / name, inputs, *words, "--seed", seed)
    a, b, c = (corpus_bytes(tmp_path / name) for name in "abc")
    assert a == b and a != c
    # Languages are drawn independently of each other.
    alone = sample(tmp_path / "d", inputs[1:2], *words, "--seed", "1")
    turned = sample(tmp_path / "e", inputs[::-1], *words, "--seed", "1")
    assert [ids[0] for ids in alone] == [ids[0] for ids in turned[20:40]]


def test_every_document_is_equally_likely(inputs: list[str], tmp_path: Path) -> None:
    drawn = np.zeros(60)
    for seed in range(100):
        words = ["--original-documents", "27", "--seed", str(seed), "--overwrite"]
        drawn[[ids[0] for ids in sample(tmp_path / "out", inputs[:1], *words)]] += 1
    assert (drawn[9::10] == 0).all()
    drawn = np.delete(drawn, np.s_[9::10])
    # 54 documents, each drawn in half of 100 draws: 50 +- 5, and none further away than 5 of these.
    assert 25 < drawn.min() < drawn.max() < 75


def test_small_language_is_used_completely_with_a_note(inputs, tmp_path, capsys) -> None:
    actual = sample(tmp_path / "out", inputs, "--expanded-documents", "55")
    assert len(actual) == 54
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"note: {inputs[2]} contains less than the requested 55 documents") for line in lines)
    assert ["el", "expanded", "54", "54", "1,620", inputs[2]] in [line.split() for line in lines]
    sample(tmp_path / "again", inputs, "--expanded-documents", "54")
    assert "note" not in capsys.readouterr().out


def test_manifest_counts_the_sample(inputs: list[str], tmp_path: Path) -> None:
    actual = sample(tmp_path / "out", inputs[1:], "--original-documents", "2", "--expanded-documents", "1000000")
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    assert manifest.languages == {
        "es": LanguageCount("original", 2, sum(map(len, actual[:2])), 0),
        "el": LanguageCount("expanded", 54, 1620, 0),
    }
    size = Path(f"{inputs[1]}.bin").stat().st_size
    assert manifest.sources == [Source(f"{inputs[1]}.bin", size, None, 2), Source(f"{inputs[2]}.bin", size, None, 54)]
    assert manifest.tokenizer.fingerprint == "f" and manifest.append_eod


def test_documents_of_both_groups_keep_their_bits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Without a manifest, and in corpora whose bits change inside a document."""
    write_mixed_corpus(tmp_path / "mixed", [1, 0, 1], [0, 1, 0], [1, 1, 1])
    sample(tmp_path / "out", [str(tmp_path / "mixed")], "--expanded-documents", "5")
    assert Corpus(tmp_path / "out").document(0)[1].tolist() == [0, 0, 1, 1, 1, 1, 0]
    assert "mixed has no manifest, so" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "pass --original-documents, --expanded-documents or both"),
        (["--expanded-documents", "0"], "--expanded-documents must be at least 1"),
        (["--expanded-documents", "1", "--seed", "-1"], "--seed must be at least 0"),
        (["--expanded-documents", "1", "--output-prefix", "en"], "--output-prefix en is one of"),
        (["--expanded-documents", "1", "--output-prefix", ".//en"], "--output-prefix .//en is one of"),
        (["--expanded-documents", "1", "--input", "en", "./en"], "names a corpus twice"),
        (["--expanded-documents", "1"], "en, es contain no matching documents"),
    ],
)
def test_contradicting_options_are_reported(words, message, inputs, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        call(sample_data.main, ["--input", "en", "es", "--output-prefix", "out", *words])
    assert not list(tmp_path.glob("*out*"))


def test_indistinguishable_languages_are_rejected(make_corpus: Callable[..., Path]) -> None:
    prefix = make_corpus("all", [("en", [1]), ("es", [2]), ("el", [3])])
    with pytest.raises(UserError, match=r"all contains 2 original languages \(en, es\)"):
        sample(prefix.parent / "out", [str(prefix)], "--original-documents", "1")
    assert len(sample(prefix.parent / "out", [str(prefix)], "--expanded-documents", "1")) == 1
