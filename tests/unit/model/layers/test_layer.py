import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch.utils._python_dispatch import TorchDispatchMode

from moelpr.model.layers import original_experts
from moelpr.model.layers.loading import build_model, logits
from moelpr.model.metrics.routing_sums import RoutingSums
from moelpr.model.model_spec import ModelSpec, MoeSpec
from tests.fake_gpu import transformer_engine_stub

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(params=[(1, 1), (3, 1), (1, 2), (3, 2)], ids=lambda param: "m={},C={}".format(*param))
def spec(request, moe_spec: ModelSpec) -> ModelSpec:
    """First rounds of languages, and later ones in which the experts of the first are original experts."""
    m, copies = request.param
    return replace(moe_spec, moe=replace(moe_spec.moe, num_original_experts=m, original_copies=copies))


@pytest.fixture
def layer(spec: ModelSpec):
    return first_layer(spec)


def first_layer(spec: ModelSpec, **settings: Any):
    """The first MoE layer of a random model whose experts all differ."""
    torch.manual_seed(0)
    model = build_model(spec, **settings)
    layer = model.decoder.layers[0].mlp
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.2)
    return layer.train()


def plain_loop(layer, hidden_TH: torch.Tensor, first: int = 0) -> torch.Tensor:
    """sum over the K best places of softmax over their K logits times the expert's output, token by token.

    `first` is the first place that a token can choose.
    """
    dense, *others = layer.original_experts
    original = [*[dense] * layer.config.original_copies, *others]
    fc1, fc2 = (
        torch.stack([*(getattr(expert, name).weight for expert in original), *stack.weight])
        for name, stack in (("linear_fc1", layer.experts.linear_fc1), ("linear_fc2", layer.experts.linear_fc2))
    )
    outputs = []
    for hidden in hidden_TH:
        best = torch.topk((layer.router.weight @ hidden)[first:], layer.router.topk)
        output = torch.zeros_like(hidden)
        for weight, expert in zip(torch.softmax(best.values, dim=0), best.indices + first, strict=True):
            gate, up = (fc1[expert] @ hidden).chunk(2)
            output = output + weight * (fc2[expert] @ (torch.nn.functional.silu(gate) * up))
        outputs.append(output)
    return torch.stack(outputs)


@pytest.mark.parametrize("sums_by_token", [False, True], ids=["CPU", "GPU"])
def test_output_and_gradients_equal_a_plain_loop_over_experts(layer, monkeypatch, sums_by_token) -> None:
    monkeypatch.setattr(original_experts, "_sums_by_token", lambda rows: sums_by_token)
    compare_with_a_plain_loop(layer)


def output_and_gradients(layer, run, hidden, target) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output [T, H] of `run`, and the gradients of its input and of the layer's parameters by name."""
    layer.zero_grad()
    given = hidden.clone().requires_grad_()
    output = run(given).flatten(0, -2)
    (output * target).sum().backward()
    return output, {"hidden": given.grad, **{name: weight.grad for name, weight in layer.named_parameters()}}


def compare_with_a_plain_loop(layer, first: int = 0, names: tuple[str, ...] = ()) -> None:
    """Check the output and gradients, by default all of them."""
    hidden, target = torch.randn(7, 3, 32), torch.randn(21, 32)
    loop, expected = output_and_gradients(layer, lambda x: plain_loop(layer, x.flatten(0, 1), first), hidden, target)
    ours, actual = output_and_gradients(layer, lambda x: layer(x)[0], hidden, target)
    torch.testing.assert_close(ours, loop, rtol=1e-5, atol=1e-6)
    for name in names or expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


