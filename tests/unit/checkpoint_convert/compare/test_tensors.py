import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_convert.compare import tensors
from checkpoint_convert.compare.logits import compare_on_text
from checkpoint_convert.compare.tensors import compare, compare_frozen, largest_difference
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.base.errors import UserError
from moelpr.model.families.new_experts import NewExperts
from tests.support.hf_models import copy_of


def test_a_difference_in_any_chunk_of_a_tensor_is_found(export: Path, monkeypatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 100)
    for row in (0, 60, 98):
        other = copy_of(export, lambda tensors, row=row: tensors["lm_head.weight"][row, 31].add_(2))
        assert largest_difference(compare(export, other)) == pytest.approx(2)


def test_the_numbers_are_those_of_both_models_run_together(qwen2: Path, export: Path, text: Path) -> None:
    """Independently: both models at once, the whole file in sequences of 16 tokens."""
    other = copy_of(export, lambda tensors: tensors["model.norm.weight"][:16].mul_(3))
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (qwen2, other)]
    lines = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    ids = torch.tensor(AutoTokenizer.from_pretrained(qwen2)("\n".join(lines))["input_ids"][:72])
    with torch.inference_mode():
        a, b = (torch.cat([model(part[None]).logits[0] for part in ids.split(16)]) for model in models)
    (verdict,) = compare_on_text(qwen2, other, [text], num_tokens=72, sequence_length=16)
    assert verdict.num_tokens == 72
    assert verdict.max_abs_logit_diff == pytest.approx((a - b).abs().max().item(), rel=1e-5)
    assert verdict.num_same_choice == int((a.argmax(-1) == b.argmax(-1)).sum()) < 72


def test_a_further_round_is_compared_with_the_first_in_its_class_only(base: Path, tmp_path: Path) -> None:
    granite, second = tmp_path / "granite", tmp_path / "second"
    hf_to_mcore(base, tmp_path / "first", NewExperts(1))
    mcore_to_hf(tmp_path / "first", granite, as_class="granitemoe")
    hf_to_mcore(granite, second, NewExperts(1))
    mcore_to_hf(second, tmp_path / "same", as_class="granitemoe")
    assert largest_difference(compare_frozen(granite, tmp_path / "same")) == 0.0
    mcore_to_hf(second, tmp_path / "other", as_class="qwen2_moe")
    with pytest.raises(UserError, match="--as"):
        list(compare_frozen(granite, tmp_path / "other"))
