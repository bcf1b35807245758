"""Layouts of a tiny model, how they are trained on CPU ranks (gloo, fp32), and how far apart two runs are."""

import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import common
from benchmarks.common import STAGES
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from moelpr.base.run_folder import METRICS_FILE
from moelpr.model.checkpoints.chain import step_folder
from moelpr.model.checkpoints.torch_dist import TorchDistReader
from moelpr.model.metrics.run_metrics import Step, read_run_metrics
from moelpr.model.model_spec import ModelSpec, NewTokens
from moelpr.project.workflow.execution import execute

# Number of ranks → arguments of the trainer, of each training.
type Commands = dict[int, list[list[str]]]

TOLERANCE = 1e-5
STEPS = 3
LOSSES = ("lm_loss", "lm_loss_original", "lm_loss_expanded", "balance_loss", "lpr_loss")
VOCAB_SIZE = 300  # padded to 384 in one process, to 512 over two tensor-parallel ranks
NEW_TOKENS = NewTokens(220, 60, VOCAB_SIZE)  # two tensor-parallel ranks have 36 and 24 of them

# Adam moves an element whose gradient is only rounding by a full step, unless its epsilon exceeds the rounding.
SETTINGS = (
    f"--micro-batch-size 2 --global-batch-size 8 --seq-length 32 --lr 3e-3 --train-iters {STEPS} --log-interval 1 "
    "--adam-eps 1e-4 --weight-decay 0 --save-interval 100"
)
BOTH_LOSSES = "--lpr-loss-coeff 0.1 --balance-loss-coeff 0.01"
# Weight decay must not change old rows.
NEW_ROWS_TOO = f"{BOTH_LOSSES} --train-new-embeddings --weight-decay 0.1"

ROWS_STAGES = ("stage0", "stage1")

# Names of Megatron's arguments, and of ours, in model_spec.json.
FACTORS = {"rotary_interleaved": True, "softmax_scale": 0.2, "residual_multiplier": 0.22}
FACTORS |= {"use_mup": True, "mup_embedding_mult": 12.0, "mup_output_mult": 0.1}

TP2 = "--tensor-model-parallel-size 2"  # with sequence parallelism; the experts are split too (ETP 2)
TP2_ETP1 = f"{TP2} --expert-tensor-parallel-size 1"
EP2 = "--expert-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
VPP2 = "--num-virtual-stages-per-pipeline-rank 2"
OPTIMIZER = "--use-distributed-optimizer"
OVERLAP = f"{OPTIMIZER} --overlap-grad-reduce --overlap-param-gather"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules moe core_attn"
APART = "--dataloader-inter-document-masking"
PER_TOKEN = "--calculate-per-token-loss --eod-mask-loss"
FUSED = "--cross-entropy-loss-fusion"  # a GPU's default


@dataclass(frozen=True)
class Layout:
    """Ranks and flags of a training, the layout it must agree with, its model, and the stages that are compared."""

    ranks: int
    flags: str
    reference: str = "1"
    model: str = "all-moe"
    stages: tuple[str, ...] = STAGES


_PER_TOKEN = partial(Layout, reference="1 per-token loss")
_APART = partial(Layout, reference="1 documents apart")
_EDGES = partial(Layout, reference="edges 1", model="edges")
_ROWS = partial(Layout, reference="rows 1", model="rows", stages=ROWS_STAGES)
_UNTIED = partial(Layout, reference="rows untied 1", model="rows-untied", stages=ROWS_STAGES)
_FACTORS = partial(Layout, reference="factors 1", model="factors")
_HYBRID = partial(Layout, reference="hybrid 1", model="hybrid")
_HYBRID_APART = partial(Layout, reference="hybrid 1 documents apart", model="hybrid")

