from argparse import Namespace

import pytest
import torch

from moelpr.model.megatron import cpu
from moelpr.train.arguments import kernels

LOCAL = {"transformer_impl": "local"}
HERE = "attention: Transformer Engine; optimizer: T"
VARLEN = "attention: torch varlen; optimizer: Transformer Engine's"
TE_EXPERTS = "experts: Transformer Engine's"
NOT_LOCAL = "; faster: Transformer Engine (remove --transformer-impl local)"
MEGATRONS = "; faster: --moe-grouped-gemm, with --no-load-optim"


@pytest.mark.parametrize(
    ("capability", "has_te", "changes", "record", "grouped", "part"),
    [
        (9, True, {}, None, False, f"experts: torch grouped_mm; {HERE}"),
        (10, True, {}, None, False, "experts: torch grouped_mm;"),
        (8, True, {}, None, True, f"{TE_EXPERTS} grouped linear layers; {HERE}"),  # an A100
        (12, True, {}, None, True, TE_EXPERTS),  # a consumer GPU
        (9, True, {"bf16": False}, None, True, TE_EXPERTS),
        (9, True, {"gradient_accumulation_fusion": False}, None, False, "experts: torch grouped_mm;"),
        (0, False, {}, None, False, "attention: torch scaled dot product; optimizer: torch's fused Adam; "),
        (0, False, {}, None, False, "with torch's permutation; faster: a GPU"),
        (8, False, {}, None, False, "experts: torch grouped_mm in a loop; attention: torch scaled dot product; "),
        (8, False, {}, None, False, "; faster: Transformer Engine also for the experts on this GPU ("),
        (9, True, LOCAL | {"dataloader_inter_document_masking": True}, None, False, VARLEN),
        (9, True, LOCAL | {"window_size": (16, 0)}, None, False, VARLEN),
        (9, True, LOCAL, None, False, NOT_LOCAL),
        # A resumed run keeps its kernel.
        (8, True, {}, False, False, MEGATRONS),
        (8, True, {}, True, True, TE_EXPERTS),
        (9, True, {}, True, True, TE_EXPERTS),
        (8, False, {}, True, False, "grouped_mm in a loop"),
        (8, True, {"num_experts": None}, None, False, HERE),
        (8, True, {"optimizer_cpu_offload": True}, None, True, "optimizer: torch's fused Adam on the host"),
    ],
)
def test_a_machine_gets_its_fastest_kernels(monkeypatch, capability, has_te, changes, record, grouped, part) -> None:
    monkeypatch.setattr(cpu, "is_needed", lambda: capability == 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    monkeypatch.setattr(kernels, "is_installed", lambda module: has_te and module == "transformer_engine")
    monkeypatch.setattr("megatron.core.utils.is_te_min_version", lambda version: True)
    defaults = {"transformer_impl": "transformer_engine", "num_experts": 4, "optimizer": "adam", "stage": "stage1"}
    defaults |= {"gradient_accumulation_fusion": True, "bf16": True, "window_size": None, "seq_length": 64}
    off = "optimizer_cpu_offload moe_grouped_gemm moe_permute_fusion dataloader_inter_document_masking "
    off += "train_everything cross_entropy_loss_fusion"
    args = Namespace(**defaults | dict.fromkeys(off.split(), False) | {"linear_attention_freq": None} | changes)
    wants_fusion = args.gradient_accumulation_fusion
    kernels.choose_kernels(args, None if record is None else {"moe_grouped_gemm": record})
    line = kernels.describe_kernels(args)
    assert args.moe_grouped_gemm == grouped and part in line
    assert args.moe_permute_fusion == bool(has_te and args.num_experts and "transformer_impl" not in changes)
    assert args.cross_entropy_loss_fusion == (capability > 0)
    assert not args.gradient_accumulation_fusion and args.fuse_expert_gradients == wants_fusion  # the former needs Apex
    assert ("experts: " in line) == ("dispatcher: " in line) == bool(args.num_experts)
    assert ("--moe-grouped-gemm" in line) == (part == MEGATRONS)
