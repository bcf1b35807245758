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


@pytest.mark.parametrize("capability", [9, 10])
def test_torch_computes_experts_where_it_is_fast(machine, capability: int) -> None:
    args, line = machine(capability, TE)
    assert not args.moe_grouped_gemm and args.moe_permute_fusion
    assert line == (
        "experts: torch grouped_mm; attention: Transformer Engine; optimizer: Transformer Engine's fused Adam; "
        "dispatcher: all-to-all with Transformer Engine's permutation"
    )


@pytest.mark.parametrize("capability", [0, 8, 9, 10])
def test_gradients_are_added_in_products_unless_megatrons_flag_forbids_it(machine, capability: int) -> None:
    assert machine(capability, TE)[0].fuse_expert_gradients
    assert not machine(capability, TE, gradient_accumulation_fusion=False)[0].fuse_expert_gradients


@pytest.mark.parametrize(("capability", "bf16"), [(8, True), (12, True), (9, False)])
def test_transformer_engine_computes_experts_where_torch_is_slow(machine, capability: int, bf16: bool) -> None:
    """An A100, a consumer GPU, and fp16 or fp32."""
    args, line = machine(capability, TE, bf16=bf16)
    assert args.moe_grouped_gemm and not args.gradient_accumulation_fusion
    assert line.startswith("experts: Transformer Engine's grouped linear layers; ") and "faster" not in line


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


def test_without_a_gpu_nothing_of_one_is_chosen(machine) -> None:
    args, line = machine(0, set())
    assert not args.moe_grouped_gemm and not args.moe_permute_fusion and not args.gradient_accumulation_fusion
    assert line == (
        "experts: torch grouped_mm; attention: torch scaled dot product; optimizer: torch's fused Adam; "
        "dispatcher: all-to-all with torch's permutation; faster: a GPU"
    )


def test_the_line_is_printed_at_the_start(upcycled: str, accepted, capsys) -> None:
    accepted("stage1", upcycled)
    assert "moelpr: experts: torch grouped_mm; attention: " in capsys.readouterr().err
