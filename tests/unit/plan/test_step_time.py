import itertools
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelpr.model.model_spec import ModelSpec, MoeSpec, NewTokens
from moelpr.plan.candidates import fitting
from moelpr.plan.gpus import GPUS, Cluster, Gpu
from moelpr.plan.layouts import RECOMPUTES, PlannedLayout
from moelpr.plan.memory import Workload, model_parts, stage_memories
from moelpr.plan.step_time import (
    LINK_EFFICIENCY,
    MATMUL_EFFICIENCY,
    MEMORY_EFFICIENCY,
    StepTime,
    _Links,
    bubble,
    expert_traffic,
    stage_flops,
    step_time,
)
from tests.unit.conftest import SHAPE
from tests.unit.plan.conftest import ROUTING, SPEC, WORKLOAD

PARTS = model_parts(SPEC)
# A layer with 4 tokens has an original row for half of them, a new one for all and a second one for half.
EXPERT = 3 * 8 * 16
ATTENTION, ROUTER = 2 * 4 * (16 * 8 + 16 + 8 * 8), 2 * 4 * 3 * 8
ORIGINAL, NEW = 2 * 2 * EXPERT, 2 * 6 * EXPERT
CORE = 2 * 4 * 4 * 8
FORWARD = ATTENTION + ROUTER + ORIGINAL + NEW + CORE
OUTPUT = 2 * 4 * 128 * 8  # the vocabulary of 100 is padded to 128


def flops(layout: PlannedLayout = PlannedLayout(), workload: Workload = WORKLOAD, pp_rank: int = 0):  # noqa: B008
    return stage_flops(SPEC, PARTS, layout, workload, pp_rank, ROUTING)


def test_operations_of_both_stages() -> None:
    """Nothing trains below the first layer's experts, of which stage 1 needs the down projection's input gradient."""
    both = 2 * FORWARD + (FORWARD + CORE) + 2 * ROUTER + 2 * OUTPUT
    assert flops() == (pytest.approx(both + 2 * NEW + NEW / 3), 0)
    assert flops(workload=replace(WORKLOAD, stage="stage2")) == (both, 0)


def test_operations_of_new_tokens_rows() -> None:
    """The embedding's gradient requires that of every layer's input, the output layer's one more product."""
    layout, tokens = PlannedLayout(), NewTokens(first=70, number=30, base_vocab_size=100)
    stage0 = 2 * (FORWARD + (FORWARD + CORE)) + 2 * OUTPUT + 2 * 4 * 30 * 8
    stage1 = stage0 + 2 * (ROUTER + NEW)
    for is_untied in (True, False):
        shape = SPEC.megatron_args | {"untie_embeddings_and_output_weights": is_untied}
        spec = replace(SPEC, megatron_args=shape, new_tokens=tokens)
        for changes, expected in (({"stage": "stage0"}, stage0), ({"new_embeddings": True}, stage1)):
            workload = replace(WORKLOAD, **changes)
            assert stage_flops(spec, model_parts(spec), layout, workload, 0, ROUTING) == (expected, 0)
        # The first of two ranks has 128 rows and computes all 30; a rank has no more rows than these.
        split = stage_flops(spec, model_parts(spec), PlannedLayout(tp=2), replace(WORKLOAD, stage="stage0"), 0, ROUTING)
        assert split.once == pytest.approx((FORWARD + (FORWARD + CORE)) + 2 * OUTPUT + 2 * 4 * 30 * 8)
    more = replace(SPEC, megatron_args=SPEC.megatron_args | {"vocab_size": 101 + 128})
    grown = stage_flops(more, model_parts(more), layout, WORKLOAD, 0, ROUTING)
    assert grown.once == pytest.approx(flops().once + 2 * OUTPUT)


def test_recompute_repeats_the_forward_pass_of_experts_or_layers() -> None:
    once = 2 * (FORWARD + (FORWARD + CORE) + ROUTER + NEW) + 2 * OUTPUT  # the embedding's output requires a gradient
    assert flops(PlannedLayout(recompute="selective")) == (once, 2 * (ROUTER + ORIGINAL + NEW))
    assert flops(PlannedLayout(recompute="full")) == (once, 2 * FORWARD)


def test_a_pipeline_divides_the_layers_and_a_tensor_parallel_rank_the_products() -> None:
    stages = [flops(PlannedLayout(pp=2), pp_rank=rank).once for rank in (0, 1)]
    assert sum(stages) == pytest.approx(flops().once)
    assert stages[1] == pytest.approx(FORWARD + (FORWARD + CORE) + ROUTER + NEW + 2 * OUTPUT)
    padded = replace(SPEC, megatron_args=SPEC.megatron_args | {"vocab_size": 256})
    whole, half = (
        stage_flops(padded, model_parts(padded), PlannedLayout(tp=tp), WORKLOAD, 0, ROUTING) for tp in (1, 2)
    )
    assert half.once == pytest.approx(whole.once / 2)


