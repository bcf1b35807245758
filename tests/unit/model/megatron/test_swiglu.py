import pytest
import torch

from moelpr.model.megatron.swiglu import swiglu, weighted_swiglu


@pytest.mark.parametrize("rows", [0, 1, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_plain_operations(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up, weights = torch.randn(rows, 24, dtype=dtype), torch.rand(rows, 1)
    grad_output = torch.randn(rows, 12, dtype=dtype)
    ours, exact = ([tensor.clone().requires_grad_() for tensor in (gate_up, weights)] for _ in range(2))
    actual = weighted_swiglu(ours[0], None, ours[1])
    gate, up = exact[0].float().chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up * exact[1]
    actual.backward(grad_output)
    expected.backward(grad_output.float())
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, **tolerance)
    torch.testing.assert_close(ours[0].grad.float(), exact[0].grad.float(), **tolerance)
    torch.testing.assert_close(ours[1].grad, exact[1].grad, **tolerance)


def test_swiglu_without_weights_equals_plain_operations() -> None:
    gate_up = torch.randn(2, 5, 24)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(gate_up, None), torch.nn.functional.silu(gate) * up)
