"""List the layouts of an upcycled model that fit on a cluster, with memory per rank and step time, and recommend one.

    moelpr layouts --hf-path DIR --num-new-experts 5 --gpus 8 --gpu h100-80

It reads only config.json. docs/design/planner.md explains how memory and time are computed.
"""

import argparse
import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from moelpr.base.command import CommandParser, program_name, run_command
from moelpr.base.errors import UserError
from moelpr.base.machine import format_bytes
from moelpr.base.quantities import count_argument
from moelpr.base.text_tables import table_text
from moelpr.data.mixing import Mix, Share, mixed, num_tokens, share_table
from moelpr.data.vocabulary_extension import VocabularyExtension
from moelpr.model.families.families import read_base
from moelpr.model.families.hub import config_folder
from moelpr.model.families.new_experts import with_new_experts
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import DENSE_STAGES, MOE_STAGES, UNTRAINED_ROUTERS, Part, Stage, Stage1Experts
from moelpr.plan.arguments import add_expert_flags, new_experts
from moelpr.plan.candidates import MOST_EXPERTS, Candidate, most_experts
from moelpr.plan.gpus import GIB, GPUS, RESERVED_FRACTION, Cluster, cluster_here
from moelpr.plan.memory import RankMemory, Workload
from moelpr.plan.stage_plan import PAPER_GLOBAL_BATCH_SIZE, PAPER_SEQ_LENGTH, RunCost, StagePlan, plan_stage
from moelpr.plan.step_time import PREDICTION_NOTE, bubble

_HEAD = (
    "TP PP EP ETP DP recompute parameters gradients optimizer activations working total all-to-all gathers bubble"
).split()


def main() -> None:
    args = _parser().parse_args()
    seq_length = args.seq_length or PAPER_SEQ_LENGTH.get(args.stage, PAPER_SEQ_LENGTH["stage1"])
    sizes = seq_length, args.micro_batch_size, args.global_batch_size
    if args.stage1_experts == "new" and args.stage != "stage1":
        raise UserError(f"--stage1-experts new applies to --stage stage1, got {args.stage}; remove it")
    trains = {"new_embeddings": args.train_new_embeddings, "train_everything": args.train_everything}
    trains |= {"stage1_experts": args.stage1_experts, "optimizer_cpu_offload": args.optimizer_cpu_offload}
    workload, cluster = Workload(args.stage, *sizes, args.dtype, **trains), _cluster(args)
    spec = _model(args, workload, cluster)
    shares = _shares(args)
    plan = plan_stage(spec, workload, cluster, any_micro_batch=False)
    cost = plan.cost(args.train_tokens) if args.train_tokens else None
    if args.json:
        mix = {"mix": {prefix: asdict(one) for prefix, one in shares.items()}} if shares else {}
        print(json.dumps(_as_json(plan, cost) | mix, indent=2))
        return
    print(_table(plan, cost, len(plan.candidates) if args.all else args.rows))
    if shares:
        print(f"\nThe corpora share {args.train_tokens:,} tokens:\n{share_table(shares, 'corpus')}")


def _shares(args: argparse.Namespace) -> dict[str, Share]:
    """How the corpora share the tokens, if --mix is passed."""
    if bool(args.mix) != bool(args.data_path) or (args.mix and not args.train_tokens):
        raise UserError("--mix, --data-path and --train-tokens need each other; pass all three, or the last one alone")
    return (
        mixed({prefix: num_tokens(prefix) for prefix in args.data_path}, args.train_tokens, args.mix)
        if args.mix
        else {}
    )


def _model(args: argparse.Namespace, workload: Workload, cluster: Cluster) -> ModelSpec:
    family, base = read_base(config_folder(args.hf_path))
    if args.stage in DENSE_STAGES:
        flags = "num_new_experts topk original_copies moe_layers moe_every_k_layers train_everything".split()
        if unused := [name for name in flags if getattr(args, name)]:
            raise UserError(f"--stage {args.stage} trains a dense model; remove --{unused[0].replace('_', '-')}")
        if base.moe is not None:
            raise UserError(
                f"--stage {args.stage} requires a dense model, but {args.hf_path} has experts; use --stage stage1"
            )
        return _with_new_tokens(base, args)
    if args.num_new_experts is None:
        raise UserError(f"--stage {args.stage} requires new experts; pass --num-new-experts N, or auto")
    is_auto = args.num_new_experts == "auto"
    experts = replace(new_experts(args, base), num_new_experts=MOST_EXPERTS if is_auto else args.num_new_experts)
    spec = _with_new_tokens(with_new_experts(family, base, experts), args)
    if spec.moe is not None and spec.moe.topk == 1 and args.stage in MOE_STAGES:
        raise UserError(f"--stage {args.stage} is impossible: {UNTRAINED_ROUTERS}")
    return most_experts(spec, workload, cluster) if is_auto else spec


