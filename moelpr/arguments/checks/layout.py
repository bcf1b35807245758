"""Parallel sizes: do they fit the number of processes, the model and each other?"""

import math
from collections.abc import Iterable

from moelpr.arguments.checks.run import Run, divisors, neighbours, one_of

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage",
    "make_vocab_size_divisible_by",
)

# Flags that cut the pipeline unevenly. Megatron checks what they say.
_UNEVEN = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def sizes_are_at_least_1(run: Run) -> Iterable[str]:
    for name in _SIZES:
        value = getattr(run.args, name)
        if value is not None and value < 1:
            yield f"{_flag(run, name)} {value} must be at least 1"


def the_model_fits_the_world(run: Run) -> Iterable[str]:
    layout = run.layout
    product = layout.tp * layout.pp * layout.cp
    if run.world_size % product:
        yield (
            f"{_processes(run)} can't be shared out over --tensor-model-parallel-size {layout.tp} x "
            f"--pipeline-model-parallel-size {layout.pp} x --context-parallel-size {layout.cp} = {product}; start a "
            f"multiple of {product} processes, or make the product {one_of(divisors(run.world_size))}"
        )


def the_experts_fit_the_world(run: Run) -> Iterable[str]:
    layout = run.layout
    product = layout.etp * layout.ep * layout.pp
    is_said_already = layout.etp * layout.ep == layout.tp * layout.cp
    if run.is_moe and run.world_size % product and not is_said_already:
        yield (
            f"{_processes(run)} can't be shared out over --expert-tensor-parallel-size {layout.etp} x "
            f"--expert-model-parallel-size {layout.ep} x --pipeline-model-parallel-size {layout.pp} = {product}; start "
            f"a multiple of {product} processes, or make the product {one_of(divisors(run.world_size))}"
        )


def new_experts_divide_over_their_ranks(run: Run) -> Iterable[str]:
    if not run.is_moe:
        return
    experts, parallel = run.shape["num_experts"], run.layout.ep
    if experts % parallel:
        yield (
            f"{experts} new experts do not divide over --expert-model-parallel-size {parallel}; "
            f"use {one_of(divisors(experts))}"
        )


def expert_tensor_parallelism_is_1_or_all(run: Run) -> Iterable[str]:
    layout = run.layout
    if run.is_moe and layout.etp not in (1, layout.tp):
        yield (
            f"--expert-tensor-parallel-size {layout.etp} must be {one_of(sorted({1, layout.tp}))}: original experts "
            f"are split over the tensor-parallel ranks (--tensor-model-parallel-size {layout.tp}) or not at all"
        )


def a_dense_model_has_no_expert_parallelism(run: Run) -> Iterable[str]:
    if run.spec is None or run.spec.moe is not None:
        return
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        if (getattr(run.args, name) or 1) > 1:
            yield f"{_flag(run, name)} has no meaning for a dense model; drop it"


def tensor_parallelism_divides_the_model(run: Run) -> Iterable[str]:
    """Megatron's query groups may be fewer than the tensor-parallel ranks, which then share them."""
    if not run.shape:
        return
    parts = {
        "attention heads": run.shape["num_attention_heads"],
        "FFN rows": run.shape["ffn_hidden_size"],
        "rows of queries, keys and values": run.shape["kv_channels"]
        * (run.shape["num_attention_heads"] + 2 * run.shape["num_query_groups"]),
    }
    groups = run.shape["num_query_groups"]

    def indivisible(size: int) -> list[str]:
        wrong = [f"{number} {part}" for part, number in parts.items() if number % size]
        return wrong + ([f"{groups} query groups"] if groups % size and size % groups else [])

    size = run.layout.tp
    if wrong := indivisible(size):
        works = [size for size in divisors(run.shape["num_attention_heads"]) if not indivisible(size)]
        yield f"--tensor-model-parallel-size {size} does not divide the model's {', '.join(wrong)}; use {one_of(works)}"


