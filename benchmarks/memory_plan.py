"""Is the memory plan right? Trains a small random model in several layouts and holds moelpr.plan against what it used.

    python -m benchmarks.memory_plan [--json] [--only NAME …]

Every run is one step of the real trainer on one or two CPU ranks (benchmarks/measured_memory.py). Parameters, gradient
buffers and optimizer state must be predicted to the byte, padding apart; what autograd keeps is compared as a ratio,
once with the plan's assumption that every expert is chosen equally often and once with the rows that were routed.
The peer of the last table is the same model with everything trained (--train-everything).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moelpr.model_spec import ModelSpec
from moelpr.plan.layouts import Layout
from moelpr.plan.memory import CPU, RankMemory, Routing, Run, stage_memories
from moelpr.plan.model import model_parts
from moelpr.plan.traffic import expert_traffic

ROOT = Path(__file__).resolve().parents[1]
SEQ_LENGTH, MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE = 256, 2, 8
STAGES = ("stage1", "stage2")
MIB = 1 << 20
HEADER = f"""\
MiB per rank, measured. exact: parameters, gradients and optimizer state are as planned to the byte. plan, routed:
activations, planned over measured, with experts chosen equally often and as they were routed.
{"layout":<28}{"stage":<8}{"dtype":<6}{"rank":<5}{"parameters":>11}{"gradients":>10}{"optimizer":>10}\
{"exact":>7}{"activations":>12}{"plan":>7}{"routed":>8}{"B/trainable":>12}{"B/frozen":>9}"""
EXACT = ("frozen", "trainable", "parameter_bytes", "gradient_bytes", "optimizer_bytes")


@dataclass(frozen=True)
class Case:
    name: str
    layout: Layout
    stage: str
    dtype: str
    model: str = "upcycled"
    is_peer: bool = False


def cases() -> list[Case]:
    plain = {
        "1 rank": Layout(distributed_optimizer=False),
        "EP2": Layout(ep=2, dp=2, distributed_optimizer=False),
        "TP2+SP": Layout(tp=2, distributed_optimizer=False),
        "PP2": Layout(pp=2, distributed_optimizer=False),
        "DP2, distributed optimizer": Layout(dp=2),
    }
    found = [
        Case(name, layout, stage, dtype)
        for name, layout in plain.items()
        for dtype in ("bf16", "fp32")
        for stage in STAGES
    ]
    for recompute in ("selective", "full"):
        layout = Layout(recompute=recompute, distributed_optimizer=False)
        found.append(Case(f"1 rank, {recompute} recompute", layout, "stage1", "bf16"))
    # One new expert, top-2: nothing depends on the routing, so what is left of an error is the rule's own.
    found += [Case("1 rank, K = E", plain["1 rank"], stage, "bf16", model="upcycled-k-is-e") for stage in STAGES]
    found += [Case("EP2, two original experts", plain["EP2"], stage, "bf16", model="second-round") for stage in STAGES]
    found.append(Case("everything trained", Layout(distributed_optimizer=False), "stage1", "bf16", is_peer=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of layouts, as in the table")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if arguments.only is None or case.name in arguments.only]
    rows: list[dict[str, Any]] = []
    if not arguments.json:
        print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        material = Path(folder)
        make_material(material)
        for number, case in enumerate(chosen):
            for rank, measured in enumerate(measure(case, material, material / f"out{number}")):
                rows.append(compare(case, ModelSpec.read(material / case.model), rank, measured))
                print(line_of(rows[-1]), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps({"machine": "CPU", "rows": rows, "summary": summary(rows)}, indent=2))
    else:
        print("\n".join(["", *traffic_lines(rows), "", *(f"{name}: {value}" for name, value in summary(rows).items())]))


def make_material(folder: Path) -> None:
    """A random Qwen2 with tied embeddings and grouped queries, upcycled but for one layer, and random text.

    `second-round` extends the export of `upcycled-k-is-e`, whose two experts are then original ones.
    """
    import numpy as np
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from checkpoint_convert.export import mcore_to_hf
    from checkpoint_convert.upcycling import hf_to_mcore
    from data_tools.corpus_writer import CorpusWriter

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1000, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "hf")
    hf_to_mcore(folder / "hf", folder / "upcycled", num_new_experts=4, topk=2, moe_layers=[0, 1, 3])
    hf_to_mcore(folder / "hf", folder / "upcycled-k-is-e", num_new_experts=1, topk=2, moe_layers=[0, 1, 3])
    mcore_to_hf(folder / "upcycled-k-is-e", folder / "exported")
    hf_to_mcore(folder / "exported", folder / "second-round", num_new_experts=4)
    random = np.random.default_rng(0)
    with CorpusWriter(folder / "text", vocab_size=1000) as writer:
        for document in range(60):
            writer.add_document(random.integers(1, 1000, 200), document % 2 == 0)
        writer.finalize()
        writer.commit()


def measure(case: Case, material: Path, out: Path) -> list[dict[str, Any]]:
    """What each rank of one real training step held."""
    out.mkdir()
    words = ["--stage", case.stage, "--pretrained-checkpoint", material / case.model, "--data-path", material / "text"]
    words += ["--micro-batch-size", MICRO_BATCH_SIZE, "--global-batch-size", GLOBAL_BATCH_SIZE]
    words += ["--seq-length", SEQ_LENGTH, "--lr", "1e-4", "--train-iters", 1, *case.layout.flags()]
    words += ["--bf16"] if case.dtype == "bf16" else ["--fp32"]
    words += ["--no-save-optim"]  # nothing is saved; torch's Adam is refused beside the distributed optimizer otherwise
    words += ["--train-everything"] if case.is_peer else []
    torchrun = [sys.executable, "-m", "moelpr.torchrun", "--standalone", "--nproc-per-node", case.layout.world]
    command = [*torchrun, "-m", "benchmarks.measured_memory", out, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        list(map(str, command)), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        sys.exit(f"{case.name}, {case.stage}, {case.dtype} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(case.layout.world)]


def compare(case: Case, spec: ModelSpec, rank: int, measured: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"layout": case.name, "stage": case.stage, "dtype": case.dtype, "rank": rank, **measured}
    row["state_bytes_per_trainable"] = (
        (measured["trainable_bytes"] + measured["gradient_bytes"] + measured["optimizer_bytes"]) / measured["trainable"]
    )  # fmt: skip
    if measured["frozen"]:
        row["bytes_per_frozen"] = (measured["frozen_bytes"] + measured["frozen_state_bytes"]) / measured["frozen"]
    if case.is_peer:
        return row
    run = Run(case.stage, SEQ_LENGTH, MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE, case.dtype, CPU)
    tokens = SEQ_LENGTH * MICRO_BATCH_SIZE / case.layout.tp
    routed = Routing(measured["original_rows"] / tokens, measured["new_rows"] / tokens)
    parts = model_parts(spec)
    pp_rank = rank if case.layout.pp > 1 else 0
    predicted = stage_memories(spec, parts, case.layout, run)[pp_rank]
    as_routed = stage_memories(spec, parts, case.layout, run, routed)[pp_rank]
    found = RankMemory(
        frozen=measured["frozen"],
        trainable=measured["trainable"],
        parameter_bytes=measured["trainable_bytes"] + measured["frozen_bytes"],
        gradient_bytes=measured["gradient_bytes"],
        optimizer_bytes=measured["optimizer_bytes"],
        activation_bytes=measured["activation_bytes"],
        working_bytes=0,
    )
    row["predicted"] = asdict(predicted)
    row["is_exact"] = all(getattr(predicted, name) == getattr(found, name) for name in EXACT)
    row["activation_ratio"] = predicted.activation_bytes / found.activation_bytes
    row["activation_ratio_as_routed"] = as_routed.activation_bytes / found.activation_bytes
    row["predicted_all_to_all_bytes"] = expert_traffic(spec, case.layout, run).all_to_all
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    planned = [row for row in rows if "predicted" in row]
    bf16 = [row for row in planned if row["dtype"] == "bf16"]
    frozen = sorted({round(row["bytes_per_frozen"], 6) for row in bf16})
    peers = [row["state_bytes_per_trainable"] for row in rows if "predicted" not in row]
    return {
        "state_is_exact": all(row["is_exact"] for row in planned),
        "worst_activation_error": max((abs(row["activation_ratio"] - 1) for row in planned), default=None),
        "worst_activation_error_as_routed": max(
            (abs(row["activation_ratio_as_routed"] - 1) for row in planned), default=None
        ),
        "bf16_bytes_per_frozen_parameter": frozen,
        "bf16_bytes_per_parameter_if_trained": peers[0] if peers else None,
        "ratio_to_peer": frozen[-1] / peers[0] if peers and frozen else None,
    }


def line_of(row: dict[str, Any]) -> str:
    line = f"{row['layout']:<28}{row['stage']:<8}{row['dtype']:<6}{row['rank']:<5}"
    line += f"{(row['trainable_bytes'] + row['frozen_bytes']) / MIB:>11.3f}"
    line += f"{row['gradient_bytes'] / MIB:>10.3f}{row['optimizer_bytes'] / MIB:>10.3f}"
    line += f"{'' if 'predicted' not in row else 'yes' if row['is_exact'] else 'NO':>7}"
    line += f"{row['activation_bytes'] / MIB:>12.2f}"
    for name, width in (("activation_ratio", 7), ("activation_ratio_as_routed", 8)):
        line += f"{f'{row[name]:.3f}' if name in row else '':>{width}}"
    frozen = f"{row['bytes_per_frozen']:.3f}" if row["frozen"] else "–"
    return line + f"{row['state_bytes_per_trainable']:>12.3f}{frozen:>9}"


def traffic_lines(rows: list[dict[str, Any]]) -> list[str]:
    moved = [row for row in rows if row["all_to_all_bytes"]]
    lines = ["all-to-all MiB per rank and step, planned (experts chosen equally often) and measured:"] if moved else []
    for row in moved:
        line = f"{row['layout']:<28}{row['stage']:<8}{row['dtype']:<6}{row['rank']:<5}"
        lines.append(f"{line}{row['predicted_all_to_all_bytes'] / MIB:>11.3f}{row['all_to_all_bytes'] / MIB:>10.3f}")
    return lines


if __name__ == "__main__":
    main()
