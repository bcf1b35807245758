"""Flags that are required or exclude each other, and ranges of numbers."""

import math
from collections.abc import Iterable
from importlib.util import find_spec

from moelpr.train.arguments.checks.data import DATA_FLAGS
from moelpr.train.arguments.kernels import is_installed
from moelpr.train.arguments.requested import LENGTH_FLAGS, RequestedRun
from moelpr.train.track.trackers import TRACKERS, missing_packages

_LENGTHS = tuple(flag[2:].replace("-", "_") for flag in LENGTH_FLAGS)

# The flag to pass if none of the arguments is given.
_REQUIRED = {
    "--stage stage1 (or stage0, stage2, sft, dense, ffn)": ("stage",),
    "--micro-batch-size SEQUENCES": ("micro_batch_size",),
    "--seq-length TOKENS": ("seq_length",),
    "--lr RATE": ("lr",),
    "--train-iters STEPS (or --train-tokens N, --train-epochs E, --train-samples SEQUENCES)": _LENGTHS,
    "--data-path PREFIX (moelpr data preprocess makes a corpus)": (*DATA_FLAGS, "mock_data"),
}

_EXCLUSIVE = (_LENGTHS, DATA_FLAGS, ("fp16", "bf16", "fp32"))

# Least value and the bound that it must be below.
_RANGES: dict[tuple[int, float], str] = {
    (1, math.inf): (
        "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size "
        "expert_tensor_parallel_size num_virtual_stages_per_pipeline_rank num_layers_per_virtual_pipeline_stage "
        "make_vocab_size_divisible_by micro_batch_size global_batch_size seq_length train_iters train_samples "
        "save_interval log_interval eval_interval warn_window lr_decay_iters lr_decay_samples lr_wsd_decay_iters "
        "lr_wsd_decay_samples tensorboard_log_interval log_memory_interval train_tokens early_stop_patience "
        "gpu_sniff_test_interval"
    ),
    (1, 2**31): "seed",
    (0, math.inf): (
        "lr min_lr lr_warmup_init lr_warmup_iters lr_warmup_samples weight_decay clip_grad start_weight_decay "
        "end_weight_decay balance_loss_coeff lpr_loss_coeff eval_iters grace_seconds manual_gc_interval"
    ),
    (0, 10**6): "train_epochs",
    (0, 1): "adam_beta1 adam_beta2 lr_warmup_fraction",
}


def check_presence(run: RequestedRun) -> Iterable[str]:
    """Flags without a default are given; length of training, data and dtype only once."""
    for usage, names in _REQUIRED.items():
        if run.recipe_is_read and not any(name in run.explicit_args for name in names):
            yield f"{usage.split()[0]} is required; pass {usage}"
    for names in _EXCLUSIVE:
        flags = [run.flag(name) for name in names if name in run.explicit_args]
        if len(flags) > 1:
            yield f"{' and '.join(flags)} are mutually exclusive; keep one of them"


def check_optimizer(run: RequestedRun) -> Iterable[str]:
    """Megatron's distributed optimizer knows only Adam's state; others but SGD need another package."""
    name = run.args.optimizer
    if name == "sgd" and run.args.use_distributed_optimizer:
        yield "--use-distributed-optimizer does not support --optimizer sgd; remove it, or use --optimizer adam"
    if run.args.optimizer_cpu_offload and (name != "adam" or not run.args.use_distributed_optimizer):
        yield "--optimizer-cpu-offload requires --optimizer adam and --use-distributed-optimizer; add them"
    can_reduce = run.args.bf16 and is_installed("transformer_engine") and not run.args.optimizer_cpu_offload
    if run.args.bf16_moments and not (can_reduce and name == "adam" and run.args.use_distributed_optimizer):
        yield (
            "--bf16-moments requires Transformer Engine, bf16, --optimizer adam and --use-distributed-optimizer, and "
            "not --optimizer-cpu-offload; remove it"
        )
    if run.args.optimizer_cpu_offload and run.args.async_save:
        yield "--async-save would save the state of --optimizer-cpu-offload while the next step changes it; remove one"
    if name not in ("adam", "sgd") and find_spec("emerging_optimizers") is None:
        yield f"--optimizer {name} requires the package emerging-optimizers, which is not installed; use adam or sgd"


def check_loss(run: RequestedRun) -> Iterable[str]:
    """The loss is fused if at most the output layer's rows of new tokens train."""
    if run.args.cross_entropy_loss_fusion and (run.args.train_everything or run.args.stage == "dense"):
        yield "--cross-entropy-loss-fusion does not support an output layer that trains; remove it"


def check_ranges(run: RequestedRun) -> Iterable[str]:
    """Numbers are finite, and neither too small nor too large."""
    known = {name: bounds for bounds, names in _RANGES.items() for name in names.split()}
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


def check_schedule(run: RequestedRun) -> Iterable[str]:
    """The learning rate rises within the run, and its decay, and a weight decay that grows, have all their settings."""
    args = run.args
    for unit in ("iters", "samples"):
        warmup, decay = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"lr_decay_{unit}")
        end = f"lr_decay_{unit}" if decay is not None else f"train_{unit}"
        length = getattr(args, end)
        if warmup and length is not None and warmup >= length >= 1:
            yield (
                f"{run.flag(f'lr_warmup_{unit}')} must be below {run.flag(end)} {length}, got {warmup}; pass, for "
                f"example, {length // 10}"
            )
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


def check_trackers(run: RequestedRun) -> Iterable[str]:
    """A tracker that is asked for is installed, and there are metrics that it can get after a kill."""
    yield from missing_packages(run.args)
    for flag in TRACKERS:
        if getattr(run.args, flag, None) and not run.args.save:
            yield f"{run.flag(flag)} requires --save, whose metrics a tracker gets; add it"


def check_early_stop(run: RequestedRun) -> Iterable[str]:
    """Early stopping has held-out text, and each pass but the first and the last is of a saved step."""
    args, interval = run.args, run.args.save_interval
    misses = bool(interval) and "eval_interval" in run.explicit_args and args.eval_interval % interval != 0
    if args.early_stop_patience and not (args.validation_data and args.save):
        yield "--early-stop-patience requires --validation-data LANG=PREFIX and --save; add them, or remove it"
    if args.early_stop_patience and misses:
        yield (
            f"with --early-stop-patience, --eval-interval must be a multiple of --save-interval {interval}, got "
            f"{args.eval_interval}; remove it to validate each saved step"
        )
