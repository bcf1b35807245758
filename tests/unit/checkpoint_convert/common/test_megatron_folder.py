"""PyTorch's and Megatron's loaders read our checkpoints, and we read Megatron's; invalid ones are rejected."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from checkpoint_convert.compare.tensors import compare, largest_difference
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.initialization import Start
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.base.errors import UserError
from moelpr.model.checkpoints.torch_dist import TorchDistReader, TorchDistWriter
from moelpr.model.families.families import family_named
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.families.tables import megatron_shape, pieces
from tests.support.hf_models import assert_nothing_left, edit_json


def test_torchs_loader_reads_every_tensor_and_megatrons_what_it_needs(megatron, qwen2: Path, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.training.checkpointing import checkpoint_exists, find_checkpoint_rank_0, read_metadata

    spec = hf_to_mcore(qwen2, tmp_path / "megatron", NewExperts(4))
    reader = TorchDistReader(tmp_path / "megatron" / "release")
    plan = list(pieces(family_named(spec.family).table, spec))
    state = {piece.key: torch.full(megatron_shape(piece, spec), torch.nan) for piece in plan}
    assert reader.keys == state.keys()
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "megatron" / "release"), no_dist=True)
    for key, tensor in state.items():
        assert torch.equal(tensor, reader.read(key)), key
    folder = str(tmp_path / "megatron")
    assert checkpoint_exists(folder)
    # read_metadata agrees on the iteration over the ranks on the GPU; a single process does not.
    with mock.patch.object(dist, "is_initialized", lambda: False):
        iteration, release = read_metadata(f"{folder}/latest_checkpointed_iteration.txt")
    assert (iteration, release) == (0, True)
    common = dist_checkpointing.load_common_state_dict(find_checkpoint_rank_0(folder, iteration, release))
    assert common["checkpoint_version"] == 3.0 and "args" not in common
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    assert metadata["non_homogeneous_layers"] is True


@pytest.mark.parametrize("tied", [False, True])
def test_what_megatron_saves_with_a_padded_vocabulary_comes_back(megatron, make_qwen2, tmp_path, tied: bool) -> None:
    """Gate and up rows are in chunks of their own, and the vocabulary has 128 rows."""
    from megatron.core import dist_checkpointing

    from moelpr.model.layers.loading import build_model
    from moelpr.model.layers.weights import load_weights

    source = make_qwen2(tie_word_embeddings=tied)
    spec = hf_to_mcore(source, tmp_path / "megatron", None)
    model = build_model(replace(spec, megatron_args=spec.megatron_args | {"vocab_size": 128}))
    load_weights([model], [tmp_path / "megatron" / "release"])
    assert model.embedding.word_embeddings.weight.shape[0] == 128
    saved = tmp_path / "trained" / "iter_0000003"
    saved.mkdir(parents=True)
    dist_checkpointing.save(model.sharded_state_dict(), str(saved))
    (tmp_path / "trained" / "latest_checkpointed_iteration.txt").write_text("3")
    spec.write(tmp_path / "trained")
    (tmp_path / "megatron" / "hf").rename(tmp_path / "trained" / "hf")
    mcore_to_hf(tmp_path / "trained", tmp_path / "hf", iteration=3)
    assert largest_difference(compare(source, tmp_path / "hf")) == 0.0


def test_experts_saved_in_expert_parallel_shards_are_exported(qwen2, tmp_path) -> None:
    """A trainer's checkpoint: experts in shards, and optimizer state and Megatron's arguments next to the weights."""
    hf_to_mcore(qwen2, tmp_path / "megatron", NewExperts(4), start=Start("random"))
    mcore_to_hf(tmp_path / "megatron", tmp_path / "expected")
    reader = TorchDistReader(tmp_path / "megatron" / "release")
    with TorchDistWriter(tmp_path / "megatron" / "iter_0000012") as writer:
        for key in sorted(reader.keys):
            tensor = reader.read(key)
            writer.write(f"optimizer.state.exp_avg.{key}", torch.zeros_like(tensor))
            if ".experts.experts." not in key:
                writer.write(key, tensor)
                continue
            for expert in (0, 2):
                for half in tensor[expert : expert + 2].chunk(2, dim=1):
                    offset = 0 if half.data_ptr() == tensor[expert].data_ptr() else half.shape[1]
                    writer.write(key, half, tensor.shape, (expert, offset, 0))
        writer.finish({"args": None, "iteration": 12})
    with mock.patch.object(
        TorchDistReader, "_load_chunk", autospec=True, side_effect=TorchDistReader._load_chunk
    ) as load:
        mcore_to_hf(tmp_path / "megatron", tmp_path / "hf", iteration=12)
    assert largest_difference(compare(tmp_path / "expected", tmp_path / "hf")) == 0.0
    loads = Counter((key, tuple(chunk.offsets)) for _, key, chunk in (call.args for call in load.mock_calls))
    assert set(loads.values()) == {1}  # no chunk is read twice, however many experts it holds


def assert_export_fails(upcycled: Path, tmp_path: Path, message: str, **options) -> None:
    with pytest.raises(UserError, match=message) as caught:
        mcore_to_hf(upcycled, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert_nothing_left(tmp_path)


def test_a_diverged_run_is_rejected(upcycled: Path, tmp_path: Path) -> None:
    reader = TorchDistReader(upcycled / "release")
    with TorchDistWriter(upcycled / "iter_0000012") as writer:
        for key in sorted(reader.keys):
            tensor = reader.read(key).clone()
            writer.write(key, tensor.fill_(float("nan")) if key.endswith("1.mlp.router.weight") else tensor)
        writer.finish({})
    message = "iter_0000012: model.layers.1.mlp.gate.weight .*NaN.*--iteration"
    assert_export_fails(upcycled, tmp_path, message, iteration=12)


THREE = {"num_new_experts": 3, "topk": 2, "layers": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "bloom"}, "llama, mistral, qwen2.*'bloom'"),
        ({"moe": {"num_new_experts": 4, "topk": 6, "layers": [0]}}, "top-6"),
        ({"megatron_args": {"num_layers": 4}}, "hidden_size"),
        ({"moe": THREE}, r"router.weight .*\[5, 32\].*model_spec.json.*\[4, 32\]"),
        ({"moe": None}, "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"),
    ],
)
def test_a_spec_that_is_invalid_or_does_not_fit_is_rejected(upcycled: Path, tmp_path: Path, changes, message) -> None:
    edit_json(upcycled / "model_spec.json", **changes)
    assert_export_fails(upcycled, tmp_path, message)


def test_an_incomplete_checkpoint_is_rejected(upcycled: Path, tmp_path: Path) -> None:
    data = upcycled / "release" / "__0_0.distcp"
    os.truncate(data, data.stat().st_size // 2)
    assert_export_fails(upcycled, tmp_path, "__0_0.distcp .*truncated")
    data.unlink()
    assert_export_fails(upcycled, tmp_path, "__0_0.distcp")
