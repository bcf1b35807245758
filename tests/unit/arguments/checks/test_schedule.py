"""Data, batches, steps and learning rate."""

from pathlib import Path

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
        (["--mock-data"], "--mock-data has no language bits; name corpora with --data-path PREFIX"),
        (["--reset-attention-mask"],
         "--reset-attention-mask has no effect: attention is causal over the packed sequence; drop it"),
    ],
)  # fmt: skip
def test_schedules_that_cannot_be_meant_are_refused(upcycled: str, refused, words: list[str], said: str) -> None:
    assert refused("stage1", upcycled, *words) == [said]


def test_the_global_batch_counts_data_parallel_ranks(upcycled: str, refused, accepted) -> None:
    (said,) = refused("stage1", upcycled, "--global-batch-size", "6", ranks=2)
    assert said.endswith("--micro-batch-size 2 x 2 data-parallel ranks = 4; use 4 or 8")
    layout = ["--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]
    assert accepted("stage1", upcycled, "--global-batch-size", "6", *layout, ranks=2)["data_parallel_size"] == 1


def test_every_corpus_that_is_not_there_is_named(upcycled: str, refused, tmp_path: Path) -> None:
    there = tmp_path / "corpus"
    said = refused("stage1", upcycled, "--data-path", "0.5", "nowhere", "0.3", str(there), "0.2", "elsewhere")
    assert said == [
        f"{prefix}.bin and .idx are not both there; build them with data_tools/preprocess_data.py"
        for prefix in ("nowhere", "elsewhere")
    ]


def test_data_that_is_named_twice_or_unreadable_is_refused(upcycled: str, refused, tmp_path: Path) -> None:
    said = refused("stage1", upcycled, "--train-data-path", str(tmp_path / "corpus"))
    assert said == ["--data-path and --train-data-path both name the training data; keep one of them"]
    (said,) = refused("stage1", upcycled, "--data-args-path", "nowhere.txt", with_data=False)
    assert said.startswith("the training data can't be read from the flags ([Errno 2]")