class RowsOfTokens(TorchDispatchMode):
    """Counts results that are as large as the rows of 24 tokens, or larger."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **kwargs or {})
        if not func.is_view and func._schema.name not in ("aten::empty", "aten::detach"):
            self.number += torch.is_tensor(result) and result.dim() == 2 and result.numel() >= 24 * 32
        return result


@pytest.mark.parametrize("sums_by_token", [False, True], ids=["CPU", "GPU"])
def test_frozen_original_experts_take_as_many_launches_whatever_their_number(
    moe_spec: ModelSpec, monkeypatch, sums_by_token: bool
) -> None:
    monkeypatch.setattr(original_experts, "_sums_by_token", lambda rows: sums_by_token)
    numbers = []
    for m in (2, 9):
        layer = first_layer(replace(moe_spec, moe=replace(moe_spec.moe, num_original_experts=m)))
        layer.original_experts.requires_grad_(False)
        hidden = torch.randn(24, 1, 32, requires_grad=True)
        expected = plain_loop(layer, hidden.flatten(0, 1))
        (gradient,) = torch.autograd.grad(expected.square().sum(), hidden)
        actual = layer(hidden)[0].flatten(0, 1)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        with RowsOfTokens() as rows:
            actual.square().sum().backward()
        torch.testing.assert_close(hidden.grad, gradient, rtol=1e-4, atol=1e-5)
        numbers.append(rows.number)
    assert numbers[0] == numbers[1], numbers


@pytest.mark.parametrize("only_original", [False, True])
def test_the_permutation_of_transformer_engine_changes_no_result(moe_spec, monkeypatch, only_original: bool) -> None:
    """A stand-in with its refusals; also if there are no rows to send."""
    for name in "permute permute_with_probs unpermute sort_chunks_by_index sort_chunks_by_index_with_probs".split():
        monkeypatch.setattr(moe_utils, f"fused_{name}", getattr(transformer_engine_stub, f"moe_{name}"))
    monkeypatch.setattr(moe_utils, "HAVE_TE", True)
    spec = replace(moe_spec, moe=replace(moe_spec.moe, num_original_experts=2))
    hidden, target, results = torch.randn(5, 3, 32), torch.randn(15, 32), []
    for fuses in (True, False):
        layer = first_layer(spec, moe_permute_fusion=fuses)
        if only_original:
            hidden[..., 0] = 1.0
            with torch.no_grad():
                layer.router.weight[:2, 0] = 100.0
        results.append(output_and_gradients(layer, lambda x, layer=layer: layer(x)[0], hidden, target))
        assert layer.token_dispatcher.config.moe_permute_fusion == (fuses and not only_original)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert only_original == (not results[0][1]["experts.linear_fc1.weight"].any())


@pytest.mark.parametrize("m", [1, 3])
def test_with_one_choice_the_gate_weight_is_one_and_routers_get_no_gradient(moe_spec, m) -> None:
    layer = first_layer(replace(moe_spec, moe=replace(moe_spec.moe, topk=1, num_original_experts=m)))
    compare_with_a_plain_loop(layer)
    assert not layer.router.weight.grad.any() and layer.experts.linear_fc1.weight.grad.any()
    weights, is_chosen = layer.router(torch.randn(7, 3, 32))
    assert torch.equal(weights, is_chosen.float()) and bool((is_chosen.sum(dim=1) == 1).all())


def test_stage_1_may_keep_tokens_from_the_original_experts(spec: ModelSpec) -> None:
    """In training, tokens choose among the new experts as if there were no others; otherwise among all."""
    layer = first_layer(spec, stage1_experts="new")
    p = layer.config.num_original_places
    compare_with_a_plain_loop(layer, p, ("hidden", "router.weight", "experts.linear_fc1.weight"))
    gradient = layer.router.weight.grad
    assert not gradient[:p].any() and gradient[p:].all()
    hidden = torch.randn(7, 3, 32)
    in_training, in_use = layer(hidden)[0].flatten(0, 1), layer.eval()(hidden)[0].flatten(0, 1)
    torch.testing.assert_close(in_use, plain_loop(layer, hidden.flatten(0, 1)), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(in_use, in_training)


@pytest.mark.parametrize("favorite", [0, 3])
def test_all_tokens_may_choose_the_same_two_experts(layer, favorite: int) -> None:
    """New experts without tokens get a gradient of zero."""
    p, num_experts = layer.config.num_original_places, len(layer.router.weight)
    chosen = (favorite, (favorite + 1) % num_experts)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[chosen, 0] = 10.0
    hidden = torch.randn(6, 2, 32)
    hidden[..., 0] = 1.0
    output = layer(hidden)[0]
    output.sum().backward()
    torch.testing.assert_close(output.flatten(0, 1), plain_loop(layer, hidden.flatten(0, 1)), rtol=1e-5, atol=1e-6)
    for expert in (expert for expert in range(p, num_experts) if expert not in chosen):
        assert torch.equal(layer.experts.linear_fc1.weight.grad[expert - p], torch.zeros(96, 32))


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_tokens_that_choose_only_copies_get_the_dense_models_logits_bit_for_bit(dense_spec, topk) -> None:
    """Whatever the new experts compute, and however the token's weight is divided over the copies."""
    dense = build_model(dense_spec)
    copied = build_model(replace(dense_spec, moe=MoeSpec(4, topk, (0, 1, 2), original_copies=topk)))
    state = {name.replace(".mlp.", ".mlp.original_experts.0."): part for name, part in dense.state_dict().items()}
    unknown = copied.load_state_dict(state, strict=False)
    assert not [key for key in unknown.unexpected_keys if "_extra_state" not in key]
    assert all(".router." in key or ".experts." in key for key in unknown.missing_keys if "_extra_state" not in key)
    prefers_copies = torch.tensor([100.0] * topk + [0.0] * 4)
    for layer in copied.decoder.layers:
        layer.mlp.router.gating = lambda hidden: torch.randn(*hidden.shape[:2], topk + 4) + prefers_copies
        torch.nn.init.normal_(layer.mlp.experts.linear_fc1.weight)
    tokens = torch.randint(0, 128, (2, 48))
    assert torch.equal(logits(copied, tokens), logits(dense, tokens))


