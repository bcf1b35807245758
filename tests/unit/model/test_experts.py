"""The grouped experts equal a plain loop, in fp32 and bf16; frozen ones get no gradient."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from moelpr.model.freezing import freeze
from moelpr.model.layer import OverlappedOriginalExperts
from moelpr.model.loading import build_model
from moelpr.model_spec import ModelSpec

pytestmark = pytest.mark.usefixtures("megatron")

# Rows of four experts, one of them without any.
TOKENS_PER_EXPERT = torch.tensor([5, 0, 9, 2])


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def experts(request, moe_spec: ModelSpec):
    torch.manual_seed(0)
    bf16 = request.param == torch.bfloat16
    model = build_model(moe_spec, bf16=bf16, params_dtype=request.param)
    experts = model.decoder.layers[0].mlp.experts
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.2)
    return experts


def rows_and_weights(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randn(16, 32).to(dtype).requires_grad_()
    return rows, torch.rand(16).requires_grad_()


def loop(experts, rows: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Expert after expert, in `dtype` throughout."""
    outputs = []
    parts = zip(rows.split(TOKENS_PER_EXPERT.tolist()), weights.split(TOKENS_PER_EXPERT.tolist()), strict=True)
    for expert, (part, weight) in enumerate(parts):
        fc1, fc2 = (linear.weight[expert].to(dtype) for linear in (experts.linear_fc1, experts.linear_fc2))
        gate, up = (part.to(dtype) @ fc1.T).chunk(2, dim=-1)
        outputs.append((torch.nn.functional.silu(gate) * up * weight.to(dtype)[:, None]) @ fc2.T)
    return torch.cat(outputs)


def output_and_gradients(run, experts, rows, weights) -> list[torch.Tensor]:
    experts.zero_grad()
    rows.grad = weights.grad = None
    output = run()
    (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    leaves = (rows, weights, experts.linear_fc1.weight, experts.linear_fc2.weight)
    return [output.detach().float(), *(leaf.grad.float().clone() for leaf in leaves)]


def test_grouped_experts_equal_a_plain_loop(experts) -> None:
    """In fp32 up to rounding; in bf16 the error is at most 1.5 times that of a loop in bf16."""
    dtype = experts.linear_fc1.weight.dtype
    rows, weights = rows_and_weights(dtype)
    ours = output_and_gradients(lambda: experts(rows, TOKENS_PER_EXPERT, weights)[0], experts, rows, weights)
    exact = output_and_gradients(lambda: loop(experts, rows, weights, torch.float32), experts, rows, weights)
    if dtype == torch.float32:
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        return
    same_precision = output_and_gradients(lambda: loop(experts, rows, weights, dtype), experts, rows, weights)
    for a, b, reference in zip(ours, exact, same_precision, strict=True):
        assert (a - b).norm() <= 1.5 * (reference - b).norm()
        assert (a - b).norm() <= 0.02 * b.norm()


def test_frozen_experts_propagate_gradients_and_get_none(experts) -> None:
    rows, weights = rows_and_weights(experts.linear_fc1.weight.dtype)
    experts.requires_grad_(False)
    output = experts(rows, TOKENS_PER_EXPERT, weights)[0]
    output.backward(torch.randn_like(output))
    assert rows.grad.abs().sum() > 0
    assert weights.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in experts.parameters())


def test_a_frozen_original_expert_saves_no_input(moe_spec: ModelSpec) -> None:
    """Its linear layers save only their weights, and get no gradient."""
    model = build_model(moe_spec)
    freeze([model], "stage1")
    original = model.decoder.layers[0].mlp.original_experts[0]
    saved = []
    hidden = torch.randn(6, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda x: x):
        original(hidden, per_token_scale=torch.rand(6))[0].sum().backward()
    assert hidden.data_ptr() not in {tensor.data_ptr() for tensor in saved}
    assert all(parameter.grad is None for parameter in original.parameters())


class Stream:
    """A CUDA stream that notes in `log` what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Noted(torch.Tensor):
    """A tensor that says which stream has used it, so that its memory is not given away before."""

    def record_stream(self, stream: Stream) -> None:
        stream.log.append(f"{stream.name} uses {tuple(self.shape)}")


@pytest.mark.parametrize("are_split", [False, True])
def test_the_side_stream_waits_and_is_waited_for_and_its_tensors_are_kept(monkeypatch, are_split) -> None:
    """On a GPU a missing wait is a race that a test may win. Split experts communicate, so they stay on main."""
    log: list[str] = []
    streams = [Stream("main", log)]

    @contextmanager
    def stream(inner: Stream) -> Iterator[None]:
        streams.append(inner)
        yield
        streams.pop()

    class Experts:
        def __init__(self) -> None:
            self.are_split = are_split

        def __call__(self, hidden: torch.Tensor, weights: torch.Tensor, chosen: list[torch.Tensor]) -> list[tuple]:
            log.append(f"{streams[-1].name} computes {[rows.tolist() for rows in chosen]}")
            return [(None if are_split else torch.zeros(2).as_subclass(Noted), torch.zeros(1).as_subclass(Noted))]

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(OverlappedOriginalExperts, "side_stream", Stream("side", log))
    weights = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.5, 1.0]]).as_subclass(Noted)
    overlapped = OverlappedOriginalExperts(Experts(), weights)  # type: ignore[arg-type]
    overlapped.pre_forward_comm(torch.zeros(3, 1, 4).as_subclass(Noted))
    overlapped.wait_current_stream()
    overlapped.linear_fc1_forward_and_act(torch.zeros(0))
    overlapped.post_forward_comm()
    own = "main" if are_split else "side"
    assert log == [
        f"{own} waits for main",
        f"{own} computes [[0, 2], [2]]",
        f"{own} uses (3, 1, 4)",
        f"{own} uses (3, 2)",
        f"main waits for {own}",
        *([] if are_split else ["main uses (2,)"]),
        "main uses (1,)",
    ]
