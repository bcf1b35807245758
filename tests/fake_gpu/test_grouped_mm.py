"""The experts depend on nothing that a GPU's grouped_mm leaves open, and call it as its fast kernels require."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moelpr.megatron_patches import bootstrap
from moelpr.model_spec import ModelSpec, MoeSpec
from tests.fake_gpu.forwards import SHAPE

EXPERTS, HIDDEN = 4, SHAPE["hidden_size"]


class PoisonedGroupedMM(torch.autograd.Function):
    """NaN where some GPUs write nothing: in the gradient of an expert's weight without rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        return torch.cat([part @ one for part, one in zip(rows.split(sizes), weight, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, ends = ctx.saved_tensors
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        weight_gradient = torch.full_like(weight.transpose(1, 2), torch.nan).transpose(1, 2)
        parts = list(zip(rows.split(sizes), gradient.split(sizes), weight, strict=True))
        for expert, (part, part_gradient, _) in enumerate(parts):
            if len(part):
                weight_gradient[expert] = part.T @ part_gradient
        return torch.cat([part_gradient @ one.T for _, part_gradient, one in parts]), weight_gradient, None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Poisons grouped_mm; lists its arguments."""
    calls = []

    def grouped_mm(rows: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        calls.append((rows, weight, offs))
        return PoisonedGroupedMM.apply(rows, weight, offs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm)
    return calls


@pytest.fixture(scope="module")
def experts() -> Any:
    bootstrap.install_patches()
    from moelpr.megatron_patches.bootstrap import single_process
    from moelpr.model.loading import build_model

    spec = ModelSpec("qwen2", "bfloat16", SHAPE, MoeSpec(EXPERTS, 2, (0, 1)))
    with single_process():
        yield build_model(spec, bf16=True, params_dtype=torch.bfloat16).decoder.layers[0].mlp.experts


@pytest.mark.parametrize("rows_of", [[5, 0, 9, 0], [0, 0, 0, 14], [3, 4, 3, 4]])
def test_idle_experts_have_a_gradient_of_zero(experts: Any, calls: list, rows_of: list[int]) -> None:
    experts.zero_grad()
    rows = torch.randn(14, HIDDEN).bfloat16().requires_grad_()
    output, _ = experts(rows, torch.tensor(rows_of), torch.rand(14))
    output.float().square().sum().backward()
    assert len(calls) == 2 and rows.grad.isfinite().all()
    for weight in experts.parameters():
        assert weight.grad.isfinite().all()
        assert [bool(gradient.any()) for gradient in weight.grad] == [number > 0 for number in rows_of]


def test_the_arguments_are_those_of_the_fast_kernels(experts: Any, calls: list) -> None:
    """bf16 for both, rows and weights without copies, strides of whole 16 bytes, and ends as int32.

    On Hopper the kernels leave no gradient unwritten for weights that are the transpose of a contiguous tensor.
    """
    experts(torch.randn(14, HIDDEN).bfloat16(), torch.tensor([3, 4, 3, 4]), torch.rand(14))
    for (rows, weight, ends), linear in zip(calls, (experts.linear_fc1, experts.linear_fc2), strict=True):
        assert rows.dtype == weight.dtype == torch.bfloat16
        assert rows.is_contiguous() and rows.shape[1] * rows.element_size() % 16 == 0
        assert weight.data_ptr() == linear.weight.data_ptr()
        assert weight.transpose(1, 2).is_contiguous() and weight.shape[1] * weight.element_size() % 16 == 0
        assert ends.dtype == torch.int32 and ends.tolist() == [3, 7, 10, 14]


def test_no_rows_at_all_do_not_reach_it(experts: Any, calls: list) -> None:
    experts.zero_grad()
    rows = torch.empty(0, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    experts(rows, torch.zeros(EXPERTS, dtype=torch.long), torch.empty(0))[0].sum().backward()
    assert calls == []
    assert all(torch.equal(weight.grad, torch.zeros_like(weight)) for weight in experts.parameters())