LAYOUTS: dict[str, Layout] = {
    "1": Layout(1, ""),
    # The balance loss is a mean over micro-batches of a product of means, so accumulation is compared without it.
    "1 no balance loss": Layout(1, "--micro-batch-size 8 --balance-loss-coeff 0", reference="1 no balance loss"),
    "1 accumulation": Layout(1, "--micro-batch-size 1 --balance-loss-coeff 0", reference="1 no balance loss"),
    "1 full recompute": Layout(1, FULL),
    "1 selective recompute": Layout(1, SELECTIVE),
    "1 per-token loss": _PER_TOKEN(1, PER_TOKEN),
    "DP2": Layout(2, ""),
    "DP2 distributed optimizer": Layout(2, OPTIMIZER),
    "DP2 overlapped": Layout(2, OVERLAP),
    "DP2 per-token loss": _PER_TOKEN(2, PER_TOKEN),
    "EP2": Layout(2, EP2),
    "EP2 distributed optimizer, full recompute": Layout(2, f"{EP2} {OPTIMIZER} {FULL}"),
    "EP2 per-token loss, overlapped": _PER_TOKEN(2, f"{EP2} {PER_TOKEN} {OVERLAP}"),
    "TP2+SP": Layout(2, TP2_ETP1),
    "TP2+SP ETP2": Layout(2, TP2),
    "TP2+SP ETP2 selective recompute": Layout(2, f"{TP2} {SELECTIVE}"),
    "TP2+SP EP2": Layout(2, f"{TP2_ETP1} {EP2}"),
    "TP2+SP per-token loss": _PER_TOKEN(2, f"{TP2_ETP1} {PER_TOKEN}"),
    "PP2": Layout(2, PP2),
    "PP2 full recompute": Layout(2, f"{PP2} {FULL}"),
    "PP2 VPP2": Layout(2, f"{PP2} {VPP2}"),
    "PP2 VPP2 per-token loss": _PER_TOKEN(2, f"{PP2} {VPP2} {PER_TOKEN}"),
    "PP4": Layout(4, "--pipeline-model-parallel-size 4"),
    "EP4": Layout(4, "--expert-model-parallel-size 4"),
    "EP2 DP2 distributed optimizer": Layout(4, f"{EP2} {OPTIMIZER}"),
    "EP2 DP2 overlapped": Layout(4, f"{EP2} {OVERLAP}"),
    "PP2 VPP2 DP2 overlapped": Layout(4, f"{PP2} {VPP2} {OVERLAP}"),
    "PP2 EP2": Layout(4, f"{PP2} {EP2}"),
    "PP2 VPP2 EP2 overlapped, full recompute": Layout(4, f"{PP2} {VPP2} {EP2} {OVERLAP} {FULL}"),
    "TP2+SP PP2": Layout(4, f"{TP2_ETP1} {PP2}"),
    "TP2+SP EP2 DP2 distributed optimizer": Layout(4, f"{TP2_ETP1} {EP2} {OPTIMIZER}"),
    # These four contain every pair of compatible features (tests/distributed/test_layouts.py).
    "TP2+SP ETP2 EP2 distributed optimizer, selective recompute": Layout(4, f"{TP2} {EP2} {OPTIMIZER} {SELECTIVE}"),
    "TP2+SP ETP2 PP2 VPP2 overlapped, full recompute": Layout(4, f"{TP2} {PP2} {VPP2} {OVERLAP} {FULL} {FUSED}"),
    "TP2+SP EP2 PP2 VPP2 overlapped, selective recompute, per-token loss": _PER_TOKEN(
        4, f"{TP2_ETP1} {EP2} {PP2} {VPP2} {OVERLAP} {SELECTIVE} {PER_TOKEN} {FUSED}"
    ),
    "TP2+SP ETP2 EP2 overlapped, full recompute, per-token loss": _PER_TOKEN(
        4, f"{TP2} {EP2} {OVERLAP} {FULL} {PER_TOKEN}"
    ),
    "1 documents apart": _APART(1, APART),
    "TP2+SP ETP2 documents apart, full recompute": _APART(2, f"{TP2} {APART} {FULL}"),
    "TP2+SP ETP2 PP2 VPP2 documents apart, selective recompute": _APART(4, f"{TP2} {PP2} {VPP2} {APART} {SELECTIVE}"),
    # Tied embeddings; the last two layers dense, so that a pipeline stage has nothing to train; new experts that no
    # token chooses, all on one expert-parallel rank; most micro-batches and some steps without original-language text.
    "edges 1": _EDGES(1, ""),
    "edges DP2": _EDGES(2, OPTIMIZER),
    "edges EP2": _EDGES(2, EP2),
    "edges TP2+SP ETP2": _EDGES(2, TP2),
    "edges PP2": _EDGES(2, PP2),
    "edges PP2 overlapped, full recompute": _EDGES(2, f"{PP2} {OVERLAP} {FULL}"),
    "edges TP2+SP PP2": _EDGES(4, f"{TP2_ETP1} {PP2} {FUSED}"),
    "edges PP2 EP2 distributed optimizer": _EDGES(4, f"{PP2} {EP2} {OPTIMIZER}"),
    # Rows of new tokens train: alone in stage 0, with experts in stage 1. Tied embeddings.
    "rows 1": _ROWS(1, ""),
    "rows 1 full recompute": _ROWS(1, FULL),
    "rows DP2 overlapped": _ROWS(2, OVERLAP),
    "rows TP2+SP ETP2": _ROWS(2, TP2),
    "rows PP2 VPP2": _ROWS(2, f"{PP2} {VPP2}"),
    "rows TP2+SP PP2, full recompute": _ROWS(4, f"{TP2_ETP1} {PP2} {FULL} {FUSED}", stages=("stage0",)),
    "rows PP2 VPP2 DP2 overlapped": _ROWS(4, f"{PP2} {VPP2} {OVERLAP} {FUSED}", stages=("stage1",)),
    "rows untied 1": _UNTIED(1, ""),
    # RoPE of neighbouring channels, and Granite's multipliers.
    "factors 1": _FACTORS(1, ""),
    "factors TP2+SP ETP2 PP2 overlapped, full recompute": _FACTORS(4, f"{TP2} {PP2} {OVERLAP} {FULL}"),
    # A Qwen3.5: layers with linear attention between others with gated attention.
    "hybrid 1": _HYBRID(1, ""),
    "hybrid DP2 overlapped": _HYBRID(2, OVERLAP),
    "hybrid EP2 distributed optimizer": _HYBRID(2, f"{EP2} {OPTIMIZER}"),
    "hybrid TP2+SP ETP2": _HYBRID(2, TP2),
    "hybrid PP2 VPP2": _HYBRID(2, f"{PP2} {VPP2}"),
    "hybrid PP2, full recompute": _HYBRID(2, f"{PP2} {FULL}"),
    "hybrid EP4": _HYBRID(4, "--expert-model-parallel-size 4"),
    "hybrid PP2 EP2 overlapped": _HYBRID(4, f"{PP2} {EP2} {OVERLAP}"),
    "hybrid TP2+SP PP2": _HYBRID(4, f"{TP2_ETP1} {PP2}"),
    "hybrid TP2+SP EP2 distributed optimizer": _HYBRID(4, f"{TP2_ETP1} {EP2} {OPTIMIZER}"),
    "hybrid 1 documents apart": _HYBRID_APART(1, APART),
    "hybrid TP2+SP documents apart, selective recompute": _HYBRID_APART(2, f"{TP2_ETP1} {APART} {SELECTIVE}"),
    "hybrid TP2+SP PP2 documents apart, full recompute": _HYBRID_APART(4, f"{TP2_ETP1} {PP2} {APART} {FULL}"),
    "rows untied TP2+SP PP2": _UNTIED(4, f"{TP2} {PP2}"),
}


