"""Is the memory plan right? Trains a small random model in several layouts and compares its memory with moelpr.plan.

    python -m tests.distributed.memory_plan [--json] [--only NAME …]

Every run is one step of the real trainer on one or two CPU ranks (measured_memory.py). Parameters, gradient
buffers and optimizer state must be predicted to the byte, except padding. What autograd keeps is compared as a ratio,
with the plan's assumption that every expert is chosen equally often, and with the rows that were routed. The peer of
the summary is the same model with everything trained (--train-everything); full training of a dense one is there too.
"""

import json
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from benchmarks import common
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import Stage
from moelpr.plan.layouts import PlannedLayout
from moelpr.plan.memory import CPU, Routing, Workload, model_parts, stage_memories
from moelpr.plan.step_time import expert_traffic

SEQ_LENGTH, MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE = 256, 2, 8
VOCABULARY = 1000
RUN = ("layout", "stage", "dtype", "rank")
STATE = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "state_bytes_per_trainable", "bytes_per_frozen")
ACTIVATIONS = ("activation_bytes", "activation_ratio", "activation_ratio_as_routed")
TRAFFIC = ("all_to_all_bytes", "predicted_all_to_all_bytes")
EXACT = ("frozen", "trainable", "parameter_bytes", "gradient_bytes", "optimizer_bytes")


@dataclass(frozen=True)
class Case:
    name: str
    layout: PlannedLayout
    stage: Stage
    dtype: Literal["bf16", "fp32"]
    model: str = "upcycled"
    train_everything: bool = False


def cases() -> list[Case]:
    plain = {
        "1 rank": PlannedLayout(distributed_optimizer=False),
        "EP2": PlannedLayout(ep=2, dp=2, distributed_optimizer=False),
        "TP2+SP": PlannedLayout(tp=2, distributed_optimizer=False),
        "PP2": PlannedLayout(pp=2, distributed_optimizer=False),
        "DP2, distributed optimizer": PlannedLayout(dp=2),
    }
    dtypes: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
    found = [Case(name, plain[name], stage, dtype) for name, dtype, stage in product(plain, dtypes, common.STAGES)]
    for recompute in ("selective", "full"):
        layout = PlannedLayout(recompute=recompute, distributed_optimizer=False)
        found.append(Case(f"1 rank, {recompute} recompute", layout, "stage1", "bf16"))
    # One new expert, top-2: nothing depends on the routing, so any error is that of the rule.
    for stage in common.STAGES:
        found.append(Case("1 rank, K = E", plain["1 rank"], stage, "bf16", "k-is-e"))
        found.append(Case("EP2, two original experts", plain["EP2"], stage, "bf16", "second"))
    for name in ("1 rank", "EP2", "TP2+SP", "DP2, distributed optimizer"):
        found.append(Case(f"{name}, everything trained", plain[name], "stage1", "bf16", train_everything=True))
        if name != "EP2":
            layout = replace(plain[name], etp=plain[name].tp)
            found.append(Case(f"{name}, dense", layout, "dense", "bf16", "dense"))
    return found


def main() -> None:
    from tqdm import tqdm

    parser = common.argument_parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of layouts, as in the table (default: all)")
    args = parser.parse_args()
    chosen = [case for case in cases() if args.only is None or case.name in args.only]
    rows: list[dict[str, Any]] = []
    with common.working_folder(None) as folder:
        make_material(folder)
        for number, case in enumerate(tqdm(chosen, unit="run")):
            for rank, measured in enumerate(measure(case, folder, folder / f"out{number}")):
                rows.append(compare(case, ModelSpec.read(folder / case.model), rank, measured))
    if args.json:
        print(json.dumps({"machine": "CPU", "rows": rows, "summary": summary(rows)}, indent=2))
        return
    common.print_table(rows, *RUN, *STATE, "is_exact")
    common.print_table(rows, *RUN, *ACTIVATIONS, *TRAFFIC)
    print(*(f"{name}: {value}" for name, value in summary(rows).items()), sep="\n")


