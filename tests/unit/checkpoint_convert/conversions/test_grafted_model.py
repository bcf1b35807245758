import json
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from checkpoint_convert import graft as grafter
from checkpoint_convert import verify as verifier
from checkpoint_convert.card.graft_record import Graft
from checkpoint_convert.compare.tensors import compare_graft
from checkpoint_convert.conversions.exported_model import mcore_to_hf
from checkpoint_convert.conversions.grafted_model import graft
from checkpoint_convert.conversions.instruct_difference import add_difference
from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from checkpoint_convert.hf.hub import Model, find_model
from moelpr.base.errors import UserError
from moelpr.model.families.new_experts import NewExperts
from tests.support.hf_models import (
    assert_logits,
    assert_nothing_left,
    edit_json,
    edit_tensors,
    load_stock,
    save_tokenizer,
    stock_logits,
    tensors_of,
    write_export,
)
from tests.unit.checkpoint_convert.conftest import instruct_of


def upcycle(base: Path, folder: Path, **options) -> Path:
    """An export whose two new experts differ from the FFN, as training would leave them."""
    return write_export(base, folder, NewExperts(2, **options), noise=0.5)


@pytest.fixture
def models(qwen2: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, instruct model and upcycled model, which has two copies of the original expert in layers 0 and 2."""
    model = upcycle(qwen2, tmp_path, moe_layers=[0, 2], original_copies=2)
    return qwen2, instruct_of(qwen2, tmp_path / "instruct"), model


def run(folders: tuple[Path, Path, Path], save: Path, **options) -> Path:
    graft(*map(find_model, folders), save, **options)  # type: ignore[call-arg]
    return save


def dense_name(name: str) -> str | None:
    """The base's name of a tensor of an upcycled model; None for what only the MoE has."""
    if re.search(r"mlp\.gate\.|block_sparse_moe\.gate\.|shared_expert", name):
        return None
    for number, part in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        name = re.sub(rf"block_sparse_moe\.experts\.\d+\.{number}\.", f"mlp.{part}_proj.", name)
    return re.sub(r"mlp\.experts\.\d+\.", "mlp.", name)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("LlamaForCausalLM", {"tie_word_embeddings": True}), ("Qwen2ForCausalLM", {}), ("Qwen3ForCausalLM", {})],
)
def test_every_tensor_is_the_model_plus_the_difference(architecture, changes, make_model, tmp_path) -> None:
    base = make_model(architecture, tokenizer=True, **changes)
    folders = base, instruct_of(base, tmp_path / "instruct"), upcycle(base, tmp_path)
    of_base, of_instruct, of_model = map(tensors_of, folders)
    actual = tensors_of(run(folders, tmp_path / "out"))
    assert actual.keys() == of_model.keys()
    num_new = 0
    for name, tensor in actual.items():
        dense = dense_name(name)
        if dense is None:
            assert torch.equal(tensor, of_model[name]), name
            continue
        own, b, i = of_model[name], of_base[dense], of_instruct[dense]
        num_new += not torch.equal(own, b)
        expected = i if torch.equal(own, b) else (own.double() + (i.double() - b.double())).float()
        assert torch.equal(tensor, expected), name
        assert not torch.equal(tensor, own), name
    assert num_new == 4 * 2 * 3  # layers, new experts, matrices
    load_stock(tmp_path / "out")


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_a_model_whose_experts_are_stored_as_one_tensor_gets_the_same_difference(architecture, make_model, tmp_path):
    """GraniteMoe stores all experts of a layer as one tensor, with gate and up projection together."""
    base, granite = make_model(architecture, tokenizer=True), tmp_path / "granite"
    instruct = instruct_of(base, tmp_path / "instruct")
    model = upcycle(base, tmp_path, original_copies=2)
    mcore_to_hf(tmp_path / "megatron", granite, as_class="granitemoe")
    one, other = (run((base, instruct, its), tmp_path / f"{its.name}-graft") for its in (model, granite))
    logits = stock_logits(one)
    assert_logits(logits, other)
    assert not torch.allclose(logits, stock_logits(model), atol=1e-3)
    assert not any(verdict.differs(0) for verdict in compare_graft(base, instruct, granite, other))


