"""Data, batches, steps and learning rate."""

from collections.abc import Iterable

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training.utils import get_blend_and_blend_per_split

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

_DATA = ("data_path", "data_args_path", "train_data_path", "per_split_data_args_path")

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


def data_is_named_once(run: Run) -> Iterable[str]:
    if "mock_data" in run.typed:
        yield "--mock-data has no language bits; name corpora with --data-path PREFIX"
        return
    given = [run.typed[name] for name in _DATA if name in run.typed]
    if len(given) > 1:
        yield f"{' and '.join(given)} both name the training data; keep one of them"
    elif not given and run.recipe_is_read:
        yield "no training data; name corpora with --data-path PREFIX (built by data_tools/preprocess_data.py)"


def data_is_there(run: Run) -> Iterable[str]:
    if sum(name in run.typed for name in _DATA) != 1:
        return
    try:
        blend, per_split = get_blend_and_blend_per_split(run.args)
    except (AssertionError, OSError, ValueError, KeyError, TypeError) as error:
        yield f"the training data can't be read from the flags ({error}); give --data-path [WEIGHT] PREFIX …"
        return
    for prefixes, *_ in [part for part in (blend, *(per_split or ())) if part is not None]:
        for prefix in prefixes:
            if not IndexedDataset.exists(prefix):
                yield f"{prefix}.bin and .idx are not both there; build them with data_tools/preprocess_data.py"


def the_attention_mask_is_causal(run: Run) -> Iterable[str]:
    if run.args.reset_attention_mask:
        yield "--reset-attention-mask has no effect: attention is causal over the packed sequence; drop it"


CHECKS = (
    needed_flags_are_given,
    counts_are_at_least_1,
    the_length_of_training_is_said_once,
    the_global_batch_divides,
    the_sequence_fits_the_model,
    the_learning_rate_falls,
    data_is_named_once,
    data_is_there,
    the_attention_mask_is_causal,
)
