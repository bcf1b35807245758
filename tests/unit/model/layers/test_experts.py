from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from moelpr.model.layers import experts as layers_experts
from moelpr.model.layers.layer import OverlappedOriginalExperts
from moelpr.model.layers.loading import build_model
from moelpr.model.model_spec import ModelSpec

pytestmark = pytest.mark.usefixtures("megatron")

# Rows of four experts, one of them without any; more than a block of swiglu.py has.
TOKENS_PER_EXPERT = torch.tensor([5, 0, 190, 2])


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
    number = int(TOKENS_PER_EXPERT.sum())
    return torch.randn(number, 32).to(dtype).requires_grad_(), torch.rand(number).requires_grad_()


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


def test_without_a_kernel_for_all_experts_the_host_reads_no_number(experts, monkeypatch) -> None:
    """Products of single experts are those of torch's grouped_mm, which would wait in each, bit for bit."""
    rows, weights = rows_and_weights(experts.linear_fc1.weight.dtype)
    actual = []
    for takes_grouped_mm in (True, False):
        monkeypatch.setattr(layers_experts, "_takes_grouped_mm", lambda _, takes=takes_grouped_mm: takes)
        if not takes_grouped_mm:
            monkeypatch.delattr(torch.nn.functional, "grouped_mm")
        run = lambda: experts(rows, TOKENS_PER_EXPERT, weights)[0]  # noqa: E731
        actual.append(output_and_gradients(run, experts, rows, weights))
    assert all(torch.equal(a, b) for a, b in zip(*actual, strict=True))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, ...]]:
    """The arguments of grouped_mm, poisoned: NaN where some GPUs write nothing, for an expert's weight without rows."""
    calls = []

    def grouped_mm(left: torch.Tensor, right: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        calls.append((left, right, offs))
        sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
        if right.dim() == 3:
            return torch.cat([part @ one for part, one in zip(left.split(sizes), right, strict=True)])
        actual = left.new_full((len(sizes), left.shape[0], right.shape[1]), torch.nan)
        for expert, (columns, rows) in enumerate(zip(left.split(sizes, dim=1), right.split(sizes), strict=True)):
            if len(rows):
                actual[expert] = columns @ rows
        return actual

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm)
    return calls


in_bf16 = pytest.mark.parametrize("experts", [torch.bfloat16], indirect=True)


@in_bf16
@pytest.mark.parametrize("rows_of", [[5, 0, 9, 0], [0, 0, 0, 14], [3, 4, 3, 4], [0, 0, 0, 0]])
def test_idle_experts_have_a_gradient_of_zero(experts, calls, rows_of: list[int]) -> None:
    """Also if there are no rows at all, which do not reach grouped_mm."""
    rows = torch.randn(sum(rows_of), 32).bfloat16().requires_grad_()
    output, _ = experts(rows, torch.tensor(rows_of), torch.rand(sum(rows_of)))
    output.float().square().sum().backward()
    assert len(calls) == (6 if any(rows_of) else 0) and rows.grad.isfinite().all()
    for weight in experts.parameters():
        assert weight.grad.isfinite().all()
        assert [bool(gradient.any()) for gradient in weight.grad] == [number > 0 for number in rows_of]


@in_bf16
def test_the_arguments_of_grouped_mm_are_those_of_the_fast_kernels(experts, calls) -> None:
    """bf16 for both, rows and weights without copies, strides of whole 16 bytes, and ends as int32.

    On Hopper the kernels leave no gradient unwritten for weights that are the transpose of a contiguous tensor.
    """
    output, _ = experts(torch.randn(14, 32).bfloat16(), torch.tensor([3, 4, 3, 4]), torch.rand(14))
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


def micro_batches(experts, number: int) -> list[torch.Tensor]:
    """The `main_grad` of both weights, in which Megatron adds up micro-batches."""
    for batch in range(number):
        torch.manual_seed(batch)
        rows, weights = rows_and_weights(experts.linear_fc1.weight.dtype)
        output = experts(rows, TOKENS_PER_EXPERT, weights)[0]
        output.backward(torch.randn_like(output))
        for parameter in experts.parameters():
            if not parameter.grad_added_to_main_grad:
                parameter.main_grad.add_(parameter.grad)
            parameter.grad = None
    return [parameter.main_grad for parameter in experts.parameters()]


