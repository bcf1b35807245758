"""The layouts to choose from, which the trainer accepts, their traffic worked out by hand, and the rule of thumb."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moelpr.layouts import RECOMPUTES, PlannedLayout
from moelpr.megatron_patches import cpu, megatron_fixes
from moelpr.model_spec import ModelSpec, MoeSpec
from moelpr.plan.candidates import Cluster, bubble, expert_traffic, legal_layouts, preference, relative_time
from moelpr.plan.memory import Routing, Workload, model_parts
from tests.unit.conftest import SHAPE as TINY_SHAPE
from tests.unit.plan.conftest import ROUTING
from tests.unit.plan.conftest import SPEC as SMALL_SPEC
from tests.unit.plan.conftest import WORKLOAD as SMALL_WORKLOAD

cpu.install()
megatron_fixes.install()

SPEC = replace(SMALL_SPEC, moe=MoeSpec(num_new_experts=3, topk=2, layers=(0, 1)))
PARTS = model_parts(SPEC)
WORKLOAD = Workload("stage1", seq_length=4, micro_batch_size=1, global_batch_size=16)
EXPERT = 3 * 8 * 16
ATTENTION = 16 * 8 + 16 + 8 * 8


def test_recompute_costs_the_fraction_of_the_forward_pass_that_it_repeats() -> None:
    experts, others, output = 2 * 2 * EXPERT, 2 * ATTENTION, 100 * 8
    once = 2 * (experts + others + output) + experts * 3 / 4
    assert relative_time(SPEC, PARTS, PlannedLayout(), WORKLOAD) == 1
    selective = relative_time(SPEC, PARTS, PlannedLayout(recompute="selective"), WORKLOAD)
    assert selective == pytest.approx(1 + experts / once)
    assert relative_time(SPEC, PARTS, PlannedLayout(recompute="full"), WORKLOAD) == pytest.approx(
        1 + (experts + others) / once
    )
    in_stage2 = relative_time(SPEC, PARTS, PlannedLayout(recompute="selective"), replace(WORKLOAD, stage="stage2"))
    assert in_stage2 == pytest.approx(1 + experts / (2 * (experts + others + output)))


def test_a_token_passes_through_k_experts_for_every_number_of_experts() -> None:
    """A second original expert takes rows from the new experts, whose weight gradients then cost less."""
    spec = replace(SPEC, moe=replace(SPEC.moe, num_original_experts=2))
    experts, others, output = 2 * 2 * EXPERT, 2 * ATTENTION, 100 * 8
    once = 2 * (experts + others + output) + experts * 3 / 5
    selective = relative_time(spec, model_parts(spec), PlannedLayout(recompute="selective"), WORKLOAD)
    assert selective == pytest.approx(1 + experts / once)


def test_a_token_that_chose_two_copies_passes_through_the_ffn_once() -> None:
    spec = replace(SPEC, moe=replace(SPEC.moe, original_copies=2))
    rows, new = 1 - (3 * 2) / (5 * 4) + 2 * 3 / 5, 2 * 3 / 5  # of 5 places, 3 are new experts
    experts, others, output = rows * 2 * EXPERT, 2 * ATTENTION, 100 * 8
    once = 2 * (experts + others + output) + new * 2 * EXPERT
    selective = relative_time(spec, model_parts(spec), PlannedLayout(recompute="selective"), WORKLOAD)
    assert selective == pytest.approx(1 + experts / once)


def test_a_pipeline_waits_for_its_first_and_last_micro_batch() -> None:
    assert bubble(PlannedLayout(pp=4), num_microbatches=12) == pytest.approx(3 / 15)
    assert relative_time(SPEC, PARTS, PlannedLayout(pp=2), WORKLOAD) == pytest.approx(17 / 16)


def test_time_in_twentieths_decides_before_communication() -> None:
    def key(layout: PlannedLayout, time: float, traffic: float = 0) -> tuple[float, ...]:
        return preference(layout, time, gpus_per_node=8, traffic_bytes=traffic)

    in_order = [
        key(PlannedLayout(dp=8), 1.0),
        key(PlannedLayout(ep=2, dp=8), 1.0, traffic=100),
        key(PlannedLayout(pp=2, dp=4), 1.02),
        key(PlannedLayout(tp=2, dp=4), 1.0),
        key(PlannedLayout(tp=4, dp=2), 1.0),
        key(PlannedLayout(ep=3, dp=24), 1.0),  # groups of 3 span nodes of 8
        key(PlannedLayout(pp=2, dp=4), 1.1),
        key(PlannedLayout(recompute="full", dp=8), 1.3),
    ]
    assert sorted(reversed(in_order)) == in_order


def test_expert_traffic_by_hand() -> None:
    """3 of 6 rows leave the rank, out (16 + 4 bytes) and back (16), forward and backward, 2 layers, 2 micro-batches."""
    layout = PlannedLayout(ep=2, dp=2)
    assert expert_traffic(SMALL_SPEC, layout, SMALL_WORKLOAD, ROUTING).all_to_all == 3 * (16 + 4 + 16) * 2 * 2 * 2
    recomputed = replace(layout, recompute="full")
    assert expert_traffic(SMALL_SPEC, recomputed, SMALL_WORKLOAD, ROUTING).all_to_all == 3 * (16 + 4 + 16) * 3 * 2 * 2
    assert expert_traffic(SMALL_SPEC, layout, SMALL_WORKLOAD, ROUTING).expert_tensor == 0


def test_expert_tensor_parallel_ranks_gather_new_rows_and_every_token() -> None:
    """2 tokens per rank: it receives the other rank's 3 rows and 2 tokens; 4 micro-batches, 2 layers."""
    traffic = expert_traffic(SMALL_SPEC, PlannedLayout(tp=2, etp=2), SMALL_WORKLOAD, ROUTING)
    assert traffic.expert_tensor == (3 + 2) * (16 + 4 + 16) * 2 * 2 * 4
    assert traffic.all_to_all == 0
    spec = replace(SMALL_SPEC, moe=replace(SMALL_SPEC.moe, num_original_experts=3))
    more_weights = 2 * 2 * 4  # two tokens, two more original experts
    gathered = (expert_traffic(spec, PlannedLayout(tp=2, etp=2), SMALL_WORKLOAD, ROUTING), traffic)
    assert gathered[0].expert_tensor - gathered[1].expert_tensor == more_weights * 2 * 2 * 4


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_rows_of_the_original_expert_never_leave_the_rank(fraction: float) -> None:
    all_new = expert_traffic(SMALL_SPEC, PlannedLayout(ep=2, dp=2), SMALL_WORKLOAD, Routing(0, 2)).all_to_all
    some = expert_traffic(
        SMALL_SPEC, PlannedLayout(ep=2, dp=2), SMALL_WORKLOAD, Routing(2 * fraction, 2 * (1 - fraction))
    ).all_to_all
    assert some == all_new * (1 - fraction)


