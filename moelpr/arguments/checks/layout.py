"""The parallel layout, batches, steps and learning rate."""

from collections.abc import Iterable

from moelpr.arguments.settings import RunSettings
from moelpr.layouts import divisors, layout_problems, neighbors, one_of
from moelpr.megatron_patches import cpu

_AT_LEAST_1 = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage", "make_vocab_size_divisible_by", "micro_batch_size", "global_batch_size",
    "seq_length", "train_iters", "train_samples", "save_interval", "log_interval", "warn_window",
)  # fmt: skip

# Flags that split the layers unevenly over the pipeline; Megatron checks their values.
_UNEVEN = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)

_REQUIRED = {
    "stage": "--stage stage1 (or dense, stage2)",
    "micro_batch_size": "--micro-batch-size SEQUENCES",
    "seq_length": "--seq-length TOKENS",
    "lr": "--lr RATE",
}


def check_required_flags(run: RunSettings) -> Iterable[str]:
    """Flags without a default are given."""
    if not run.recipe_is_read:
        return
    for name, usage in _REQUIRED.items():
        # A flag with an invalid value has been reported.
        if getattr(run.args, name) is None and name not in run.explicit_args:
            yield f"{usage.split()[0]} is required; pass {usage}"


def check_counts(run: RunSettings) -> Iterable[str]:
    """Sizes and counts are at least 1."""
    for name in _AT_LEAST_1:
        value = getattr(run.args, name)
        if value is not None and value < 1:
            yield f"{run.flag(name)} must be at least 1, got {value}"


def check_layout(run: RunSettings) -> Iterable[str]:
    """The rules of moelpr.layouts."""
    spec = run.spec if run.is_moe or run.spec is None else run.spec.as_dense()
    yield from layout_problems(
        run.layout,
        run.world_size,
        spec,
        seq_length=run.args.seq_length,
        micro_batch_size=run.args.micro_batch_size,
        global_batch_size=run.args.global_batch_size,
        sequence_parallel=run.args.sequence_parallel,
        even_pipeline=not _is_uneven(run),
        torch_grouped_gemm=not cpu.is_needed() and not run.args.moe_grouped_gemm,
    )


def check_expert_parallelism(run: RunSettings) -> Iterable[str]:
    """A dense model has no expert parallelism."""
    if run.spec is None or run.spec.moe is not None:
        return
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        if (getattr(run.args, name) or 1) > 1:
            yield f"{run.flag(name)} does not apply to a dense model; remove it"


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
    if run.virtual_stages == 1 or micro is None or micro < 1 or group < 1:
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


def check_training_length(run: RunSettings) -> Iterable[str]:
    """The length of training is given once."""
    given = [name for name in ("train_iters", "train_samples") if name in run.explicit_args]
    if len(given) > 1:
        yield "--train-iters and --train-samples are mutually exclusive; keep one of them"
    elif not given and run.recipe_is_read:
        yield "the length of training is required; pass --train-iters STEPS (or --train-samples SEQUENCES)"


def check_sequence_length(run: RunSettings) -> Iterable[str]:
    """Sequences are not longer than the model supports."""
    length, positions = run.args.seq_length, run.shape.get("max_position_embeddings")
    if length is not None and positions is not None and length > positions:
        yield f"--seq-length must be at most {positions}, the model's number of positions, got {length}"


def check_learning_rate(run: RunSettings) -> Iterable[str]:
    """Learning rates are not negative, and the minimum is the smaller one."""
    lr, least = run.args.lr, run.args.min_lr
    if lr is not None and lr < 0:
        yield f"--lr must be at least 0, got {lr}"
    elif lr is not None and least is not None and least > lr:
        yield f"--min-lr must be at most --lr {lr}, got {least}"


def note_sequence_parallelism(run: RunSettings) -> Iterable[str]:
    """Sequence parallelism is enabled (`apply_method`)."""
    if run.is_moe and run.layout.tp > 1 and not run.args.sequence_parallel:
        yield "enabled --sequence-parallel, which tensor parallelism with experts requires"
