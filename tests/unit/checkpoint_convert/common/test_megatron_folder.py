"""PyTorch's and Megatron's loaders read our checkpoints, and we read Megatron's; invalid ones are rejected."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

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
from moelpr.model.model_spec import ModelSpec
from tests.support.hf_models import assert_logits, assert_nothing_left, edit_json


def test_torchs_loader_reads_every_tensor(qwen2: Path, tmp_path: Path) -> None:
    spec = hf_to_mcore(qwen2, tmp_path / "megatron", NewExperts(4))
    reader = TorchDistReader(tmp_path / "megatron" / "release")
    plan = list(pieces(family_named(spec.family).table, spec))
    state = {piece.key: torch.full(megatron_shape(piece, spec), torch.nan) for piece in plan}
    assert reader.keys == state.keys()
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "megatron" / "release"), no_dist=True)
    for key, tensor in state.items():
        assert torch.equal(tensor, reader.read(key)), key


def test_megatron_loads_experts_in_expert_and_tensor_parallel_shards(megatron, qwen2, tmp_path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    hf_to_mcore(qwen2, tmp_path / "megatron", NewExperts(4))
    folder = tmp_path / "megatron" / "release"
    key = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
    whole = TorchDistReader(folder).read(key).clone()
    # Expert-parallel rank 1 of 2, tensor-parallel rank 2 of 3.
    shard = ShardedTensor.from_rank_offsets(key, torch.empty(2, 32, 32), (0, 1, 2), (1, 2, 3))
    loaded = dist_checkpointing.load({"x": shard}, str(folder), validate_access_integrity=False)["x"]
    assert torch.equal(loaded, whole[2:, 64:])


def test_megatron_finds_what_load_checkpoint_needs(megatron: None, qwen2: Path, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.training.checkpointing import checkpoint_exists, find_checkpoint_rank_0, read_metadata

    hf_to_mcore(qwen2, tmp_path / "megatron", NewExperts(4))
    folder = str(tmp_path / "megatron")
    assert checkpoint_exists(folder)
    # read_metadata agrees on the iteration over the ranks on the GPU; a single process does not.
    dist_is_initialized = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        iteration, release = read_metadata(f"{folder}/latest_checkpointed_iteration.txt")
    finally:
        dist.is_initialized = dist_is_initialized
    assert (iteration, release) == (0, True)
    step = find_checkpoint_rank_0(folder, iteration, release)
    assert step is not None
    common = dist_checkpointing.load_common_state_dict(step)
    assert common["checkpoint_version"] == 3.0
    assert "args" not in common
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    assert metadata["non_homogeneous_layers"] is True


def dense_model(spec: ModelSpec, padded_vocab_size: int):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    args = spec.megatron_args
    same = "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization"
    same += " add_bias_linear add_qkv_bias qk_layernorm attention_dropout hidden_dropout"
    off = "perform_initialization masked_softmax_fusion bias_activation_fusion bias_dropout_fusion apply_rope_fusion"
    config = TransformerConfig(
        **{name: args[name] for name in same.split()},
        **dict.fromkeys(off.split(), False),
        layernorm_epsilon=args["norm_epsilon"],
        gated_linear_unit=args["swiglu"],
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args["normalization"], qk_layernorm=args["qk_layernorm"]),
        vocab_size=padded_vocab_size,
        max_sequence_length=args["max_position_embeddings"],
        position_embedding_type=args["position_embedding_type"],
        rotary_base=args["rotary_base"],
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
    )


def sharded_state(model, folder: Path | None = None) -> dict:
    """The model's sharded state as load_checkpoint builds it: with the metadata the checkpoint carries."""
    from megatron.core import dist_checkpointing, parallel_state

    metadata = dist_checkpointing.load_content_metadata(str(folder)) if folder else {"non_homogeneous_layers": True}
    return model.sharded_state_dict(
        metadata={**metadata, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    )


@pytest.mark.parametrize("tied", [False, True])
def test_megatrons_dense_model_loads_strictly_with_a_padded_vocabulary_and_comes_back(
    megatron: None, make_qwen2: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    from megatron.core import dist_checkpointing

    source = make_qwen2(tie_word_embeddings=tied)
    spec = hf_to_mcore(source, tmp_path / "megatron", None)
    folder = tmp_path / "megatron" / "release"
    model = dense_model(spec, padded_vocab_size=128)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    # The default strictness, which fails on any tensor or module state that the checkpoint lacks.
    state = dist_checkpointing.load(sharded_state(model, folder), str(folder))
    state.pop("content_metadata", None)
    common = {"checkpoint_version", "iteration", "args"}
    model.load_state_dict({key: value for key, value in state.items() if key not in common}, strict=True)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model.embedding.word_embeddings.weight.shape[0] == 128

    # Saved by Megatron (gate and up rows in chunks of their own, 128 rows of vocabulary) and exported.
    saved = tmp_path / "trained" / "iter_0000003"
    saved.mkdir(parents=True)
    dist_checkpointing.save(sharded_state(model), str(saved), content_metadata={"non_homogeneous_layers": True})
    (tmp_path / "trained" / "latest_checkpointed_iteration.txt").write_text("3")
    spec.write(tmp_path / "trained")
    (tmp_path / "megatron" / "hf").rename(tmp_path / "trained" / "hf")
    mcore_to_hf(tmp_path / "trained", tmp_path / "hf", iteration=3)
    assert largest_difference(compare(source, tmp_path / "hf")) == 0.0


def test_megatrons_dense_model_computes_hfs_logits(megatron, make_qwen2, tmp_path) -> None:
    from megatron.core import dist_checkpointing

    source = make_qwen2()
    spec = hf_to_mcore(source, tmp_path / "megatron", None)
    folder = tmp_path / "megatron" / "release"
    model = dense_model(spec, padded_vocab_size=99).eval()
    state = dist_checkpointing.load(sharded_state(model, folder), str(folder))
    model.load_state_dict({key: state[key] for key in model.state_dict() if key in state}, strict=False)
    tokens = torch.arange(40).reshape(2, 20) * 7 % 99
    positions = torch.arange(20).expand(2, -1)
    future = torch.ones(20, 20, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        ours = model(tokens, positions, future)
    assert_logits(ours, source, tokens)


def test_experts_saved_in_expert_parallel_shards_are_exported(qwen2, tmp_path, monkeypatch) -> None:
    """A trainer's checkpoint: experts in shards, and optimizer state and Megatron's arguments next to the weights."""
    spec = hf_to_mcore(qwen2, tmp_path / "megatron", NewExperts(4), start=Start("random"))
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
    loads: Counter[tuple] = Counter()
    load_chunk = TorchDistReader._load_chunk

    def count(self: TorchDistReader, key: str, chunk) -> torch.Tensor:
        loads[key, tuple(chunk.offsets)] += 1
        return load_chunk(self, key, chunk)

    monkeypatch.setattr(TorchDistReader, "_load_chunk", count)
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf", iteration=12)
    assert largest_difference(compare(tmp_path / "expected", tmp_path / "hf")) == 0.0
    assert set(loads.values()) == {1}  # no chunk is read twice, however many experts it holds
    assert spec.moe is not None


# --- invalid input


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "bloom"}, "llama, mistral, qwen2.*'bloom'"),
        ({"moe": {"num_new_experts": 4, "topk": 6, "layers": [0]}}, "top-6"),
        ({"megatron_args": {"num_layers": 4}}, "hidden_size"),
        (
            {"moe": {"num_new_experts": 3, "topk": 2, "layers": [0, 1, 2, 3]}},
            r"router.weight .*\[5, 32\].*model_spec.json.*\[4, 32\]",
        ),
        ({"moe": None}, "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"),
    ],
)
def test_a_spec_that_is_invalid_or_does_not_fit_is_rejected(upcycled: Path, tmp_path: Path, changes, message) -> None:
    edit_json(upcycled / "model_spec.json", **changes)
    assert_export_fails(upcycled, tmp_path, message)


def test_an_incomplete_checkpoint_is_rejected(upcycled: Path, tmp_path: Path) -> None:
    data = upcycled / "release" / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    assert_export_fails(upcycled, tmp_path, "__0_0.distcp .*truncated")
    data.unlink()
    assert_export_fails(upcycled, tmp_path, "__0_0.distcp")
