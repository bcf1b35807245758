"""Stage 1 against Megatron's own MoE layer of the same shape, by dry runs.

    python -m tests.dry_run.against_megatron [--layers] [REGEX]

prints a table of the models whose names match: launches, waits of the host, bytes that kernels touch and peak memory
of the last rank's step, and predicted tokens/s per H100. With --layers, what a second MoE layer adds to a micro-batch
instead, without what it takes to read the original expert's weights, and the ratios to Megatron's.

Megatron's layer has its own rotary embedding, and sends all K choices to experts with the same kernels; the rest of the
model and the trainer are ours.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

from moelpr.base.text_tables import table_text
from moelpr.train.check import whole_run
from tests.dry_run.cases import PER_NODE, Case, folder_of_models, real_case

NAMES = ("Qwen1.5-1.8B stage1", "Qwen3-8B stage1", "Qwen2.5-72B stage1")
GPU = "h100-80"
PHASES = "forward", "backward"


def dry_run(case: Case, is_megatrons: bool) -> whole_run.Outcome:
    if not is_megatrons:
        return whole_run.check(case.argv, 1, case.ranks, lambda: case.spec)
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from benchmarks.baselines.plain_megatron import plain_layer_spec
    from moelpr.model.layers import builder, layer
    from moelpr.model.layers.experts import GroupedExperts

    rotate = "_apply_rotary_pos_emb_bshd"
    with (
        patch.object(rope_utils, rotate, inspect.unwrap(getattr(rope_utils, rotate))),
        patch.object(layer, "NewExpertsDispatcher", MoEAlltoAllTokenDispatcher),
        patch.object(builder, "layer_spec", partial(plain_layer_spec, experts=GroupedExperts)),
    ):
        return whole_run.check([*case.argv, "--stage1-experts", "new"], 1, case.ranks, lambda: case.spec)


def added_by_a_layer(name: str, is_megatrons: bool) -> dict[str, tuple[float, float]]:
    """Phase → launches and bytes of a micro-batch, without those for the original expert's weights."""
    runs = []
    for layers in (1, 2):
        case = real_case(name, layers, pipeline_stages=1)
        runs += dry_run(case, is_megatrons).runs
    shape, etp = runs[0].spec.megatron_args, runs[0].layout.etp
    weights = 0 if is_megatrons else 2 * 3 * shape["hidden_size"] * shape["ffn_hidden_size"] // etp
    found = {}
    for phase in PHASES:
        sums = [
            [
                (number, number * kernel.num_bytes)
                for kernel, number in run.counts.kernels.items()
                if kernel.phase == phase
            ]
            for run in runs
        ]
        fewer, more = (map(sum, zip(*pairs, strict=True)) for pairs in sums)
        launches, num_bytes = ((b - a) / runs[0].num_microbatches for a, b in zip(fewer, more, strict=True))
        found[phase] = launches, num_bytes - weights
    return found


def rows_of_layers(name: str) -> Iterator[list[str]]:
    stock, ours = (added_by_a_layer(name, is_megatrons) for is_megatrons in (True, False))
    for label, one in (("Megatron's", stock), ("ours", ours)):
        sums = [sum(both) for both in zip(*one.values(), strict=True)]
        ratios = [mine / sum(theirs) for mine, theirs in zip(sums, zip(*stock.values(), strict=True), strict=True)]
        launches, gigabytes = zip(*one.values(), strict=True)
        numbers = [f"{n:.1f}" for n in launches] + [f"{n / 1e9:.3f}" for n in gigabytes]
        yield [name, label, *numbers, *(f"{ratio:.3f}" for ratio in ratios)]


def rows_of_steps(name: str) -> Iterator[list[str]]:
    from moelpr.train.check.tables import numbers

    for label, is_megatrons in (("Megatron's", True), ("ours", False)):
        found = dry_run(real_case(name), is_megatrons)
        last, ranks = found.runs[-1], found.runs[0].layout.world_size
        step_s = numbers(found, PER_NODE)["step_seconds"][GPU]["dry_run"]
        num_bytes = sum(number * kernel.num_bytes for kernel, number in last.counts.kernels.items())
        sizes = f"{num_bytes / 1e9:,.0f}", f"{last.peak_bytes / 2**30:.2f}"
        counts = last.counts.kernels.total(), last.counts.waits.total()
        speed = last.tokens_per_step / step_s / ranks
        yield [name, label, *(f"{count:,}" for count in counts), *sizes, f"{speed:,.0f}"]


def main() -> None:
    words = sys.argv[1:]
    by_layer = "--layers" in words
    pattern = next((word for word in words if word != "--layers"), "")
    whole_run.prepare(GPU, PER_NODE)
    if by_layer:
        columns = [f"{what} {phase}" for what in ("launches", "GB") for phase in PHASES]
        head, rows_of = [*columns, "launches / Megatron's", "bytes / Megatron's"], rows_of_layers
    else:
        head, rows_of = ["launches", "waits", "GB", "peak GiB", "tokens/s per GPU"], rows_of_steps
    with folder_of_models():
        rows = [row for name in NAMES if re.search(pattern, name) for row in rows_of(name)]
    print(table_text(["model", "MoE", *head], rows, [0, 1]))


if __name__ == "__main__":
    main()
