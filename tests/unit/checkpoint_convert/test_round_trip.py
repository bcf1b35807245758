"""HF → Megatron → HF: bit-identical when dense, the same function when upcycled."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from checkpoint_convert.export import mcore_to_hf
from checkpoint_convert.upcycling import Start, hf_to_mcore
from moelpr.model_spec import ModelSpec, MoeSpec
from moelpr.torch_dist import TorchDistReader

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 99


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def megatron_tensors_of(folder: Path) -> dict[str, Tensor]:
    reader = TorchDistReader(folder / "release")
    return {key: reader.read(key).clone() for key in reader.keys}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def load_stock(folder: Path, kind: str, **kwargs):
    """The model as a stranger's transformers loads it; fails on any missing or unexpected weight."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto", **kwargs)
    assert type(model).__name__ == kind
    assert not info["unexpected_keys"] and not info["mismatched_keys"] and not info["error_msgs"], info
    # A shared expert of width 0 has no weights that could be missing.
    parameters = dict(model.named_parameters())
    missing = [name for name in info["missing_keys"] if parameters[name].numel()]
    assert not missing, missing
    return model.eval()


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_model_returns_bit_identical(
    make_qwen2: Callable[..., Path], tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    source = make_qwen2(dtype, tie_word_embeddings=tied)
    spec = hf_to_mcore(source, tmp_path / "megatron", num_new_experts=None)
    assert spec.dtype == str(dtype).removeprefix("torch.")
    assert spec.moe is None
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert_same(tensors_of(source), tensors_of(tmp_path / "hf"))
    assert torch.equal(
        logits(load_stock(source, "Qwen2ForCausalLM")), logits(load_stock(tmp_path / "hf", "Qwen2ForCausalLM"))
    )


@pytest.mark.parametrize(
    ("layers", "expected"),
    [({}, (0, 1, 2, 3)), ({"moe_layers": [2, 0]}, (0, 2)), ({"moe_every_k_layers": 2}, (1, 3))],
)
@pytest.mark.parametrize("tied", [False, True])
def test_upcycled_model_in_stock_transformers_equals_the_dense_one(
    make_qwen2: Callable[..., Path], tmp_path: Path, layers: dict, expected: tuple[int, ...], tied: bool
) -> None:
    source = make_qwen2(tie_word_embeddings=tied)
    spec = hf_to_mcore(source, tmp_path / "megatron", num_new_experts=4, topk=2, **layers)
    assert spec.moe == MoeSpec(4, 2, expected)
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    model = load_stock(tmp_path / "hf", "Qwen2MoeForCausalLM")
    assert model.config.mlp_only_layers == [i for i in range(4) if i not in expected]
    assert (logits(model) - logits(load_stock(source, "Qwen2ForCausalLM"))).abs().max() <= 1e-5
    # Equal for whatever the routers say only if they say something: they must not be zero or all alike.
    routers = [tensor for name, tensor in tensors_of(tmp_path / "hf").items() if name.endswith("mlp.gate.weight")]
    assert len(routers) == len(expected)
    assert all(router.std() > 0.1 for router in routers)
    assert not torch.equal(routers[0], routers[1])


def test_experts_are_bit_equal_copies_of_the_dense_ffn(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "megatron", num_new_experts=3)
    dense, moe = tensors_of(qwen2), megatron_tensors_of(tmp_path / "megatron")
    for i in range(4):
        ffn = {name: dense[f"model.layers.{i}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
        mlp = f"decoder.layers.{i}.mlp."
        fc1 = torch.cat([ffn["gate"], ffn["up"]])
        assert torch.equal(moe[mlp + "original_experts.0.linear_fc1.weight"], fc1)
        assert torch.equal(moe[mlp + "original_experts.0.linear_fc2.weight"], ffn["down"])
        assert moe[mlp + "experts.experts.linear_fc1.weight"].shape == (3, 96, 32)
        assert torch.equal(moe[mlp + "experts.experts.linear_fc1.weight"], fc1.expand(3, -1, -1))
        assert torch.equal(moe[mlp + "experts.experts.linear_fc2.weight"], ffn["down"].expand(3, -1, -1))
        assert moe[mlp + "router.weight"].shape == (4, 32)


def test_attention_rows_are_grouped_by_query_group(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "megatron", num_new_experts=None)
    dense, megatron = tensors_of(qwen2), megatron_tensors_of(tmp_path / "megatron")
    # 4 query heads of 8 rows in 2 groups: q0 q1 k0 v0, q2 q3 k1 v1.
    for suffix in ("weight", "bias"):
        q, k, v = (dense[f"model.layers.1.self_attn.{name}_proj.{suffix}"] for name in "qkv")
        expected = torch.cat([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]])
        assert torch.equal(megatron[f"decoder.layers.1.self_attention.linear_qkv.{suffix}"], expected)


def test_random_experts_differ_from_the_ffn_and_from_each_other(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "copied")
    hf_to_mcore(qwen2, tmp_path / "random", start=Start("random"))
    copied, random = megatron_tensors_of(tmp_path / "copied"), megatron_tensors_of(tmp_path / "random")
    for key in copied:
        assert torch.equal(copied[key], random[key]) == ("experts.experts." not in key), key
    experts = random["decoder.layers.0.mlp.experts.experts.linear_fc1.weight"]
    assert not torch.equal(experts[0], experts[1])
    assert experts.std().item() == pytest.approx(0.02, rel=0.1)  # Qwen2's initializer_range


def test_routers_are_xavier_normal_and_depend_on_the_seed_only(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "all", num_new_experts=63)
    hf_to_mcore(qwen2, tmp_path / "some", num_new_experts=63, moe_layers=[1, 3])
    hf_to_mcore(qwen2, tmp_path / "other", num_new_experts=63, start=Start(seed=1))
    key = "decoder.layers.3.mlp.router.weight"
    router, some, other = (megatron_tensors_of(tmp_path / name)[key] for name in ("all", "some", "other"))
    assert router.std().item() == pytest.approx((2 / (64 + 32)) ** 0.5, rel=0.1)
    assert torch.equal(router, some)
    assert not torch.equal(router, other)


def test_two_conversions_write_the_same_bytes(qwen2: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        hf_to_mcore(qwen2, tmp_path / f"megatron-{name}", start=Start("random"))
        mcore_to_hf(tmp_path / f"megatron-{name}", tmp_path / f"hf-{name}")
    for kind in ("megatron", "hf"):
        a, b = tmp_path / f"{kind}-a", tmp_path / f"{kind}-b"
        files = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
        assert all((a / path).read_bytes() == (b / path).read_bytes() for path in files)


def test_dtype_is_kept_unless_asked(make_qwen2: Callable[..., Path], tmp_path: Path) -> None:
    source = make_qwen2(torch.bfloat16)
    hf_to_mcore(source, tmp_path / "kept")
    hf_to_mcore(source, tmp_path / "wide", dtype="float32")
    assert {t.dtype for t in megatron_tensors_of(tmp_path / "kept").values()} == {torch.bfloat16}
    assert {t.dtype for t in megatron_tensors_of(tmp_path / "wide").values()} == {torch.float32}
    mcore_to_hf(tmp_path / "wide", tmp_path / "hf", dtype="bfloat16")
    mcore_to_hf(tmp_path / "kept", tmp_path / "hf-kept")
    # bf16 → fp32 → bf16 is exact for what came from the model; routers were drawn in fp32 and rounded once.
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "hf-kept"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_config_speaks_the_old_and_the_new_spelling(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "megatron", num_new_experts=4, topk=3)
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    expected = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "moe_intermediate_size": 48,
        "intermediate_size": 48,
        "shared_expert_intermediate_size": 0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "rope_theta": 50000,
        "rope_parameters": {"rope_theta": 50000, "rope_type": "default"},
        "dtype": "float32",
        "torch_dtype": "float32",
        "vocab_size": 99,
    }
    assert {key: config.get(key, "absent") for key in expected} == expected
    names = set(tensors_of(tmp_path / "hf"))
    assert "model.layers.0.mlp.shared_expert_gate.weight" in names
    assert not any("shared_expert." in name for name in names)


def test_old_configs_with_a_plain_rope_theta_are_understood(make_qwen2: Callable[..., Path], tmp_path: Path) -> None:
    source = make_qwen2()
    config = json.loads((source / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype", "float32")
    (source / "config.json").write_text(json.dumps(config))
    assert hf_to_mcore(source, tmp_path / "megatron").megatron_args["rotary_base"] == 50000


def test_tokenizer_and_chat_template_travel_along(qwen2: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    hf_to_mcore(qwen2, tmp_path / "megatron")
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    for folder in (tmp_path / "megatron" / "hf", tmp_path / "hf"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert type(tokenizer).__name__ == "Qwen2Tokenizer"
        assert tokenizer("baab")["input_ids"] == [2, 3, 2]
        assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
        assert (folder / "generation_config.json").is_file()
    assert not list((tmp_path / "megatron" / "hf").glob("*.safetensors"))


def test_large_exports_are_sharded_with_an_index(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "megatron")
    mcore_to_hf(tmp_path / "megatron", tmp_path / "one")
    mcore_to_hf(tmp_path / "megatron", tmp_path / "many", max_shard_bytes=40_000)
    assert [path.name for path in tmp_path.glob("one/*.safetensors*")] == ["model.safetensors"]
    assert_same(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 5
    for file in set(index["weight_map"].values()):
        assert (tmp_path / "many" / file).stat().st_size < 42_000
        with safe_open(tmp_path / "many" / file, framework="pt") as opened:
            assert set(opened.keys()) == {name for name, where in index["weight_map"].items() if where == file}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "one").values())
    assert torch.equal(
        logits(load_stock(tmp_path / "many", "Qwen2MoeForCausalLM")),
        logits(load_stock(tmp_path / "one", "Qwen2MoeForCausalLM")),
    )


def test_export_generates_the_same_tokens_as_the_dense_model(qwen2: Path, tmp_path: Path) -> None:
    hf_to_mcore(qwen2, tmp_path / "megatron")
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    dense = load_stock(qwen2, "Qwen2ForCausalLM").generate(TOKENS, **settings)
    upcycled = load_stock(tmp_path / "hf", "Qwen2MoeForCausalLM").generate(TOKENS, **settings)
    assert torch.equal(dense, upcycled)


def test_redundant_output_layer_of_a_tied_model_is_dropped(make_qwen2: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = make_qwen2(tie_word_embeddings=True)
    tensors = tensors_of(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    spec = hf_to_mcore(source, tmp_path / "megatron", num_new_experts=None)
    assert spec.megatron_args["untie_embeddings_and_output_weights"] is False
    assert "output_layer.weight" not in megatron_tensors_of(tmp_path / "megatron")


def test_few_tensors_are_held_at_a_time(make_qwen2: Callable[..., Path], tmp_path: Path, held_bytes) -> None:
    """Memory is that of a few tensors, whatever the number of layers and experts."""
    source = make_qwen2(num_hidden_layers=12)
    largest = max(tensor.nbytes for tensor in tensors_of(source).values())
    hf_to_mcore(source, tmp_path / "megatron", num_new_experts=8)
    assert 0 < held_bytes.take_peak() <= 3 * largest
    mcore_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert 0 < held_bytes.take_peak() <= 3 * largest


def test_spec_survives_its_file(qwen2: Path, tmp_path: Path) -> None:
    spec = hf_to_mcore(qwen2, tmp_path / "megatron", moe_layers=[1])
    assert ModelSpec.read(tmp_path / "megatron") == spec
    assert spec.megatron_args["vocab_size"] == 99
    assert spec.megatron_args["kv_channels"] == 8
    assert spec.megatron_args["add_qkv_bias"] is True
