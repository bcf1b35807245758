"""Required flags, ranges of numbers, and the parallel layout."""

import math
from collections.abc import Iterable

from moelpr.arguments.checks.data import DATA_FLAGS
from moelpr.arguments.settings import RunSettings
from moelpr.layouts import divisors, layout_problems, neighbors, one_of
from moelpr.megatron_patches import cpu

# What to pass if none of the arguments is given.
_REQUIRED = {
    "--stage stage1 (or stage0, stage2, dense)": ("stage",),
    "--micro-batch-size SEQUENCES": ("micro_batch_size",),
    "--seq-length TOKENS": ("seq_length",),
    "--lr RATE": ("lr",),
    "--train-iters STEPS (or --train-samples SEQUENCES)": ("train_iters", "train_samples"),
    "--data-path PREFIX (data_tools/preprocess_data.py makes a corpus)": (*DATA_FLAGS, "mock_data"),
}

_EXCLUSIVE = (("train_iters", "train_samples"), DATA_FLAGS, ("fp16", "bf16", "fp32"))

# Least value and the bound that it must be below.
_RANGES: dict[tuple[int, float], tuple[str, ...]] = {
    (1, math.inf): (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
        "expert_model_parallel_size", "expert_tensor_parallel_size", "num_virtual_stages_per_pipeline_rank",
        "num_layers_per_virtual_pipeline_stage", "make_vocab_size_divisible_by", "micro_batch_size",
        "global_batch_size", "seq_length", "train_iters", "train_samples", "save_interval", "log_interval",
        "eval_interval", "warn_window", "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters",
        "lr_wsd_decay_samples", "tensorboard_log_interval", "log_memory_interval",
    ),
    (1, 2**31): ("seed",),
    (0, math.inf): (
        "lr", "min_lr", "lr_warmup_init", "lr_warmup_iters", "lr_warmup_samples", "weight_decay", "clip_grad",
        "start_weight_decay", "end_weight_decay", "balance_loss_coeff", "lpr_loss_coeff", "eval_iters",
    ),
    (0, 1): ("adam_beta1", "adam_beta2", "lr_warmup_fraction"),
}  # fmt: skip

