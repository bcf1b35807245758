import sys
from dataclasses import replace
from functools import partial

import pytest

from moelpr.base import ranks
from moelpr.model.megatron import cpu
from moelpr.model.model_spec import ModelSpec, MoeSpec
from moelpr.plan.candidates import fitting, legal_layouts, preference
from moelpr.plan.gpus import GPUS, Cluster
from moelpr.plan.layouts import PlannedLayout
from moelpr.plan.memory import Workload, layers_of_stage
from moelpr.train.arguments import parse
from moelpr.train.arguments.settings import RunSettings
from tests.unit.conftest import SHAPE as TINY_SHAPE


def test_time_in_twentieths_decides_before_communication() -> None:
    def key(layout: PlannedLayout, time: float, traffic: float = 0) -> tuple[float, ...]:
        return preference(layout, time, Cluster(layout.world_size, 8, 80, 8), traffic)

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


SHAPE = TINY_SHAPE | dict(num_layers=6, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=4)
SIX_LAYERS = ModelSpec("qwen2", "float32", SHAPE, MoeSpec(4, 2, (0, 1, 2, 3, 4, 5)))


def layouts_of(gpus: int, gpus_per_node: int = 8, global_batch_size: int = 8) -> list[PlannedLayout]:
    workload = Workload("stage1", 64, 1, global_batch_size)
    return list(legal_layouts(SIX_LAYERS, workload, Cluster(gpus, gpus_per_node, 80, 8)))


def test_tensor_parallelism_stays_inside_a_node_and_data_parallel_ranks_have_equally_many_micro_batches() -> None:
    assert max(layout.tp for layout in layouts_of(16, gpus_per_node=4, global_batch_size=16)) == 4
    assert {layout.tp for layout in layouts_of(12, gpus_per_node=6, global_batch_size=12)} == {1, 2}
    assert layouts_of(5) == []
    assert {layout.dp for layout in layouts_of(8, global_batch_size=2)} == {1, 2}


def test_layers_are_divided_over_virtual_stages_or_unevenly() -> None:
    """4 stages of 6 layers: 1, 2, 2 and 1; virtual ones need micro-batches that fill the pipeline."""
    pipelines = {(layout.pp, layout.vpp, layout.ends) for layout in layouts_of(8, global_batch_size=8)}
    assert pipelines == {(1, 1, None), (2, 1, None), (2, 3, None), (4, 1, (1, 1))}
    assert {layout.vpp for layout in layouts_of(8, global_batch_size=4) if layout.dp == 4} == {1}
    assert {layout.pp for layout in layouts_of(16, global_batch_size=16)} == {1, 2, 4}  # no stage without layers
    divided = [*map(partial(layers_of_stage, SIX_LAYERS, PlannedLayout(pp=4, ends=(1, 1))), range(4))]
    assert divided == [(0,), (1, 2), (3, 4), (5,)]
    assert layers_of_stage(SIX_LAYERS, PlannedLayout(pp=2, vpp=3), 1) == (1, 3, 5)


def test_virtual_stages_are_preferred_where_they_are_faster() -> None:
    workload, cluster = Workload("stage1", 4096, 1, 64), Cluster.of(GPUS["h100-80"], 32)
    shape = SHAPE | dict(num_layers=48, hidden_size=8192, ffn_hidden_size=29568, max_position_embeddings=4096)
    spec = ModelSpec("qwen2", "bfloat16", shape, MoeSpec(1, 2, tuple(range(48)), original_copies=2))
    best, *others = fitting(spec, workload, cluster)
    assert best.layout.pp > 1 and best.layout.vpp > 1
    (plain,) = (one for one in others if one.layout == replace(best.layout, vpp=1))
    assert best.step_time.total_s < plain.step_time.total_s and best.peak.total_bytes > plain.peak.total_bytes


