import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moelpr.model.layers.losses import LPRVariant, lpr_loss, megatron_balance_coeff


def test_lpr_loss_of_two_original_experts_is_that_of_the_sum_of_their_scores() -> None:
    # Weights 2, 1 of the original experts and 3, 4 of the new ones: scores 0.2, 0.1, 0.3, 0.4; together 0.3.
    logits = torch.tensor([[2.0, 1.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]]).log().requires_grad_()
    is_original = torch.tensor([True, False])
    loss = lpr_loss(logits, is_original, num_original_places=2)
    assert loss.item() == pytest.approx(-math.log(0.3), rel=1e-6)
    loss.backward()
    # G_i - G_i / (G_0 + G_1) for the original experts, in proportion to their scores; G_i for the new ones.
    expected = torch.tensor([0.2 - 2 / 3, 0.1 - 1 / 3, 0.3, 0.4])
    torch.testing.assert_close(logits.grad, torch.stack([expected, torch.zeros(4)]))


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_lpr_loss_of_several_original_experts_is_finite_for_extreme_logits(variant: LPRVariant) -> None:
    logits = torch.tensor([[-200.0, -200.0, 300.0], [300.0, -200.0, -200.0]], requires_grad=True)
    is_original = torch.tensor([True, True])
    loss = lpr_loss(logits, is_original, num_original_places=2, variant=variant)
    loss.backward()
    if variant == "paper":
        assert loss.item() == pytest.approx(500 - math.log(2))
    assert loss.isfinite() and logits.grad.isfinite().all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), variant=st.sampled_from(get_args(LPRVariant)))
def test_lpr_loss_of_one_original_expert_is_the_cross_entropy_of_column_0(seed: int, variant: LPRVariant) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(7, 4, dtype=torch.float64)
    scores = logits if variant == "paper" else torch.softmax(logits, dim=-1)
    expected = torch.nn.functional.cross_entropy(scores, torch.zeros(7, dtype=torch.long), reduction="sum")
    actual = lpr_loss(logits, torch.ones(7, dtype=torch.bool), num_original_places=1, variant=variant)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("m", [1, 2])
def test_lpr_loss_and_its_gradient_are_exactly_zero_without_original_tokens(m: int) -> None:
    logits = torch.randn(5, 3, requires_grad=True)
    loss = lpr_loss(logits, torch.zeros(5, dtype=torch.bool), num_original_places=m)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(5, 3))


def test_reference_variant_has_a_floor_but_the_papers_loss_reaches_zero() -> None:
    certain = torch.tensor([[100.0, 0.0, 0.0, 0.0]])
    is_original = torch.tensor([True])
    floor = lpr_loss(certain, is_original, variant="reference").item()
    assert floor == pytest.approx(math.log(1 + 3 / math.e), rel=1e-6)
    assert lpr_loss(certain, is_original).item() == pytest.approx(0.0, abs=1e-6)
    floor = lpr_loss(certain, is_original, num_original_places=2, variant="reference").item()
    assert floor == pytest.approx(math.log(1 + 2 / (math.e + 1)), rel=1e-6)


def test_balance_coefficient_is_the_papers_for_24_layers() -> None:
    assert megatron_balance_coeff(0.01, topk=2, num_moe_layers=24) == pytest.approx(8.333e-4, rel=1e-3)