def _with_new_tokens(spec: ModelSpec, args: argparse.Namespace) -> ModelSpec:
    """The model with the rows of new tokens, which stage 0 and --train-new-embeddings require."""
    if args.train_everything and args.stage == "stage0":
        raise UserError("stage0 trains only rows of new tokens; remove --train-everything, or use another --stage")
    if args.train_new_embeddings and (args.stage != "stage1" or args.train_everything):
        other = "--train-everything" if args.train_everything else args.stage
        raise UserError(f"--train-new-embeddings applies to --stage stage1, got {other}; remove it")
    rows = spec.megatron_args["vocab_size"]
    if args.extended_tokenizer is not None:
        extension = VocabularyExtension.read(args.extended_tokenizer)
        first, number = extension.first_new_id, extension.number
    elif args.num_new_tokens is not None:
        first, number = rows, args.num_new_tokens
    elif args.stage == "stage0" or args.train_new_embeddings:
        flag = "--stage stage0" if args.stage == "stage0" else "--train-new-embeddings"
        raise UserError(f"{flag} trains rows of new tokens, got none; pass --extended-tokenizer or --num-new-tokens")
    else:
        return spec
    if first > rows:
        raise UserError(
            f"{args.extended_tokenizer} extends a tokenizer of {first:,} tokens, but {args.hf_path} has "
            f"{rows:,} rows in its embedding; pass a tokenizer that extends the model's"
        )
    return spec.with_new_tokens(first, number)


def _cluster(args: argparse.Namespace) -> Cluster:
    here = cluster_here() if args.gpu == "auto" else None
    gpus = args.gpus or (here.gpus if here else None)
    per_node = args.gpus_per_node or (here.gpus if here else 8)
    if gpus is None:
        raise UserError("the number of GPUs is unknown; pass --gpus, or --gpu auto for those of this machine")
    gpu = here.gpu if here else GPUS.get(args.gpu)
    if gpu is not None and args.dtype != "bf16":
        raise UserError(f"--gpu predicts the time of bf16, got --dtype {args.dtype}; use --gpu-memory-gib instead")
    memory_gib = args.gpu_memory_gib or (here.gpu_memory_gib if here else gpu.memory_gib if gpu else None)
    if memory_gib is None:
        raise UserError(f"the GPUs are unknown; pass --gpu {'|'.join(GPUS)}, or --gpu-memory-gib for others")
    reserve_gib = memory_gib * RESERVED_FRACTION if args.reserve_gib is None else args.reserve_gib
    if reserve_gib >= memory_gib:
        raise UserError(
            f"--reserve-gib must be less than the memory per GPU, {memory_gib:g} GiB, got {reserve_gib:g}; use "
            f"--reserve-gib {memory_gib * RESERVED_FRACTION:g}"
        )
    return Cluster(gpus, per_node, memory_gib, reserve_gib, gpu)


