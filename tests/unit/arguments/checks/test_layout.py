"""Parallel sizes that do not fit are refused with the values that work."""

import itertools
import os
import re

import pytest

TP, PP, EP, ETP, CP = (
    f"--{name}-parallel-size" for name in ("tensor-model", "pipeline-model", "expert-model", "expert-tensor", "context")
)


@pytest.fixture
def six_layers(make_checkpoint) -> str:
    return make_checkpoint("six", shape={"num_layers": 6})


def one(said: list[str], start: str) -> str:
    (line,) = [line for line in said if line.startswith(start)]
    return line


def test_sizes_are_at_least_1(upcycled: str, refused) -> None:
    assert refused("stage1", upcycled, TP, "0", EP, "-2") == [
        "--tensor-model-parallel-size 0 must be at least 1",
        "--expert-model-parallel-size -2 must be at least 1",
    ]


def test_the_model_has_to_fit_the_number_of_processes(six_layers: str, refused) -> None:
    said = refused("stage1", six_layers, TP, "2", ETP, "1", PP, "3", ranks=4)
    assert one(said, "4 processes can't be shared out over --tensor") == (
        "4 processes can't be shared out over --tensor-model-parallel-size 2 x --pipeline-model-parallel-size 3 x "
        "--context-parallel-size 1 = 6; start a multiple of 6 processes, or make the product one of 1, 2, 4"
    )


def test_the_experts_have_to_fit_the_number_of_processes(upcycled: str, refused) -> None:
    (said,) = refused("stage1", upcycled, EP, "4", ranks=6)
    assert said == (
        "6 processes can't be shared out over --expert-tensor-parallel-size 1 x --expert-model-parallel-size 4 x "
        "--pipeline-model-parallel-size 1 = 4; start a multiple of 4 processes, or make the product one of 1, 2, 3, 6"
    )
    (said,) = refused("stage1", upcycled, EP, "2")
    assert said.startswith("1 process can't be shared out over")
    assert said.endswith("start a multiple of 2 processes, or make the product 1")


def test_new_experts_that_do_not_divide_name_the_sizes_that_do(upcycled: str, refused) -> None:
    (said,) = refused("stage1", upcycled, EP, "3", ranks=3)
    assert said == "4 new experts do not divide over --expert-model-parallel-size 3; use one of 1, 2, 4"


def test_experts_are_split_over_all_tensor_parallel_ranks_or_none(upcycled: str, refused) -> None:
    said = one(refused("stage1", upcycled, TP, "4", ETP, "2", ranks=4), "--expert-tensor-parallel-size 2")
    assert "must be one of 1, 4" in said


def test_a_dense_model_has_no_expert_parallelism(dense: str, refused) -> None:
    (said,) = refused("dense", dense, EP, "2", ranks=2)
    assert said == "--expert-model-parallel-size has no meaning for a dense model; drop it"


def test_heads_groups_and_ffn_divide_over_tensor_parallel_ranks(make_checkpoint, refused) -> None:
    said = refused(
        "dense", make_checkpoint("m", shape={"num_attention_heads": 6, "num_query_groups": 3}), TP, "4", ranks=4
    )
    assert "does not divide the model's 6 attention heads, 3 query groups; use one of 1, 3, 6" in one(said, TP)
    # Of the divisors of 12 heads: 48 FFN rows do with all; 4 query groups with 1, 2, 4 and 12, but not with 3 or 6;
    # (12 + 2 x 4) x 8 = 160 rows of queries, keys and values with 1, 2 and 4, but not with 12.
    start = make_checkpoint("n", shape={"num_attention_heads": 12, "num_query_groups": 4})
    said = refused("stage1", start, TP, "12", ETP, "1", ranks=12)
    assert "does not divide the model's 160 rows of queries, keys and values; use one of 1, 2, 4" in one(said, TP)


def test_more_tensor_parallel_ranks_than_query_groups_share_them(make_checkpoint, accepted) -> None:
    start = make_checkpoint("one-group", shape={"num_query_groups": 1})
    assert accepted("stage1", start, TP, "2", ETP, "1", ranks=2)["num_query_groups"] == 1


@pytest.mark.parametrize(
    ("length", "words", "ranks", "said"),
    [
        ("33", [TP, "2", ETP, "1"], 2, f"{TP} 2 with sequence parallelism; use a multiple of 2, such as 32 or 34"),
        ("34", [CP, "2"], 2, f"2 x {CP} 2; use a multiple of 4, such as 32 or 36"),
        ("28", [TP, "4", ETP, "1", CP, "2"], 8,
         f"{TP} 4 with sequence parallelism; use a multiple of 8, such as 24 or 32"),
        ("3", [CP, "2"], 2, f"2 x {CP} 2; use a multiple of 4, such as 4"),
    ],
)  # fmt: skip
def test_the_sequence_divides_over_tensor_and_context_ranks(
    upcycled: str, refused, length: str, words: list[str], ranks: int, said: str
) -> None:
    line = one(refused("stage1", upcycled, "--seq-length", length, *words, ranks=ranks), "--seq-length")
    assert line == f"--seq-length {length} does not divide over {said}"


