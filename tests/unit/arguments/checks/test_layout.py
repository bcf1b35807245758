"""Layouts, batches and steps that do not fit are rejected with values that work (rules: tests/unit/test_layouts.py)."""

import re

import pytest

TP, PP, EP, ETP, CP = (
    f"--{name}-parallel-size" for name in ("tensor-model", "pipeline-model", "expert-model", "expert-tensor", "context")
)


@pytest.fixture
def six_layers(make_checkpoint) -> str:
    return make_checkpoint("six", shape={"num_layers": 6})


def test_all_required_flags_are_requested_at_once(upcycled: str, problems) -> None:
    found = problems(None, upcycled, steps=[], with_data=False)
    expected = ["--stage stage1", "--micro-batch-size SEQUENCES", "--seq-length TOKENS", "--lr RATE",
                "--train-iters STEPS", "--data-path PREFIX"]  # fmt: skip
    assert len(found) == len(expected)
    for flag in expected:
        assert sum(f"pass {flag}" in line for line in found) == 1, flag


def test_parallel_sizes_are_at_least_1(upcycled: str, problems) -> None:
    found = problems("stage1", upcycled, TP, "0", EP, "-2")
    assert found == [f"{TP} must be at least 1, got 0", f"{EP} must be at least 1, got -2"]


@pytest.mark.parametrize(
    ("argv", "ranks", "start", "fix"),
    [
        ([EP, "4"], 6, f"{ETP} 1 x {EP} 4 x {PP} 1 = 4 ", "one of 1, 2, 3, 6"),
        ([EP, "3"], 3, f"{EP} 3 ", "one of 1, 2, 4"),
        ([TP, "4", ETP, "2"], 4, f"{ETP} must be 1 or {TP} 4, got 2", "one of 1, 4"),
        ([TP, "3"], 3, f"{TP} 3 ", "one of 1, 2, 4"),
        ([PP, "2"], 2, f"{PP} 2 ", "one of 1, 3"),
        ([CP, "2", "--seq-length", "34"], 2, "--seq-length 34 ", "32 or 36"),
        (["--global-batch-size", "3"], 1, "--global-batch-size 3 ", "use 2 or 4"),
        (["--global-batch-size", "6"], 2, "--global-batch-size 6 ", "use 4 or 8"),
    ],
)  # fmt: skip
def test_each_rule_of_the_layouts_is_reported(
    upcycled: str, problems, argv: list[str], ranks: int, start: str, fix: str
) -> None:
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


def test_expert_tensor_parallelism_needs_no_gpu(upcycled: str, accepted) -> None:
    assert accepted("stage1", upcycled, TP, "2", ranks=2)["sequence_parallel"]


def test_rows_of_grouped_gemm_are_checked_on_a_gpu_only(
    upcycled: str, problems, accepted, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moelpr.megatron_patches import cpu

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
        (["--num-virtual-stages-per-pipeline-rank", "2"], r"^--num-virtual-stages-\S+ 2 .*3 layers.* one of 1, 3"),
        (["--num-layers-per-virtual-pipeline-stage", "2"], r"number of layers per pipeline stage must be divisible"),
        (["--num-layers-per-virtual-pipeline-stage", "1", "--num-virtual-stages-per-pipeline-rank", "3"],
         r"--num-layers-per-virtual-pipeline-stage, --num-virtual-stages-per-pipeline-rank"),
        (["--num-virtual-stages-per-pipeline-rank", "3", "--no-overlap-p2p-communication"],
         r"pipeline-model-parallel size should be greater than 2"),
        (["--num-virtual-stages-per-pipeline-rank", "3", "--global-batch-size", "6"],
         r"--global-batch-size 6 makes 3 micro-batches.* multiple of 4, such as 4 or 8"),
    ],
)  # fmt: skip
def test_virtual_stages_fit_pipeline_layers_and_batch(six_layers: str, problems, argv: list[str], message: str) -> None:
    (found,) = problems("stage1", six_layers, PP, "2", "--global-batch-size", "4", *argv, ranks=2)
    assert re.search(message, found)


def test_virtual_stages_need_a_pipeline(six_layers: str, problems) -> None:
    (found,) = problems("stage1", six_layers, "--num-virtual-stages-per-pipeline-rank", "2")
    assert "pipeline-model-parallel size should be greater than 1" in found