def test_the_sum_is_exact_to_the_last_bit_and_the_instruct_models_where_the_model_is_the_base() -> None:
    torch.manual_seed(0)
    model, base, instruct = (torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,)) for _ in range(3))
    instruct[:3] = torch.tensor([-0.0, 1e-45, 3e38])
    model[:500] = base[:500]
    for scale in (1.0, 0.3):
        actual = add_difference(model, base, instruct, scale, torch.float32)
        exact = [
            Fraction(m) + Fraction(scale) * (Fraction(i) - Fraction(b))
            for m, b, i in zip(model.tolist(), base.tolist(), instruct.tolist(), strict=True)
        ]
        spacing = np.spacing(np.abs(actual.numpy())).tolist()
        for value, wanted, ulp in zip(actual.tolist(), exact, spacing, strict=True):
            assert abs(Fraction(value) - wanted) <= Fraction(ulp) * Fraction(51, 100)
    one = add_difference(model, base, instruct, 1.0, torch.float32)
    assert torch.equal(one[:500].view(torch.int32), instruct[:500].view(torch.int32))
    naive = model[:500] + (instruct[:500] - base[:500])
    assert not torch.equal(naive, instruct[:500])  # the formula itself would not give these bits
    # A model that rounded its base: the instruct model is rounded once too.
    rounded = add_difference(base.bfloat16(), base, instruct, 1.0, torch.bfloat16)
    assert torch.equal(rounded, instruct.bfloat16())


def test_verify_understands_a_graft(models, tmp_path: Path, exit_code, refused, capsys) -> None:
    base, instruct, model = models
    for number, options in enumerate(({}, {"scale": 0.5}, {"only": "attention", "dtype": "float16"})):
        grafted = run(models, tmp_path / f"out{number}", **options)
        arguments = "--graft", base, instruct, model, grafted
        assert exit_code(verifier.main, *arguments) == 0
        equals_instruct = exit_code(verifier.main, "--frozen", instruct, grafted) == 0
        assert equals_instruct == (not options)
        edit_tensors(grafted, lambda tensors: tensors["model.layers.2.mlp.experts.3.up_proj.weight"][0, :1].mul_(2))
        assert exit_code(verifier.main, *arguments) == 1
        assert "model.layers.2.mlp.experts.3.up_proj.weight" in capsys.readouterr().out
    assert "graft.json" in refused(verifier.main, "--graft", base, instruct, model, model)


@pytest.mark.parametrize(
    ("only", "part"), [("attention", r"self_attn\.\w_proj"), ("ffn", r"mlp\..*_proj|mlp\.experts")]
)
def test_only_the_chosen_part_is_scaled_and_added(only, part, models, tmp_path) -> None:
    of_base, of_instruct, of_model = map(tensors_of, models)
    actual = tensors_of(run(models, tmp_path / "out", only=only, scale=0.5))
    changed = {name for name in actual if not torch.equal(actual[name], of_model[name])}
    assert changed == {name for name in actual if re.search(part, name)}
    for name in changed:
        difference = of_instruct[dense_name(name)] - of_base[dense_name(name)]
        torch.testing.assert_close(actual[name], of_model[name] + difference / 2, rtol=0, atol=1e-6)


