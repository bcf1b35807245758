"""Resuming a run: the same model and stage, and optimizer state that fits.

Weights load under every layout. Optimizer state does not, and what it needs depends on how it was saved.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moelpr.arguments.checks.run import Layout, Run
from moelpr.errors import UserError
from moelpr.model_spec import ModelSpec
from moelpr.run_folder import TRACKER_FILE

# The table: what has to be the same before and now for optimizer state to load, by the format it was saved in. What is
# not named may change: the number of processes, and every size for the first two formats.
#   by parameter      without --use-distributed-optimizer
#   reshardable       --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
#   by buffer         --use-distributed-optimizer alone: state is saved as the flat buffers of one layout
# Read in Megatron 0.19.2: training/checkpointing.py (load_checkpoint), core/optimizer (ChainedOptimizer,
# DistributedOptimizer.sharded_param_state_*); tried by benchmarks/resume_layouts.py.
_ALWAYS = ("optimizer", "use_distributed_optimizer", "bf16", "fp16", "train_everything")
_MUST_MATCH = {
    "by parameter": _ALWAYS,
    "reshardable": _ALWAYS,
    "by buffer": (*_ALWAYS, "tp", "pp", "vpp", "ep", "etp", "overlap_grad_reduce"),
}

_FLAGS = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "vpp": "virtual pipeline stages",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
}


# What Megatron's learning-rate schedule is made of; it refuses to load another one.
_SCHEDULE = (
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_decay_iters",
    "lr_decay_samples",
    "lr_warmup_fraction",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "weight_decay",
    "global_batch_size",
)


def the_folder_to_save_in_is_free(run: Run) -> Iterable[str]:
    """Else one folder would hold steps of two runs, and one base_checkpoint.json would speak for both."""
    save = run.args.save
    if not save or not (Path(save) / TRACKER_FILE).exists() or run.checkpoint is None:
        return
    if not run.is_resumed or run.checkpoint != Path(save):
        flag = "--finetune" if run.args.finetune else "--load"
        yield (
            f"--save {save} holds checkpoints of a run, and {flag} would start another one over them from "
            f"{run.checkpoint}; give another folder to --save, or drop {flag} to resume the run"
        )


def there_is_a_run_to_resume(run: Run) -> Iterable[str]:
    if run.is_resumed and run.record is None:
        yield (
            f"{run.checkpoint} holds a checkpoint but no run to resume; give another folder to --save and name this "
            "one with --pretrained-checkpoint"
        )


def the_stage_is_the_same(run: Run) -> Iterable[str]:
    if not run.is_resumed or run.record is None or run.args.stage is None:
        return
    before = run.record.get("stage")
    if before != run.args.stage:
        yield (
            f"{run.checkpoint} holds a run of --stage {before}, which --stage {run.args.stage} cannot resume; give "
            "another folder to --save and name this one with --pretrained-checkpoint"
        )


def the_model_is_the_same(run: Run) -> Iterable[str]:
    """--pretrained-checkpoint is read at the first start only; a resumed run may not contradict it."""
    start = run.args.pretrained_checkpoint
    if not run.is_resumed or run.spec is None or not start:
        return
    try:
        other = ModelSpec.read(Path(start))
    except UserError:
        return  # moved or deleted since: it is not needed any more
    if differences := _differences(other, run.spec):
        yield (
            f"{run.checkpoint} holds a run of another model than --pretrained-checkpoint {start} ("
            f"{'; '.join(differences)}); give another folder to --save, or drop --pretrained-checkpoint to resume"
        )


def the_checkpoints_hold_the_same(run: Run) -> Iterable[str]:
    """base_checkpoint.json speaks for all checkpoints of a folder."""
    if not run.is_resumed or run.record is None or run.record.get("stage") != run.args.stage:
        return
    before, now = bool(run.record.get("save_trained_only")), bool(run.args.save_trained_only)
    if before != now:
        yield (
            f"{run.checkpoint} was saved {'with' if before else 'without'} --save-trained-only; resume it the same "
            "way, or give another folder to --save and name this one with --pretrained-checkpoint"
        )


def _differences(there: ModelSpec, here: ModelSpec) -> list[str]:
    def flat(spec: ModelSpec) -> dict[str, Any]:
        moe = spec.moe
        experts = {
            "original experts": moe and moe.num_original_experts,
            "new experts": moe and moe.num_new_experts,
            "K": moe and moe.topk,
            "MoE layers": moe and moe.layers,
        }
        return {"family": spec.family, **experts, **spec.megatron_args}

    before, now = flat(there), flat(here)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} {before.get(name)} there, {now.get(name)} here" for name in names]


def optimizer_state_fits(run: Run) -> Iterable[str]:
    record, args = run.record, run.args
    if not run.is_resumed or record is None or record.get("stage") != args.stage:
        return
    if args.no_load_optim or record.get("no_save_optim"):
        return
    before = _facts(record, _layout_of_record(record))
    now = _facts(vars(args), run.layout)
    state_format = _format(record)
    changed = [name for name in _MUST_MATCH[state_format] if before[name] != now[name]]
    if not changed:
        return
    was, wanted = _words(changed, before), _words(changed, now)
    if state_format == "by buffer":
        hint = " (optimizer state saved with --dist-ckpt-optim-fully-reshardable can change its layout)"
    else:
        hint = ""
    yield (
        f"{run.checkpoint} was trained with {was}; its optimizer state does not fit {wanted}. Keep {was}, or start the "
        f"optimizer afresh with --no-load-optim{hint}"
    )


def the_schedule_is_the_same(run: Run) -> Iterable[str]:
    record, args = run.record, run.args
    if not run.is_resumed or record is None or record.get("stage") != args.stage:
        return
    if args.no_load_optim or args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    names = list(_SCHEDULE)
    if args.lr_decay_iters is None and args.lr_decay_samples is None:
        names += ["train_iters", "train_samples"]  # the decay then ends with the training
    before = {name: record.get(name) for name in names}
    now = {name: getattr(args, name) for name in names}
    changed = [name for name in names if name in run.typed and before[name] != now[name]]
    if changed:
        yield (
            f"{run.checkpoint} was trained with {_words(changed, before)}, which its learning-rate schedule rests on, "
            f"not {_words(changed, now)}; keep it, or add --override-opt-param-scheduler to follow the new schedule "
            "from here or --use-checkpoint-opt-param-scheduler to keep the old one"
        )


def step_of_the_first_start(run: Run) -> Iterable[str]:
    step = run.args.ckpt_step
    if run.is_resumed and step is not None and run.step is None:
        yield (
            f"--ckpt-step {step} chose the step of --pretrained-checkpoint to start from; this run goes on from the "
            f"latest step in {run.checkpoint} (to go back to its step {step}, drop --pretrained-checkpoint)"
        )


def _format(record: Mapping[str, Any]) -> str:
    if not record.get("use_distributed_optimizer"):
        return "by parameter"
    return "reshardable" if record.get("dist_ckpt_optim_fully_reshardable") else "by buffer"


def _facts(settings: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    trains_experts = settings.get("stage") == "stage1" or bool(settings.get("train_everything"))
    return {
        "optimizer": settings.get("optimizer", "adam"),
        **{
            name: bool(settings.get(name))
            for name in ("use_distributed_optimizer", "bf16", "fp16", "train_everything", "overlap_grad_reduce")
        },
        "tp": layout.tp,
        "pp": layout.pp,
        "vpp": layout.vpp,
        "ep": layout.ep if trains_experts else 1,
        "etp": layout.etp if trains_experts else 1,
    }


def _layout_of_record(record: Mapping[str, Any]) -> Layout:
    vpp = record.get("virtual_pipeline_model_parallel_size")
    return Layout.of(record, vpp or 1, world_size=record.get("world_size", 1))


def _words(names: list[str], facts: Mapping[str, Any]) -> str:
    words = []
    for name in names:
        flag, value = _FLAGS.get(name, f"--{name.replace('_', '-')}"), facts[name]
        words.append(f"{'no ' if value is False else ''}{flag}{'' if isinstance(value, bool) else f' {value}'}")
    return ", ".join(words)


CHECKS = (
    the_folder_to_save_in_is_free,
    there_is_a_run_to_resume,
    the_stage_is_the_same,
    the_model_is_the_same,
    the_checkpoints_hold_the_same,
    optimizer_state_fits,
    the_schedule_is_the_same,
)
