"""Dry runs of recipes and of layouts of tests/distributed, in forks of one process.

    python -m tests.dry_run.cases [REGEX] [rows]

prints a line of JSON for each case: what its ranks did. `suite` stands for the cases of the test suite; `rows` prints
the rows of docs/design/gpu.md for stages of models of real size.
"""

import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from moelpr.base.errors import UserError
from moelpr.model.families.families import read_base
from moelpr.model.families.new_experts import NewExperts, with_new_experts
from moelpr.model.model_spec import ModelSpec, MoeSpec, NewTokens
from moelpr.plan.gpus import GPUS
from moelpr.train.check import whole_run
from tests.distributed.layout_runs import APART, EP2, FACTORS, LAYOUTS, OVERLAP, Layout, qwen3_5, trainer_arguments
from tests.support.model_shapes import SHAPES, save_config
from tests.unit.conftest import SHAPE as TINY_SHAPE

DATA = ["--pretrained-checkpoint", "upcycled", "--data-path", "corpus"]
PER_NODE = 8


@dataclass(frozen=True)
class Real:
    """A stage of a model of real size on GPUs with 80 GiB: the paper's recipe, and `flags` that override it."""

    model: str
    experts: NewExperts | None
    ranks: int
    flags: str = ""


ON_4_NODES = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 8 --expert-tensor-parallel-size 1"
DENSE_ON_4_NODES = "--pipeline-model-parallel-size 2 --micro-batch-size 2"
DENSE_ON_40_NODES = "--tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 5 "
DENSE_ON_40_NODES += "--micro-batch-size 1"
ON_40_NODES = f"{DENSE_ON_40_NODES} --expert-model-parallel-size 8 --expert-tensor-parallel-size 4"
ON_4_GPUS = "--expert-model-parallel-size 4 --micro-batch-size 4 --seq-length 4096"
ON_A_NODE = "--expert-model-parallel-size 8 --micro-batch-size 2 --bf16-moments"
# The last word of a name is the stage.
EP8 = "--expert-model-parallel-size 8 --micro-batch-size 4 --save-trained-only"
EVERY_2ND = NewExperts(1, moe_every_k_layers=2)
REAL = {
    "Qwen3-1.7B stage1": Real("Qwen3-1.7B-Base", EVERY_2ND, 1, "--micro-batch-size 2 --train-tokens 1B"),
    "Qwen3-8B stage2": Real("Qwen3-8B-Base", NewExperts(8), 32, EP8),
    "Qwen2.5-72B stage1": Real("Qwen2.5-72B", NewExperts(8), 320, ON_40_NODES),
    "Granite-3.1-3B-A800M stage1": Real("Granite-3.1-3B-A800M", NewExperts(8), 4, ON_4_GPUS),
    "Qwen3-8B on a node, moments in bf16, stage1": Real("Qwen3-8B-Base", NewExperts(8), 8, ON_A_NODE),
}
MORE_REAL = {
    "Qwen1.5-1.8B stage1": Real("Qwen1.5-1.8B", NewExperts(5, original_copies=1), 8),
    "Qwen1.5-1.8B stage2": Real("Qwen1.5-1.8B", NewExperts(5, original_copies=1), 8),
    "Qwen3-8B stage1": Real("Qwen3-8B-Base", NewExperts(8), 32, f"{ON_4_NODES} --micro-batch-size 2"),
    "Qwen3.5-9B stage1": Real("Qwen3.5-9B-Base", NewExperts(8), 32, f"{ON_4_NODES} --micro-batch-size 1"),
    # A second FFN, against full fine-tuning with Megatron's dense layers.
    **{f"Qwen1.5-1.8B {stage}": Real("Qwen1.5-1.8B", None, 8) for stage in ("ffn", "dense")},
    **{f"Qwen3-8B {stage}": Real("Qwen3-8B-Base", None, 32, DENSE_ON_4_NODES) for stage in ("ffn", "dense")},
    "Qwen3-8B on a node, ffn": Real("Qwen3-8B-Base", None, 8, "--micro-batch-size 4"),
    "Qwen3-8B on a node, dense": Real("Qwen3-8B-Base", None, 8, "--micro-batch-size 2"),
    **{f"Qwen2.5-72B {stage}": Real("Qwen2.5-72B", None, 320, DENSE_ON_40_NODES) for stage in ("ffn", "dense")},
}
# Together with these: every kind of parallelism, of recompute and of model, and a pipeline stage that trains
# nothing. Each is a name in tests/distributed and a stage.
LAYOUT_NAMES = [
    ("TP2+SP ETP2 PP2 VPP2 overlapped, full recompute", "stage1"),
    ("TP2+SP EP2 PP2 VPP2 overlapped, selective recompute, per-token loss", "stage2"),
    ("1 documents apart", "stage2"),
    ("edges PP2 EP2 distributed optimizer", "stage1"),
    ("rows DP2 overlapped", "stage0"),
]
SHAPE = TINY_SHAPE | dict(num_layers=4, hidden_size=256, ffn_hidden_size=512, kv_channels=64, vocab_size=512)
_UNTIED = SHAPE | dict(untie_embeddings_and_output_weights=True)
_LAYERS = (0, 1, 2, 3)
_WINDOW = SHAPE | dict(window_size=[16, 0])
_ROWS = NewTokens(400, 60, 512)
MODELS = {
    "all-moe": ModelSpec("qwen2", "bfloat16", _UNTIED, MoeSpec(4, 2, _LAYERS, 2, 2)),
    "edges": ModelSpec("qwen2", "bfloat16", SHAPE, MoeSpec(8, 2, (0, 1))),
    "rows": ModelSpec("qwen2", "bfloat16", SHAPE, MoeSpec(4, 2, _LAYERS), new_tokens=_ROWS),
    "rows-untied": ModelSpec("qwen2", "bfloat16", _UNTIED, MoeSpec(4, 2, _LAYERS), new_tokens=_ROWS),
    "factors": ModelSpec("qwen2", "bfloat16", SHAPE | FACTORS, MoeSpec(4, 2, _LAYERS)),
    "window": ModelSpec("qwen2", "bfloat16", _WINDOW, MoeSpec(4, 2, _LAYERS)),
    "dense": ModelSpec("qwen2", "bfloat16", _UNTIED, None),
}
# Cases that no layout has: flags and models, with their number of ranks.
_ACTIVATION = "--recompute-granularity selective --recompute-modules moe_act"
OTHERS = {
    "window, documents apart": Layout(1, APART, model="window", stages=("stage1",)),
    "EP2, SwiGLU again": Layout(2, f"{EP2} {OVERLAP} {_ACTIVATION}", stages=("stage1",)),
    "only new experts in stage 1": Layout(1, "--stage1-experts new --lpr-loss-coeff 0", stages=("stage1",)),
}
# Allowed flags that change a step and are in no layout, as many together as there can be: ranks, model, stage.
_FLAGS = """
2 all-moe sft conversations, documents apart
  --expert-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --lpr-loss reference --bf16 --moe-router-dtype fp64 --attention-softmax-in-fp32 --ddp-num-buckets 2 --clip-grad 0.5
  --adam-beta1 0.8 --adam-beta2 0.9 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-fraction 0.1
4 all-moe sft conversations, pipeline
  --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2
  --decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 3 --transformer-impl local
  --attention-backend auto --no-gradient-accumulation-fusion --no-rope-fusion --no-bias-swiglu-fusion
  --no-bias-dropout-fusion --no-masked-softmax-fusion --no-persist-layer-norm --hidden-dropout 0.1
  --init-method-std 0.01 --make-vocab-size-divisible-by 64 --recompute-activations
2 all-moe stage1 fp16
  --fp16 --initial-loss-scale 4096 --min-loss-scale 1 --loss-scale-window 100 --hysteresis 2
  --accumulate-allreduce-grads-in-fp32 --expert-model-parallel-size 2 --optimizer sgd --sgd-momentum 0.5
  --lr-warmup-iters 1 --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 1 --lr-warmup-init 1e-5
  --lr-decay-iters 3
1 all-moe stage2 fp16, constant scale
  --fp16 --loss-scale 128
1 all-moe stage2 fp32
  --fp32 --train-everything --decoupled-lr 1e-4 --decoupled-min-lr 1e-5
2 all-moe stage1 norms and times
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --log-num-zeros-in-grad
  --timing-log-level 2
2 all-moe stage1 optimizer on the host
  --optimizer-cpu-offload --use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 1000000
  --main-grads-dtype bf16 --use-precision-aware-optimizer --seed 7
4 rows stage1 gradients in bf16
  --grad-reduce-in-bf16 --use-distributed-optimizer --pipeline-model-parallel-size 2
  --num-virtual-stages-per-pipeline-rank 2 --microbatch-group-size-per-virtual-pipeline-stage 2
2 all-moe stage1 a short first stage
  --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1 --recompute-granularity full
  --recompute-method block --recompute-num-layers 1 --no-overlap-p2p-communication
2 dense ffn ffn
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
2 dense dense dense
  --pipeline-model-parallel-size 2 --use-distributed-optimizer --ddp-num-buckets 3 --overlap-grad-reduce
"""
FLAGS = {
    f"flags: {name}": Layout(int(ranks), flags, model=model, stages=(stage,))
    for ranks, model, stage, name, flags in re.findall(r"^(\d) (\S+) (\S+) (.+)\n((?:  .+\n)+)", _FLAGS, re.MULTILINE)
}
SUITE = [*REAL, *(f"{stage} {name}" for name, stage in LAYOUT_NAMES), *list(OTHERS)[:2], next(iter(FLAGS))]