@pytest.mark.parametrize("number", [1, 3])
def test_gradients_that_are_added_in_the_product_are_the_same(experts, number: int) -> None:
    """In bf16 sums, that of a product is rounded once instead of twice."""
    dtype, sums = experts.linear_fc1.weight.dtype, []
    for experts.config.fuse_expert_gradients in (False, True):
        for parameter in experts.parameters():
            parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros_like(parameter), False
        sums.append(micro_batches(experts, number))
        assert {one.grad_added_to_main_grad for one in experts.parameters()} == {experts.config.fuse_expert_gradients}
    for apart, fused in zip(*sums, strict=True):
        assert fused[1].count_nonzero() == 0 and fused[0].count_nonzero() > 0
        if number == 1:
            assert torch.equal(apart, fused)
        else:
            tolerance = 1e-6 if dtype == torch.float32 else 1e-2
            assert (apart - fused).abs().max() <= tolerance * apart.abs().max()


def test_where_torch_cannot_add_to_sums_megatron_does(experts) -> None:
    """A CPU has no product of bf16 that adds to fp32; and no sums are there without Megatron's data parallelism."""
    experts.config.fuse_expert_gradients = True
    experts.linear_fc1.weight.main_grad = torch.zeros(experts.linear_fc1.weight.shape, dtype=torch.float64)
    rows, weights = rows_and_weights(experts.linear_fc1.weight.dtype)
    output = experts(rows, TOKENS_PER_EXPERT, weights)[0]
    output.backward(torch.randn_like(output))
    assert all(parameter.grad.count_nonzero() > 0 for parameter in experts.parameters())
    assert not experts.linear_fc1.weight.main_grad.any()


def test_swiglu_is_recomputed_bit_for_bit_and_not_kept(moe_spec: ModelSpec) -> None:
    """`--recompute-modules moe_act`."""
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    results, kept = [], []
    rows, weights = rows_and_weights(torch.float32)
    plain, other = (build_model(moe_spec, **one).decoder.layers[0].mlp.experts for one in ({}, recompute))
    other.load_state_dict(plain.state_dict())
    for experts in (plain, other):
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor, saved: dict = saved) -> torch.Tensor:
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        def run(experts=experts, note=note) -> torch.Tensor:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                return experts(rows, TOKENS_PER_EXPERT, weights)[0]

        results.append(output_and_gradients(run, experts, rows, weights))
        kept.append(sum(saved.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    ffn = moe_spec.megatron_args["ffn_hidden_size"]
    assert kept[0] - kept[1] == len(rows) * ffn * 4


@dataclass
class Stream:
    """A CUDA stream that notes in `log` what is asked of it."""

    name: str
    log: list[str]

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

    def experts(hidden: torch.Tensor, weights: torch.Tensor, num_chosen: list[int]) -> tuple:
        log.append(f"{streams[-1].name} computes {num_chosen}")
        return None if are_split else torch.zeros(2).as_subclass(Noted), torch.zeros(1).as_subclass(Noted)

    experts.are_split = are_split  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(OverlappedOriginalExperts, "side_stream", Stream("side", log))
    weights = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.5, 1.0]]).as_subclass(Noted)
    overlapped = OverlappedOriginalExperts(experts, weights)  # type: ignore[arg-type]
    overlapped.pre_forward_comm(torch.zeros(3, 1, 4).as_subclass(Noted))
    overlapped.wait_current_stream()
    overlapped.linear_fc1_forward_and_act(torch.zeros(0))
    overlapped.post_forward_comm()
    own = "main" if are_split else "side"
    assert log == [
        f"{own} waits for main",
        f"{own} computes [2, 1]",
        f"{own} uses (3, 1, 4)",
        f"{own} uses (3, 2)",
        f"main waits for {own}",
        *([] if are_split else ["main uses (2,)"]),
        "main uses (1,)",
    ]
