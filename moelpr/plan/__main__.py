"""Which layouts of a model fit on a cluster, what a rank then holds, and which one to take.

    python -m moelpr.plan --hf-path DIR --num-new-experts 5 --gpus 8 --gpu-memory-gib 80

Reads config.json alone. The rule is in moelpr/plan/memory.py and docs/design/memory-plan.md.
"""

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moelpr.errors import UserError, run_command
from moelpr.families.families import layer_list
from moelpr.plan.candidates import GIB, Candidate, Cluster, fitting
from moelpr.plan.memory import RankMemory, Run
from moelpr.plan.model import model_parts, upcycled_spec
from moelpr.plan.ranking import bubble

# Of the paper's recipes, launch/recipes/paper-stage1.yaml and paper-stage2.yaml.
PAPER_SEQ_LENGTH = {"stage1": 1024, "stage2": 512}
PAPER_GLOBAL_BATCH_SIZE = 512
RESERVED_SHARE = 0.1


def main() -> None:
    args = _parser().parse_args()
    run = Run(
        stage=args.stage,
        seq_length=args.seq_length or PAPER_SEQ_LENGTH[args.stage],
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size,
        dtype=args.dtype,
    )
    cluster = _cluster(args)
    spec = upcycled_spec(args.hf_path, args.num_new_experts, args.topk, args.moe_layers, args.moe_every_k_layers)
    plans = fitting(spec, model_parts(spec), run, cluster)
    if args.json:
        print(json.dumps(_as_json(plans, run, cluster), indent=2))
    else:
        print(_table(plans, run, cluster, plans if args.all else plans[: args.rows]))


def flags(plan: Candidate, run: Run) -> list[str]:
    """The recommended words behind launch/stage1.sh: the layout, and the batch it was planned for."""
    words = [*plan.layout.flags(), "--micro-batch-size", str(run.micro_batch_size)]
    words += ["--global-batch-size", str(run.global_batch_size), "--seq-length", str(run.seq_length)]
    return [*words, "--fp32"] if run.dtype == "fp32" else words


def _cluster(args: argparse.Namespace) -> Cluster:
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        nodes = args.gpus // args.gpus_per_node
        raise UserError(
            f"{args.gpus} GPUs are no whole number of nodes of {args.gpus_per_node}; use --gpus "
            f"{nodes * args.gpus_per_node} or {(nodes + 1) * args.gpus_per_node}, or another --gpus-per-node"
        )
    reserve = args.gpu_memory_gib * RESERVED_SHARE if args.reserve_gib is None else args.reserve_gib
    if reserve >= args.gpu_memory_gib:
        raise UserError(
            f"--reserve-gib {reserve:g} leaves nothing of {args.gpu_memory_gib:g} GiB; give a smaller reserve"
        )
    return Cluster(args.gpus, args.gpus_per_node, args.gpu_memory_gib, reserve)


def _table(plans: list[Candidate], run: Run, cluster: Cluster, shown: list[Candidate]) -> str:
    lines = [
        f"{run.stage}, {run.dtype}: steps of {run.global_batch_size} sequences of {run.seq_length} tokens, "
        f"{run.micro_batch_size} per micro-batch, on {cluster.gpus} GPUs of {cluster.gpu_memory_gib:g} GiB, "
        f"{cluster.reserve_gib:g} of them reserved.",
        "GiB on the fullest rank; all-to-all, gathers: what experts exchange per rank and step over EP and over ETP,",
        "GiB, with every expert chosen equally often. Rows of original experts take no part in the all-to-all.",
        "time: arithmetic of a step, waiting in the pipeline included, over that without recompute; no communication.",
        "",
        f"{'TP':>3}{'PP':>4}{'EP':>4}{'ETP':>4}{'DP':>5}  {'recompute':<10}{'parameters':>11}{'gradients':>10}"
        f"{'optimizer':>10}{'activations':>12}{'working':>8}{'total':>8}{'all-to-all':>12}{'gathers':>9}{'bubble':>8}{'time':>6}",
    ]
    for plan in shown:
        layout, rank = plan.layout, plan.fullest
        share = bubble(layout, run.num_microbatches(layout))
        lines.append(
            f"{layout.tp:>3}{layout.pp:>4}{layout.ep:>4}{layout.etp:>4}{layout.dp:>5}  {layout.recompute:<10}"
            f"{rank.parameter_bytes / GIB:>11.2f}{rank.gradient_bytes / GIB:>10.2f}{rank.optimizer_bytes / GIB:>10.2f}"
            f"{rank.activation_bytes / GIB:>12.2f}{rank.working_bytes / GIB:>8.2f}{rank.total_bytes / GIB:>8.2f}"
            f"{plan.traffic.all_to_all / GIB:>12.2f}{plan.traffic.expert_tensor / GIB:>9.2f}"
            f"{share:>8.1%}{plan.relative_time:>6.2f}"
        )
    if len(shown) < len(plans):
        lines.append(f"… and {len(plans) - len(shown)} more that fit (--all)")
    lines += ["", f"Recommended, behind launch/{run.stage}.sh:", f"  {shlex.join(flags(plans[0], run))}"]
    return "\n".join(lines)


