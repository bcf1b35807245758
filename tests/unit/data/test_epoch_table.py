"""The epoch table agrees with counts of the corpora."""

from collections.abc import Callable

import pytest

from data_tools.corpus.corpus import Corpus
from moelpr.base.errors import UserError
from moelpr.data import dataset
from moelpr.data.epoch_table import epoch_table
from moelpr.data.manifest import LanguageCount
from tests.support.gpt_data import gpt_config, training_set
from tests.support.manifests import write_manifest

SEQUENCE = 16


def table(samples: int, prefixes: list[str], weights: list[float] | None = None, split: str = "100,0,0") -> list[list]:
    text = epoch_table(training_set(samples, gpt_config(prefixes, weights, split=split)), samples, SEQUENCE)
    return [line.replace(",", "").split() for line in text.splitlines()]


def test_blend_is_shown_by_corpus_and_language(write_corpus: Callable) -> None:
    original, ids, _ = write_corpus("original", documents=30, bits="original", seed=1)
    mixed, mixed_ids, bits = write_corpus("mixed", documents=50, seed=2)
    n, m, o = len(ids), len(mixed_ids), int(bits.sum())
    languages = {"zh": LanguageCount("original", 10, n - 100), "en": LanguageCount("original", 20, 100)}
    write_manifest(original, n, 30, **languages)
    lines = table(200, [str(original), str(mixed)], [3.0, 1.0])
    assert "200" in lines[0]
    first, en, zh, second, old, new, last = lines[2:]
    assert first == [str(original), "30", str(n), str((n - 1) // SEQUENCE), f"{150 * SEQUENCE / n:.2f}", "75.0%"]
    assert en == ["en", "original", "20", "100", f"{0.75 * 100 / n:.1%}"]
    assert zh == ["zh", "original", "10", str(n - 100), f"{0.75 * (n - 100) / n:.1%}"]
    assert second == [str(mixed), "50", str(m), str((m - 1) // SEQUENCE), f"{50 * SEQUENCE / m:.2f}", "25.0%"]
    corpus = Corpus(mixed)
    number = sum(int(corpus.document(index)[1][0]) for index in range(corpus.num_documents))
    assert old == ["original", str(number), str(o), f"{0.25 * o / m:.1%}"]
    assert new == ["expanded", str(50 - number), str(m - o), f"{0.25 * (m - o) / m:.1%}"]
    share = 0.75 + 0.25 * o / m
    assert " ".join(last).endswith(f"{share:.1%} are original-language and {1 - share:.1%} are expanded-language")


def test_part_of_a_corpus_is_counted_by_its_bits(write_corpus: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --split 50,50,0 the manifest describes only the complete corpus."""
    monkeypatch.setattr(dataset, "_SEQUENCES_AT_ONCE", 7)
    prefix, ids, bits = write_corpus("corpus", documents=60, bits="random", seed=4)
    write_manifest(prefix, len(ids), 60, en=LanguageCount("original", 60, len(ids)))
    tokens = int(Corpus(prefix).document_lengths[:30].sum())
    original = [int(Corpus(prefix).document(index)[1][0]) for index in range(30)]
    _, _, whole, old, new, _ = table(5, [str(prefix)], split="50,50,0")
    assert whole[1:3] == ["30", str(tokens)]
    assert old[:3] == ["original", str(sum(original)), str(int(bits[:tokens].sum()))]
    assert new[:3] == ["expanded", str(30 - sum(original)), str(tokens - int(bits[:tokens].sum()))]


def test_run_longer_than_corpora_without_weights_is_rejected(write_corpus: Callable) -> None:
    prefixes = [str(write_corpus(name, seed=seed)[0]) for seed, name in enumerate("ab")]
    assert len(table(20, prefixes)) > 3
    with pytest.raises(UserError, match=r"\d+ samples, .* 5,000; .*--data-path"):
        table(5000, prefixes)
    assert table(5000, prefixes, [1.0, 1.0])
