"""Flags that are required or exclude each other."""

from collections.abc import Iterable
from importlib.util import find_spec

from moelpr.train.arguments.early import LENGTHS, missing
from moelpr.train.arguments.kernels import is_installed
from moelpr.train.arguments.requested import RequestedRun
from moelpr.train.track.trackers import TRACKERS, missing_packages

_EXCLUSIVE = (LENGTHS, ("fp16", "bf16", "fp32"))


def check_presence(run: RequestedRun) -> Iterable[str]:
    """Flags without a default are given; length of training and dtype only once."""
    yield from missing(run.explicit_args) if run.recipe_is_read else ()
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


def check_least_rates(run: RequestedRun) -> Iterable[str]:
    """The learning rate is above those that it starts and ends with."""
    lr, least_lr = run.args.lr, run.args.min_lr
    if "min_lr" in run.explicit_args and lr is not None and least_lr is not None and least_lr > lr:
        yield f"--min-lr must be at most --lr {lr}, got {least_lr}"
    if lr is not None and run.args.lr_warmup_init > lr >= 0:
        yield f"--lr-warmup-init must be at most --lr {lr}, got {run.args.lr_warmup_init}"


def check_schedule(run: RequestedRun) -> Iterable[str]:
    """The learning rate rises within the run, and its decay has all its settings."""
    args = run.args
    end = "train_iters" if args.lr_decay_iters is None else "lr_decay_iters"
    warmup, length = args.lr_warmup_iters, getattr(args, end)
    if warmup and length is not None and warmup >= length >= 1:
        yield f"--lr-warmup-iters must be below {run.flag(end)} {length}, got {warmup}; pass, say, {length // 10}"
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is None:
        yield "--lr-decay-style WSD requires the length of its decay; add --lr-wsd-decay-iters N"


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
