"""List the layouts of an upcycled model that fit on a cluster, with memory per rank and step time, and recommend one.

    moelpr layouts --hf-path DIR --num-new-experts 5 --gpus 8 --gpu h100-80

It reads only config.json. docs/design/planner.md explains how memory and time are computed.
"""

import json
import shlex
from dataclasses import asdict
from typing import Annotated, Any

from moelpr.base.errors import UserError
from moelpr.base.machine import format_bytes
from moelpr.base.settings import Folder, choices, metavar, number
from moelpr.base.text_tables import table_text
from moelpr.model.families.families import read_base
from moelpr.model.families.hub import config_folder
from moelpr.model.families.new_experts import with_new_experts
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import DENSE_STAGES, MOE_STAGES, UNTRAINED_ROUTERS, Part, Stage, Stage1Experts
from moelpr.plan.candidates import MOST_EXPERTS, most_experts
from moelpr.plan.gpus import GIB, GPUS, RESERVED_FRACTION, Cluster, cluster_here
from moelpr.plan.memory import RankMemory, Workload
from moelpr.plan.settings import ExpertFlags
from moelpr.plan.stage_plan import PAPER_GLOBAL_BATCH_SIZE, PAPER_SEQ_LENGTH, StagePlan, plan_stage
from moelpr.plan.step_time import PREDICTION_NOTE, bubble

_HEAD = (
    "TP PP VPP EP ETP DP recompute parameters gradients optimizer activations working total all-to-all gathers bubble"
).split()


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


_Count = Annotated[int, number(int, 1, 1e12)]
_Gib = Annotated[float, number(float, 0.001, 1e12)]


class Settings(ExpertFlags):
    hf_path: Folder  # directory with the model's config.json, or the model's name on the Hub
    # per MoE layer, or auto: most that fit
    num_new_experts: Annotated[int | str | None, {"type": _number_or_auto}, metavar("N")] = None
    gpus: _Count | None = None  # total number of GPUs (default with --gpu auto: this machine's)
    gpu: Annotated[str | None, choices([*GPUS, "auto"])] = None  # their kind; auto: this machine's
    gpu_memory_gib: _Gib | None = None  # memory per GPU, in GiB, of which a tenth stays free (default: that of --gpu)
    gpus_per_node: _Count | None = None  # GPUs per node (default: 8, or this machine's)
    num_new_tokens: _Count | None = None  # tokens that an extended tokenizer adds
    stage: Stage = "stage1"  # training stage
    train_new_embeddings: bool = False  # in stage1, train the rows of new tokens too
    train_everything: bool = False  # in stage1 and stage2, train all parameters
    stage1_experts: Stage1Experts = "all"  # experts that tokens can choose in stage1
    optimizer_cpu_offload: bool = False  # keep the optimizer's state in the host's memory, which takes time
    bf16_moments: bool = False  # keep Adam's moments in bf16, with Transformer Engine
    seq_length: _Count | None = None  # tokens per sequence (default: the paper's)
    micro_batch_size: _Count | None = None  # sequences per micro-batch (default: the fastest)
    global_batch_size: _Count = PAPER_GLOBAL_BATCH_SIZE  # sequences per step, by default the paper's
    rows: _Count = 20  # number of layouts to list
    json: bool = False  # print JSON with all layouts that fit, in bytes and per pipeline stage


def main(args: Settings) -> None:
    seq_length = args.seq_length or PAPER_SEQ_LENGTH.get(args.stage, PAPER_SEQ_LENGTH["stage1"])
    sizes = seq_length, args.micro_batch_size or 1, args.global_batch_size
    if args.stage1_experts == "new" and args.stage != "stage1":
        raise UserError(f"--stage1-experts new applies to --stage stage1, got {args.stage}; remove it")
    if args.bf16_moments and args.optimizer_cpu_offload:
        raise UserError("--bf16-moments does not support --optimizer-cpu-offload; remove one of them")
    names = ("train_everything", "stage1_experts", "optimizer_cpu_offload", "bf16_moments")
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    workload = Workload(args.stage, *sizes, new_embeddings=args.train_new_embeddings, **options)
    cluster = _cluster(args)
    plan = plan_stage(_model(args, workload, cluster), workload, cluster, any_micro_batch=args.micro_batch_size is None)
    print(json.dumps(_as_json(plan), indent=2) if args.json else _table(plan, args.rows))


def _model(args: Settings, workload: Workload, cluster: Cluster) -> ModelSpec:
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
    experts = args.experts(MOST_EXPERTS if isinstance(args.num_new_experts, str) else args.num_new_experts, base)
    spec = _with_new_tokens(with_new_experts(family, base, experts), args)
    if spec.moe is not None and spec.moe.topk == 1 and args.stage in MOE_STAGES:
        raise UserError(f"--stage {args.stage} is impossible: {UNTRAINED_ROUTERS}")
    return most_experts(spec, workload, cluster) if isinstance(args.num_new_experts, str) else spec


