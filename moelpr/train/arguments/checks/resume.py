"""Whether a run can be resumed with these settings.

Weights load under every layout. Optimizer state does not; what has to match depends on how it was saved.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moelpr.base.errors import UserError
from moelpr.base.run_folder import TRACKER_FILE
from moelpr.model.layers.config import shape_of
from moelpr.model.model_spec import ModelSpec
from moelpr.model.stages import DENSE_STAGES
from moelpr.plan.layouts import Layout
from moelpr.train.arguments.requested import RequestedRun

# Saved with the optimizer state, and then used instead of other values.
_ADAM = ("adam_beta1", "adam_beta2", "adam_eps")

_UNEVEN_PIPELINE = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")

# Settings of the learning-rate schedule, most of which Megatron does not load with other values.
_SCHEDULE = (
    "lr min_lr decoupled_lr decoupled_min_lr lr_decay_style lr_decay_iters lr_warmup_fraction lr_warmup_iters "
    "lr_warmup_init lr_wsd_decay_style lr_wsd_decay_iters weight_decay global_batch_size train_iters"
).split()

_NEW_RUN = "to start a new run from it, pass it as --pretrained-checkpoint and change --save"


def check_resumed_run(run: RequestedRun) -> Iterable[str]:
    """The checkpoint is of a run, of the same stage and with the same tensors (base_checkpoint.json applies to all)."""
    if not run.is_resumed:
        return
    if run.record is None:
        yield f"{run.checkpoint} contains a checkpoint but no run to resume; {_NEW_RUN}"
        return
    before = run.record.get("stage")
    if run.args.stage is not None and before != run.args.stage:
        yield f"{run.checkpoint} is a run of --stage {before}, which --stage {run.args.stage} cannot resume; {_NEW_RUN}"
    for name in ("save_trained_only", "train_new_embeddings"):
        had_it = bool(run.record.get(name))
        if before == run.args.stage and had_it != bool(getattr(run.args, name)):
            yield (
                f"{run.checkpoint} was started {'with' if had_it else 'without'} {run.flag(name)} and must be resumed "
                f"the same way; {_NEW_RUN}"
            )


def check_resumed_model(run: RequestedRun) -> Iterable[str]:
    """Only the first start reads --pretrained-checkpoint; a resumed run may not contradict it."""
    start = run.args.pretrained_checkpoint
    if not run.is_resumed or run.spec is None or not start:
        return
    try:
        other = ModelSpec.read(Path(start))
    except UserError:
        return  # moved or deleted since, and no longer needed
    there, here = ({"family": spec.family} | shape_of(spec) for spec in (other, run.spec))
    if names := [name for name in there | here if there.get(name) != here.get(name)]:
        differences = "; ".join(f"{name} {there.get(name)} there, {here.get(name)} in the run" for name in names)
        yield (
            f"{run.checkpoint} is a run of another model than --pretrained-checkpoint {start} ({differences}); change "
            "--save, or remove --pretrained-checkpoint to resume"
        )


def check_optimizer_state(run: RequestedRun) -> Iterable[str]:
    """The saved optimizer state loads with these settings."""
    if (record := _record_of_state(run)) is None:
        return
    vpp = record.get("virtual_pipeline_model_parallel_size") or 1
    old_layout = Layout.from_settings(record, record.get("world_size") or 1, vpp)
    is_reshardable = bool(record.get("dist_ckpt_optim_fully_reshardable"))
    by_buffer = bool(record.get("use_distributed_optimizer")) and not is_reshardable
    before = _optimizer_settings(record, old_layout, by_buffer)
    now = _optimizer_settings(vars(run.args), run.layout, by_buffer)
    changed = [name for name in now if before[name] != now[name]]
    if "overlap_grad_reduce" in changed and "ddp_bucket_size" in changed:
        changed.remove("ddp_bucket_size")  # follows from it
    if changed:
        hint = " (state saved with --dist-ckpt-optim-fully-reshardable can change its layout)" if by_buffer else ""
        yield (
            f"{run.checkpoint} was trained with {_as_flags(changed, before)}; its optimizer state does not fit "
            f"{_as_flags(changed, now)}; keep the old values, or reset the optimizer with --no-load-optim{hint}"
        )


def _bucket_size(settings: Mapping[str, Any], layout: Layout) -> int | None:
    """Parameters per bucket of gradients, as Megatron's resolve_ddp_bucket_size has it; None for a single bucket."""
    if not settings.get("overlap_grad_reduce") or settings.get("ddp_num_buckets"):
        return None
    return settings.get("ddp_bucket_size") or max(40_000_000, 1_000_000 * layout.dp * layout.cp)


