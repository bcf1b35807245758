"""Bootstrap intervals against worked-out answers, and against how often they contain the truth."""

from pathlib import Path

import numpy as np
import pytest

from moelpr.evaluate.compare import Comparison
from moelpr.evaluate.results import TextResults, estimates, interval_of, mean
from moelpr.evaluate.scoring import LanguageScore, Settings


def score_of(bits, size=None, correct=None) -> LanguageScore:
    """A score whose documents are a byte and a token each, by default."""
    ones = [1] * len(bits)
    return LanguageScore(list(bits), list(size or ones), ones, list(correct or ones), unknown_tokens=0, routing=None)


def test_a_value_is_a_ratio_of_sums_and_so_is_each_sample():
    estimate = estimates({"m": score_of([10, 1], size=[1, 9])}, 1)["m"]["bits_per_byte"]
    assert estimate[0] == pytest.approx(11 / 10)
    # Two documents: a sample contains the first twice, the second twice, or each once.
    assert {round(sample, 9) for sample in estimate[1:]} == {10.0, round(1 / 9, 9), 1.1}
    assert np.mean(estimate[1:] == estimate[1:].max()) == pytest.approx(1 / 4, abs=0.05)


def test_a_95_percent_interval_contains_the_truth_about_as_often():
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        estimate = estimates({"m": score_of(rng.exponential(size=100))}, trial)["m"]["bits_per_byte"]
        _, low, high = interval_of(estimate)
        hits += low < 1 < high
    assert 0.88 < hits / 200 < 0.99


def test_a_paired_change_is_clear_when_the_intervals_overlap():
    """Documents differ by far more than the models do, but each of them improved."""
    hardness = np.random.default_rng(1).uniform(1, 9, 50)
    noise = np.random.default_rng(2).permutation(hardness)
    scores = {"base": score_of(hardness), "ours": score_of(0.98 * hardness), "noise": score_of(noise)}
    results = text_results(scores).to_json()["models"]
    base, ours, unclear = (results[model]["languages"]["en"] for model in scores)
    assert ours["bits_per_byte"]["high"] > base["bits_per_byte"]["low"]
    change = ours["change"]["bits_per_byte"]
    assert change.pop("is_clear") and list(change.values()) == pytest.approx([-0.02, -0.02, -0.02])
    assert not unclear["change"]["bits_per_byte"]["is_clear"]


def test_samples_depend_on_the_seed_alone():
    scores = {"m": score_of([1, 2, 3, 4, 5, 6], correct=[1, 0, 1, 1, 0, 1])}
    first, again, other = (estimates(scores, seed)["m"]["accuracy"][1:] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def spread(bits, **names) -> float:
    """The standard error of the mean over texts, given as the bits of their documents."""
    parts = [
        estimates({"m": score_of(its)}, 1, **{key: value[number] for key, value in names.items()})["m"]["bits_per_byte"]
        for number, its in enumerate(bits)
    ]
    assert mean(parts)[0] == pytest.approx(np.mean([np.mean(its) for its in bits]))
    return mean(parts)[1:].std()


def test_a_mean_over_unrelated_texts_is_more_certain_and_one_over_parallel_texts_is_not():
    bits = np.random.default_rng(1).uniform(1, 2, (4, 200))
    alone = spread(bits[:1])
    assert spread(bits) == pytest.approx(alone / 2, rel=0.15)
    assert spread([bits[0]] * 4) == pytest.approx(alone, rel=0.01)


def test_texts_that_share_some_documents_are_certain_in_between():
    """Two texts of 100 documents, of which 50 are translations, in another order: correlation 1/2."""
    bits = np.random.default_rng(2).uniform(1, 2, 150)
    texts = [[*range(100)], [*range(149, 49, -1)]]
    documents = [[str(number) for number in text] for text in texts]
    population = [[str(number) for number in range(150)]] * 2
    together = spread([bits[text] for text in texts], documents=documents, population=population)
    alone = spread([bits[:100]])
    assert together == pytest.approx(alone * 0.75**0.5, rel=0.1)


def test_one_document_has_no_interval():
    base, ours = text_results({"base": score_of([3]), "ours": score_of([2])}).to_json()["models"].values()
    assert base["languages"]["en"]["perplexity"] == {"value": 8, "low": None, "high": None}
    change = ours["languages"]["en"]["change"]["bits_per_byte"]
    assert change == {"value": pytest.approx(-1 / 3), "low": None, "high": None, "is_clear": False}


def text_results(scores: dict[str, LanguageScore], window: int = 64) -> TextResults:
    """Of models on English as an original language."""
    models = {model: Path(model) for model in scores}
    by_model = {model: {"en": score} for model, score in scores.items()}
    return TextResults(
        Comparison(models, Settings(window, window // 4), by_model, 0, {}), {"en": Path("en.jsonl")}, ["en"], seed=1
    )


def test_models_with_different_tokenizers_are_compared_in_what_does_not_depend_on_tokens():
    base = LanguageScore([1, 2, 3], [2, 2, 4], [2, 2, 4], [1, 1, 1], unknown_tokens=0, routing=None)
    fewer = LanguageScore([1, 2, 4], [2, 2, 4], [1, 1, 2], [1, 1, 1], unknown_tokens=0, routing=None)
    scores = {"base": base, "same": base, "fewer": fewer}
    found = text_results(scores)
    models = {name: model["languages"]["en"] for name, model in found.to_json()["models"].items()}
    everything = {"bits_per_byte", "perplexity", "accuracy", "bytes_per_token"}
    assert models["same"]["change"].keys() == everything
    assert models["fewer"]["change"].keys() == {"bits_per_byte", "bytes_per_token"}
    assert models["fewer"]["change"]["bits_per_byte"]["value"] == pytest.approx(1 / 6)
    assert [model["bytes_per_token"]["value"] for model in models.values()] == [1, 1, 2]
    assert models["fewer"]["change"]["bytes_per_token"] == {"value": 1, "low": 1, "high": 1, "is_clear": True}
    table = found.tables()["Bytes per token (higher is better)"]
    assert [row.cells[0] for row in table.rows] == ["en", "mean original"]
    assert [cell.split()[0] for cell in table.rows[0].cells[1:]] == ["1.00", "1.00", "2.00"]
    # Each document fits the window of 64 tokens; of 3, one does not.
    assert not any("window" in finding for finding in found.findings())
    (finding,) = [text for text in text_results(scores, window=3).findings() if "window" in text]
    assert "1 of 3 documents" in finding and "window of 3 tokens" in finding and "has 4 tokens" in finding
    assert not any("window" in text for text in text_results({"base": base, "same": base}, window=3).findings())


def test_findings_name_the_better_model_and_text_that_a_tokenizer_cannot_encode():
    base = score_of([2.0, 4.0, 6.0])
    better = LanguageScore([1.0, 2.0, 3.0], [1] * 3, [1] * 3, [1] * 3, unknown_tokens=1, routing=None)
    findings = text_results({"base": base, "better": better}).findings()
    assert any("English: better is better than base (\u221250.0%" in finding for finding in findings)
    assert any("better" in finding and "33.3%" in finding for finding in findings)