def _table(plan: StagePlan, cost: RunCost | None, rows: int) -> str:
    candidates, spec, workload, cluster = plan.candidates, plan.spec, plan.workload, plan.cluster
    time = (
        "step, tokens/s: predicted seconds of a step, exchanges included, and tokens per second and GPU."
        if cluster.gpu
        else "time: compute time of a step with recompute and bubble, relative to one without; excludes communication."
    )
    tokens, moe, s = spec.new_tokens, spec.moe, "s" if cluster.gpus > 1 else ""
    lines = [
        f"{workload.stage}, {workload.dtype}: {workload.global_batch_size} sequences of {workload.seq_length} tokens "
        f"per step, {workload.micro_batch_size} per micro-batch; {cluster.gpus} GPU{s} of {cluster.gpu_memory_gib:g} "
        f"GiB, {cluster.reserve_gib:g} GiB of them reserved.",
        *([f"New experts: {moe.num_new_experts} in each of {len(moe.layers)} layers."] if moe else []),
        *([f"{tokens.number:,} new tokens: {tokens.vocab_size:,} rows of the vocabulary."] if tokens else []),
        "Memory: GiB on the highest-memory rank. all-to-all, gathers: GiB that experts exchange per rank and step over",
        "EP and over ETP, if all experts are chosen equally often; rows of original experts need no all-to-all.",
        time,
        "",
    ]
    head = [*_HEAD, *(["step", "tokens/s"] if cluster.gpu else ["time"])]
    table = []
    for one in candidates[:rows]:
        layout, rank = one.layout, one.peak
        parts = rank.parameter_bytes, rank.gradient_bytes, rank.optimizer_bytes, rank.activation_bytes
        sizes = *parts, rank.working_bytes, rank.total_bytes, one.traffic.all_to_all, one.traffic.expert_tensor
        row = [*map(str, (layout.tp, layout.pp, layout.ep, layout.etp, layout.dp, layout.recompute))]
        row += [*(f"{size / GIB:.2f}" for size in sizes), f"{bubble(layout, workload.num_microbatches(layout)):.1%}"]
        if one.step_time:
            row += [f"{one.step_time.total_s:.2f}", f"{one.step_time.tokens_per_s(workload, cluster):,.0f}"]
        else:
            row.append(f"{one.relative_time:.2f}")
        table.append(row)
    lines.append(table_text(head, table, [_HEAD.index("recompute")]))
    if rows < len(candidates):
        lines.append(f"… and {len(candidates) - rows} more (--all)")
    if step := candidates[0].step_time:
        shares = (f"{name.removesuffix('_s')} {seconds / step.total_s:.0%}" for name, seconds in asdict(step).items())
        lines += [
            "",
            f"The first layout's step: {', '.join(shares)}.",
            PREDICTION_NOTE,
        ]
    checkpoint, trained_only, export = map(format_bytes, asdict(plan.disk).values())
    trained_only = "" if workload.trained == frozenset(Part) else f"{trained_only} with --save-trained-only, "
    lines += [
        "",
        f"Disk: {checkpoint} for each checkpoint, {trained_only}{export} for the export.",
        *([f"{cost}."] if cost else []),
    ]
    if host_bytes := max(rank.host_bytes for rank in candidates[0].stages):
        lines.append(f"Host: up to {format_bytes(host_bytes)} of memory for the optimizer of each GPU.")
    other = plan_stage(spec, workload, cluster)
    if other.workload != workload and other.tokens_per_s:
        lines.append(
            "Another micro-batch should be faster: plan again with --micro-batch-size "
            f"{other.workload.micro_batch_size} ({other.tokens_per_s:,.0f} tokens/s per GPU, "
            f"{other.memory_bytes / GIB:.2f} GiB)."
        )
    lines += ["", f"Recommended arguments for launch/{workload.stage}.sh:", f"  {shlex.join(plan.flags)}"]
    return "\n".join(lines)


def _as_json(plan: StagePlan, cost: RunCost | None) -> dict[str, Any]:
    workload, cluster = plan.workload, plan.cluster
    described = [
        {
            **{name: size for name, size in asdict(one.layout).items() if name not in ("cp", "vpp")},
            "fullest_rank": _rank_as_json(one.peak),
            "stages": [_rank_as_json(rank) for rank in one.stages],
            "all_to_all_bytes_per_step": one.traffic.all_to_all,
            "expert_tensor_bytes_per_step": one.traffic.expert_tensor,
            "bubble": bubble(one.layout, workload.num_microbatches(one.layout)),
            "relative_time": one.relative_time,
            "predicted": _time_as_json(one, workload, cluster),
            "flags": one.flags(workload),
        }
        for one in plan.candidates
    ]
    return {
        "run": asdict(workload),
        "vocab_size": plan.spec.megatron_args["vocab_size"],
        "disk_bytes": asdict(plan.disk),
        **({"cost": asdict(cost)} if cost else {}),
        "cluster": asdict(cluster),
        "assumptions": ["every expert is chosen equally often", "working_bytes is an estimate"],
        "recommended": described[0],
        "layouts": described,
    }


def _time_as_json(one: Candidate, workload: Workload, cluster: Cluster) -> dict[str, float] | None:
    if one.step_time is None:
        return None
    tokens_per_s = one.step_time.tokens_per_s(workload, cluster)
    return {"step_time_s": one.step_time.total_s, "tokens_per_s_and_gpu": tokens_per_s, **asdict(one.step_time)}


