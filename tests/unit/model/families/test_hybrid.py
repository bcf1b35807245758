"""Qwen3.5: linear attention at any length and in documents, and multimodal checkpoints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint_convert.compare.tensors import compare, compare_frozen
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.initialization import Start
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.base.errors import UserError
from moelpr.data.tokenizers.loading import load_tokenizer
from moelpr.model.families.new_experts import NewExperts
from moelpr.model.layers import loading
from moelpr.model.layers.attention import document_edges
from moelpr.model.megatron import bootstrap
from moelpr.model.stages import Part, part_of
from moelpr.plan.memory import model_parts
from tests.support.hf_models import (
    HYBRID,
    InDouble,
    assert_as_exact,
    assert_import_fails,
    assert_logits,
    assert_same,
    edit_json,
    in_double,
    load_stock,
    our_logits,
    save_multimodal,
    stock_logits,
    tensors_of,
    write_export,
)

SHAPE = HYBRID | {"max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def dense(make_model: Callable[..., Path]) -> Path:
    return make_model("Qwen3_5ForCausalLM", tokenizer=True, **SHAPE)


@pytest.fixture(scope="module")
def multimodal(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_multimodal(dense, tmp_path_factory.mktemp("multimodal") / "model")


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 2051])
def test_logits_are_those_of_transformers_at_any_length(dense: Path, tmp_path: Path, length: int) -> None:
    hf_to_mcore(dense, tmp_path / "megatron", None)
    tokens = torch.randint(99, (2, length), generator=torch.Generator().manual_seed(length))
    assert_logits(our_logits(tmp_path / "megatron", tokens), dense, tokens)


def test_a_multimodal_checkpoint_is_upcycled_as_its_language_model(dense, multimodal, tmp_path) -> None:
    for name, source in {"text": dense, "multimodal": multimodal}.items():
        hf_to_mcore(source, tmp_path / name, NewExperts(3), start=Start(noise=0.5))
        mcore_to_hf(tmp_path / name, tmp_path / f"{name}-hf")
    assert_same(tensors_of(tmp_path / "text-hf"), tensors_of(tmp_path / "multimodal-hf"))
    exported = [load_stock(tmp_path / f"{name}-hf", "Qwen3_5MoeForCausalLM") for name in ("text", "multimodal")]
    assert torch.equal(*map(stock_logits, exported))
    folders = dense, multimodal, tmp_path / "multimodal" / "hf", tmp_path / "multimodal-hf"
    fingerprints = {load_tokenizer("HuggingFaceTokenizer", str(folder)).fingerprint() for folder in folders}
    assert len(fingerprints) == 1
    assert "mtp_num_hidden_layers" not in json.loads((tmp_path / "multimodal-hf" / "config.json").read_text())


def test_the_whole_multimodal_model_is_exported_bit_for_bit(multimodal: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    (multimodal / "preprocessor_config.json").write_text("{}")
    hf_to_mcore(multimodal, tmp_path / "megatron", NewExperts(3), start=Start(noise=0.5))
    mcore_to_hf(tmp_path / "megatron", tmp_path / "text")
    mcore_to_hf(tmp_path / "megatron", tmp_path / "whole", multimodal_base=multimodal)
    base, whole = tensors_of(multimodal), tensors_of(tmp_path / "whole")
    for name in base:
        assert name in whole or ".mlp." in name
        assert name not in whole or torch.equal(base[name], whole[name]), name
    assert all(not verdict.differs(0) for verdict in compare(tmp_path / "whole", tmp_path / "text"))
    assert all(not verdict.differs(0) for verdict in compare_frozen(multimodal, tmp_path / "whole"))
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert type(model).__name__ == "Qwen3_5MoeForConditionalGeneration" and not any(info.values())
    assert torch.equal(stock_logits(model), stock_logits(tmp_path / "text"))
    assert (tmp_path / "whole" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers 2, but the files contain 1 layers"),
        ({"rms_norm_eps": 1e-5}, "is not the base: its norm_epsilon is 1e-05"),
    ],
)
def test_another_multimodal_base_is_refused(dense, multimodal, tmp_path, changes, message) -> None:
    hf_to_mcore(multimodal, tmp_path / "megatron", NewExperts(1))
    other = Path(shutil.copytree(multimodal, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    edit_json(other / "config.json", text_config=config["text_config"] | changes)
    for folder, reason in {other: message, dense: "is a language model only", multimodal: "--dtype"}.items():
        dtype = "bfloat16" if folder == multimodal else None
        with pytest.raises(UserError, match=reason):
            mcore_to_hf(tmp_path / "megatron", tmp_path / "out", multimodal_base=folder, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings both true and false"),
        ({"text_config": None}, "lacks text_config"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration cannot be upcycled"),
        ({"architectures": None, "model_type": None}, "config.json lacks architectures; restore it"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized"),
    ],
)
def test_a_multimodal_checkpoint_that_cannot_be_read_is_refused(multimodal, tmp_path, changes, message) -> None:
    source = Path(shutil.copytree(multimodal, tmp_path / "source"))
    edit_json(source / "config.json", **changes)
    assert_import_fails(source, tmp_path, message)


@pytest.mark.parametrize("lengths", [[7, 70, 1, 12], [90]])
def test_packed_documents_do_not_see_each_other(dense: Path, tmp_path: Path, lengths: list[int]) -> None:
    """Neither through attention, nor through states and convolutions; in the second sequence they are reversed."""
    hf_to_mcore(dense, tmp_path / "megatron", None)
    tokens = torch.randint(99, (2, 90), generator=torch.Generator().manual_seed(0))
    per_sequence = lengths, lengths[::-1]
    positions = torch.stack([torch.cat([torch.arange(length) for length in own]) for own in per_sequence])
    with bootstrap.single_process(), torch.no_grad():
        model = loading.load_model(tmp_path / "megatron").eval()
        actual = model(tokens, positions, attention_mask=document_edges(positions))
    stock = load_stock(dense)
    for logits, row, own in zip(actual, tokens, per_sequence, strict=True):
        for part, document in zip(logits.split(own), row.split(own), strict=True):
            assert_logits(part, stock, document[None])


def test_new_experts_get_the_gradients_of_transformers(dense: Path, tmp_path: Path) -> None:
    """Through the layers above, at a length that is no multiple of the chunk."""
    write_export(dense, tmp_path, NewExperts(3), noise=0.5)
    tokens = torch.randint(99, (2, 150), generator=torch.Generator().manual_seed(0))
    stock = load_stock(tmp_path / "hf")
    exact = in_double(stock)
    backward(stock(tokens).logits, tokens)
    with InDouble():
        backward(exact(tokens).logits, tokens)
    with bootstrap.single_process():
        model = loading.load_model(tmp_path / "megatron").eval()
        backward(model(tokens, torch.arange(150).expand_as(tokens), attention_mask=None), tokens)
        ours = [layer.mlp.experts.linear_fc2.weight.grad for layer in model.decoder.layers]
    for gradient, *layers in zip(ours, stock.model.layers, exact.model.layers, strict=True):
        expected = [layer.mlp.experts.down_proj.grad[1:] for layer in layers]
        assert expected[1].abs().max() > 1e-4
        assert_as_exact(gradient, *expected)


def backward(logits: Tensor, tokens: Tensor) -> None:
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()


def test_the_planner_counts_every_parameter(dense: Path, tmp_path: Path) -> None:
    spec = hf_to_mcore(dense, tmp_path / "megatron", NewExperts(3))
    with bootstrap.single_process():
        model = loading.build_model(spec)
    actual: dict[tuple[int | None, Part], int] = {}
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
        place = layer, part_of(name)
        actual[place] = actual.get(place, 0) + parameter.numel()
    assert actual == model_parts(spec)
