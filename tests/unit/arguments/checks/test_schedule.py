"""Batches, steps and learning rate."""

import pytest


def test_everything_needed_is_asked_for_at_once(upcycled: str, refused) -> None:
    assert refused(None, upcycled, steps=[], with_data=False) == [
        "--stage is missing; give --stage dense, stage1 or stage2",
        "--micro-batch-size is missing; give --micro-batch-size SEQUENCES",
        "--seq-length is missing; give --seq-length TOKENS",
        "--lr is missing; give --lr RATE",
        "nothing says how long to train; give --train-iters STEPS (or --train-samples SEQUENCES)",
        "no training data; name corpora with --data-path PREFIX (built by data_tools/preprocess_data.py)",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--micro-batch-size", "0"], "--micro-batch-size 0 must be at least 1"),
        (["--save-interval", "0"], "--save-interval 0 must be at least 1"),
        (["--train-iters", "-5"], "--train-iters -5 must be at least 1"),
        (["--train-samples", "10"], "--train-iters and --train-samples both say how long to train; keep one of them"),
        (["--global-batch-size", "3"],
         "--global-batch-size 3 is no multiple of --micro-batch-size 2 x 1 data-parallel ranks = 2; use 2 or 4"),
        (["--seq-length", "65"], "--seq-length 65 is longer than the model's 64 positions; use at most 64"),
        (["--min-lr", "1"], "--min-lr 1.0 is above --lr 0.001; lower it, or raise --lr"),
        (["--lr", "-1"], "--lr -1.0 must not be negative"),
    ],
)  # fmt: skip
def test_schedules_that_cannot_be_meant_are_refused(upcycled: str, refused, words: list[str], said: str) -> None:
    assert refused("stage1", upcycled, *words) == [said]


def test_the_global_batch_counts_data_parallel_ranks(upcycled: str, refused, accepted) -> None:
    (said,) = refused("stage1", upcycled, "--global-batch-size", "6", ranks=2)
    assert said.endswith("--micro-batch-size 2 x 2 data-parallel ranks = 4; use 4 or 8")
    layout = ["--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]
    assert accepted("stage1", upcycled, "--global-batch-size", "6", *layout, ranks=2)["data_parallel_size"] == 1
