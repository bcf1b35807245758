"""The parallel layout fits the model and the batch."""

from collections.abc import Iterable

from moelpr.model.megatron import cpu
from moelpr.plan.layouts import divisors, layout_problems, neighbors, one_of
from moelpr.train.arguments.requested import RequestedRun


def check_layout(run: RequestedRun) -> Iterable[str]:
    """The rules of moelpr.plan.layouts."""
    args, spec = run.args, run.spec if run.is_moe or run.spec is None else run.spec.as_dense()
    sizes = args.seq_length, args.micro_batch_size, args.global_batch_size
    options = {
        "sequence_parallel": args.sequence_parallel,
        "even_pipeline": not is_uneven(run),
        "torch_grouped_gemm": not cpu.is_needed() and not args.moe_grouped_gemm,
    }
    yield from layout_problems(run.layout, run.world_size, spec, *sizes, **options)


def check_virtual_stages(run: RequestedRun) -> Iterable[str]:
    """Virtual stages fit the layers and the batch, which Megatron does not check, or only in the first step."""
    stages, micro, batch = run.layout.pp, run.args.micro_batch_size, run.args.global_batch_size
    virtual = run.args.num_virtual_stages_per_pipeline_rank
    layers_per_stage = run.shape.get("num_layers", 0) // stages
    if virtual is not None and virtual >= 1 and layers_per_stage % virtual and not is_uneven(run):
        yield (
            f"--num-virtual-stages-per-pipeline-rank {virtual} does not divide the {layers_per_stage} layers of each "
            f"pipeline stage; use {one_of(divisors(layers_per_stage))}"
        )
    group = run.args.microbatch_group_size_per_vp_stage or stages
    if run.layout.vpp == 1 or micro is None or micro < 1 or group < 1:
        return
    if group < stages:
        yield (
            f"--microbatch-group-size-per-virtual-pipeline-stage must be at least --pipeline-model-parallel-size "
            f"({stages}), got {group}; omit it"
        )
        return
    step = micro * run.layout.dp
    batch = step if batch is None else batch
    number = batch // step
    if batch >= 1 and batch % step == 0 and (number < group or 0 < number % group < stages):
        yield (
            f"--global-batch-size {batch} makes {number} micro-batches, which do not fill the virtual stages of "
            f"--pipeline-model-parallel-size {stages}; use a multiple of {step * group}, such as "
            f"{neighbors(batch, step * group)}"
        )


def is_uneven(run: RequestedRun) -> bool:
    """Whether pipeline stages may have different numbers of layers; Megatron checks them."""
    return bool(run.args.decoder_first_pipeline_num_layers or run.args.decoder_last_pipeline_num_layers)


def uneven_ends(run: RequestedRun) -> tuple[int, int] | None:
    """Layers of the first and the last pipeline stage, if both are given."""
    first, last = run.args.decoder_first_pipeline_num_layers, run.args.decoder_last_pipeline_num_layers
    return (first, last) if first and last and run.layout.pp > 1 else None


def note_sequence_parallelism(run: RequestedRun) -> Iterable[str]:
    """Sequence parallelism is enabled (`apply_method`)."""
    if run.is_moe and run.layout.tp > 1 and not run.args.sequence_parallel:
        yield "enabled --sequence-parallel, which tensor parallelism with experts requires"