def _rank_as_json(rank: RankMemory) -> dict[str, int]:
    return {**asdict(rank), "total_bytes": rank.total_bytes}


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog=program_name("python -m moelpr.plan"), description=(__doc__ or "").splitlines()[0])
    count, gib, gib_or_0 = _at_least(1, int), _at_least(0.001, float), _at_least(0, float)
    add = parser.add_argument
    path = "directory with the model's config.json, or the model's name on the Hub (required)"
    add("--hf-path", type=Path, required=True, metavar="DIR", help=path)
    experts = (
        f"new experts per MoE layer, or auto: the most that fit, up to {MOST_EXPERTS} (none for --stage dense and ffn)"
    )
    add("--num-new-experts", type=_number_or_auto, metavar="N", help=experts)
    add("--gpus", type=count, metavar="G", help="total number of GPUs (default with --gpu auto: this machine's)")
    kinds = f"the GPUs, whose step time is predicted: {', '.join(GPUS)}, or auto, this machine's"
    add("--gpu", choices=(*GPUS, "auto"), metavar="GPU", help=kinds)
    add("--gpu-memory-gib", type=gib, metavar="GIB", help="memory per GPU, in GiB (default: that of --gpu)")
    add("--gpus-per-node", type=count, metavar="PER_NODE", help="GPUs per node (default: 8, or this machine's)")
    reserve = "memory per GPU, in GiB, left free for CUDA context, NCCL buffers and fragmentation (default: 10%% of it)"
    add("--reserve-gib", type=gib_or_0, metavar="RESERVE", help=reserve)
    add_expert_flags(parser)
    add_either = parser.add_mutually_exclusive_group().add_argument
    extended = "tokenizer with new tokens, as in moelpr model convert (default: the model's)"
    add_either("--extended-tokenizer", type=Path, metavar="EXTENDED", help=extended)
    new_tokens = "number of new tokens of a tokenizer that does not exist yet; each gets a further row"
    add_either("--num-new-tokens", type=count, metavar="NEW", help=new_tokens)
    add("--stage", choices=get_args(Stage), default="stage1", help="training stage (default: %(default)s)")
    add("--train-new-embeddings", action="store_true", help="in stage1, train the rows of new tokens too")
    add("--train-everything", action="store_true", help="in stage1 and stage2, train all parameters")
    chosen = "experts that tokens can choose in stage1 (default: %(default)s)"
    add("--stage1-experts", choices=get_args(Stage1Experts), default="all", help=chosen)
    on_host = "keep the optimizer's state in the memory of the host, which needs more time per step"
    add("--optimizer-cpu-offload", action="store_true", help=on_host)
    lengths = ", ".join(f"{length} in {stage}" for stage, length in PAPER_SEQ_LENGTH.items())
    seq_length = f"tokens per sequence (default: the paper's, {lengths}; elsewhere that of stage1)"
    add("--seq-length", type=count, metavar="TOKENS", help=seq_length)
    add("--micro-batch-size", type=count, default=1, metavar="MICRO", help="sequences per micro-batch (default: 1)")
    batch = "sequences per step (default: the paper's, %(default)s)"
    add("--global-batch-size", type=count, default=PAPER_GLOBAL_BATCH_SIZE, metavar="GLOBAL", help=batch)
    tokens = "print what training on so many tokens costs, such as 24B"
    add("--train-tokens", type=count_argument, metavar="TOKENS", help=tokens)
    add("--data-path", nargs="+", metavar="PREFIX", help="corpora, whose shares of --train-tokens are printed")
    mix = "how corpora share the tokens, as in training; max-epochs is how often one is read at most (default: 4)"
    add("--mix", type=Mix.argument, metavar="temperature=T,max-epochs=E", help=mix)
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="dtype of the weights (default: %(default)s)")
    add("--rows", type=count, default=20, metavar="ROWS", help="number of layouts to list (default: %(default)s)")
    add("--all", action="store_true", help="list all layouts that fit")
    add("--json", action="store_true", help="print JSON with all layouts that fit, in bytes and per pipeline stage")
    return parser


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _at_least(least: float, convert: type[int] | type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:  # argparse reports a ValueError as "invalid number value"
        value = convert(text)
        if not least <= value <= 1e12:
            raise argparse.ArgumentTypeError(f"must be at least {least} and at most 10^12, got {text[:40]}")
        return value

    return number


if __name__ == "__main__":
    run_command(main)