def balance_loss(scores_TE: torch.Tensor, is_chosen_TE: torch.Tensor, topk: int) -> torch.Tensor:
    """The paper's load-balancing loss (section 3.2): sum_i f_i P_i, 1 under perfect balance.

    f_i = E/(K T) * (tokens that chose expert i), P_i = mean score of expert i.
    """
    num_tokens, num_experts = scores_TE.shape
    fraction_E = is_chosen_TE.sum(dim=0) * (num_experts / (topk * num_tokens))
    return (fraction_E * scores_TE.mean(dim=0)).sum()


@pytest.mark.parametrize("stage1_experts", ["all", "new"])
def test_the_balance_loss_in_training_is_the_papers(spec: ModelSpec, stage1_experts: str) -> None:
    """Megatron's auxiliary loss, attached with our coefficient, has the gradient of balance_loss.

    It is over the experts that tokens can choose.
    """
    layer = first_layer(spec, stage1_experts=stage1_experts)
    first = layer.config.num_original_places if stage1_experts == "new" else 0
    layer.router.config.moe_aux_loss_coeff = 0.5
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    hidden = torch.randn(9, 2, 32)
    weights, chosen = layer.router(hidden)
    (weights * 0).sum().backward()
    actual = layer.router.weight.grad.clone()
    layer.zero_grad()
    scores = torch.softmax(hidden.flatten(0, 1) @ layer.router.weight[first:].T, dim=-1)
    (0.5 * balance_loss(scores, chosen[:, first:], topk=2)).backward()
    torch.testing.assert_close(actual, layer.router.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 2)])
