"""Exports are bitwise identical when dense, and the same function when upcycled."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_convert.conversions.complete_checkpoint import whole_checkpoint
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.initialization import Start
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.checkpoints.torch_dist import TorchDistReader
from moelpr.families.new_experts import NewExperts
from moelpr.process.errors import UserError
from tests.support.hf_models import TOKENS, assert_same, load_stock, stock_logits, tensors_of


def megatron_tensors_of(folder: Path) -> dict[str, Tensor]:
    reader = TorchDistReader(folder / "release")
    return {key: reader.read(key).clone() for key in reader.keys}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dense_model_returns_bitwise_identical(make_qwen2, tmp_path, tied, dtype) -> None:
    source = make_qwen2(dtype, tie_word_embeddings=tied)
    spec = hf_to_mcore(source, tmp_path / "megatron", None)
    assert spec.dtype == str(dtype).removeprefix("torch.")
    assert spec.moe is None
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert_same(tensors_of(source), tensors_of(tmp_path / "hf"))
    assert torch.equal(stock_logits(source), stock_logits(load_stock(tmp_path / "hf", "Qwen2ForCausalLM")))


def test_two_conversions_write_the_same_bytes(qwen2: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        hf_to_mcore(qwen2, tmp_path / f"megatron-{name}", NewExperts(4), start=Start("random"))
        mcore_to_hf(tmp_path / f"megatron-{name}", tmp_path / f"hf-{name}")
    for kind in ("megatron", "hf"):
        a, b = tmp_path / f"{kind}-a", tmp_path / f"{kind}-b"
        files = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
        assert all((a / path).read_bytes() == (b / path).read_bytes() for path in files)


def test_dtype_is_kept_unless_asked(make_qwen2: Callable[..., Path], tmp_path: Path) -> None:
    source = make_qwen2(torch.bfloat16)
    hf_to_mcore(source, tmp_path / "kept", NewExperts(4))
    hf_to_mcore(source, tmp_path / "wide", NewExperts(4), dtype="float32")
    assert {t.dtype for t in megatron_tensors_of(tmp_path / "kept").values()} == {torch.bfloat16}
    assert {t.dtype for t in megatron_tensors_of(tmp_path / "wide").values()} == {torch.float32}
    mcore_to_hf(tmp_path / "wide", tmp_path / "hf", dtype="bfloat16")
    mcore_to_hf(tmp_path / "kept", tmp_path / "hf-kept")
    # bf16 → fp32 → bf16 is exact for what came from the model; routers were initialized in fp32 and rounded once.
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "hf-kept"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_export_generates_the_same_tokens_as_the_dense_model(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "megatron", NewExperts(4))
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    dense = load_stock(qwen2, "Qwen2ForCausalLM").generate(TOKENS, **settings)
    upcycled = load_stock(tmp_path / "hf", "Qwen2MoeForCausalLM").generate(TOKENS, **settings)
    assert torch.equal(dense, upcycled)


def test_few_tensors_are_held_at_a_time(make_qwen2: Callable[..., Path], tmp_path: Path, held_bytes) -> None:
    """Memory is that of a few tensors, whatever the number of layers and experts."""
    source = make_qwen2(num_hidden_layers=12)
    largest = max(tensor.nbytes for tensor in tensors_of(source).values())
    hf_to_mcore(source, tmp_path / "megatron", NewExperts(8))
    assert 0 < held_bytes.take_peak() <= 3 * largest
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert 0 < held_bytes.take_peak() <= 3 * largest


def test_numbers_that_float16_does_not_have_are_reported(make_qwen2: Callable[..., Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(make_qwen2(torch.float32), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = 1e5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="in float16 contains NaN or Inf; .*too large"):
        hf_to_mcore(base, tmp_path / "narrow", NewExperts(2), dtype="float16")
    hf_to_mcore(base, tmp_path / "wide", NewExperts(2))
    with pytest.raises(UserError, match="in float16 contains NaN or Inf; .*too large"):
        mcore_to_hf(tmp_path / "wide", tmp_path / "hf", dtype="float16")
    with pytest.raises(UserError, match="in float16 contains NaN or Inf; .*too large"):
        mcore_to_hf(tmp_path / "wide", tmp_path / "delta", dtype="float16", as_delta=True)


def test_a_whole_checkpoint_does_not_replace_the_base_checkpoint_it_is_made_of(make_qwen2, tmp_path) -> None:
    hf_to_mcore(make_qwen2(), tmp_path / "c1", NewExperts(2))
    shutil.copytree(tmp_path / "c1", tmp_path / "c2")
    with pytest.MonkeyPatch.context() as patch:
        links = [tmp_path / "c2" / "release", tmp_path / "c1" / "release"]
        patch.setattr("checkpoint_convert.conversions.complete_checkpoint.checkpoint_chain", lambda *_: links)
        with pytest.raises(UserError, match="must be separate folders"):
            whole_checkpoint(tmp_path / "c2", tmp_path / "c1", overwrite=True)
