"""Batches, steps and learning rate."""

from collections.abc import Iterable

from moelpr.arguments.checks.run import Run, neighbours

_COUNTS = (
    "micro_batch_size",
    "global_batch_size",
    "seq_length",
    "train_iters",
    "train_samples",
    "save_interval",
    "log_interval",
)

# Needed, with what its value is.
_NEEDED = {
    "stage": ("--stage", "dense, stage1 or stage2"),
    "micro_batch_size": ("--micro-batch-size", "SEQUENCES"),
    "seq_length": ("--seq-length", "TOKENS"),
    "lr": ("--lr", "RATE"),
}


def counts_are_at_least_1(run: Run) -> Iterable[str]:
    for name in _COUNTS:
        value = getattr(run.args, name)
        if value is not None and value < 1:
            yield f"{run.typed.get(name, name)} {value} must be at least 1"


def needed_flags_are_given(run: Run) -> Iterable[str]:
    if not run.recipe_is_read:
        return
    for name, (flag, value) in _NEEDED.items():
        # A flag that was typed wrongly has its own complaint.
        if getattr(run.args, name) is None and name not in run.typed:
            yield f"{flag} is missing; give {flag} {value}"


def the_length_of_training_is_said_once(run: Run) -> Iterable[str]:
    given = [name for name in ("train_iters", "train_samples") if name in run.typed]
    if len(given) > 1:
        yield "--train-iters and --train-samples both say how long to train; keep one of them"
    elif not given and run.recipe_is_read:
        yield "nothing says how long to train; give --train-iters STEPS (or --train-samples SEQUENCES)"


def the_global_batch_divides(run: Run) -> Iterable[str]:
    micro, whole = run.args.micro_batch_size, run.args.global_batch_size
    layout = run.layout
    if micro is None or whole is None or min(micro, whole) < 1 or run.world_size % (layout.tp * layout.pp * layout.cp):
        return
    step = micro * layout.dp
    if whole % step:
        yield (
            f"--global-batch-size {whole} is no multiple of --micro-batch-size {micro} x {layout.dp} data-parallel "
            f"ranks = {step}; use {neighbours(whole, step)}"
        )


def the_sequence_fits_the_model(run: Run) -> Iterable[str]:
    length, positions = run.args.seq_length, run.shape.get("max_position_embeddings")
    if length is not None and positions is not None and length > positions:
        yield f"--seq-length {length} is longer than the model's {positions} positions; use at most {positions}"


def the_learning_rate_falls(run: Run) -> Iterable[str]:
    lr, least = run.args.lr, run.args.min_lr
    if lr is not None and lr < 0:
        yield f"--lr {lr} must not be negative"
    elif lr is not None and least is not None and least > lr:
        yield f"--min-lr {least} is above --lr {lr}; lower it, or raise --lr"


CHECKS = (
    needed_flags_are_given,
    counts_are_at_least_1,
    the_length_of_training_is_said_once,
    the_global_batch_divides,
    the_sequence_fits_the_model,
    the_learning_rate_falls,
)
