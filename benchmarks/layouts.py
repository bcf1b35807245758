"""One checkpoint, many layouts: do they all train the same model?

    python -m benchmarks.layouts [--json FILE] [--only REGEX]

Trains both stages for a few steps under every layout of the table below, on CPU ranks with gloo in fp32, and compares
losses, gradient norms and updated weights with those of one process. Stage 1 trains with both losses at once, so that
every loss meets every layout in both stages. Exit code 1 when a layout is off by more than 1e-5.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

TOLERANCE = 1e-5
STEPS = 3
LOSSES = ("lm_loss", "lm_loss_original", "lm_loss_expanded", "balance_loss", "lpr_loss")
VOCAB_SIZE = 300  # padded to 384 in one process, to 512 over two tensor-parallel ranks

# Adam moves an element whose gradient is all rounding by a full step, unless its epsilon is larger than the rounding.
SETTINGS = (
    f"--micro-batch-size 2 --global-batch-size 8 --seq-length 32 --lr 3e-3 --train-iters {STEPS} --log-interval 1 "
    "--lpr-loss-coeff 0.1 --balance-loss-coeff 0.01 --adam-eps 1e-4 --weight-decay 0 --save-interval 100"
)

TP2 = "--tensor-model-parallel-size 2"  # with sequence parallelism; the experts are split as well (ETP 2)
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


@dataclass(frozen=True)
class Layout:
    ranks: int
    flags: str
    reference: str = "1"
    model: str = "all-moe"


LAYOUTS: dict[str, Layout] = {
    "1": Layout(1, ""),
    # The balance loss is a mean over micro-batches of a product of means, so accumulation is compared without it.
    "1 no balance loss": Layout(1, "--micro-batch-size 8 --balance-loss-coeff 0", reference="1 no balance loss"),
    "1 accumulation": Layout(1, "--micro-batch-size 1 --balance-loss-coeff 0", reference="1 no balance loss"),
    "1 full recompute": Layout(1, FULL),
    "1 selective recompute": Layout(1, SELECTIVE),
    "1 per-token loss": Layout(1, PER_TOKEN, reference="1 per-token loss"),
    "DP2": Layout(2, ""),
    "DP2 distributed optimizer": Layout(2, OPTIMIZER),
    "DP2 overlapped": Layout(2, OVERLAP),
    "DP2 per-token loss": Layout(2, PER_TOKEN, reference="1 per-token loss"),
    "EP2": Layout(2, EP2),
    "EP2 distributed optimizer, full recompute": Layout(2, f"{EP2} {OPTIMIZER} {FULL}"),
    "EP2 per-token loss, overlapped": Layout(2, f"{EP2} {PER_TOKEN} {OVERLAP}", reference="1 per-token loss"),
    "TP2+SP": Layout(2, TP2_ETP1),
    "TP2+SP ETP2": Layout(2, TP2),
    "TP2+SP ETP2 selective recompute": Layout(2, f"{TP2} {SELECTIVE}"),
    "TP2+SP EP2": Layout(2, f"{TP2_ETP1} {EP2}"),
    "TP2+SP per-token loss": Layout(2, f"{TP2_ETP1} {PER_TOKEN}", reference="1 per-token loss"),
    "PP2": Layout(2, PP2),
    "PP2 full recompute": Layout(2, f"{PP2} {FULL}"),
    "PP2 VPP2": Layout(2, f"{PP2} {VPP2}"),
    "PP2 VPP2 per-token loss": Layout(2, f"{PP2} {VPP2} {PER_TOKEN}", reference="1 per-token loss"),
    "PP4": Layout(4, "--pipeline-model-parallel-size 4"),
    "EP4": Layout(4, "--expert-model-parallel-size 4"),
    "EP2 DP2 distributed optimizer": Layout(4, f"{EP2} {OPTIMIZER}"),
    "PP2 EP2": Layout(4, f"{PP2} {EP2}"),
    "PP2 VPP2 EP2 overlapped, full recompute": Layout(4, f"{PP2} {VPP2} {EP2} {OVERLAP} {FULL}"),
    "TP2+SP PP2": Layout(4, f"{TP2_ETP1} {PP2}"),
    "TP2+SP EP2 DP2 distributed optimizer": Layout(4, f"{TP2_ETP1} {EP2} {OPTIMIZER}"),
    # These four hold every pair of features that go together (tests/distributed/test_layouts.py).
    "TP2+SP ETP2 EP2 distributed optimizer, selective recompute": Layout(4, f"{TP2} {EP2} {OPTIMIZER} {SELECTIVE}"),
    "TP2+SP ETP2 PP2 VPP2 overlapped, full recompute": Layout(4, f"{TP2} {PP2} {VPP2} {OVERLAP} {FULL}"),
    "TP2+SP EP2 PP2 VPP2 overlapped, selective recompute, per-token loss": Layout(
        4, f"{TP2_ETP1} {EP2} {PP2} {VPP2} {OVERLAP} {SELECTIVE} {PER_TOKEN}", reference="1 per-token loss"
    ),
    "TP2+SP ETP2 EP2 overlapped, full recompute, per-token loss": Layout(
        4, f"{TP2} {EP2} {OVERLAP} {FULL} {PER_TOKEN}", reference="1 per-token loss"
    ),
    "1 documents apart": Layout(1, APART, reference="1 documents apart"),
    "TP2+SP ETP2 documents apart, full recompute": Layout(2, f"{TP2} {APART} {FULL}", reference="1 documents apart"),
    "TP2+SP ETP2 PP2 VPP2 documents apart, selective recompute": Layout(
        4, f"{TP2} {PP2} {VPP2} {APART} {SELECTIVE}", reference="1 documents apart"
    ),
    # Tied embeddings; the last two layers dense, so that a pipeline stage has nothing to train; new experts that no
    # token chooses, all of one expert-parallel rank; most micro-batches and some steps without original-language text.
    "edges 1": Layout(1, "", "edges 1", "edges"),
    "edges DP2": Layout(2, OPTIMIZER, "edges 1", "edges"),
    "edges EP2": Layout(2, EP2, "edges 1", "edges"),
    "edges TP2+SP ETP2": Layout(2, TP2, "edges 1", "edges"),
    "edges PP2": Layout(2, PP2, "edges 1", "edges"),
    "edges PP2 overlapped, full recompute": Layout(2, f"{PP2} {OVERLAP} {FULL}", "edges 1", "edges"),
    "edges TP2+SP PP2": Layout(4, f"{TP2_ETP1} {PP2}", "edges 1", "edges"),
    "edges PP2 EP2 distributed optimizer": Layout(4, f"{PP2} {EP2} {OPTIMIZER}", "edges 1", "edges"),
}
STAGES = ("stage1", "stage2")


@dataclass(frozen=True)
class Difference:
    """How far a layout is from its reference: the largest relative difference of each kind."""

    losses: float
    grad_norm: float
    weights: float  # largest difference of a tensor's elements over its largest element

    @property
    def worst(self) -> float:
        return max(self.losses, self.grad_norm, self.weights)


def make_material(folder: Path) -> None:
    """Random models `all-moe` and `edges` as Megatron checkpoints; corpora `original`, `expanded` and held-out ones.

    `all-moe` is at the start of a second round of languages: it has two original experts.
    """
    from data_tools.corpus_writer import CorpusWriter

    _make_model(folder / "all-moe", num_new_experts=4, moe_layers=None, tied=False)
    _add_an_original_expert(folder / "all-moe")
    with patch("torch.nn.init.xavier_normal_", _half_of_the_experts_win):  # which draws the routers
        _make_model(folder / "edges", num_new_experts=8, moe_layers=[0, 1], tied=True)
    random = np.random.default_rng(0)
    # Held-out text fills no whole number of global batches.
    for name, documents in {"original": 80, "expanded": 80, "held-out-original": 12, "held-out-expanded": 12}.items():
        with CorpusWriter(folder / name, vocab_size=VOCAB_SIZE) as writer:
            for _ in range(documents):
                start = int(random.integers(0, 150)) + (150 if name.endswith("expanded") else 0)
                words = (start + np.arange(random.integers(10, 40))) % VOCAB_SIZE
                writer.add_document(np.append(words, 0), name.endswith("original"))  # 0 ends a document
            writer.finalize()
            writer.commit()


def _make_model(folder: Path, num_new_experts: int, moe_layers: list[int] | None, tied: bool) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from checkpoint_convert.upcycling import Start, hf_to_mcore

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, eos_token_id=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as hf:
        Qwen2ForCausalLM(config).save_pretrained(hf)
        # Experts that differ, so that every choice of a router counts.
        hf_to_mcore(Path(hf), folder, num_new_experts, moe_layers=moe_layers, start=Start("random"))


def _add_an_original_expert(folder: Path) -> None:
    """Make one more original expert part of the model, and draw all weights anew."""
    from moelpr.megatron_patches import cpu

    cpu.install()  # before Megatron is imported
    from megatron.core import dist_checkpointing

    from moelpr.model.loading import build_model, single_process
    from moelpr.model_spec import ModelSpec

    spec = ModelSpec.read(folder)
    assert spec.moe is not None
    spec = replace(spec, moe=replace(spec.moe, num_original_experts=spec.moe.num_original_experts + 1))
    shutil.rmtree(folder / "release")
    (folder / "release").mkdir()
    with single_process():
        model = build_model(spec)
        for layer in model.decoder.layers:
            torch.nn.init.xavier_normal_(layer.mlp.router.weight)  # as the converter does
        dist_checkpointing.save(model.sharded_state_dict(), str(folder / "release"))
    spec.write(folder)


def _half_of_the_experts_win(router: torch.Tensor, **_: object) -> torch.Tensor:
    """Whatever the input, two of the first half of the new experts and the original one have the best logits."""
    direction = torch.randn(router.shape[1], generator=torch.Generator().manual_seed(1))
    router.zero_()
    # On one side of the plane experts 1 and 2 win, on the other side 3 and the original.
    for expert, factor in ((1, 20.0), (2, 10.0), (3, -20.0), (0, -10.0)):
        router[expert] = factor * direction
    return router


def trainer_arguments(folder: Path, layout: Layout, stage: str, save: Path) -> list[str]:
    weights = ("1", "1") if layout.model == "all-moe" else ("1", "40")
    data = [weights[0], str(folder / "original"), weights[1], str(folder / "expanded")]
    words = ["--stage", stage, "--pretrained-checkpoint", str(folder / layout.model), "--data-path", *data]
    words += ["--validation-data", f"en={folder / 'held-out-original'}", f"el={folder / 'held-out-expanded'}"]
    return [*words, "--save", str(save), *SETTINGS.split(), *layout.flags.split()]


def run_folder(folder: Path, name: str, stage: str) -> Path:
    return folder / "runs" / re.sub(r"[^A-Za-z0-9+]+", "-", name) / stage


def run_layouts(folder: Path, names: list[str], stages: tuple[str, ...] = STAGES) -> None:
    """Train every named layout; all that need the same number of ranks share one launch."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    for ranks in sorted({LAYOUTS[name].ranks for name in names}):
        commands = [
            trainer_arguments(folder, LAYOUTS[name], stage, run_folder(folder, name, stage))
            for name in names
            if LAYOUTS[name].ranks == ranks
            for stage in stages
        ]
        launch(folder, ranks, commands, f"layouts-{ranks}")


