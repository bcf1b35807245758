"""The experiment on layers: its choices, its verdict, and the rewriting of a Llama as a Qwen2."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples.real_model import as_qwen2
from examples.real_model.layers import EXPANDED, LANGUAGES, SHARES, evenly_spaced, results_text, verdict
from moelpr.errors import UserError
from moelpr.evaluate.models import load_model
from moelpr.families.families import read_base, with_new_experts
from tests.hf_models import make_model  # noqa: F401


def test_evenly_spaced_layers_are_those_of_a_user() -> None:
    assert evenly_spaced(30, 10) == list(range(2, 30, 3))  # --moe-every-k-layers 3
    assert evenly_spaced(30, 15) == list(range(1, 30, 2))
    assert evenly_spaced(7, 3) == [1, 3, 6]


def results(learning: dict[str, float], forgetting: float = 0.0) -> dict:
    """The measured layers change the bits of expanded languages by `learning` (per kind) more than even ones do."""
    change = {}
    for share in SHARES:
        texts = [(language, kind) for language in LANGUAGES for kind in learning]
        change[f"{share}-even"] = {f"{language}.{kind}": -0.2 for language, kind in texts}
        change[f"{share}-measured"] = {
            f"{language}.{kind}": -0.2 - learning[kind] if language in EXPANDED else -0.2 + forgetting
            for language, kind in texts
        }
    return {"change": change, "trained_kinds": ["help", "stories"]}


@pytest.mark.parametrize(
    ("learning", "forgetting", "is_win"),
    [
        ({"help": 0.009, "stories": 0.011, "interface": 0.002}, 0.0, True),  # 0.01 on trained kinds, 0.002 on others
        ({"help": 0.009, "stories": 0.009, "interface": 0.0}, 0.0, False),
        ({"help": -0.01, "interface": -0.01}, 0.0, False),
        ({"help": 0.01, "interface": 0.01}, 0.004, True),
        ({"help": 0.01, "interface": 0.01}, 0.006, False),
    ],
)
def test_the_verdict_is_the_documented_rule(learning: dict[str, float], forgetting: float, is_win: bool) -> None:
    assert ("do not beat" not in verdict(results(learning, forgetting))) == is_win


def test_a_win_at_one_share_is_not_enough() -> None:
    found = results({"help": 0.02, "interface": 0.02})
    found["change"]["half-measured"] = found["change"]["half-even"]
    assert "do not beat" in verdict(found)
    assert "third they learn +2.00 points more" in verdict(found) and "half they learn +0.00" in verdict(found)


def test_the_table_has_means_over_kinds_and_languages() -> None:
    found = results({"help": 0.01, "stories": 0.03, "interface": 0.04}, forgetting=0.1)
    found["settings"] = [{"name": "half-measured", "label": "3 measured", "layers": [0, 4, 5], "minutes": 7.2}]
    row = next(line for line in results_text(found).splitlines() if line.startswith("| 3 measured"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["−10.0%", "−10.0%", "−22.0%", "−24.0%", "7"]


def test_a_llama_as_a_qwen2_has_the_same_logits_and_may_keep_dense_layers(
    make_model: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    llama = make_model("LlamaForCausalLM", tokenizer=True, tie_word_embeddings=True)
    assert as_qwen2.save_as_qwen2(llama, tmp_path / "qwen2") < 1e-5
    tokens = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        logits = [load_model(path, "cpu").logits(tokens) for path in (llama, tmp_path / "qwen2")]
    assert torch.allclose(*logits, atol=1e-5)
    family, base = read_base(tmp_path / "qwen2")
    assert with_new_experts(family, base, 3, moe_layers=[0, 2]).moe.layers == (0, 2)
    with pytest.raises(UserError, match="must be a LlamaForCausalLM, got a qwen2"):
        as_qwen2.save_as_qwen2(tmp_path / "qwen2", tmp_path / "again")