def test_training_everything_costs_three_forward_passes() -> None:
    """One for the gradients of inputs, and one for those of weights; attention has no weights, but two inputs."""
    everything = replace(WORKLOAD, train_everything=True)
    assert flops(workload=everything).once == pytest.approx(3 * (2 * FORWARD + OUTPUT))
    dense, workload = SPEC.as_dense(), replace(WORKLOAD, stage="dense")
    forward = ATTENTION + CORE + 2 * 4 * EXPERT
    counted = stage_flops(dense, model_parts(dense), PlannedLayout(), workload, 0)
    assert counted == (pytest.approx(3 * (2 * forward + OUTPUT)), 0)
    assert expert_traffic(dense, PlannedLayout(dp=2), workload) == (0, 0)


def test_a_pipeline_waits_for_its_first_and_last_micro_batch() -> None:
    assert bubble(PlannedLayout(pp=4), num_microbatches=12) == pytest.approx(3 / 15)


def test_expert_traffic_by_hand() -> None:
    """3 of 6 rows leave the rank, out (16 + 4 bytes) and back (16), forward and backward, 2 layers, 2 micro-batches."""
    layout = PlannedLayout(ep=2, dp=2)
    assert expert_traffic(SPEC, layout, WORKLOAD, ROUTING) == (3 * (16 + 4 + 16) * 2 * 2 * 2, 0)
    recomputed = replace(layout, recompute="full")
    assert expert_traffic(SPEC, recomputed, WORKLOAD, ROUTING) == (3 * (16 + 4 + 16) * 3 * 2 * 2, 0)


def test_expert_tensor_parallel_ranks_gather_new_rows_and_every_token() -> None:
    """2 tokens per rank: it receives the other rank's 3 rows and 2 tokens; 4 micro-batches, 2 layers."""
    for num_original, weights in ((1, 0), (3, 2 * 2 * 4)):  # two tokens, two more original experts
        spec = replace(SPEC, moe=replace(SPEC.moe, num_original_experts=num_original))
        traffic = expert_traffic(spec, PlannedLayout(tp=2, etp=2), WORKLOAD, ROUTING)
        assert traffic == (0, ((3 + 2) * (16 + 4 + 16) + weights) * 2 * 2 * 4)


# A GPU whose parts are so slow that each has its own digit.
LINKS = {"node_bandwidth": 1e3 / LINK_EFFICIENCY, "network_bandwidth": 1e2 / LINK_EFFICIENCY}
SLOW = Gpu(1, flops=1e6 / MATMUL_EFFICIENCY, memory_bandwidth=1e12, **LINKS)


def predict(layout: PlannedLayout, cluster: Cluster, workload: Workload = WORKLOAD) -> StepTime:
    return step_time(
        SPEC, PARTS, layout, workload, cluster, stage_memories(SPEC, PARTS, layout, workload, ROUTING), ROUTING
    )


def test_a_step_on_one_gpu_is_its_products_and_its_memory_accesses() -> None:
    one = Cluster(1, 8, 1, 0, SLOW)
    actual = predict(PlannedLayout(), one)
    assert actual == StepTime(pytest.approx(4 * flops().once / 1e6), actual.memory_s, 0, 0, 0, 0)
    assert actual.tokens_per_s(WORKLOAD, one) == pytest.approx(16 / (actual.products_s + actual.memory_s))
    (memory,) = stage_memories(SPEC, PARTS, PlannedLayout(), WORKLOAD, ROUTING)
    logits = 4 * 128 * 2  # read twice, and overwritten
    per_micro_batch = 2 * (memory.parameter_bytes + memory.gradient_bytes) + 4 * memory.activation_bytes + 3 * logits
    update = 2 * memory.optimizer_bytes + 3 * memory.gradient_bytes
    assert actual.memory_s * 1e12 * MEMORY_EFFICIENCY == pytest.approx(4 * per_micro_batch + update)


def test_experts_exchange_through_the_slower_of_two_networks() -> None:
    layout = PlannedLayout(ep=2, dp=2)
    sent = expert_traffic(SPEC, layout, WORKLOAD, ROUTING).all_to_all
    assert predict(layout, Cluster(2, 2, 1, 0, SLOW)).experts_s == pytest.approx(sent / 1e3)
    assert predict(layout, Cluster(2, 1, 1, 0, SLOW)).experts_s == pytest.approx(sent / 1e2)