def _as_json(plans: list[Candidate], run: Run, cluster: Cluster) -> dict[str, Any]:
    described = [
        {
            **asdict(plan.layout),
            "fullest_rank": _rank_as_json(plan.fullest),
            "stages": [_rank_as_json(rank) for rank in plan.stages],
            "all_to_all_bytes_per_step": plan.traffic.all_to_all,
            "expert_tensor_bytes_per_step": plan.traffic.expert_tensor,
            "bubble": bubble(plan.layout, run.num_microbatches(plan.layout)),
            "relative_time": plan.relative_time,
            "flags": flags(plan, run),
        }
        for plan in plans
    ]
    return {
        "run": asdict(run),
        "cluster": asdict(cluster),
        "assumptions": ["every expert is chosen equally often", "working_bytes is an estimate"],
        "recommended": described[0],
        "layouts": described,
    }


def _rank_as_json(rank: RankMemory) -> dict[str, int]:
    return {**asdict(rank), "total_bytes": rank.total_bytes}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moelpr.plan",
        description="List the layouts of an upcycled model that fit on a cluster, with what a rank holds, and "
        "recommend one. Only config.json of the model is needed.",
    )
    parser.add_argument("--hf-path", type=Path, required=True, help="folder with the dense model's config.json")
    parser.add_argument("--num-new-experts", type=int, required=True, metavar="N", help="beside the original experts")
    parser.add_argument("--gpus", type=_positive, required=True, metavar="G", help="GPUs in all")
    parser.add_argument("--gpu-memory-gib", type=_positive_float, required=True, metavar="M", help="of one GPU")
    parser.add_argument("--gpus-per-node", type=_positive, default=8, help="default: %(default)s")
    parser.add_argument(
        "--reserve-gib", type=_not_negative_float,
        help="kept free on each GPU for what the rule does not count: the CUDA context, NCCL's buffers, "
        "fragmentation (default: a tenth of --gpu-memory-gib, an assumption)",
    )  # fmt: skip
    parser.add_argument("--topk", type=int, metavar="K", help="experts per token (default: 2, or what an MoE has)")
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument("--moe-layers", type=layer_list, metavar="0,2,5", help="as in hf_to_mcore.py (default: all)")
    layers.add_argument("--moe-every-k-layers", type=int, metavar="k", help="as in hf_to_mcore.py")
    parser.add_argument("--stage", choices=tuple(PAPER_SEQ_LENGTH), default="stage1", help="default: %(default)s")
    lengths = ", ".join(f"{length} in {stage}" for stage, length in PAPER_SEQ_LENGTH.items())
    parser.add_argument("--seq-length", type=_positive, help=f"default: the paper's, {lengths}")
    parser.add_argument("--micro-batch-size", type=_positive, default=1, help="default: %(default)s")
    parser.add_argument(
        "--global-batch-size", type=_positive, default=PAPER_GLOBAL_BATCH_SIZE, help="default: the paper's, %(default)s"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="default: %(default)s")
    parser.add_argument("--rows", type=_positive, default=20, help="layouts shown (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="show all of them")
    parser.add_argument("--json", action="store_true", help="everything, in bytes, with the memory of each stage")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def _not_negative_float(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more")
    return value


if __name__ == "__main__":
    run_command(main)
