"""What the machine decides: NCCL, bf16, Transformer Engine where it has them; else gloo, fp32 and torch's kernels."""

import argparse
import importlib.util

from moelpr.megatron_patches import cpu


def apply_machine(args: argparse.Namespace) -> None:
    if cpu.is_needed():
        for name, value in cpu.CPU_ARGUMENTS.items():
            setattr(args, name, value)
    elif not args.fp16 and not args.fp32:
        args.bf16 = True
    if args.async_save:
        args.use_persistent_ckpt_worker = True  # without it Megatron would drop --async-save
        if cpu.is_needed() or not is_installed("nvidia_resiliency_ext"):
            args.async_strategy = "mcore"
    if args.transformer_impl == "transformer_engine" and not is_installed("transformer_engine"):
        args.transformer_impl = "local"
    # Megatron's own linear layers (original expert, output layer) need Apex for it, with Transformer Engine or without.
    has_apex = is_installed("fused_weight_gradient_mlp_cuda")
    args.gradient_accumulation_fusion = args.gradient_accumulation_fusion and has_apex
    if args.transformer_impl == "local":
        args.no_persist_layer_norm = True
        args.apply_rope_fusion = False
        args.masked_softmax_fusion = False


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