def _optimizer_settings(settings: Mapping[str, Any], layout: Layout, by_buffer: bool) -> dict[str, Any]:
    """The settings that must match for optimizer state to load; everything else may change.

    If it was saved with --use-distributed-optimizer but without --dist-ckpt-optim-fully-reshardable, as the flat
    buffers of one layout, they are more. Taken from Megatron 0.19.2: training/checkpointing.py (load_checkpoint),
    core/optimizer (ChainedOptimizer, DistributedOptimizer.sharded_param_state_*); tested by
    tests/distributed/resume_layouts.py.
    """
    flags = ("use_distributed_optimizer", "bf16", "fp16", "bf16_moments", "train_everything")
    always = {
        **{name: settings.get(name) for name in ("optimizer", *_ADAM)},
        **{name: bool(settings.get(name)) for name in flags},
        "decoupled_lr": settings.get("decoupled_lr") is not None,  # then the vocabulary is a group of its own
    }
    if not by_buffer:
        return always
    trains_experts = settings.get("stage") in ("stage1", "sft") or always["train_everything"]
    trains_layers = settings.get("stage") in DENSE_STAGES or always["train_everything"]
    # Whether a bf16 run accumulates and reduces gradients in fp32, as Megatron's validate_args decides it.
    has_fp32_sums = str(settings.get("main_grads_dtype")) in ("fp32", "torch.float32")
    has_fp32_gradients = has_fp32_sums and not settings.get("grad_reduce_in_bf16")
    return always | {
        **{name: settings.get(name) for name in (*_UNEVEN_PIPELINE, "ddp_num_buckets")},
        "overlap_grad_reduce": bool(settings.get("overlap_grad_reduce")),
        # Routers and rows of new tokens fill no bucket.
        "ddp_bucket_size": _bucket_size(settings, layout) if trains_experts or trains_layers else None,
        # Transformer Engine's layers order and divide the same weights differently.
        "moe_grouped_gemm": bool(settings.get("moe_grouped_gemm")) and trains_experts,
        "transformer_impl": settings.get("transformer_impl") if trains_layers else None,
        # The gradients' dtype, with the flag that usually decides it; in a bf16 run, Megatron sets the other flag.
        "grad_reduce_in_bf16": always["bf16"] and not has_fp32_gradients,
        "accumulate_allreduce_grads_in_fp32": always["fp16"]
        and bool(settings.get("accumulate_allreduce_grads_in_fp32")),
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "num_virtual_stages_per_pipeline_rank": layout.vpp,
        "expert_model_parallel_size": layout.ep if trains_experts else 1,
        "expert_tensor_parallel_size": layout.etp if trains_experts else 1,
    }


def check_schedule(run: RequestedRun) -> Iterable[str]:
    """The learning-rate schedule is the one that was saved."""
    record, args = _record_of_state(run), run.args
    if record is None or args.override_opt_param_scheduler:
        return
    settings = vars(args) | {"global_batch_size": run.global_batch_size or None}
    before, now = _schedule(settings | record), _schedule(settings)
    if record.get("lr_decay_iters") is None and args.lr_decay_iters is None:
        del now["lr_decay_iters"]  # follows from the length of the training
    missing = [name for name in ("lr", "global_batch_size", "train_iters") if now[name] is None]
    changed = [name for name in now if before[name] != now[name] and name not in missing]
    if changed:
        yield (
            f"{run.checkpoint} was trained with {_as_flags(changed, before)}, on which its learning-rate schedule "
            f"depends, not {_as_flags(changed, now)}; keep the old values, or use the new schedule from here with "
            "--override-opt-param-scheduler"
        )


def _schedule(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values that Megatron derives the schedule from; None for those that it does not use."""
    schedule = {name: settings.get(name) for name in _SCHEDULE}
    if schedule["lr_decay_iters"] is None:
        schedule["lr_decay_iters"] = schedule["train_iters"]
    unused = [name for name in _SCHEDULE if "wsd" in name and schedule["lr_decay_style"] != "WSD"]
    return schedule | dict.fromkeys(unused)


def _record_of_state(run: RequestedRun) -> dict[str, Any] | None:
    """The settings of the run to resume if it is of the same stage and its optimizer state will be loaded."""
    is_loaded = run.is_resumed and not run.args.no_load_optim and not run.has_no_optimizer_state
    is_same = is_loaded and run.record is not None and run.record.get("stage") == run.args.stage
    return run.record if is_same and run.recipe_is_read else None


def _as_flags(names: list[str], settings: Mapping[str, Any]) -> str:
    flags = []
    for name in names:
        flag, value = f"--{name.replace('_', '-')}", settings.get(name)
        is_off = value is None or value is False
        flags.append(f"no {flag}" if is_off else flag if value is True else f"{flag} {value}")
    return ", ".join(flags)


def note_resume(run: RequestedRun) -> Iterable[str]:
    """The settings that a resumed run does not follow, or follows again at every start."""
    step, last = run.args.ckpt_step, run.saved_step
    if not run.is_resumed or run.checkpoint is None:
        return
    if run.has_no_optimizer_state and not run.args.no_load_optim:
        yield (
            f"enabled --no-load-optim, because {run.checkpoint} was saved with --no-save-optim: the optimizer starts "
            "afresh, the learning-rate schedule does not"
        )
    if step is not None and run.step is None:
        yield (
            f"--ckpt-step {step} selects a step of --pretrained-checkpoint; this run resumes from the latest step in "
            f"{run.checkpoint} (to return to its own step {step}, remove --pretrained-checkpoint)"
        )
    elif step is not None and last is not None and step < last:
        yield (
            f"--ckpt-step returns to step {step}, though {run.checkpoint} has step {last}; so does every start of this "
            f"command: to return once, write {step} into {run.checkpoint / TRACKER_FILE} instead"
        )