SHAPE = TINY_SHAPE | {
    "num_layers": 6, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 4,
}  # fmt: skip
SIX_LAYERS = ModelSpec("qwen2", "float32", SHAPE, MoeSpec(4, 2, (0, 1, 2, 3, 4, 5)))


def layouts_of(
    gpus: int, gpus_per_node: int = 8, global_batch_size: int = 8, seq_length: int = 64
) -> list[PlannedLayout]:
    workload = Workload("stage1", seq_length, 1, global_batch_size)
    return list(legal_layouts(SIX_LAYERS, workload, Cluster(gpus, gpus_per_node, 80, 8)))


def test_layouts_of_eight_ranks() -> None:
    found = layouts_of(8)
    assert len(found) == len(set(found))
    assert {layout.recompute for layout in found} == set(RECOMPUTES)
    assert {layout.tp for layout in found} == {1, 2, 4, 8}
    assert {layout.pp for layout in found} == {1, 2}  # 4 and 8 do not divide 6 layers
    assert {layout.ep for layout in found} == {1, 2, 4}
    assert {layout.etp for layout in found} == {1, 2, 4}  # 96 FFN rows over 8 ranks would not be aligned
    for layout in found:
        assert layout.world_size == 8
        assert layout.etp in (1, layout.tp)
        assert layout.expert_dp * layout.ep * layout.etp * layout.pp == 8
    assert {layout.ep for layout in found if layout.etp == 4} == {1, 2}


def test_tensor_parallelism_stays_inside_a_node() -> None:
    assert max(layout.tp for layout in layouts_of(16, gpus_per_node=4, global_batch_size=16)) == 4
    assert {layout.tp for layout in layouts_of(12, gpus_per_node=6, global_batch_size=12)} == {1, 2}


def test_data_parallel_ranks_process_equally_many_micro_batches() -> None:
    assert layouts_of(5) == []
    assert {layout.dp for layout in layouts_of(8, global_batch_size=2)} == {1, 2}


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_the_trainer_accepts_the_flags_of_every_kind_of_layout(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All checks of a GPU machine before a model is built: ours, Megatron's, and those of its model config."""
    from moelpr.arguments import parse

    SIX_LAYERS.write(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "release").mkdir()
    for suffix in (".bin", ".idx"):
        (tmp_path / f"corpus{suffix}").touch()
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(gpus)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(cpu, "is_needed", lambda: False)
    monkeypatch.setattr(parse, "set_global_variables", lambda *args, **kwargs: None)
    argv = ["--stage", "stage1", "--pretrained-checkpoint", str(tmp_path), "--lr", "1e-3", "--train-iters", "2"]
    argv += ["--micro-batch-size", "1", "--global-batch-size", "8", "--seq-length", "32"]
    argv += ["--data-path", str(tmp_path / "corpus"), "--verify-corpus", "none"]
    for layout in layouts_of(gpus)[:: 1 if gpus < 8 else 7]:
        args, _ = parse.parse_arguments([*argv, *layout.flags()])
        found = (
            args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.expert_model_parallel_size,
            args.expert_tensor_parallel_size, args.data_parallel_size, args.recompute_granularity,
        )  # fmt: skip
        granularity = None if layout.recompute == "none" else layout.recompute
        assert found == (layout.tp, layout.pp, layout.ep, layout.etp, layout.dp, granularity)
        assert args.sequence_parallel == (layout.tp > 1)