@dataclass(frozen=True)
class Case:
    ranks: int
    spec: ModelSpec
    argv: list[str]


def cases() -> dict[str, Callable[[], Case]]:
    """All cases, also those that are not in the suite; make one in `folder_of_models`."""
    return {
        # Every fourth layer of Qwen3.5 has full attention.
        **{name: partial(real_case, name, 4 if "3.5" in name else 2) for name in REAL | MORE_REAL},
        **{f"{stage} {name}": partial(tiny_case, one, stage) for name, one in LAYOUTS.items() for stage in one.stages},
        **{name: partial(tiny_case, one, *one.stages) for name, one in (OTHERS | FLAGS).items()},
    }


def tiny_case(layout: Layout, stage: str) -> Case:
    spec = hybrid() if layout.model == "hybrid" else MODELS[layout.model]
    return Case(layout.ranks, spec, trainer_arguments(Path(), layout, stage, Path("save")))


def hybrid() -> ModelSpec:
    return replace(with_new_experts(*read_base(Path("hybrid")), NewExperts(4)), dtype="bfloat16")


def real_case(name: str, layers: int | None = None, pipeline_stages: int | None = None) -> Case:
    """A stage of a model of real size, or of one with this many layers per pipeline stage; with other stages too."""
    real, stage = (REAL | MORE_REAL)[name], name.split()[-1]
    family, spec = read_base(Path(real.model))
    if real.experts:
        spec = with_new_experts(family, spec, real.experts.with_default_copies(spec))
    argv = ["--stage", stage, "--recipe", f"paper-{stage.replace('ffn', 'dense')}", *real.flags.split(), *DATA]
    words = dict(zip(argv, argv[1:], strict=False))
    stages, ranks = int(words.get("--pipeline-model-parallel-size", 1)), real.ranks
    if pipeline_stages is not None:
        ranks, stages = ranks // stages * pipeline_stages, pipeline_stages
        argv += ["--pipeline-model-parallel-size", str(stages)]
    return Case(ranks, _shortened(spec, layers * stages) if layers else spec, argv)