def _with_new_tokens(spec: ModelSpec, args: Settings) -> ModelSpec:
    """The model with the rows of new tokens, which stage 0 and --train-new-embeddings require."""
    if args.train_everything and args.stage == "stage0":
        raise UserError("stage0 trains only rows of new tokens; remove --train-everything, or use another --stage")
    if args.train_new_embeddings and (args.stage != "stage1" or args.train_everything):
        other = "--train-everything" if args.train_everything else args.stage
        raise UserError(f"--train-new-embeddings applies to --stage stage1, got {other}; remove it")
    if args.num_new_tokens is not None:
        return spec.with_new_tokens(spec.megatron_args["vocab_size"], args.num_new_tokens)
    if args.stage == "stage0" or args.train_new_embeddings:
        flag = "--stage stage0" if args.stage == "stage0" else "--train-new-embeddings"
        raise UserError(f"{flag} trains rows of new tokens, got none; pass --num-new-tokens")
    return spec


def _cluster(args: Settings) -> Cluster:
    here = cluster_here() if args.gpu == "auto" else None
    gpus = args.gpus or (here.gpus if here else None)
    per_node = args.gpus_per_node or (here.gpus if here else 8)
    if gpus is None:
        raise UserError("the number of GPUs is unknown; pass --gpus, or --gpu auto for those of this machine")
    gpu = here.gpu if here else GPUS.get(args.gpu or "")
    memory_gib = args.gpu_memory_gib or (here.gpu_memory_gib if here else gpu.memory_gib if gpu else None)
    if memory_gib is None:
        raise UserError(f"the GPUs are unknown; pass --gpu {'|'.join(GPUS)}, or --gpu-memory-gib for others")
    return Cluster(gpus, per_node, memory_gib, memory_gib * RESERVED_FRACTION, gpu)


def _table(plan: StagePlan, rows: int) -> str:
    candidates, spec, workload, cluster = plan.candidates, plan.spec, plan.workload, plan.cluster
    time = (
        "step, tokens/s: predicted seconds of a step, exchanges included, and tokens per second and GPU."
        if cluster.gpu
        else "The fastest is first, as on A100s; --gpu predicts times."
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
    head = [*_HEAD, *(["step", "tokens/s"] if cluster.gpu else [])]
    table = []
    for one in candidates[:rows]:
        layout, rank = one.layout, one.peak
        parts = rank.parameter_bytes, rank.gradient_bytes, rank.optimizer_bytes, rank.activation_bytes
        sizes = *parts, rank.working_bytes, rank.total_bytes, one.traffic.all_to_all, one.traffic.expert_tensor
        row = [*map(str, (layout.tp, layout.pp, layout.vpp, layout.ep, layout.etp, layout.dp, layout.recompute))]
        row += [*(f"{size / GIB:.2f}" for size in sizes), f"{bubble(layout, workload.num_microbatches(layout)):.1%}"]
        row += [f"{one.step_time.total_s:.2f}", f"{one.step_time.tokens_per_s(workload, cluster):,.0f}"]
        table.append(row[: len(head)])
    lines.append(table_text(head, table, [_HEAD.index("recompute")]))
    if rows < len(candidates):
        lines.append(f"… and {len(candidates) - rows} more (--rows)")
    step = candidates[0].step_time
    if cluster.gpu:
        shares = (f"{name.removesuffix('_s')} {seconds / step.total_s:.0%}" for name, seconds in asdict(step).items())
        lines += ["", f"The first layout's step: {', '.join(shares)}.", PREDICTION_NOTE]
    checkpoint, trained_only, export = map(format_bytes, asdict(plan.disk).values())
    trained_only = "" if workload.trained == frozenset(Part) else f"{trained_only} with --save-trained-only, "
    lines += ["", f"Disk: {checkpoint} for each checkpoint, {trained_only}{export} for the export."]
    if host_bytes := max(rank.host_bytes for rank in candidates[0].stages):
        lines.append(f"Host: up to {format_bytes(host_bytes)} of memory for the optimizer of each GPU.")
    lines += ["", f"Recommended arguments for moelpr train {workload.stage}:", f"  {shlex.join(plan.flags)}"]
    return "\n".join(lines)


def _as_json(plan: StagePlan) -> dict[str, Any]:
    workload, cluster = plan.workload, plan.cluster
    described = [
        {
            **{name: size for name, size in asdict(one.layout).items() if name != "cp"},
            "fullest_rank": _rank_as_json(one.peak),
            "stages": [_rank_as_json(rank) for rank in one.stages],
            "all_to_all_bytes_per_step": one.traffic.all_to_all,
            "expert_tensor_bytes_per_step": one.traffic.expert_tensor,
            "bubble": bubble(one.layout, workload.num_microbatches(one.layout)),
            "predicted": cluster.gpu
            and {
                "step_time_s": one.step_time.total_s,
                "tokens_per_s_and_gpu": one.step_time.tokens_per_s(workload, cluster),
                **asdict(one.step_time),
            },
            "flags": one.flags(workload),
        }
        for one in plan.candidates
    ]
    return {
        "run": asdict(workload),
        "vocab_size": plan.spec.megatron_args["vocab_size"],
        "disk_bytes": asdict(plan.disk),
        "cluster": asdict(cluster),
        "assumptions": ["every expert is chosen equally often", "working_bytes is an estimate"],
        "recommended": described[0],
        "layouts": described,
    }


def _rank_as_json(rank: RankMemory) -> dict[str, int]:
    return {**asdict(rank), "total_bytes": rank.total_bytes}