def test_the_graft_speaks_as_the_instruct_model(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, model = models
    (instruct / "generation_config.json").write_text('{"eos_token_id": [3, 0], "do_sample": true}')
    edit_json(instruct / "config.json", eos_token_id=3)
    (instruct / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\nIt chats.\n")
    before = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(before | {"auto_map": {"AutoConfig": "code.Config"}}))
    names = (Model(base, "o/Base"), Model(instruct, "o/Base-Instruct"), Model(model, "model"))
    graft(*names, tmp_path / "out", scale=0.5)
    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (instruct / name).read_bytes()
    messages = [{"role": "user", "content": "a"}]
    assert AutoTokenizer.from_pretrained(out).apply_chat_template(messages, tokenize=False) == "ab"
    assert GenerationConfig.from_pretrained(out).eos_token_id == [3, 0]
    config = json.loads((out / "config.json").read_text())
    assert {key for key in config if config[key] != before.get(key)} == {"eos_token_id"}
    assert config["original_copies"] == 2
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == ["o/Base", "o/Base-Instruct"] and card.data.base_model_relation == "merge"
    assert card.data.license is None and card.data.library_name == "transformers"
    assert "0.5 times the difference" in card.text
    links = re.findall(r"\]\((README[\w.-]*)\)", card.text)
    assert links == ["README-model.md", "README-instruct.md"] and all((out / link).is_file() for link in links)
    assert Graft.read(out) == Graft("o/Base", "o/Base-Instruct", "model", scale=0.5)


def test_a_model_whose_base_was_rounded_in_training_is_named_as_such(make_qwen2, tmp_path: Path) -> None:
    base = make_qwen2(torch.float32, tokenizer=True)
    hf_to_mcore(base, tmp_path / "megatron", NewExperts(1), dtype="bfloat16")
    mcore_to_hf(tmp_path / "megatron", tmp_path / "model", dtype="float32")
    with pytest.raises(UserError, match="was trained in bfloat16, which rounded .*--dtype bfloat16"):
        run((base, instruct_of(base, tmp_path / "instruct"), tmp_path / "model"), tmp_path / "graft")
    mcore_to_hf(tmp_path / "megatron", tmp_path / "narrow", dtype="bfloat16")
    run((base, tmp_path / "instruct", tmp_path / "narrow"), tmp_path / "graft")


def test_models_that_do_not_fit_are_rejected_by_name_of_the_tensor(
    models, make_qwen2, make_model, tmp_path: Path, refused
) -> None:
    base, instruct, model = models
    attention = "model.layers.1.self_attn.q_proj.weight"

    def changed(folder: Path, change: Callable[[Path], object]) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / f"changed{len(list(tmp_path.glob('changed*')))}"))
        change(copy)
        return copy

    def edited(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
        (file,) = [f for f in sorted(folder.glob("*.safetensors")) if attention in load_file(f)]
        return changed(folder, lambda copy: edit_tensors(copy / file.name, change))

    small_vocabulary = make_qwen2(vocab_size=98, tokenizer=True)
    unrelated = edited(instruct, lambda tensors: tensors[attention].normal_(std=tensors[attention].std().item()))
    other_base = edited(base, lambda tensors: tensors[attention][0, :1].add_(1e-6))
    not_a_number = edited(instruct, lambda tensors: tensors[attention][0, :1].fill_(torch.nan))
    other_tokenizer = changed(instruct, lambda folder: save_tokenizer(folder, num_ids=58))
    other_rope = changed(
        instruct, lambda folder: edit_json(folder / "config.json", rope_theta=1.0, rope_parameters=None)
    )
    llama = make_model("LlamaForCausalLM", tokenizer=True)
    for folders, message in (
        ((base, small_vocabulary, model), r"model.embed_tokens.weight .*\[99, 32\].* \[98, 32\]"),
        ((small_vocabulary, small_vocabulary, model), r"model.embed_tokens.weight .*\[99, 32\].* \[98, 32\]"),
        ((llama, llama, model), r"are different models: add_qkv_bias is False and True"),
        ((other_base, instruct, model), rf"changed\d+ is not the base of .*{attention}"),
        ((instruct, base, model), r"instruct is not the base of .*lm_head\.weight"),
        ((base, unrelated, model), f"was not made of .*{attention}"),
        ((base, not_a_number, model), f"{attention} contains NaN"),
        ((base, other_tokenizer, model), "tokenizers .* 58 .*None"),
        ((base, other_rope, model), "rotary_base is 50000 and 1"),
        ((base, instruct, base), "is dense; .*--model"),
        ((base, model, model), "is an MoE"),
        ((base, instruct, tmp_path / "megatron"), "is a Megatron checkpoint"),
        ((base, instruct, tmp_path / "gone"), "gone"),
    ):
        arguments = [part for pair in zip(("--base", "--instruct", "--model"), folders, strict=True) for part in pair]
        error = refused(grafter.main, *arguments, "--save", tmp_path / "out")
        assert re.search(message, error), error
        assert not (tmp_path / "out").exists()
        assert_nothing_left(tmp_path)
    arguments = ["--base", base, "--instruct", instruct, "--model", model, "--save", tmp_path / "out"]
    for scale in (0, "nan", "inf"):
        assert "--scale" in refused(grafter.main, *arguments, "--scale", scale)