@pytest.mark.parametrize("ep, dp, in_node", [(5, 40, 1), (6, 24, 2), (16, 16, 8)])
def test_the_worst_placed_rank_of_a_group_decides_how_much_leaves_its_node(ep: int, dp: int, in_node: int) -> None:
    """With groups of 5 on nodes of 8, it was a negative part: the exchange seemed five times as fast."""
    links = _Links(PlannedLayout(ep=ep, dp=dp), Cluster(dp, 8, 1, 0, SLOW))
    outside = (ep - in_node) / (ep - 1)
    assert links.all_to_all_s(1e6) == pytest.approx(1e6 * max(outside / 1e2, (1 - outside) / 1e3))
    groups = [range(start, start + ep) for start in range(0, dp - ep + 1, ep)]
    same = [sum(other // 8 == rank // 8 for other in group) for group in groups for rank in group]
    assert min(same) == in_node


def test_only_what_a_micro_batch_does_not_hide_of_the_reduction_counts() -> None:
    """Two ranks: half of the new experts' gradients (4 bytes) and weights (2) is exchanged."""
    new_experts = 2 * 2 * EXPERT
    layout, pair = PlannedLayout(dp=2), Cluster(2, 2, 1, 0, SLOW)
    actual = predict(layout, pair)
    hidden_s = actual.products_s / 2 + actual.memory_s / 2
    assert actual.gradients_s == pytest.approx(new_experts * 6 / 2 / 1e3 - hidden_s, rel=1e-3)
    assert predict(layout, replace(pair, gpu=replace(SLOW, node_bandwidth=1e9))).gradients_s == 0
    assert predict(layout, pair, replace(WORKLOAD, stage="stage2")).gradients_s == 0


def test_an_optimizer_on_the_host_takes_its_memory_and_its_bus() -> None:
    """A trained parameter moves 4 bytes there and 4 back, and 28 in its memory, in place of 24 on the GPU."""
    one = Cluster(1, 1, 1, 0, SLOW)
    on_gpu, on_host = (
        predict(PlannedLayout(), one, replace(WORKLOAD, optimizer_cpu_offload=is_on_host)).memory_s
        for is_on_host in (False, True)
    )
    trained = 2 * (2 * EXPERT + 3 * 8)
    gpu_s = 24 / (SLOW.memory_bandwidth * MEMORY_EFFICIENCY)
    assert on_host - on_gpu == pytest.approx(trained * (8 / (32e9 * LINK_EFFICIENCY) + 28 / 50e9 - gpu_s))


SIX_SHAPE = SHAPE | dict(num_layers=6, hidden_size=512, ffn_hidden_size=1024, num_attention_heads=8)
SIX_SHAPE |= dict(num_query_groups=4, kv_channels=64, max_position_embeddings=4096, vocab_size=32000)
SIX_LAYERS = ModelSpec("qwen2", "bfloat16", SIX_SHAPE, MoeSpec(4, 2, (0, 1, 2, 3, 4, 5)))
SIX_PARTS = model_parts(SIX_LAYERS)
# Sixteen ranks on nodes of four.
layouts = st.sampled_from(
    [
        PlannedLayout(tp, pp, ep, etp, 16 // (tp * pp), recompute=recompute)
        for tp, pp, ep, recompute in itertools.product((1, 2, 4), (1, 2), (1, 2, 4), RECOMPUTES)
        for etp in {1, tp}
        if 16 % (pp * ep * etp) == 0
    ]
)
batches = {"micro_batch_size": st.sampled_from([1, 4]), "global_batch_size": st.sampled_from([64, 512])}
stages, lengths = st.sampled_from(["stage1", "stage2"]), st.sampled_from([256, 4096])
workloads = st.builds(Workload, stage=stages, seq_length=lengths, **batches)
gpus = st.sampled_from(list(GPUS.values()))
rates = st.sampled_from([field.name for field in fields(Gpu) if field.name != "memory_gib"])


def six_layers_s(layout: PlannedLayout, workload: Workload, gpu: Gpu) -> float:
    memories = stage_memories(SIX_LAYERS, SIX_PARTS, layout, workload)
    cluster = Cluster(layout.world_size, 4, 80, 8, gpu)
    return step_time(SIX_LAYERS, SIX_PARTS, layout, workload, cluster, memories).total_s


@given(layout=layouts, workload=workloads, gpu=gpus, factor=st.floats(1, 100), part=rates)
@settings(max_examples=150, deadline=None)
def test_no_step_is_slower_on_a_faster_gpu(layout, workload, gpu, factor, part) -> None:
    faster = replace(gpu, **{part: getattr(gpu, part) * factor})
    assert 0 < six_layers_s(layout, workload, faster) <= six_layers_s(layout, workload, gpu) * (1 + 1e-9)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("name", GPUS)
def test_a_run_is_never_slower_on_more_gpus(name: str, stage: str) -> None:
    """The best layout with the paper's batch; with tiny ones exchanges would outweigh the work that is divided."""
    workload = Workload(stage, 1024, 1, 512)
    best = [
        min(one.step_time.total_s for one in fitting(SIX_LAYERS, workload, Cluster(gpus, 8, 80, 8, GPUS[name])))
        for gpus in (1, 2, 4, 8, 16, 32, 64)
    ]
    assert best == sorted(best, reverse=True)