def make_material(folder: Path) -> None:
    """A random Qwen2 with tied embeddings and grouped queries, upcycled except for one layer, and random text.

    `second` extends the export of `k-is-e`, whose two experts are then original ones.
    """
    import numpy as np

    from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore

    config = common.qwen2_config(4, 256, 704, VOCABULARY, length=512, tie_word_embeddings=True)
    hf = common.save_random_model(config, folder / "hf")
    common.upcycle(hf, folder / "upcycled", 4, moe_layers=[0, 1, 3])
    hf_to_mcore(hf, folder / "dense", None)
    common.upcycle(hf, folder / "k-is-e", 1, moe_layers=[0, 1, 3])
    common.upcycle(common.export(folder / "k-is-e", folder / "exported"), folder / "second", 4)
    random = np.random.default_rng(0)
    documents = ((random.integers(1, VOCABULARY, 200), number % 2 == 0) for number in range(60))
    common.write_corpus(folder / "text", VOCABULARY, documents)


def measure(case: Case, material: Path, out: Path) -> list[dict[str, Any]]:
    """Memory of each rank in one real training step."""
    out.mkdir()
    settings = (
        f"--stage {case.stage} --{case.dtype} --micro-batch-size {MICRO_BATCH_SIZE} --global-batch-size "
        f"{GLOBAL_BATCH_SIZE} --seq-length {SEQ_LENGTH} --lr 1e-4 --train-iters 1 "
        "--no-save-optim"  # nothing is saved, but torch's Adam requires it with the distributed optimizer
    ).split()
    settings += ["--train-everything"] if case.train_everything else []
    paths = ["--pretrained-checkpoint", material / case.model, "--data-path", material / "text"]
    ranks, words = case.layout.world_size, (out, *settings, *paths, *case.layout.flags(case.stage != "dense"))
    log = out / f"{case.name}, {case.stage}, {case.dtype}.log"
    common.run_ranks(ranks, "tests.distributed.measured_memory", *words, log=log, timeout_s=300)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def compare(case: Case, spec: ModelSpec, rank: int, measured: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: what was measured on a rank, and what the plan predicts."""
    measured = measured | {"parameter_bytes": measured["trainable_bytes"] + measured["frozen_bytes"]}
    row: dict[str, Any] = {"layout": case.name, "stage": case.stage, "dtype": case.dtype, "rank": rank, **measured}
    state = measured["trainable_bytes"] + measured["gradient_bytes"] + measured["optimizer_bytes"]
    row["state_bytes_per_trainable"] = state / measured["trainable"]
    if measured["frozen"]:
        row["bytes_per_frozen"] = (measured["frozen_bytes"] + measured["frozen_state_bytes"]) / measured["frozen"]
    sizes = SEQ_LENGTH, MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE
    run = Workload(case.stage, *sizes, case.dtype, CPU, train_everything=case.train_everything)
    tokens = SEQ_LENGTH * MICRO_BATCH_SIZE / case.layout.tp
    routed = Routing(measured["original_rows"] / tokens, measured["new_rows"] / tokens)
    parts, pp_rank = model_parts(spec), rank if case.layout.pp > 1 else 0
    predicted = stage_memories(spec, parts, case.layout, run)[pp_rank]
    as_routed = stage_memories(spec, parts, case.layout, run, routed)[pp_rank]
    row["predicted"] = asdict(predicted)
    row["is_exact"] = all(row["predicted"][name] == measured[name] for name in EXACT)
    row["activation_ratio"] = predicted.activation_bytes / measured["activation_bytes"]
    row["activation_ratio_as_routed"] = as_routed.activation_bytes / measured["activation_bytes"]
    row["predicted_all_to_all_bytes"] = expert_traffic(spec, case.layout, run).all_to_all
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    bf16 = [row for row in rows if row["dtype"] == "bf16"]
    frozen = sorted({round(row["bytes_per_frozen"], 6) for row in bf16 if "bytes_per_frozen" in row})
    peers = [row["state_bytes_per_trainable"] for row in bf16 if "bytes_per_frozen" not in row]

    def worst_error(ratio: str) -> float | None:
        return max((abs(row[ratio] - 1) for row in rows), default=None)

    return {
        "state_is_exact": all(row["is_exact"] for row in rows),
        "worst_activation_error": worst_error("activation_ratio"),
        "worst_activation_error_as_routed": worst_error("activation_ratio_as_routed"),
        "bf16_bytes_per_frozen_parameter": frozen,
        "bf16_bytes_per_parameter_if_trained": peers[0] if peers else None,
        "ratio_to_peer": frozen[-1] / peers[0] if peers and frozen else None,
    }


if __name__ == "__main__":
    main()
