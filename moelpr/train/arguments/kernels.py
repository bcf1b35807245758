"""The kernels of a run: the fastest that this machine has, and one line that names them (docs/design/gpu.md)."""

import argparse
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from moelpr.base.versions import install_command
from moelpr.model.megatron import cpu

_DENSE = ("attention", "linear attention", "optimizer")  # parts of a model without experts
_FLA = "pip install 'flash-linear-attention~=0.4.0'"  # as Megatron Core 0.19.2 wants it


def choose_kernels(args: argparse.Namespace, record: Mapping[str, Any] | None = None) -> None:
    """Replace defaults by what is faster on this machine; the dtype in `args` is final.

    `record` has the settings of the run that is resumed, whose optimizer state may depend on the experts' kernel.
    """
    if args.transformer_impl == "transformer_engine" and not is_installed("transformer_engine"):
        args.transformer_impl = "local"
    if args.stage == "sft" and args.transformer_impl == "local":
        args.dataloader_inter_document_masking = True  # so that a sequence may have several conversations
    wants_fused_gradients = args.gradient_accumulation_fusion
    # Megatron's own linear layers (original experts, output layer) need Apex for it, even with Transformer Engine.
    has_apex = is_installed("fused_weight_gradient_mlp_cuda") and not cpu.is_needed()
    args.gradient_accumulation_fusion = wants_fused_gradients and has_apex
    args.fuse_expert_gradients = wants_fused_gradients
    # Megatron's flag, and moelpr's function (fused_loss.py); on a CPU, Megatron's keeps the digits of earlier runs.
    args.cross_entropy_loss_fusion |= not (cpu.is_needed() or args.train_everything or args.stage == "dense")
    if args.transformer_impl == "local":
        args.no_persist_layer_norm = True
        args.apply_rope_fusion = args.masked_softmax_fusion = False
    elif args.num_experts and not cpu.is_needed():
        from megatron.core.utils import is_te_min_version

        args.moe_permute_fusion |= is_te_min_version("2.1.0")
        prefers_te = not _grouped_mm_is_fast(args) if record is None else bool(record.get("moe_grouped_gemm"))
        args.moe_grouped_gemm |= prefers_te


def describe_kernels(args: argparse.Namespace) -> str:
    """One line: which kernels the run uses, and what faster ones would need."""
    is_cpu, has_experts, uses_te = cpu.is_needed(), bool(args.num_experts), args.transformer_impl != "local"
    is_slow = has_experts and not is_cpu and not args.moe_grouped_gemm and not _grouped_mm_is_fast(args)
    has_window = args.window_size is not None and args.seq_length > args.window_size[0] + 1
    uses_varlen = (args.dataloader_inter_document_masking or has_window) and args.bf16 and not is_cpu
    slow = f"torch, slow without fla ({_FLA})"
    linear = "torch" if is_cpu or not args.linear_attention_freq else "fla" if has_fla() else slow
    te_experts, torch_experts = "Transformer Engine's grouped linear layers", "torch grouped_mm"
    parts = {
        "experts": te_experts if args.moe_grouped_gemm else torch_experts + " in a loop" * is_slow,
        "attention": "Transformer Engine" if uses_te else "torch varlen" if uses_varlen else "torch scaled dot product",
        "linear attention": linear if args.linear_attention_freq else "",
        "optimizer": _optimizer(args),
        "dispatcher": f"all-to-all with {'Transformer Engine' if args.moe_permute_fusion else 'torch'}'s permutation",
    }
    shown = {part: kernel for part, kernel in parts.items() if kernel and (has_experts or part in _DENSE)}
    line = "; ".join(f"{part}: {kernel}" for part, kernel in shown.items())
    if is_cpu:
        return f"{line}; faster: a GPU"
    if not uses_te:
        how = "remove --transformer-impl local" if is_installed("transformer_engine") else install_command("gpu")
        return f"{line}; faster: Transformer Engine{' also for the experts on this GPU' * is_slow} ({how})"
    return f"{line}; faster: --moe-grouped-gemm, with --no-load-optim" if is_slow else line


def _grouped_mm_is_fast(args: argparse.Namespace) -> bool:
    from moelpr.model.layers.experts import grouped_mm_is_one_kernel

    return grouped_mm_is_one_kernel(torch.bfloat16 if args.bf16 else torch.float32)


def is_installed(module: str) -> bool:
    """Whether a Python module is there; of Transformer Engine, the start has tried to import it (bootstrap.py)."""
    return importlib.util.find_spec(module) is not None


def has_fla() -> bool:
    """Whether Megatron could import what it needs of fla; without, it is silent."""
    from megatron.core.ssm.gated_delta_net.common import chunk_gated_delta_rule

    return chunk_gated_delta_rule is not None


def _optimizer(args: argparse.Namespace) -> str:
    """Megatron takes the first fused Adam that is installed."""
    if args.optimizer != "adam":
        return args.optimizer
    if args.optimizer_cpu_offload:
        return "torch's fused Adam on the host"
    owners = {"transformer_engine": "Transformer Engine", "apex": "Apex"}
    return f"{next((owner for module, owner in owners.items() if is_installed(module)), 'torch')}'s fused Adam"