@dataclass(frozen=True)
class Difference:
    """How far a run is from its reference: the largest relative difference of each kind."""

    losses: float
    grad_norm: float
    weights: float  # largest difference of a tensor's elements over its largest element

    @property
    def worst(self) -> float:
        return max(vars(self).values())


def make_material(folder: Path) -> None:
    """Random models as Megatron checkpoints; corpora `original`, `expanded` and held-out ones.

    `all-moe` is at the start of a second round of languages: it has two original experts, one of them in two places.
    For `edges` and `rows`, see LAYOUTS.
    """
    # Random experts differ, so every choice of a router matters.
    first = common.upcycle(_dense_model(folder, tied=False), folder / "first-round", 1, random=True, original_copies=2)
    mcore_to_hf(first, folder / "first-round-hf")
    common.upcycle(folder / "first-round-hf", folder / "all-moe", 4, random=True)
    with patch("torch.nn.init.xavier_normal_", _half_of_the_experts_win):  # initializes the routers
        common.upcycle(_dense_model(folder, tied=True), folder / "edges", 8, random=True, moe_layers=[0, 1])
    for name, tied in {"rows": True, "rows-untied": False}.items():
        rows = common.upcycle(_dense_model(folder, tied=tied), folder / name, 4, random=True)
        replace(ModelSpec.read(rows), new_tokens=NEW_TOKENS).write(rows)
    factors = common.upcycle(_dense_model(folder, tied=True), folder / "factors", 4, random=True)
    spec = ModelSpec.read(factors)
    replace(spec, megatron_args=spec.megatron_args | FACTORS).write(factors)
    hybrid = common.save_random_model(qwen3_5(32, 48, VOCAB_SIZE), folder / "hf-hybrid")
    common.upcycle(hybrid, folder / "hybrid", 4, random=True)
    make_corpora(folder)


