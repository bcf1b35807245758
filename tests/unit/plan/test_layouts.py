import itertools
import subprocess
import sys
from dataclasses import replace

import pytest

from moelpr.model.model_spec import ModelSpec, MoeSpec
from moelpr.plan.layouts import Layout, layout_problems
from tests.unit.conftest import SHAPE

# 4 heads in 2 query groups, 48 FFN rows, 4 new experts.
SPEC = ModelSpec("qwen2", "float32", SHAPE | {"num_layers": 4}, MoeSpec(4, 2, (0, 1, 2, 3)))
SIX_LAYERS = ModelSpec("qwen2", "float32", SHAPE | {"num_layers": 6}, MoeSpec(4, 2, (0, 1, 2, 3, 4, 5)))


def spec_of(**shape: int) -> ModelSpec:
    return replace(SPEC, megatron_args=SPEC.megatron_args | shape)


def problems(layout: Layout, world_size: int, spec: ModelSpec | None = SPEC, **settings: object) -> list[str]:
    return list(layout_problems(layout, world_size, spec, **{"torch_grouped_gemm": False, **settings}))


# (TP, PP, EP, ETP) on 4 ranks, and on 6 ranks: TP divides 4 heads, PP the layers, EP 4 new experts.
ON_4 = "1111 1121 1141 1211 1221 1411 2111 2121 2141 2112 2122 2211 2221 2212 4111 4121 4141 4114"
ON_6 = "1111 1121 1211 1311 1321 1611 2111 2121 2112 2311 2321 2312"


@pytest.mark.parametrize(("ranks", "spec", "legal"), [(4, SPEC, ON_4), (6, SIX_LAYERS, ON_6)])
def test_exactly_the_layouts_worked_out_by_hand_are_legal(ranks: int, spec: ModelSpec, legal: str) -> None:
    actual = set()
    for sizes in itertools.product(range(1, 9), repeat=4):
        tp, pp, ep, etp = sizes
        if not problems(Layout(tp, pp, ep, etp, max(1, ranks // (tp * pp))), ranks, spec):
            actual.add(sizes)
    assert actual == {tuple(map(int, sizes)) for sizes in legal.split()}


def test_a_layout_is_read_from_parsed_arguments_and_counts_invalid_sizes_as_1() -> None:
    settings = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 0, "expert_model_parallel_size": 4}
    layout = Layout.from_settings(settings, world_size=8, vpp=0)
    assert layout == Layout(tp=2, ep=4, etp=2, dp=4)
    assert (layout.world_size, layout.model_ranks, layout.expert_dp) == (8, 2, 1)
    assert Layout.from_settings(settings, world_size=1, vpp=3) == Layout(tp=2, ep=4, etp=2, dp=1, vpp=3)


@pytest.mark.parametrize(
    ("layout", "ranks", "flag", "fix"),
    [
        (Layout(tp=2, pp=3, etp=1), 4, "--tensor-model-parallel-size 2 x --pipeline-model-parallel-size 3", "1, 2, 4"),
        (Layout(ep=4), 6, "--expert-tensor-parallel-size 1 x --expert-model-parallel-size 4", "one of 1, 2, 3, 6"),
        (
            Layout(tp=3, ep=2, etp=3),
            3,
            "--expert-tensor-parallel-size 3 (by default --tensor-model-parallel-size)",
            "3",
        ),
        (Layout(ep=2), 1, "--expert-tensor-parallel-size 1 x --expert-model-parallel-size 2", "product is 1"),
        (Layout(ep=3, dp=3), 3, "--expert-model-parallel-size 3", "one of 1, 2, 4"),
        (Layout(tp=4, etp=2), 4, "--expert-tensor-parallel-size must be 1 or", "one of 1, 4"),
        (Layout(pp=3), 3, "--pipeline-model-parallel-size 3", "one of 1, 2, 4"),
    ],
)
def test_a_message_names_the_flag_and_the_sizes_that_work(layout: Layout, ranks: int, flag: str, fix: str) -> None:
    (actual,) = [line for line in problems(layout, ranks) if line.startswith(flag)]
    assert fix in actual


def test_tensor_parallelism_divides_heads_query_groups_and_ffn() -> None:
    (actual,) = problems(Layout(tp=4, dp=1), 4, spec_of(num_attention_heads=6, num_query_groups=3).as_dense())
    assert "6 attention heads" in actual and "3 query groups" in actual and "use one of 1, 3, 6" in actual
    # Divisors of 12 heads: all divide 48 FFN rows; of 4 query groups, 1, 2 and 4 divide them and 12 is a multiple;
    # of (12 + 2 x 4) x 8 = 160 rows of queries, keys and values, 1, 2 and 4 are divisors and 12 is not.
    (actual,) = problems(Layout(tp=12), 12, spec_of(num_attention_heads=12, num_query_groups=4))
    assert "160 query, key and value rows" in actual and "use one of 1, 2, 4" in actual


@pytest.mark.parametrize(
    ("length", "layout", "flag", "fix"),
    [
        (33, Layout(tp=2), "--tensor-model-parallel-size 2", "a multiple of 2, such as 32 or 34"),
        (34, Layout(cp=2), "2 x --context-parallel-size 2", "a multiple of 4, such as 32 or 36"),
        (28, Layout(tp=4, cp=2), "--tensor-model-parallel-size 4", "a multiple of 8, such as 24 or 32"),
        (3, Layout(cp=2), "2 x --context-parallel-size 2", "a multiple of 4, such as 4"),
    ],
)
def test_the_sequence_divides_over_tensor_and_context_ranks(length, layout, flag, fix) -> None:
    (actual,) = problems(layout, layout.world_size, seq_length=length)
    assert actual.startswith(f"--seq-length {length} ") and actual.endswith(fix) and flag in actual
    # Without sequence parallelism, which a dense model need not have, tensor-parallel ranks do not divide it.
    dense = SPEC.as_dense()
    assert problems(layout, layout.world_size, dense, seq_length=length, sequence_parallel=True) == [actual]
    assert bool(problems(layout, layout.world_size, dense, seq_length=length)) == ("context" in flag)


def test_the_global_batch_divides_over_data_parallel_ranks() -> None:
    (actual,) = problems(Layout(dp=2), 2, micro_batch_size=2, global_batch_size=6)
    assert actual.startswith("--global-batch-size 6 ") and "--micro-batch-size 2" in actual and "use 4 or 8" in actual
    assert problems(Layout(tp=2), 2, micro_batch_size=2, global_batch_size=6) == []


@pytest.mark.parametrize(
    ("shape", "etp", "named", "fix"),
    [
        ({"hidden_size": 36}, 1, "got 36", "another model"),
        ({"ffn_hidden_size": 44}, 1, "got 44", "another model"),
        ({}, 4, "got 12", "--expert-tensor-parallel-size 1"),
    ],
)
def test_grouped_gemm_on_a_gpu_requires_aligned_rows(shape: dict, etp: int, named: str, fix: str) -> None:
    layout = Layout(tp=4, etp=etp)
    assert problems(layout, 4, spec_of(**shape)) == []
    (actual,) = problems(layout, 4, spec_of(**shape), torch_grouped_gemm=True)
    assert "8" in actual and named in actual and f"use {fix}" in actual


def test_the_module_imports_neither_torch_nor_megatron() -> None:
    code = "import sys, moelpr.plan.layouts; sys.exit(bool({'torch', 'megatron'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
