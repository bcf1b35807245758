import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint_convert.compare.tensors import compare
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from checkpoint_convert.hf.safetensors_reader import HfReader
from moelpr.base.errors import UserError
from moelpr.model.checkpoints.torch_dist import TorchDistReader
from moelpr.model.families.new_experts import NewExperts
from tests.support.hf_models import assert_same, edit_tensors, megatron_tensors_of, tensors_of


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


def test_few_tensors_are_held_at_a_time(make_qwen2: Callable[..., Path], tmp_path: Path, monkeypatch) -> None:
    """Import, export and comparison need the memory of a few tensors, whatever the number of layers and experts."""
    live: dict[int, int] = {}  # bytes by the address of what was read
    sums: list[int] = []

    def watch(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*args: object) -> Tensor:
            tensor = read(*args)
            storage = tensor.untyped_storage()
            live[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(tensor, live.pop, storage.data_ptr(), None)
            sums.append(sum(live.values()))
            return tensor

        return watched

    monkeypatch.setattr(HfReader, "read", watch(HfReader.read))
    monkeypatch.setattr(TorchDistReader, "_load_chunk", watch(TorchDistReader._load_chunk))
    source, megatron, hf = make_qwen2(num_hidden_layers=12), tmp_path / "megatron", tmp_path / "hf"
    largest = max(tensor.nbytes for tensor in tensors_of(source).values())
    for job in (
        lambda: hf_to_mcore(source, megatron, NewExperts(8)),
        lambda: mcore_to_hf(megatron, hf),
        lambda: list(compare(megatron, hf)),
        lambda: list(compare(hf, megatron)),
    ):
        sums.clear()
        job()
        assert 0 < max(sums) <= 3 * largest


def test_numbers_that_float16_does_not_have_are_reported(source: Path, tmp_path: Path) -> None:
    edit_tensors(source, lambda tensors: tensors["model.layers.1.self_attn.o_proj.weight"][0, 0].fill_(1e5))
    with pytest.raises(UserError, match="in float16 contains NaN or Inf; .*too large"):
        hf_to_mcore(source, tmp_path / "narrow", NewExperts(2), dtype="float16")
    hf_to_mcore(source, tmp_path / "wide", NewExperts(2))
    with pytest.raises(UserError, match="in float16 contains NaN or Inf"):
        mcore_to_hf(tmp_path / "wide", tmp_path / "hf", dtype="float16")
