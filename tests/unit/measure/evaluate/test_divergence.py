"""The exact distance from a base: by hand, against torch in fp64, and from the command to its files."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelpr.base.errors import UserError
from moelpr.measure.evaluate import divergence
from moelpr.measure.evaluate.compare import compare_models
from moelpr.measure.evaluate.divergence import document_distances
from moelpr.measure.evaluate.models import LoadedModel, load_model
from moelpr.measure.evaluate.scoring import Settings, tokenize
from moelpr.measure.report.evaluation_files import EvaluationFile

WINDOWS = Settings(64, 16)


class Digits(SimpleNamespace):
    """A tokenizer whose tokens are digits."""

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[*map(int, text)] for text in texts]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(str, ids))


def table_model(*rows: tuple[float, ...]) -> LoadedModel:
    """A model of as many tokens as rows: after token t, the next one has the probabilities of row t."""
    logits, digits = torch.tensor(rows).log(), Digits(unk_token_id=None)
    return LoadedModel(Path("table"), nn.Linear(1, 1), digits, 0, None, len(rows), lambda tokens: logits[tokens])


def test_three_tokens_by_hand() -> None:
    base = table_model((0.5, 0.25, 0.25), (0.25, 0.5, 0.25), (0.2, 0.4, 0.4))
    model = table_model((0.25, 0.5, 0.25), (0.25, 0.5, 0.25), (0.4, 0.4, 0.2))
    after_0 = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    after_2 = 0.2 * math.log(0.5) + 0.4 * math.log(2)
    # A document starts with token 0, and nothing is predicted after its last one.
    actual = document_distances(base, model, "x", ["2", "21", "1200"], WINDOWS)
    assert actual == pytest.approx([after_0, after_0 + after_2, after_0 + after_2 + after_0], rel=1e-6)
    assert document_distances(base, model, "x", ["1", "22"], replace(WINDOWS, skip_tokens=1)) == pytest.approx(
        [0, after_2]
    )


def test_it_is_kl_div_of_torch_and_0_from_the_base_itself(monkeypatch, dense_dir, moe_dir, texts) -> None:
    base, model = load_model(dense_dir, "cpu"), load_model(moe_dir, "cpu")

    def log_probabilities(loaded: LoadedModel, ids: list[int]) -> Tensor:
        with torch.no_grad():
            return loaded.model(torch.tensor([[loaded.start_id, *ids[:-1]]])).logits[0].double().log_softmax(-1)

    for language, documents in texts.items():
        pairs = [[log_probabilities(one, ids) for one in (model, base)] for ids in tokenize(model, language, documents)]
        expected = [F.kl_div(*pair, reduction="sum", log_target=True).item() for pair in pairs]
        assert document_distances(base, model, language, documents, WINDOWS) == pytest.approx(expected, rel=1e-5)
        assert min(expected) > 0
        assert document_distances(base, base, language, documents, WINDOWS) == [0.0] * len(documents)
    monkeypatch.setattr(divergence, "_CHUNK_BYTES", 1)  # a token at a time
    assert document_distances(base, model, language, documents, WINDOWS) == pytest.approx(expected, rel=1e-5)


def test_rounding_makes_no_distance_negative(dense_dir, texts) -> None:
    base = load_model(dense_dir, "cpu")
    noise = torch.Generator().manual_seed(1)

    def with_noise(tokens: Tensor) -> Tensor:
        logits = base.logits(tokens)
        return logits + 1e-7 * torch.randn(logits.shape, generator=noise)

    actual = document_distances(base, replace(base, logits=with_noise), "en", texts["en"], WINDOWS)
    assert all(0 <= nats < 1e-6 for nats in actual)


def test_another_tokenizer_is_an_error() -> None:
    class Reversed(Digits):
        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
            return super().__call__([text[::-1] for text in texts])

    base = table_model(*[(0.5, 0.25, 0.25)] * 3)
    reverse = replace(base, tokenizer=Reversed(unk_token_id=None))
    for other in (table_model(*[(0.25,) * 4] * 4), replace(base, start_id=1), reverse):
        with pytest.raises(UserError, match="--base"):
            document_distances(base, other, "x", ["12"], WINDOWS)


def test_the_command_writes_it_per_text_with_its_interval(
    evaluate, capsys, tmp_path, monkeypatch, data, dense_dir, moe_dir, texts
) -> None:
    models = ("--model", dense_dir, "--model", moe_dir, *data, "--original-languages", "en")
    models += ("--output", tmp_path / "out")
    evaluate(*models)
    without = (tmp_path / "out/results.json").read_text()
    assert '"distance"' not in without and "Distance" not in capsys.readouterr().out
    evaluate(*models, "--base", dense_dir)
    content = json.loads((tmp_path / "out/results.json").read_text())
    assert content["settings"]["base"] == str(dense_dir)
    assert "distance" not in content["models"]["dense"]["languages"]["en"]
    moe, printed = content["models"]["moe"], capsys.readouterr().out
    scores = compare_models({"moe": moe_dir}, texts, base=dense_dir, device="cpu").scores["moe"]
    for language, score in scores.items():
        actual = moe["languages"][language]["distance"]
        assert actual["value"] == pytest.approx(sum(score.document_distances) / sum(score.document_tokens))
        assert 0 < actual["low"] <= actual["value"] <= actual["high"]
        assert f"{actual['value']:.4f} [{actual['low']:.4f}, {actual['high']:.4f}]" in printed
    assert moe["means"]["mean original"]["distance"] == moe["languages"]["en"]["distance"]
    assert EvaluationFile.read(tmp_path / "out/results.json").models["moe"].languages["en"].bits_per_byte
    # A rerun measures nothing, and one without --base has no distances.
    monkeypatch.setattr("moelpr.measure.evaluate.compare.open_model", None)
    evaluate(*models, "--base", dense_dir)
    assert json.loads((tmp_path / "out/results.json").read_text()) == content
    evaluate(*models)
    assert (tmp_path / "out/results.json").read_text() == without
