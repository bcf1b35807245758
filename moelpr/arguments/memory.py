"""What the planner expects a run to need per rank, and settings that need less."""

from moelpr.arguments.requested import RequestedRun
from moelpr.layouts import PlannedLayout, Recompute, divisors, layout_problems
from moelpr.megatron_patches import cpu
from moelpr.plan.memory import CPU, PLANNED_STAGES, Dtype, Kernels, Workload, model_parts, stage_memories

# What torch, Megatron and Python occupy in a rank without a GPU, in addition to the code that all ranks share.
PROCESS_BYTES = 450 << 20


def expected_memory(run: RequestedRun) -> int | None:
    """Bytes of the rank that needs the most; None for invalid settings and for what moelpr.plan does not support."""
    args, layout, spec = run.args, run.layout, run.spec
    if spec is None or args.stage not in PLANNED_STAGES or args.train_everything or layout.cp * layout.vpp > 1:
        return None
    sizes = args.seq_length, args.micro_batch_size, run.global_batch_size
    if (
        spec.moe is None
        or not all(size and size > 0 for size in sizes)
        or any(layout_problems(layout, run.world_size, spec, *sizes, torch_grouped_gemm=False))
    ):
        return None
    sizes_of_layout = layout.tp, layout.pp, layout.ep, layout.etp, layout.dp
    is_distributed = bool(args.use_distributed_optimizer)
    planned = PlannedLayout(*sizes_of_layout, recompute=_recompute(run), distributed_optimizer=is_distributed)
    dtype: Dtype = "bf16" if args.bf16 or args.fp16 else "fp32"
    kernels = CPU if cpu.is_needed() else Kernels()
    workload = Workload(args.stage, *sizes, dtype, kernels, args.train_new_embeddings)
    ranks = stage_memories(spec, model_parts(spec), planned, workload)
    return max(rank.total_bytes for rank in ranks) + (PROCESS_BYTES if cpu.is_needed() else 0)


def smaller_settings(run: RequestedRun) -> str:
    """Settings with which a rank needs less memory, as flags."""
    args, recompute = run.args, _recompute(run)
    settings = [] if args.use_distributed_optimizer or run.layout.dp == 1 else ["--use-distributed-optimizer"]
    if (args.micro_batch_size or 1) > 1:
        settings.append(f"--micro-batch-size {divisors(args.micro_batch_size)[-2]}")
    if run.is_moe and recompute == "none":
        settings.append("--recompute-granularity selective --recompute-modules moe")
    elif recompute != "full":
        settings.append("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    return ", ".join([*settings, "or more ranks on more machines with --use-distributed-optimizer"])


def _recompute(run: RequestedRun) -> Recompute:
    granularity, modules = run.args.recompute_granularity, run.args.recompute_modules or []
    if granularity == "full":
        return "full"
    return "selective" if granularity == "selective" and "moe" in modules else "none"
