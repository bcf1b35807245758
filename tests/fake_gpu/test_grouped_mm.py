"""The experts depend on nothing that a GPU's grouped_mm leaves open, and call it as its fast kernels require."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moelpr.model.megatron import bootstrap
from moelpr.model.model_spec import ModelSpec, MoeSpec
from tests.unit.conftest import SHAPE

EXPERTS, HIDDEN = 4, SHAPE["hidden_size"]


def poisoned_grouped_mm(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
    """NaN where some GPUs write nothing: in the gradient of an expert's weight without rows."""
    sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
    if right.dim() == 3:
        return torch.cat([part @ one for part, one in zip(left.split(sizes), right, strict=True)])
    actual = left.new_full((len(sizes), left.shape[0], right.shape[1]), torch.nan)
    for expert, (columns, rows) in enumerate(zip(left.split(sizes, dim=1), right.split(sizes), strict=True)):
        if len(rows):
            actual[expert] = columns @ rows
    return actual


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Poisons grouped_mm; lists its arguments."""
    calls = []

    def grouped_mm(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        calls.append((left, right, offs))
        return poisoned_grouped_mm(left, right, offs=offs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm)
    return calls


@pytest.fixture(scope="module")
def experts() -> Any:
    bootstrap.install_patches()
    from moelpr.model.layers.loading import build_model
    from moelpr.model.megatron.bootstrap import single_process

    spec = ModelSpec("qwen2", "bfloat16", SHAPE, MoeSpec(EXPERTS, 2, (0, 1)))
    with single_process():
        yield build_model(spec, bf16=True, params_dtype=torch.bfloat16).decoder.layers[0].mlp.experts


@pytest.mark.parametrize("rows_of", [[5, 0, 9, 0], [0, 0, 0, 14], [3, 4, 3, 4]])
def test_idle_experts_have_a_gradient_of_zero(experts: Any, calls: list, rows_of: list[int]) -> None:
    experts.zero_grad()
    rows = torch.randn(14, HIDDEN).bfloat16().requires_grad_()
    output, _ = experts(rows, torch.tensor(rows_of), torch.rand(14))
    output.float().square().sum().backward()
    assert len(calls) == 6 and rows.grad.isfinite().all()
    for weight in experts.parameters():
        assert weight.grad.isfinite().all()
        assert [bool(gradient.any()) for gradient in weight.grad] == [number > 0 for number in rows_of]


def test_the_arguments_are_those_of_the_fast_kernels(experts: Any, calls: list) -> None:
    """bf16 for both, rows and weights without copies, strides of whole 16 bytes, and ends as int32.

    On Hopper the kernels leave no gradient unwritten for weights that are the transpose of a contiguous tensor.
    """
    output, _ = experts(torch.randn(14, HIDDEN).bfloat16(), torch.tensor([3, 4, 3, 4]), torch.rand(14))
    for (rows, weight, ends), linear in zip(calls, (experts.linear_fc1, experts.linear_fc2), strict=True):
        assert rows.dtype == weight.dtype == torch.bfloat16
        assert rows.is_contiguous() and rows.shape[1] * rows.element_size() % 16 == 0
        assert weight.data_ptr() == linear.weight.data_ptr()
        assert weight.transpose(1, 2).is_contiguous() and weight.shape[1] * weight.element_size() % 16 == 0
        assert ends.dtype == torch.int32 and ends.tolist() == [3, 7, 10, 14]
    calls.clear()
    output.backward(torch.ones_like(output))
    for left, right, _ in calls:
        assert right.is_contiguous() and (left.is_contiguous() or left.t().is_contiguous())


def test_no_rows_at_all_do_not_reach_it(experts: Any, calls: list) -> None:
    experts.zero_grad()
    rows = torch.empty(0, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    experts(rows, torch.zeros(EXPERTS, dtype=torch.long), torch.empty(0))[0].sum().backward()
    assert calls == []
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in experts.parameters())
