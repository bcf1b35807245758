"""The MoE layer on a GPU: its side stream changes no result, and Transformer Engine's experts compute what ours do."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from moelpr.model.model_spec import ModelSpec, MoeSpec
from tests.unit.conftest import SHAPE as TINY_SHAPE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
needs_transformer_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)

SHAPE = TINY_SHAPE | dict(num_layers=2, hidden_size=256, ffn_hidden_size=512, max_position_embeddings=128)
SHAPE |= dict(kv_channels=64, vocab_size=512)
SPEC = ModelSpec("qwen2", "bfloat16", SHAPE, MoeSpec(num_new_experts=4, topk=2, layers=(0, 1)))


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    from moelpr.model.megatron import megatron_fixes
    from moelpr.model.megatron.bootstrap import single_process

    megatron_fixes.install()
    with single_process():
        yield


def moe_layer(dtype: torch.dtype, **settings: object) -> torch.nn.Module:
    from moelpr.model.layers.loading import build_model

    torch.manual_seed(0)
    model = build_model(SPEC, bf16=dtype == torch.bfloat16, params_dtype=dtype, **settings)
    layer = model.decoder.layers[0].mlp.train()
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.05, generator=generator)
    return layer


def output_and_gradients(layer: torch.nn.Module, hidden: torch.Tensor) -> list[torch.Tensor]:
    layer.zero_grad()
    hidden = hidden.clone().requires_grad_()
    output, _ = layer(hidden)
    output.backward(torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output).to(output.dtype))
    return [output.detach(), hidden.grad, layer.router.weight.grad.clone()]


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_side_stream_changes_no_result(dtype: torch.dtype, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from moelpr.model.layers.layer import OverlappedOriginalExperts

    layer = moe_layer(dtype, num_original_experts=m)
    hidden = torch.randn(64, 4, 256, device="cuda", dtype=dtype)
    overlapped = output_and_gradients(layer, hidden)
    monkeypatch.setattr(OverlappedOriginalExperts, "side_stream", torch.cuda.current_stream())
    for a, b in zip(overlapped, output_and_gradients(layer, hidden), strict=True):
        torch.testing.assert_close(a, b)


def test_the_host_waits_for_the_gpu_once_per_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Megatron's dispatcher waits; torch reports every other wait that it knows of."""
    layer = moe_layer(torch.bfloat16, num_original_experts=2)
    hidden = torch.randn(64, 4, 256, device="cuda", dtype=torch.bfloat16)
    layer(hidden)  # allocates
    waits = []
    synchronize = torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: (waits.append(1), synchronize(event)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(hidden)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == [1]


@pytest.mark.parametrize("window", [None, (100, 0)])
def test_documents_apart_attend_as_with_a_call_per_document(window, monkeypatch) -> None:
    from megatron.core.transformer.enums import AttnMaskType

    from moelpr.model.layers import attention
    from moelpr.model.layers.loading import transformer_config

    ours = attention.SDPACoreAttention(transformer_config(SPEC, window_size=window), 1, AttnMaskType.causal, "self")
    shapes = [(512, 2, heads, 64) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    positions = torch.cat([torch.arange(length, device="cuda") for length in (1, 200, 311)]).expand(2, -1)
    edges, results = attention.document_edges(positions), []
    varlen_attention = attention._varlen_attention()
    assert varlen_attention is not None
    for kernel in (varlen_attention, None):
        monkeypatch.setattr(attention, "_varlen_attention", lambda kernel=kernel: kernel)
        output = ours(*inputs, edges)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
    for one, other in zip(*results, strict=True):
        assert (one - other).float().norm() <= 0.02 * other.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_without_rows_has_no_gradient(dtype: torch.dtype) -> None:
    """PyTorch issues 172439 and 193633: on some GPUs grouped_mm left such an expert's gradient unwritten."""
    layer = moe_layer(dtype)
    rows = torch.randn(32, 256, device="cuda", dtype=dtype)
    counts = torch.tensor([16, 0, 16, 0])
    output, _ = layer.experts(rows, counts, torch.ones(32, device="cuda"))
    output.backward(torch.ones_like(output))  # grouped_mm refuses the expanded gradient of a sum
    for weight in layer.experts.parameters():
        assert weight.grad is not None
        moved = weight.grad.float().flatten(1).abs().amax(dim=1)
        assert (moved > 0).tolist() == [True, False, True, False]
        assert moved.isfinite().all()


@pytest.mark.parametrize("fuses", [False, True])
def test_gradients_added_in_the_product_are_those_added_apart(fuses: bool) -> None:
    """In fp32 sums of bf16 gradients, over two micro-batches and against products in fp32."""
    experts = moe_layer(torch.bfloat16, fuse_expert_gradients=fuses).experts
    weight, counts = experts.linear_fc2.weight, torch.tensor([16, 0, 9, 7])
    for parameter in experts.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    expected = torch.zeros_like(weight, dtype=torch.float32)
    for seed in range(2):
        torch.manual_seed(seed)
        rows = torch.randn(32, 256, device="cuda", dtype=torch.bfloat16)
        output, _ = experts(rows, counts, torch.ones(32, device="cuda"))
        gradient = torch.randn_like(output)
        output.backward(gradient)
        for parameter in experts.parameters():
            assert parameter.grad_added_to_main_grad == fuses
            if not fuses:
                parameter.main_grad.add_(parameter.grad)
            parameter.grad = None
        parts = zip(rows.split(counts.tolist()), gradient.split(counts.tolist()), strict=True)
        for expert, (part, out) in enumerate(parts):
            gate, up = (part.float() @ experts.linear_fc1.weight[expert].float().T).chunk(2, dim=-1)
            expected[expert] += out.float().T @ (torch.nn.functional.silu(gate) * up)
    assert (weight.main_grad - expected).norm() <= 0.02 * expected.norm()


@needs_transformer_engine
def test_transformer_engines_experts_compute_what_ours_do() -> None:
    ours, theirs = moe_layer(torch.bfloat16), moe_layer(torch.bfloat16, moe_grouped_gemm=True)
    with torch.no_grad():
        theirs.router.weight.copy_(ours.router.weight)
        for name in ("linear_fc1", "linear_fc2"):
            getattr(theirs.original_experts[0], name).weight.copy_(getattr(ours.original_experts[0], name).weight)
            for expert in range(4):
                target = getattr(getattr(theirs.experts, name), f"weight{expert}")
                target.copy_(getattr(ours.experts, name).weight[expert])
    hidden = torch.randn(64, 4, 256, device="cuda", dtype=torch.bfloat16)
    for a, b in zip(output_and_gradients(ours, hidden), output_and_gradients(theirs, hidden), strict=True):
        assert (a - b).float().norm() <= 0.02 * b.float().norm()


@needs_transformer_engine
@pytest.mark.parametrize("settings", [{"moe_permute_fusion": True}, {"moe_router_fusion": True}])
@pytest.mark.parametrize("only_original", [False, True])
def test_transformer_engines_fusions_change_no_result(settings: dict[str, bool], only_original: bool) -> None:
    """Also if no token chooses a new expert."""
    hidden, results = torch.randn(64, 4, 256, device="cuda", dtype=torch.bfloat16), []
    for fusions in ({}, settings):
        layer = moe_layer(torch.bfloat16, num_original_experts=2, **fusions)
        if only_original:
            hidden[..., 0] = 1.0
            with torch.no_grad():
                layer.router.weight[:2, 0] = 100.0
        results.append(output_and_gradients(layer, hidden))
    for a, b in zip(*results, strict=True):
        assert (a - b).float().norm() <= 0.02 * b.float().norm()


@needs_transformer_engine
def test_both_kinds_of_experts_have_the_same_checkpoint_keys() -> None:
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}

    def keys(layer: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        state = layer.experts.sharded_state_dict("mlp.experts.", (), metadata)
        apply_factories(state)
        actual = {}
        for value in state.values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, ShardedObject):  # `omit_extra_state` keeps it out of checkpoints
                    assert "_extra_state" in tensor.key and tensor.data.numel() == 0
                    continue
                assert isinstance(tensor, ShardedTensor)
                actual[tensor.key] = tensor.global_shape
        return actual

    assert keys(moe_layer(torch.bfloat16)) == keys(moe_layer(torch.bfloat16, moe_grouped_gemm=True))