def make_corpora(folder: Path) -> None:
    random = np.random.default_rng(0)
    # Held-out text does not fill a multiple of the global batch.
    for name, count in {"original": 80, "expanded": 80, "held-out-original": 12, "held-out-expanded": 12}.items():
        first_token = 150 if name.endswith("expanded") else 0
        starts = random.integers(first_token, first_token + 150, count)
        documents = [(start + np.arange(random.integers(10, 40))) % VOCAB_SIZE for start in starts]
        # 0 ends a document.
        common.write_corpus(
            folder / name, VOCAB_SIZE, ((np.append(ids, 0), name.endswith("original")) for ids in documents)
        )


def _dense_model(folder: Path, tied: bool) -> Path:
    config = common.qwen2_config(4, 32, 48, VOCAB_SIZE, length=64, tie_word_embeddings=tied)
    return common.save_random_model(config, folder / f"hf-tied-{tied}")


def qwen3_5(hidden: int, ffn: int, vocabulary: int, **others: Any) -> Any:
    """A Qwen3.5 of four layers with linear and full attention in turn."""
    from transformers import Qwen3_5TextConfig

    shape = dict(num_hidden_layers=4, hidden_size=hidden, intermediate_size=ffn, vocab_size=vocabulary, head_dim=16)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=4)
    shape |= dict(linear_key_head_dim=8, linear_value_head_dim=12, max_position_embeddings=64, eos_token_id=0)
    kinds = ["linear_attention", "full_attention"] * 2
    return Qwen3_5TextConfig(**shape | {"layer_types": kinds, "tie_word_embeddings": False} | others)


def _half_of_the_experts_win(router: torch.Tensor, **_: object) -> torch.Tensor:
    """For any input, two of the first half of the new experts and the original one have the highest logits."""
    direction = torch.randn(router.shape[1], generator=torch.Generator().manual_seed(1))
    router.zero_()
    # On one side of the plane experts 1 and 2 win, on the other side 3 and the original one.
    for expert, factor in ((1, 20.0), (2, 10.0), (3, -20.0), (0, -10.0)):
        router[expert] = factor * direction
    return router


def trainer_arguments(folder: Path, layout: Layout, stage: str, save: Path) -> list[str]:
    weight = "40" if layout.model == "edges" else "1"
    losses = dict.fromkeys(("stage0", "dense", "ffn"), "")
    losses["stage1"] = NEW_ROWS_TOO if layout.model.startswith("rows") else BOTH_LOSSES
    data = ["1", str(folder / "original"), weight, str(folder / "expanded")]
    words = ["--stage", stage, "--pretrained-checkpoint", str(folder / layout.model), "--data-path", *data]
    words += ["--validation-data", f"en={folder / 'held-out-original'}", f"el={folder / 'held-out-expanded'}"]
    return [*words, "--save", str(save), *f"{SETTINGS} {losses.get(stage, BOTH_LOSSES)} {layout.flags}".split()]


def run_folder(folder: Path, name: str, stage: str) -> Path:
    return folder / "runs" / re.sub(r"[^A-Za-z0-9+]+", "-", name) / stage