def _shortened(spec: ModelSpec, layers: int) -> ModelSpec:
    """The model with fewer layers, which does not change what one of them does."""
    shape = spec.megatron_args | {"num_layers": layers}
    if "linear_attention_freq" in shape:
        shape["linear_attention_freq"] = shape["linear_attention_freq"][:layers]
    moe = spec.moe and replace(spec.moe, layers=tuple(layer for layer in spec.moe.layers if layer < layers))
    return replace(spec, megatron_args=shape, moe=moe)


def outcome(case: Case) -> dict[str, Any]:
    """Return the launches and the memory of a case's ranks, as JSON."""
    from moelpr.plan.step_time import expert_traffic
    from moelpr.train.check import tables
    from moelpr.train.check.cost import disagreements, moved_by_group, seconds

    try:
        actual = whole_run.check(case.argv, 1, case.ranks, lambda: case.spec)
    except (UserError, RuntimeError):
        return {"error": traceback.format_exc()}
    first, last, planned = actual.runs[0], actual.runs[-1], actual.runs[0].planned
    layers = first.spec.megatron_args["num_layers"]
    moved = {"EXPERT_MODEL": 0.0, "EXPERT_TENSOR": 0.0}
    for (group, _, _), (_, num_bytes) in moved_by_group(last.counts).items():
        if (name := group.removesuffix("_PARALLEL_GROUP")) in moved:
            moved[name] += num_bytes
    return {
        "live": [run.live_bytes for run in actual.runs],
        "peaks": [run.peak_bytes for run in actual.runs],
        "planned": [planned and planned.memories[run.stage].total_bytes for run in actual.runs],
        "moved": list(moved.values()),
        "traffic": planned and list(expert_traffic(first.spec, planned.layout, planned.workload)),
        "waits": dict(first.counts.waits),
        "operators": sorted({kernel.operator for run in actual.runs for kernel in run.counts.kernels}),
        "disagreements": [*disagreements([*actual.runs, *actual.witnesses])],
        "moe_layers_of_first": sum(map(first.spec.is_moe_layer, range(layers // first.layout.pp))),
        "micro_batches": first.num_microbatches,
        "stages": first.layout.pp,
        "step_s": seconds(last, GPUS["h100-80"], PER_NODE).total,
        "planned_s": tables.planned_seconds(actual.runs, GPUS["h100-80"], PER_NODE),
    }


def row(name: str, is_megatrons: bool) -> dict[str, float]:
    """The last rank's row in the table of docs/design/gpu.md, from one and two layers per stage: all are alike."""
    from moelpr.train.check.cost import seconds, totals

    numbers = []
    for layers in (1, 2):
        case = real_case(name, layers)
        run = dry_run_of(case, is_megatrons)
        step_s, num_bytes = seconds(run, GPUS["h100-80"], PER_NODE).total, sum(size for *_, size in totals(run.counts))
        launches, waits = run.counts.kernels.total(), run.counts.waits.total()
        numbers.append([launches, waits, num_bytes / 1e9, run.peak_bytes / 2**30, step_s])
    more = real_case(name).spec.megatron_args["num_layers"] / run.layout.pp - 1
    all_layers = [one + more * (two - one) for one, two in zip(*numbers, strict=True)]
    answer = dict(zip("launches waits gigabytes peak_gib step_s".split(), all_layers, strict=True))
    return answer | {"tokens_per_s": run.tokens_per_step / answer["step_s"] / case.ranks}


@contextmanager
def folder_of_models() -> Iterator[None]:
    """Be in a folder with a folder of each model's config.json."""
    with TemporaryDirectory() as folder, chdir(folder):
        for model in SHAPES:
            save_config(model, Path(folder) / model)
        kinds = {"head_dim": 64, "architectures": ["Qwen3_5ForCausalLM"]}
        qwen3_5(256, 512, 512, **kinds).save_pretrained(Path(folder) / "hybrid")
        yield


@contextmanager
def megatrons_layer() -> Iterator[None]:
    """Use Megatron's own MoE layer of the same shape, and its rotary embedding."""
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
        yield


def dry_run_of(case: Case, is_megatrons: bool) -> Any:
    """The last rank; Megatron's layer routes all K choices."""
    argv = [*case.argv, *(["--stage1-experts", "new"] if is_megatrons else [])]
    with megatrons_layer() if is_megatrons else nullcontext():
        return whole_run.check(argv, 1, case.ranks, lambda: case.spec).runs[-1]


def added_by_a_layer(name: str, is_megatrons: bool) -> list[float]:
    """Launches of a micro-batch, and bytes without those that read the original expert's weights."""
    sums = []
    for layers in (1, 2):
        run = dry_run_of(real_case(name, layers, pipeline_stages=1), is_megatrons)
        kernels = {kernel: n for kernel, n in run.counts.kernels.items() if kernel.phase in ("forward", "backward")}
        sums.append((sum(kernels.values()), sum(number * kernel.num_bytes for kernel, number in kernels.items())))
    shape = run.spec.megatron_args
    weights = 3 * shape["hidden_size"] * shape["ffn_hidden_size"] // run.layout.etp
    launches, num_bytes = ((more - fewer) / run.num_microbatches for fewer, more in zip(*sums, strict=True))
    return [launches, num_bytes - (0 if is_megatrons else 2 * 2 * weights)]  # in bf16, forward and backward


def refuse_writes_to_views() -> None:
    """Let a rank fail whose backward pass goes through a write to a view, which copies all of the tensor."""
    from megatron.core.pipeline_parallel import schedules

    backward = schedules.backward_step

    def checked(input_tensor: Any, output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        output = output_tensor[0] if isinstance(output_tensor, list) else output_tensor
        waiting = seen = set() if output is None else {output.grad_fn}
        while waiting:
            waiting = {other for node in waiting if node for other, _ in node.next_functions} - seen
            seen = seen | waiting
        assert not [node for node in seen if node and node.name() == "CopySlices"], "something is written to a view"
        return backward(input_tensor, output_tensor, *args, **kwargs)

    schedules.backward_step = checked


def main() -> None:
    whole_run.prepare("h100-80", PER_NODE)
    refuse_writes_to_views()
    with folder_of_models():
        pattern = sys.argv[1] if len(sys.argv) > 1 else ""
        if sys.argv[2:] == ["rows"]:
            for name in filter(re.compile(pattern).search, REAL | MORE_REAL):
                for is_megatrons in [False, True][: 1 + name.endswith("stage1")]:
                    print(json.dumps({f"{name}{', Megatron' * is_megatrons}": row(name, is_megatrons)}), flush=True)
            return
        for name, case in cases().items():
            if name in SUITE if pattern == "suite" else re.search(pattern, name):
                print(json.dumps({name: outcome(case())}), flush=True)
        if pattern == "suite":
            layer = [added_by_a_layer("Qwen3-8B stage1", is_megatrons) for is_megatrons in (True, False)]
            print(json.dumps({"against Megatron": layer}))


if __name__ == "__main__":
    main()