def the_sequence_divides(run: Run) -> Iterable[str]:
    layout, length = run.layout, run.args.seq_length
    if length is None or length < 1:
        return
    over_context = 2 * layout.cp if layout.cp > 1 else 1
    over_tensor = layout.tp * layout.cp if run.is_sequence_parallel else 1
    multiple = math.lcm(over_context, over_tensor)
    if length % multiple:
        why = []
        if length % over_context:
            why.append(f"2 x --context-parallel-size {layout.cp}")
        if length % over_tensor:
            why.append(f"--tensor-model-parallel-size {layout.tp} with sequence parallelism")
        yield (
            f"--seq-length {length} does not divide over {' or '.join(why)}; use a multiple of {multiple}, such as "
            f"{neighbours(length, multiple)}"
        )


def layers_divide_over_the_pipeline(run: Run) -> Iterable[str]:
    if not run.shape or any(getattr(run.args, name) for name in _UNEVEN):
        return
    layers, stages = run.shape["num_layers"], run.layout.pp
    if layers % stages:
        yield (
            f"{layers} layers do not divide over --pipeline-model-parallel-size {stages}; use "
            f"{one_of(divisors(layers))}, or cut unevenly with --decoder-first-pipeline-num-layers or "
            "--pipeline-model-parallel-layout"
        )
        return
    per_stage = layers // stages
    for name in ("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage"):
        value = getattr(run.args, name)
        if value is not None and value >= 1 and per_stage % value:
            yield (
                f"{_flag(run, name)} {value} does not divide the {per_stage} layers of each pipeline stage; use "
                f"{one_of(divisors(per_stage))}"
            )


def virtual_stages_are_set_once(run: Run) -> Iterable[str]:
    names = (
        "num_virtual_stages_per_pipeline_rank",
        "num_layers_per_virtual_pipeline_stage",
        "pipeline_model_parallel_layout",
    )
    given = [_flag(run, name) for name in names if getattr(run.args, name) is not None]
    if len(given) > 1:
        yield f"{' and '.join(given)} both say how the pipeline is cut; keep one of them"


def virtual_stages_need_a_pipeline(run: Run) -> Iterable[str]:
    if run.virtual_stages == 1:
        return
    least = 2 if run.args.overlap_p2p_comm else 3
    if run.layout.pp < least:
        without = "" if run.args.overlap_p2p_comm else " without overlapped communication"
        yield (
            f"virtual pipeline stages{without} need --pipeline-model-parallel-size {least} or more, not "
            f"{run.layout.pp}; raise it, or drop the virtual stages"
        )


def micro_batches_fill_virtual_stages(run: Run) -> Iterable[str]:
    """Megatron finds this only in the first step."""
    stages, micro, whole = run.layout.pp, run.args.micro_batch_size, run.args.global_batch_size
    group = run.args.microbatch_group_size_per_vp_stage or stages
    if run.virtual_stages == 1 or micro is None or micro < 1 or group < 1:
        return
    step = micro * run.layout.dp
    whole = step if whole is None else whole
    if whole < 1 or whole % step:
        return
    if 0 < (whole // step) % group < stages:
        yield (
            f"--global-batch-size {whole} makes {whole // step} micro-batches, which do not fill the virtual stages of "
            f"--pipeline-model-parallel-size {stages}; use a multiple of {step * group}, such as "
            f"{neighbours(whole, step * group)}"
        )


def sequence_parallelism_is_switched_on(run: Run) -> Iterable[str]:
    if run.is_moe and run.layout.tp > 1 and not run.args.sequence_parallel:
        yield "tensor parallelism with experts needs --sequence-parallel: switched on"


def _flag(run: Run, name: str) -> str:
    return run.typed.get(name, f"--{name.replace('_', '-')}")


def _processes(run: Run) -> str:
    return f"{run.world_size} processes" if run.world_size > 1 else "1 process"


CHECKS = (
    sizes_are_at_least_1,
    the_model_fits_the_world,
    the_experts_fit_the_world,
    new_experts_divide_over_their_ranks,
    expert_tensor_parallelism_is_1_or_all,
    a_dense_model_has_no_expert_parallelism,
    tensor_parallelism_divides_the_model,
    the_sequence_divides,
    layers_divide_over_the_pipeline,
    virtual_stages_are_set_once,
    virtual_stages_need_a_pipeline,
    micro_batches_fill_virtual_stages,
)
