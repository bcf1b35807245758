"""Missing flags, flags that exclude each other, and numbers out of range are rejected."""

import pytest


def test_all_required_flags_are_requested_at_once(upcycled: str, problems) -> None:
    found = problems(None, upcycled, steps=False, with_data=False)
    expected = ["--stage stage1", "--micro-batch-size SEQUENCES", "--seq-length TOKENS", "--lr RATE"]
    expected += ["--train-iters STEPS", "--data-path PREFIX"]
    assert len(found) == len(expected)
    for flag in expected:
        assert sum(f"pass {flag}" in line for line in found) == 1, flag


def test_parallel_sizes_are_at_least_1(upcycled: str, problems) -> None:
    tensor, expert = "--tensor-model-parallel-size", "--expert-model-parallel-size"
    found = problems("stage1", upcycled, tensor, "0", expert, "-2")
    assert found == [f"{tensor} must be at least 1, got 0", f"{expert} must be at least 1, got -2"]


@pytest.mark.parametrize(
    ("argv", "start"),
    [
        (["--train-samples", "10"], "--train-iters and --train-samples"),
        (["--optimizer", "sgd", "--use-distributed-optimizer"], "--use-distributed-optimizer does not support"),
        (["--optimizer-cpu-offload"], "--optimizer-cpu-offload requires --optimizer adam and --use-distributed"),
        (
            ["--optimizer-cpu-offload", "--use-distributed-optimizer", "--async-save"],
            "--async-save would save the state of --optimizer-cpu-offload",
        ),
        (["--optimizer", "lion"], "--optimizer lion requires the package emerging-optimizers"),
        (["--seq-length", "65"], "--seq-length must be at most 64"),
        (["--min-lr", "1"], "--min-lr must be at most --lr 0.001, got 1.0"),
        (["--lr", "-1"], "--lr must be at least 0, got -1.0"),
        (["--lr", "inf"], "--lr must be at least 0 and finite, got inf"),
        (["--seed", "0"], "--seed must be at least 1 and below 2,147,483,648, got 0"),
        (["--weight-decay", "nan"], "--weight-decay must be at least 0, got nan"),
        (["--adam-beta1", "1"], "--adam-beta1 must be at least 0 and below 1, got 1.0"),
        (["--adam-eps", "nan"], "--adam-eps must be a finite number, got nan"),
        (["--lr-warmup-iters", "2"], "--lr-warmup-iters must be below --train-iters 2, got 2"),
        (["--lr-warmup-iters", "9", "--lr-decay-iters", "9"], "--lr-warmup-iters must be below --lr-decay-iters 9"),
        (["--lr-warmup-init", "0.1"], "--lr-warmup-init must be at most --lr 0.001, got 0.1"),
        (["--lr-decay-style", "WSD"], "--lr-decay-style WSD requires the length of its decay; add --lr-wsd-decay-"),
        (
            ["--weight-decay-incr-style", "linear", "--start-weight-decay", "0.2", "--end-weight-decay", "0.1"],
            "--end-weight-decay must be at least --start-weight-decay 0.2, got 0.1",
        ),
        (["--weight-decay-incr-style", "linear"], "--weight-decay-incr-style linear requires --start-weight-decay"),
        (["--start-weight-decay", "0.1"], "--start-weight-decay requires --weight-decay-incr-style"),
        (["--split", "nan"], "--split must be "),
        (["--split", "0,0,0"], "--split must be "),
        (["--split=-1,2"], "--split must be "),
        (["--split", "1e3,1"], "--split must be "),
        (["--split", "1,1,1,1"], "--split must be "),
        (["--split", ""], "--split must be "),
    ],
)
def test_invalid_batches_and_schedules_are_rejected(upcycled: str, problems, argv: list[str], start: str) -> None:
    (found,) = problems("stage1", upcycled, *argv)
    assert found.startswith(start)


def test_schedules_with_all_their_settings_are_accepted(upcycled: str, accepted) -> None:
    argv = ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "1", "--lr-warmup-init", "1e-3"]
    argv += ["--weight-decay-incr-style", "linear", "--start-weight-decay", "0.1", "--end-weight-decay", "0.1"]
    assert accepted("stage1", upcycled, *argv)["lr_wsd_decay_iters"] == 1
