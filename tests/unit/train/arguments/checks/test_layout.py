"""Layouts and batches that do not fit are rejected with values that work (rules: tests/unit/plan/test_layouts.py)."""

import re

import pytest

TP, PP, EP, ETP, CP = (
    f"--{name}-parallel-size" for name in ("tensor-model", "pipeline-model", "expert-model", "expert-tensor", "context")
)
PER_STAGE, VIRTUAL = "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"
GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"


@pytest.fixture
def six_layers(make_checkpoint) -> str:
    return make_checkpoint("six", shape={"num_layers": 6})


@pytest.mark.parametrize(
    ("argv", "ranks", "start", "fix"),
    [
        ([EP, "4"], 6, f"{ETP} 1 x {EP} 4 x {PP} 1 = 4 ", "one of 1, 2, 3, 6"),
        ([TP, "4", ETP, "2"], 4, f"{ETP} must be 1 or {TP} 4, got 2", "one of 1, 4"),
        ([CP, "2", "--seq-length", "34"], 2, "--seq-length 34 ", "32 or 36"),
        (["--global-batch-size", "3"], 1, "--global-batch-size 3 ", "use 2 or 4"),
    ],
)
def test_each_rule_of_the_layouts_is_reported(upcycled, problems, argv, ranks, start, fix) -> None:
    (found,) = [line for line in problems("stage1", upcycled, *argv, ranks=ranks) if line.startswith(start)]
    assert fix in found


def test_the_global_batch_counts_data_parallel_ranks_only(upcycled: str, accepted) -> None:
    argv = ["--global-batch-size", "6", TP, "2", ETP, "1"]
    assert accepted("stage1", upcycled, *argv, ranks=2)["data_parallel_size"] == 1


def test_a_dense_model_has_no_expert_parallelism(dense: str, problems) -> None:
    (found,) = problems("dense", dense, EP, "2", ranks=2)
    assert found.startswith(f"{EP} ") and "dense" in found


def test_tensor_parallel_ranks_can_share_a_query_group(make_checkpoint, accepted) -> None:
    start = make_checkpoint("one-group", shape={"num_query_groups": 1})
    assert accepted("stage1", start, TP, "2", ETP, "1", ranks=2)["num_query_groups"] == 1


def test_rows_of_grouped_gemm_are_checked_on_a_gpu_only(upcycled, problems, accepted, monkeypatch) -> None:
    from moelpr.model.megatron import cpu

    assert accepted("stage1", upcycled, TP, "4", ranks=4)
    with monkeypatch.context() as gpu:
        gpu.setattr(cpu, "is_needed", lambda: False)
        found = problems("stage1", upcycled, TP, "4", ranks=4)
    assert [line for line in found if "grouped GEMM" in line and "got 12" in line and f"use {ETP} 1" in line]


def test_an_uneven_pipeline_is_checked_by_megatron(upcycled: str, accepted, problems) -> None:
    uneven = "--decoder-first-pipeline-num-layers"
    assert accepted("stage1", upcycled, PP, "2", uneven, "1", ranks=2)[PP[2:].replace("-", "_")] == 2
    assert accepted("stage1", upcycled, PP, "2", "--pipeline-model-parallel-layout", "Et|ttL", ranks=2)
    (found,) = problems("stage1", upcycled, PP, "2", uneven, "3", ranks=2)
    assert "Megatron" in found and "Mismatch" in found


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (f"{VIRTUAL} 2", r"^--num-virtual-stages-\S+ 2 .*3 layers.* one of 1, 3"),
        (f"{PER_STAGE} 2", r"number of layers per pipeline stage must be divisible"),
        (f"{PER_STAGE} 1 {VIRTUAL} 3", f"{PER_STAGE}, {VIRTUAL}"),
        (f"{VIRTUAL} 3 --no-overlap-p2p-communication", r"pipeline-model-parallel size should be greater than 2"),
        (f"{VIRTUAL} 3 --global-batch-size 6", "batch-size 6 makes 3 micro-batches.* multiple of 4, such as 4 or 8"),
        (f"{VIRTUAL} 3 {GROUP} 4", r"--global-batch-size 4 makes 2 micro-batches.* multiple of 8"),
        (f"{VIRTUAL} 3 {GROUP} 1", f"{GROUP} must be at least"),
    ],
)
def test_virtual_stages_fit_pipeline_layers_and_batch(six_layers: str, problems, argv: str, message: str) -> None:
    (found,) = problems("stage1", six_layers, PP, "2", "--global-batch-size", "4", *argv.split(), ranks=2)
    assert re.search(message, found)


def test_virtual_stages_fit_the_batch_of_validation(six_layers: str, data: list[str], problems) -> None:
    argv = [PP, "2", "--num-virtual-stages-per-pipeline-rank", "3", "--global-batch-size", "4"]
    argv += ["--eval-global-batch-size", "2", "--validation-data", f"en={data[1]}"]
    found = problems("stage1", six_layers, *argv, ranks=2)
    assert any(message.startswith("--eval-global-batch-size 2 makes 1 micro-batches") for message in found)


def test_virtual_stages_need_a_pipeline(six_layers: str, problems) -> None:
    (found,) = problems("stage1", six_layers, "--num-virtual-stages-per-pipeline-rank", "2")
    assert "pipeline-model-parallel size should be greater than 1" in found


def test_virtual_stages_that_fit_are_accepted(six_layers: str, accepted) -> None:
    argv = ["--num-layers-per-virtual-pipeline-stage", "1", "--global-batch-size", "4"]
    assert accepted("stage2", six_layers, PP, "2", *argv, ranks=2)["virtual_pipeline_model_parallel_size"] == 3