def test_virtual_stages_that_fit_are_accepted(six_layers: str, accepted) -> None:
    argv = ["--num-layers-per-virtual-pipeline-stage", "1", "--global-batch-size", "4"]
    assert accepted("stage2", six_layers, PP, "2", *argv, ranks=2)["virtual_pipeline_model_parallel_size"] == 3


@pytest.mark.parametrize(
    ("argv", "start"),
    [
        (["--micro-batch-size", "0"], "--micro-batch-size must be at least 1, got 0"),
        (["--save-interval", "0"], "--save-interval must be at least 1, got 0"),
        (["--train-iters", "-5"], "--train-iters must be at least 1, got -5"),
        (["--warn-window", "0"], "--warn-window must be at least 1, got 0"),
        (["--train-samples", "10"], "--train-iters and --train-samples"),
        (["--seq-length", "65"], "--seq-length must be at most 64"),
        (["--min-lr", "1"], "--min-lr must be at most --lr 0.001, got 1.0"),
        (["--lr", "-1"], "--lr must be at least 0, got -1.0"),
        (["--lr", "inf"], "--lr must be at least 0 and finite, got inf"),
        (["--seed", "0"], "--seed must be at least 1 and below 2,147,483,648, got 0"),
        (["--seed", "-1"], "--seed must be at least 1 and below 2,147,483,648, got -1"),
        (["--weight-decay", "nan"], "--weight-decay must be at least 0, got nan"),
        (["--clip-grad", "nan"], "--clip-grad must be at least 0, got nan"),
        (["--adam-beta2", "1.5"], "--adam-beta2 must be at least 0 and below 1, got 1.5"),
        (["--adam-beta1", "1"], "--adam-beta1 must be at least 0 and below 1, got 1.0"),
        (["--adam-eps", "nan"], "--adam-eps must be a finite number, got nan"),
        (["--warn-expert-share", "inf"], "--warn-expert-share must be a finite number, got inf"),
        (["--lr-warmup-fraction", "1"], "--lr-warmup-fraction must be at least 0 and below 1, got 1.0"),
        (["--lr-warmup-iters", "2"], "--lr-warmup-iters must be below --train-iters 2, got 2"),
        (["--lr-warmup-iters", "9", "--lr-decay-iters", "9"], "--lr-warmup-iters must be below --lr-decay-iters 9"),
        (["--lr-warmup-init", "0.1"], "--lr-warmup-init must be at most --lr 0.001, got 0.1"),
        (["--lr-decay-style", "WSD"], "--lr-decay-style WSD requires the length of its decay; add --lr-wsd-decay-"),
        (["--lr-wsd-decay-iters", "0"], "--lr-wsd-decay-iters must be at least 1, got 0"),
        (["--weight-decay-incr-style", "linear", "--start-weight-decay", "0.2", "--end-weight-decay", "0.1"],
         "--end-weight-decay must be at least --start-weight-decay 0.2, got 0.1"),
        (["--weight-decay-incr-style", "linear"], "--weight-decay-incr-style linear requires --start-weight-decay"),
        (["--start-weight-decay", "0.1"], "--start-weight-decay requires --weight-decay-incr-style"),
        (["--tensorboard-log-interval", "0"], "--tensorboard-log-interval must be at least 1, got 0"),
        (["--log-memory-interval", "0"], "--log-memory-interval must be at least 1, got 0"),
        (["--split", "nan"], "--split must be "),
        (["--split", "0,0,0"], "--split must be "),
        (["--split=-1,2"], "--split must be "),
        (["--split", "1e3,1"], "--split must be "),
        (["--split", "1,1,1,1"], "--split must be "),
        (["--split", ""], "--split must be "),
    ],
)  # fmt: skip
def test_invalid_batches_and_schedules_are_rejected(upcycled: str, problems, argv: list[str], start: str) -> None:
    (found,) = problems("stage1", upcycled, *argv)
    assert found.startswith(start)


def test_schedules_with_all_their_settings_are_accepted(upcycled: str, accepted) -> None:
    argv = ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "1", "--lr-warmup-init", "1e-3"]
    argv += ["--weight-decay-incr-style", "linear", "--start-weight-decay", "0.1", "--end-weight-decay", "0.1"]
    assert accepted("stage1", upcycled, *argv)["lr_wsd_decay_iters"] == 1