@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_the_lpr_gradient_is_that_of_the_mean_over_original_tokens(spec, variant, layers) -> None:
    """Two micro-batches, one with few original-language tokens, equal the full batch computed by hand."""
    spec = replace(spec, moe=replace(spec.moe, layers=layers))
    router = build_model(spec, lpr_loss_coeff=0.3, lpr_loss=variant).decoder.layers[0].mlp.router.train()
    hidden = torch.randn(8, 4, 32)
    is_original = torch.zeros(8, 4, dtype=torch.bool)
    is_original[:, 0] = True
    is_original[0, 3] = True
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1) / 2)  # Megatron's value for two micro-batches
    router.model_config.lpr_token_weight = torch.tensor(2.0) / is_original.sum()
    for columns in (slice(0, 2), slice(2, 4)):
        weights, _ = router(hidden[:, columns].contiguous(), is_original[:, columns].contiguous())
        (weights * 0).sum().backward()
    actual = router.weight.grad.clone()
    router.zero_grad()
    per_layer = 0.3 / len(layers)
    scores = torch.softmax(hidden.flatten(0, 1) @ router.weight.T, dim=-1)
    if variant == "reference":
        scores = torch.softmax(scores, dim=-1)
    losses = -scores[is_original.flatten(), : spec.moe.num_original_places].sum(dim=-1).log()
    (per_layer * losses.mean()).backward()
    torch.testing.assert_close(actual, router.weight.grad, rtol=1e-4, atol=1e-7)


def test_routing_sums_count_first_choices_by_language(layer) -> None:
    """Any of the original experts counts."""
    hidden = torch.randn(5, 2, 32)
    is_original = torch.arange(10).view(5, 2) % 3 > 0
    layer.router(hidden, is_original)
    sums = RoutingSums.from_vectors(layer.router.routing_sums[None])
    p = layer.config.num_original_places
    first_is_original = (hidden @ layer.router.weight.T).argmax(dim=-1) < p
    scores = torch.softmax(hidden.flatten(0, 1) @ layer.router.weight.T, dim=-1)
    losses = -scores[is_original.flatten(), :p].sum(dim=-1).log()
    torch.testing.assert_close(sums.scores[0], scores.sum(dim=0))
    torch.testing.assert_close(sums.router_scores()[0], scores.mean(dim=0))
    torch.testing.assert_close(sums.lpr_loss[0], losses.sum())
    torch.testing.assert_close(sums.mean_lpr_loss(), losses.mean())

    def by_group(mask: torch.Tensor) -> list[int]:
        return [(mask & group).sum().item() for group in (is_original, ~is_original)]

    assert sums.tokens[0].tolist() == by_group(torch.ones_like(is_original))
    assert sums.original_first[0].tolist() == by_group(first_is_original)
    _, is_chosen = layer.router(hidden, is_original)
    has_only_original = ~is_chosen[:, p:].any(dim=1).view(5, 2)
    assert sums.all_original[0].tolist() == by_group(has_only_original)
    assert torch.equal(sums.choices[0], is_chosen.sum(dim=0).float())
    assert sums.token_shares().sum().item() == pytest.approx(is_chosen.sum().item() / 10)


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_of_a_micro_batch_stays_after_it(layer, recompute: bool) -> None:
    """Neither its graph nor its hidden state, which a recomputed layer holds with its gradient."""
    layer.moe_layer_recompute = recompute
    seen = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(weakref.ref(inputs[0])))
    layer.router.register_forward_pre_hook(lambda _, inputs: seen.append(weakref.ref(inputs[0])))
    layer(torch.randn(9, 2, 32, requires_grad=True) * 1)[0].sum().backward()
    assert len(seen) >= 2 and not any(reference() is not None for reference in seen)


def test_every_module_with_a_weight_is_called(layer) -> None:
    """Megatron waits for an overlapped parameter gather in a hook of the call; otherwise the weight may be stale."""
    owners = {name for name, module in layer.named_modules() if list(module.parameters(recurse=False))}
    called = set()
    for name in owners:
        layer.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name))
    layer(torch.randn(6, 2, 32))
    assert called == owners