@pytest.mark.parametrize(("gpus", "on_host", "number"), [(8, False, 0), (16, False, 6), (16, True, 5)])
def test_flags_of_several_nodes_are_in_their_plans(gpus: int, on_host: bool, number: int) -> None:
    names = "async-save ckpt-assume-constant-structure ckpt-fully-parallel-load manual-gc manual-gc-interval"
    workload = Workload("stage1", 64, 1, 16, optimizer_cpu_offload=on_host)
    flags = fitting(SIX_LAYERS, workload, Cluster(gpus, 8, 80, 8))[0].flags(workload)
    of_nodes = {f"--{name}" for name in (*names.split(), "gpu-sniff-test-interval")}
    assert len(of_nodes & {flag.partition("=")[0] for flag in flags}) == number


@pytest.mark.parametrize(
    ("gpus", "stage", "everything"),
    [(1, "stage1", False), (2, "stage1", False), (8, "stage1", False), (2, "stage1", True), (4, "dense", False)],
)
def test_the_trainer_accepts_the_flags_of_every_kind_of_layout(gpus, stage, everything, tmp_path, monkeypatch) -> None:
    """All checks of a GPU machine before a model is built: ours, Megatron's, and those of its model config."""
    spec = SIX_LAYERS.as_dense() if stage == "dense" else SIX_LAYERS
    spec.write(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "release").mkdir()
    for suffix in (".bin", ".idx"):
        (tmp_path / f"corpus{suffix}").touch()
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    monkeypatch.setattr(ranks, "world_size", lambda: gpus)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(gpus)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(cpu, "is_needed", lambda: False)
    monkeypatch.setattr(parse, "set_global_variables", lambda *args, **kwargs: None)
    argv = f"--stage {stage} --pretrained-checkpoint {tmp_path} --lr 1e-3 --train-iters 2 --micro-batch-size 1 "
    argv += f"--global-batch-size 8 --seq-length 32 --data-path {tmp_path}/corpus --verify-corpus none "
    argv += "--sequence-parallel"  # as in a recipe, and sizes that the flags override
    for size in ("tensor-model", "pipeline-model", "expert-model", "expert-tensor")[: 4 if spec.moe else 2]:
        argv += f" --{size}-parallel-size 2"
    workload = Workload(stage, 32, 1, 8, train_everything=everything)
    actual = fitting(spec, workload, Cluster(gpus, 8, 80, 8))
    assert {one.layout for one in actual} == set(legal_layouts(spec, workload, Cluster(gpus, 8, 80, 8)))
    for one in actual[:: 1 if gpus < 8 else 7]:
        layout = one.layout
        run = parse.check_arguments([*argv.split(), *one.flags(workload)])
        assert run.args.train_everything == everything
        args = parse.register_arguments(run, RunSettings.of(run))
        names = [
            f"{size}_parallel_size" for size in "tensor_model pipeline_model expert_model expert_tensor data".split()
        ]
        assert [getattr(args, name) for name in names] == [layout.tp, layout.pp, layout.ep, layout.etp, layout.dp]
        assert args.recompute_granularity == (None if layout.recompute == "none" else layout.recompute)
        assert args.sequence_parallel == (layout.tp > 1)


def test_on_known_gpus_the_fastest_layout_is_recommended_up_to_a_twentieth() -> None:
    """A slow network between nodes of two GPUs, where the rule of thumb would still exchange layers."""
    workload = Workload("stage1", 64, 1, 8)
    for network_bandwidth in (1e3, 1e12):
        gpu = replace(GPUS["h100-80"], network_bandwidth=network_bandwidth)
        actual = fitting(SIX_LAYERS, workload, Cluster(8, 2, 80, 8, gpu))
        times = [one.step_time.total_s for one in actual]
        assert times[0] <= 1.05 * min(times)
    as_an_a100 = [one.layout for one in fitting(SIX_LAYERS, workload, Cluster(8, 8, 80, 8, GPUS["a100-80"]))]
    assert [one.layout for one in fitting(SIX_LAYERS, workload, Cluster(8, 8, 80, 8))] == as_an_a100
