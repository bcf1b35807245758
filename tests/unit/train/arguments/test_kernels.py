"""Defaults are the fastest kernels of the machine, and one line names them."""

import sys
from argparse import Namespace

import pytest
import torch

from moelpr.model.megatron import cpu


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """The settings that a machine chooses, and its line."""

    def choose(capability: int, installed: set[str], record: dict | None = None, **changed: object):
        from moelpr.train.arguments import kernels

        monkeypatch.setattr(cpu, "is_needed", lambda: capability == 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
        monkeypatch.setattr(kernels, "is_installed", lambda module: module in installed)
        monkeypatch.setattr(kernels, "_fuses_permutation", lambda: True)
        defaults = {"transformer_impl": "transformer_engine", "num_experts": 4, "optimizer": "adam"}
        defaults["optimizer_cpu_offload"] = False
        defaults |= dict.fromkeys(("gradient_accumulation_fusion", "bf16"), True)
        defaults |= dict.fromkeys(
            "moe_grouped_gemm moe_permute_fusion dataloader_inter_document_masking".split(), False
        )
        defaults |= {"stage": "stage1", "window_size": None, "seq_length": 64, "linear_attention_freq": None}
        args = Namespace(**defaults | changed)
        kernels.choose_kernels(args, record)
        return args, kernels.describe_kernels(args)

    return choose


TE = {"transformer_engine"}


@pytest.mark.parametrize(
    ("capability", "installed", "bf16", "uses_te"),
    [
        (9, TE, True, False),
        (10, TE, True, False),
        (8, TE, True, True),  # an A100
        (12, TE, True, True),  # a consumer GPU
        (9, TE, False, True),
        (0, set(), True, False),
    ],
)
def test_experts_are_computed_where_it_is_fast(machine, capability: int, installed, bf16: bool, uses_te: bool) -> None:
    args, line = machine(capability, installed, bf16=bf16)
    assert args.moe_grouped_gemm == uses_te and args.moe_permute_fusion == bool(installed)
    assert not args.gradient_accumulation_fusion and args.fuse_expert_gradients  # the former needs Apex
    assert not machine(capability, installed, gradient_accumulation_fusion=False)[0].fuse_expert_gradients
    experts = "Transformer Engine's grouped linear layers" if uses_te else "torch grouped_mm"
    attention, owner = ("Transformer Engine",) * 2 if installed else ("torch scaled dot product", "torch")
    assert line == (
        f"experts: {experts}; attention: {attention}; optimizer: {owner}'s fused Adam; "
        f"dispatcher: all-to-all with {owner}'s permutation" + "; faster: a GPU" * (capability == 0)
    )


def test_what_is_slow_without_transformer_engine_is_named(machine) -> None:
    args, line = machine(8, set())
    assert not args.moe_grouped_gemm and not args.moe_permute_fusion and args.transformer_impl == "local"
    assert line == (
        "experts: torch grouped_mm in a loop; attention: torch scaled dot product; optimizer: torch's fused Adam; "
        "dispatcher: all-to-all with torch's permutation; faster: Transformer Engine also for the experts on this GPU "
        f"({sys.executable} -m pip install --constraint constraints.txt --no-build-isolation --editable '.[gpu]')"
    )
    _, line = machine(9, TE, transformer_impl="local", dataloader_inter_document_masking=True)
    assert "attention: torch varlen; optimizer: Transformer Engine's fused Adam; " in line
    assert line.endswith("; faster: Transformer Engine (remove --transformer-impl local)")
    _, line = machine(9, TE, transformer_impl="local", window_size=(16, 0))
    assert "attention: torch varlen; " in line


@pytest.mark.parametrize("before", [False, True])
def test_a_resumed_run_keeps_its_kernel(machine, before: bool) -> None:
    args, line = machine(8, TE, {"moe_grouped_gemm": before})
    assert args.moe_grouped_gemm == before
    assert line.endswith("; faster: --moe-grouped-gemm, with --no-load-optim") != before
    assert machine(9, TE, {"moe_grouped_gemm": before})[0].moe_grouped_gemm == before
    assert not machine(8, set(), {"moe_grouped_gemm": before})[0].moe_grouped_gemm


def test_a_dense_model_has_neither_experts_nor_a_dispatcher(machine) -> None:
    args, line = machine(8, TE, num_experts=None)
    assert not args.moe_grouped_gemm and not args.moe_permute_fusion
    assert line == "attention: Transformer Engine; optimizer: Transformer Engine's fused Adam"
    assert "optimizer: torch's fused Adam on the host" in machine(8, TE, optimizer_cpu_offload=True)[1]
