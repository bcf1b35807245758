"""Dry runs of recipes and of layouts of tests/distributed, in forks of one process.

    python -m tests.dry_run.cases [REGEX]

prints a line of JSON for each case: what its ranks did.
"""

import json
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moelpr.arguments.recipes import read_recipe
from moelpr.dry_run import whole_run
from moelpr.model_spec import ModelSpec, MoeSpec
from moelpr.process.errors import UserError
from tests.distributed.layout_runs import BOTH_LOSSES, LAYOUTS, SETTINGS
from tests.launch import test_recipes as recipes
from tests.support.model_shapes import SHAPES, save_config
from tests.unit.conftest import SHAPE as TINY_SHAPE

DATA = ["--pretrained-checkpoint", "upcycled", "--data-path", "corpus"]
PER_NODE = 8

RECIPES = "qwen3-1.7b-stage1 qwen3-8b-stage2 qwen2.5-72b-stage1".split()
# Together with the recipes: every kind of parallelism, recompute, and a pipeline stage that trains nothing.
LAYOUT_NAMES = {
    "TP2+SP ETP2 PP2 VPP2 overlapped, full recompute": "stage1",
    "1 documents apart": "stage2",
    "edges PP2 EP2 distributed optimizer": "stage1",
}
SHAPE = TINY_SHAPE | dict(num_layers=4, hidden_size=256, ffn_hidden_size=512, kv_channels=64, vocab_size=512)
_UNTIED = SHAPE | dict(untie_embeddings_and_output_weights=True)
MODELS = {
    "all-moe": ModelSpec("qwen2", "bfloat16", _UNTIED, MoeSpec(4, 2, (0, 1, 2, 3), 2, 2)),
    "edges": ModelSpec("qwen2", "bfloat16", SHAPE, MoeSpec(8, 2, (0, 1))),
}


@dataclass(frozen=True)
class Case:
    ranks: int
    spec: ModelSpec
    argv: list[str]


def cases() -> dict[str, Case]:
    """All cases; call this in a folder with recipes' models."""
    found = {name: recipe_case(name, layers=2) for name in RECIPES}
    for name, stage in LAYOUT_NAMES.items():
        layout = LAYOUTS[name]
        flags = f"--stage {stage} {SETTINGS} {BOTH_LOSSES} {layout.flags}"
        found[name] = Case(layout.ranks, MODELS[layout.model], [*flags.split(), *DATA])
    return found


def recipe_case(name: str, layers: int | None = None) -> Case:
    """A recipe's command, for its model or one with this many layers per pipeline stage."""
    path = recipes.RECIPES / f"{name}.yaml"
    planner = recipes.command_in(recipes.comment_of(path.name))
    stages = int(read_recipe(path).get("--pipeline-model-parallel-size", 1))
    spec = recipes.spec_of(planner)
    argv = ["--stage", recipes.stage_of(path.name), "--recipe", str(path), *DATA]
    return Case(int(recipes.value_of("--gpus", planner)), _shortened(spec, layers * stages) if layers else spec, argv)


def _shortened(spec: ModelSpec, layers: int) -> ModelSpec:
    """The model with fewer layers, which does not change what one of them does."""
    shape = spec.megatron_args | {"num_layers": layers}
    moe = spec.moe and replace(spec.moe, layers=tuple(layer for layer in spec.moe.layers if layer < layers))
    return replace(spec, megatron_args=shape, moe=moe)


def outcome(case: Case) -> dict[str, Any]:
    """What the ranks of a case did, as JSON."""
    from moelpr.dry_run.cost import disagreements, moved_by_group
    from moelpr.plan.step_time import expert_traffic

    try:
        found = whole_run.check(case.argv, 1, case.ranks, lambda: case.spec)
    except (UserError, RuntimeError):
        return {"error": traceback.format_exc()}
    first, last, planned = found.runs[0], found.runs[-1], found.runs[0].planned
    layers = first.spec.megatron_args["num_layers"]
    moved = {"EXPERT_MODEL": 0.0, "EXPERT_TENSOR": 0.0}
    for (group, _, _), (_, num_bytes) in moved_by_group(last.counts).items():
        if (name := group.removesuffix("_PARALLEL_GROUP")) in moved:
            moved[name] += num_bytes
    return {
        "live": [run.live_bytes for run in found.runs],
        "peaks": [run.peak_bytes for run in found.runs],
        "planned": [planned and planned.memories[run.stage].total_bytes for run in found.runs],
        "moved": list(moved.values()),
        "traffic": planned and list(expert_traffic(first.spec, planned.layout, planned.workload)),
        "waits": dict(first.counts.waits),
        "operators": sorted({kernel.operator for run in found.runs for kernel in run.counts.kernels}),
        "disagreements": [*disagreements([*found.runs, *found.witnesses])],
        "moe_layers_of_first": sum(map(first.spec.is_moe_layer, range(layers // first.layout.pp))),
        "micro_batches": first.num_microbatches,
        "stages": first.layout.pp,
        "seconds": [run.seconds for run in (*found.runs, *found.witnesses)],
    }


@contextmanager
def folder_of_models() -> Iterator[None]:
    """Be in a folder with a folder of each model's config.json."""
    with TemporaryDirectory() as folder, chdir(folder):
        for model in SHAPES:
            save_config(model, Path(folder) / model)
        yield


def main() -> None:
    whole_run.prepare("h100-80", PER_NODE)
    with folder_of_models():
        pattern = sys.argv[1] if len(sys.argv) > 1 else ""
        for name, case in cases().items():
            if re.search(pattern, name):
                print(json.dumps({name: outcome(case)}), flush=True)


if __name__ == "__main__":
    main()