def run_layouts(folder: Path, names: list[str], others: Commands | None = None) -> None:
    """Train every named layout, and `others`; all that have the same number of ranks share one launch."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    commands: Commands = defaultdict(list)
    for name in names:
        layout = LAYOUTS[name]
        for stage in layout.stages:
            commands[layout.ranks].append(trainer_arguments(folder, layout, stage, run_folder(folder, name, stage)))
    for ranks, trainings in (others or {}).items():
        commands[ranks] += trainings
    launch_all(folder, commands, "layouts")


def launch_all(folder: Path, commands: Commands, name: str, module: str = "tests.distributed.train_many") -> None:
    """Run the trainings of each number of ranks one after another in one launch; raise its log if one fails."""
    for ranks in sorted(commands):
        plan, log = (folder / f"{name}-{ranks}.{suffix}" for suffix in ("json", "log"))
        plan.write_text(json.dumps(commands[ranks]))
        words = f"-m moelpr.torchrun --standalone --nproc-per-node {ranks} -m {module}".split()
        variables, limit_s = common.environment(OMP_NUM_THREADS="1"), 60 + 60 * len(commands[ranks])
        if execute([*words, str(plan)], log, variables, limit_s=limit_s, stderr=subprocess.STDOUT) != 0:
            # No SystemExit: pytest would report it once, and the same fixture's next tests by an assertion of its own.
            raise RuntimeError(f"{log.stem} failed:\n{log.read_text()[-6000:]}")


def compare(folder: Path, name: str, stage: str) -> Difference:
    """How far the run of a layout is from that of its reference."""
    return difference(run_folder(folder, name, stage), run_folder(folder, LAYOUTS[name].reference, stage))


def difference(ours: Path, theirs: Path) -> Difference:
    records = list(zip(metrics(ours), metrics(theirs), strict=True))
    losses = [_relative(a.get(key), b.get(key)) for a, b in records for key in LOSSES]
    for a, b in zip(validations(ours), validations(theirs), strict=True):
        losses += [_relative(a[language]["lm_loss"], b[language]["lm_loss"]) for language in b]
    shares = [key for key in records[0][1] if key.startswith(("original_first_share", "token_share"))]
    if any(a[key] != b[key] for a, b in records for key in shares):
        losses.append(float("inf"))  # tokens were counted twice or not at all
    return Difference(
        losses=max(losses),
        grad_norm=max(_relative(a["grad_norm"], b["grad_norm"]) for a, b in records),
        weights=weights_difference(weights(ours), weights(theirs)),
    )


def metrics(run: Path) -> list[Step]:
    """Records of training steps."""
    return read_run_metrics(run / METRICS_FILE).steps


def validations(run: Path) -> list[dict[str, Any]]:
    """Validation passes, before the first step and after the last: language -> result."""
    return [record["languages"] for record in read_run_metrics(run / METRICS_FILE).validations]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All model tensors of the last step."""
    reader = TorchDistReader(step_folder(run))
    return {key: reader.read(key) for key in reader.keys if key.startswith(("decoder.", "embedding.", "output_layer."))}


def _relative(a: float | None, b: float | None) -> float:
    if a is None or b is None:  # a mean over no tokens: equal if both are, infinitely different otherwise
        return 0.0 if a is b else float("inf")
    return abs(a - b) / abs(b) if b else abs(a)


def weights_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    differences = []
    for key, b in theirs.items():
        rows = min(len(ours[key]), len(b))  # the vocabulary is padded to a multiple of the tensor-parallel size
        a, b = ours[key][:rows], b[:rows]
        differences.append(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item())
    return float(np.max(differences))  # NaN if one is


def is_off(row: dict[str, Any]) -> bool:
    """Whether a row with the fields of `Difference` is above the tolerance, or NaN."""
    return not all(row[kind] <= TOLERANCE for kind in ("losses", "grad_norm", "weights"))


def measure_and_report(
    description: str | None, kind: str, steps: int, measure: Callable[[Path, str], list[dict]]
) -> None:
    """The command line of `layouts` and `resume_layouts`: measures, prints a table, exits with code 1 above TOLERANCE.

    Args:
        kind: key of the rows in the JSON file.
        measure: (folder, --only) -> rows that include the fields of Difference.
    """
    parser = common.argument_parser(description)
    parser.add_argument("--only", default="", metavar="REGEX", help=f"measure only {kind} whose name matches")
    parser.add_argument("--folder", type=Path, help="keep models, runs and logs here (default: a temporary folder)")
    args = parser.parse_args()
    with common.working_folder(args.folder) as folder:
        make_material(folder)
        rows = measure(folder, args.only)
    common.print_table([row | {"is_within_tolerance": not is_off(row)} for row in rows])
    common.write_json({"tolerance": TOLERANCE, "steps": steps, kind: rows}, args.json)
    sys.exit(int(any(map(is_off, rows))))