def launch(folder: Path, ranks: int, commands: list[list[str]], name: str) -> None:
    """Run the trainings one after the other in the same ranks; stop with the end of the log where one fails."""
    plan, log = folder / f"{name}.json", folder / f"{name}.log"
    plan.write_text(json.dumps(commands))
    torchrun = [sys.executable, "-m", "moelpr.torchrun", "--standalone", "--nproc-per-node", str(ranks)]
    with open(log, "w") as output:
        done = subprocess.run(
            [*torchrun, "-m", "benchmarks.train_many", str(plan)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            timeout=60 + 60 * len(commands),
        )
    if done.returncode:
        sys.exit(f"{name} failed:\n{log.read_text()[-6000:]}")


def compare(folder: Path, name: str, stage: str) -> Difference:
    """How far a layout's run is from that of its reference."""
    return difference(run_folder(folder, name, stage), run_folder(folder, LAYOUTS[name].reference, stage))


def difference(ours: Path, theirs: Path) -> Difference:
    records = list(zip(metrics(ours), metrics(theirs), strict=True))
    losses = max(_relative(a.get(key), b.get(key)) for a, b in records for key in LOSSES)
    for a, b in zip(validations(ours), validations(theirs), strict=True):
        losses = max(losses, *(_relative(a[language]["lm_loss"], b[language]["lm_loss"]) for language in b))
    shares = [key for key in records[0][1] if key.startswith(("original_first_share", "token_share"))]
    if any(a[key] != b[key] for a, b in records for key in shares):
        losses = float("inf")  # tokens were counted twice or not at all
    return Difference(
        losses=losses,
        grad_norm=max(_relative(a["grad_norm"], b["grad_norm"]) for a, b in records),
        weights=_weights_difference(weights(ours), weights(theirs)),
    )


def metrics(run: Path) -> list[dict]:
    """Records of training steps."""
    return [record for record in _records(run) if "event" not in record]


def validations(run: Path) -> list[dict]:
    """Passes over held-out text: language -> result, before the first step and after the last."""
    return [record["languages"] for record in _records(run) if record.get("event") == "validation"]


def _records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _relative(a: float | None, b: float | None) -> float:
    if a is None or b is None:  # a mean over no tokens, in both or an infinite difference
        return 0.0 if a is b else float("inf")
    return abs(a - b) / abs(b) if b else abs(a)


def weights(run: Path) -> dict[str, torch.Tensor]:
    from moelpr.torch_dist import TorchDistReader

    reader = TorchDistReader(max(run.glob("iter_*")))
    return {key: reader.read(key) for key in reader.keys if key.startswith(("decoder.", "embedding.", "output_layer."))}


def _weights_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    worst = 0.0
    for key, b in theirs.items():
        rows = min(len(ours[key]), len(b))  # the vocabulary is padded to a multiple of the tensor-parallel size
        a, b = ours[key][:rows], b[:rows]
        worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layouts", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="layouts whose name matches (and their references)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    parser.add_argument("--folder", type=Path, help="keep models, runs and logs here (default: a temporary folder)")
    args = parser.parse_args()
    chosen = [name for name in LAYOUTS if re.search(args.only, name)]
    names = list(dict.fromkeys([*(LAYOUTS[name].reference for name in chosen), *chosen]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_material(folder)
        run_layouts(folder, names)
        table = {stage: {name: compare(folder, name, stage) for name in chosen} for stage in STAGES}
    width = max(map(len, chosen))
    print(f"{'layout':<{width}} ranks  stage     losses  grad norm   weights   (largest relative difference)")
    for name in chosen:
        for stage in STAGES:
            found = table[stage][name]
            mark = "" if found.worst <= TOLERANCE else "  <-- more than 1e-5"
            print(
                f"{name:<{width}} {LAYOUTS[name].ranks:>5}  {stage}  {found.losses:8.1e}   {found.grad_norm:8.1e}  "
                f"{found.weights:8.1e}{mark}"
            )
    if args.json:
        rows = [
            {"layout": name, "ranks": LAYOUTS[name].ranks, "flags": LAYOUTS[name].flags, "stage": stage, **vars(found)}
            for stage in STAGES
            for name, found in table[stage].items()
        ]
        args.json.write_text(json.dumps({"tolerance": TOLERANCE, "steps": STEPS, "layouts": rows}, indent=1) + "\n")
    if any(found.worst > TOLERANCE for rows in table.values() for found in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