# Flags that split the layers unevenly over the pipeline; Megatron checks their values.
_UNEVEN = (
    "pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip


def check_required_flags(run: RunSettings) -> Iterable[str]:
    """Flags without a default are given, by recipe or command line."""
    for usage, names in _REQUIRED.items():
        if run.recipe_is_read and not any(name in run.explicit_args for name in names):
            yield f"{usage.split()[0]} is required; pass {usage}"


def check_exclusive_flags(run: RunSettings) -> Iterable[str]:
    """Length of training, data and dtype are given once."""
    for names in _EXCLUSIVE:
        given = [run.flag(name) for name in names if name in run.explicit_args]
        if len(given) > 1:
            yield f"{' and '.join(given)} are mutually exclusive; keep one of them"


def check_ranges(run: RunSettings) -> Iterable[str]:
    """Numbers are finite, and neither too small nor too large."""
    known = {name: bounds for bounds, names in _RANGES.items() for name in names}
    for name, (least, below) in known.items():
        value = getattr(run.args, name)
        if value is not None and not least <= value < below:
            bound = f" and below {below:,}" if below < math.inf else " and finite" if value == math.inf else ""
            yield f"{run.flag(name)} must be at least {least}{bound}, got {value}"
    for name in run.explicit_args.keys() - known.keys():
        value = getattr(run.args, name, None)
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{run.flag(name)} must be a finite number, got {value}"
    lr, least_lr = run.args.lr, run.args.min_lr
    if "min_lr" in run.explicit_args and lr is not None and least_lr is not None and least_lr > lr:
        yield f"--min-lr must be at most --lr {lr}, got {least_lr}"
    if lr is not None and run.args.lr_warmup_init > lr >= 0:
        yield f"--lr-warmup-init must be at most --lr {lr}, got {run.args.lr_warmup_init}"


def check_warmup(run: RunSettings) -> Iterable[str]:
    """The learning rate rises to its maximum within the run."""
    for unit in ("iters", "samples"):
        warmup, decay = getattr(run.args, f"lr_warmup_{unit}"), getattr(run.args, f"lr_decay_{unit}")
        end = f"lr_decay_{unit}" if decay is not None else f"train_{unit}"
        length = getattr(run.args, end)
        if warmup and length is not None and warmup >= length >= 1:
            yield (
                f"{run.flag(f'lr_warmup_{unit}')} must be below {run.flag(end)} {length}, got {warmup}; pass, for "
                f"example, {length // 10}"
            )


def check_decay(run: RunSettings) -> Iterable[str]:
    """The learning rate's decay, and a weight decay that grows, have their other settings."""
    args = run.args
    unit = "samples" if args.train_iters is None and args.train_samples is not None else "iters"
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        yield f"--lr-decay-style WSD requires the length of its decay; add --lr-wsd-decay-{unit} N"
    style, start, end = args.weight_decay_incr_style, args.start_weight_decay, args.end_weight_decay
    if style == "constant":
        for name in ("start_weight_decay", "end_weight_decay"):
            if getattr(args, name) is not None:
                yield f"{run.flag(name)} requires --weight-decay-incr-style linear; add it, or use --weight-decay"
    elif start is None or end is None:
        yield f"--weight-decay-incr-style {style} requires --start-weight-decay and --end-weight-decay; add them"
    elif end < start:
        yield f"--end-weight-decay must be at least --start-weight-decay {start}, got {end}"


def check_layout(run: RunSettings) -> Iterable[str]:
    """The rules of moelpr.layouts."""
    args, spec = run.args, run.spec if run.is_moe or run.spec is None else run.spec.as_dense()
    yield from layout_problems(
        run.layout, run.world_size, spec, args.seq_length, args.micro_batch_size, args.global_batch_size,
        sequence_parallel=args.sequence_parallel, even_pipeline=not _is_uneven(run),
        torch_grouped_gemm=not cpu.is_needed() and not args.moe_grouped_gemm,
    )  # fmt: skip


def check_virtual_stages(run: RunSettings) -> Iterable[str]:
    """What Megatron does not check, or reports only in the first step."""
    stages, micro, batch = run.layout.pp, run.args.micro_batch_size, run.args.global_batch_size
    virtual = run.args.num_virtual_stages_per_pipeline_rank
    layers_per_stage = run.shape.get("num_layers", 0) // stages
    if virtual is not None and virtual >= 1 and layers_per_stage % virtual and not _is_uneven(run):
        yield (
            f"--num-virtual-stages-per-pipeline-rank {virtual} does not divide the {layers_per_stage} layers of each "
            f"pipeline stage; use {one_of(divisors(layers_per_stage))}"
        )
    group = run.args.microbatch_group_size_per_vp_stage or stages
    if run.layout.vpp == 1 or micro is None or micro < 1 or group < 1:
        return
    step = micro * run.layout.dp
    batch = step if batch is None else batch
    if batch >= 1 and batch % step == 0 and 0 < (batch // step) % group < stages:
        yield (
            f"--global-batch-size {batch} makes {batch // step} micro-batches, which do not fill the virtual stages of "
            f"--pipeline-model-parallel-size {stages}; use a multiple of {step * group}, such as "
            f"{neighbors(batch, step * group)}"
        )


def _is_uneven(run: RunSettings) -> bool:
    return any(getattr(run.args, name) for name in _UNEVEN)


def note_sequence_parallelism(run: RunSettings) -> Iterable[str]:
    """Sequence parallelism is enabled (`apply_method`)."""
    if run.is_moe and run.layout.tp > 1 and not run.args.sequence_parallel:
        yield "enabled --sequence-parallel, which tensor parallelism with experts requires"
