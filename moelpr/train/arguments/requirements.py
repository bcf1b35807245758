"""The settings of Megatron that machine and method require, each set once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moelpr.model.layers.config import FIXED_FOR_MOE
from moelpr.model.layers.losses import megatron_balance_coeff
from moelpr.model.megatron import cpu
from moelpr.train.arguments.kernels import choose_kernels
from moelpr.train.arguments.requested import RequestedRun
from moelpr.train.arguments.settings import RunSettings


def apply_machine(run: RequestedRun) -> None:
    """Set what the machine requires: NCCL, bf16 and Transformer Engine if available, else gloo, fp32 and PyTorch."""
    args = run.args
    if cpu.is_needed():
        for name, value in cpu.CPU_ARGUMENTS.items():
            setattr(args, name, value)
    elif not args.fp16 and not args.fp32:
        args.bf16 = True
    if args.optimizer_cpu_offload:
        # Megatron uses the code of this flag, but not the kernels of Transformer Engine that it otherwise needs.
        args.use_precision_aware_optimizer = True
        args.overlap_cpu_optimizer_d2h_h2d = True
        args.pin_cpu_grads = not cpu.is_needed()
    if args.bf16_moments:
        args.use_precision_aware_optimizer = True
        args.exp_avg_dtype = args.exp_avg_sq_dtype = "bf16"
    if args.async_save:
        args.use_persistent_ckpt_worker = True  # without it Megatron ignores --async-save
        args.async_strategy = "mcore"
    choose_kernels(args, run.record if run.is_resumed else None)


def apply_method(run: RequestedRun, settings: RunSettings) -> None:
    """Set what follows from start, stage and model, in a run without problems."""
    args, start, moe = run.args, settings.start, settings.spec.moe
    args.model_source, args.ckpt_step, args.is_resumed = str(start.checkpoint), start.selected_step, start.is_resumed
    args.no_load_optim = args.no_load_optim or run.has_no_optimizer_state
    if args.stage == "sft":
        args.calculate_per_token_loss = True  # micro-batches differ in how much of them counts
    args.load = args.load or args.save
    if args.save and not args.tensorboard_dir:
        args.tensorboard_dir = str(Path(args.save) / "tensorboard")
    args.hetereogenous_dist_checkpoint = True  # one checkpoint key per layer, for every pipeline layout
    args.save_retain_interval = run.save_retain_interval
    if args.early_stop_patience:
        args.save_retain_interval = None  # moelpr.train.early_stop removes all but the best step
        args.eval_interval = args.eval_interval if "eval_interval" in run.explicit_args else args.save_interval
    args.split = "100,0,0"
    args.create_attention_mask_in_dataloader = False  # or tensor ranks would wait for one in --iterations-to-skip
    args.lpr_loss_coeff = settings.stage.lpr_loss_coeff
    args.balance_loss_coeff = settings.stage.balance_loss_coeff
    if moe is None:
        return
    if args.tensor_model_parallel_size > 1:
        args.sequence_parallel = True
    for name, value in FIXED_FOR_MOE.items():
        setattr(args, name, value)
    args.moe_aux_loss_coeff = megatron_balance_coeff(args.balance_loss_coeff, moe.topk, len(moe.layers))
    args.moe_router_dtype = args.moe_router_dtype or "fp32"


def resolved_settings(final: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's settings with their final values, as plain YAML types; written to recipe.yaml."""
    plain = (str, int, float, bool, type(None))  # by exact type: enums that are also ints are not YAML
    settings: dict[str, Any] = {}
    for name, value in sorted(final.items()):
        value = str(value) if isinstance(value, torch.dtype) else value
        if isinstance(value, list) and all(type(item) in plain for item in value):
            settings[name] = list(value)
        elif type(value) in plain:
            settings[name] = value
    return settings