def test_layers_divide_over_pipeline_stages(upcycled: str, refused) -> None:
    (said,) = refused("stage1", upcycled, PP, "2", ranks=2)
    assert said.startswith("3 layers do not divide over --pipeline-model-parallel-size 2; use one of 1, 3, or cut")


def test_an_uneven_pipeline_is_megatrons_to_check(upcycled: str, accepted, refused) -> None:
    uneven = "--decoder-first-pipeline-num-layers"
    assert accepted("stage1", upcycled, PP, "2", uneven, "1", ranks=2)[PP[2:].replace("-", "_")] == 2
    assert accepted("stage1", upcycled, PP, "2", "--pipeline-model-parallel-layout", "Et|ttL", ranks=2)
    (said,) = refused("stage1", upcycled, PP, "2", uneven, "3", ranks=2)
    assert said.startswith("Megatron refuses these arguments: Mismatch")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-virtual-stages-per-pipeline-rank", "2"], r"2 does not divide the 3 layers .* use one of 1, 3"),
        (["--num-layers-per-virtual-pipeline-stage", "2"], r"2 does not divide the 3 layers .* use one of 1, 3"),
        (["--num-layers-per-virtual-pipeline-stage", "1", "--num-virtual-stages-per-pipeline-rank", "3"],
         r"both say how the pipeline is cut; keep one"),
        (["--num-virtual-stages-per-pipeline-rank", "3", "--no-overlap-p2p-communication"],
         r"without overlapped communication need --pipeline-model-parallel-size 3 or more, not 2"),
        (["--num-virtual-stages-per-pipeline-rank", "3", "--global-batch-size", "6"],
         r"--global-batch-size 6 makes 3 micro-batches, which do not fill .* multiple of 4, such as 4 or 8"),
    ],
)  # fmt: skip
def test_virtual_stages_fit_pipeline_layers_and_batch(six_layers: str, refused, words: list[str], said: str) -> None:
    lines = refused("stage1", six_layers, PP, "2", "--global-batch-size", "4", *words, ranks=2)
    assert len(lines) == 1
    assert re.search(said, lines[0])


def test_virtual_stages_need_a_pipeline(six_layers: str, refused) -> None:
    said = refused("stage1", six_layers, "--num-virtual-stages-per-pipeline-rank", "2")
    assert said == [
        "virtual pipeline stages need --pipeline-model-parallel-size 2 or more, not 1; raise it, or drop the virtual "
        "stages"
    ]


def test_virtual_stages_that_fit_are_taken(six_layers: str, accepted) -> None:
    words = ["--num-layers-per-virtual-pipeline-stage", "1", "--global-batch-size", "4"]
    assert accepted("stage2", six_layers, PP, "2", *words, ranks=2)["virtual_pipeline_model_parallel_size"] == 3


def test_exactly_the_layouts_that_fit_are_taken(make_checkpoint) -> None:
    """Against the plain rules, over every layout of up to 8 processes."""
    from moelpr.arguments.checks import layout
    from moelpr.arguments.checks.run import Run
    from moelpr.arguments.flags import all_arguments
    from moelpr.arguments.sources import Sources

    start = make_checkpoint("m", shape={"num_layers": 4})
    parser, words = all_arguments(), ["--stage", "stage1", "--pretrained-checkpoint", start, "--seq-length", "32"]
    base = Sources.gather(words, parser)
    seen = set()
    for ranks, tp, pp, ep, etp in itertools.product(
        (1, 2, 3, 4, 6, 8), (1, 2, 3, 4), (1, 2, 3), (1, 2, 3, 4), (1, 2, 4)
    ):
        sizes = {"tensor_model": tp, "pipeline_model": pp, "expert_model": ep, "expert_tensor": etp}
        for name, size in sizes.items():
            setattr(base.draft, f"{name}_parallel_size", size)
        run = Run.of(base.draft, base)
        object.__setattr__(run, "world_size", ranks)
        fits = not [line for check in layout.CHECKS for line in check(run)]
        assert fits == (
            ranks % (tp * pp) == 0 and ranks % (etp * ep * pp) == 0 and 4 % ep == 0 and etp in (1, tp)
            and tp in (1, 2, 4) and 4 % pp == 0
        ), (ranks, sizes)  # fmt: skip
        seen.add(fits)
    assert seen == {True, False}
    assert os.environ["WORLD_SIZE"] == "1"
