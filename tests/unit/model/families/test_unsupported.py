"""Every architecture that is refused has its reason, in the converter and in docs/models.md."""

import re
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.base.errors import UserError
from moelpr.model.families.families import FAMILIES, family_of
from moelpr.model.families.moe_classes import MOE_CLASSES
from moelpr.model.families.unsupported import UNSUPPORTED, Unsupported
from tests.support.hf_models import assert_import_fails, assert_logits, edit_json, our_logits, save_tokenizer

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
REFUSED = [(entry, name) for entry in UNSUPPORTED for name in entry.architectures]
# Their code is in the repositories of the models, or only a multimodal model contains them.
UNMAPPED = {"InternLM2ForCausalLM", "InternLM3ForCausalLM", "ExaoneForCausalLM", "DeciLMForCausalLM"}
UNMAPPED |= {"Mistral4ForCausalLM"}


@pytest.mark.parametrize(("entry", "architecture"), REFUSED, ids=[name for _, name in REFUSED])
def test_an_architecture_without_a_class_is_refused_with_the_reason(entry: Unsupported, architecture: str) -> None:
    message = f"^a {architecture} cannot be upcycled: {re.escape(entry.reason)}; docs/models.md lists"
    with pytest.raises(UserError, match=message):
        family_of({"architectures": [architecture]})


def test_the_refused_architectures_exist_and_are_not_supported() -> None:
    names = [name for _, name in REFUSED]
    assert len(names) == len(set(names))
    assert not set(names) & {kind.architecture for kind in (*FAMILIES.values(), *MOE_CLASSES.values())}
    assert set(names) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) == UNMAPPED


def test_a_config_without_architectures_is_that_of_its_type(source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", architectures=None, model_type="smollm3")
    assert_import_fails(source, tmp_path, "a smollm3 cannot be upcycled: every fourth layer")


def test_the_page_lists_every_architecture() -> None:
    rows = PAGE.read_text()
    for family in FAMILIES.values():
        row = next(row for row in rows.splitlines() if f"`{family.architecture}`" in row)
        assert f"`{family.moe_class.architecture}`" in row
    for entry in UNSUPPORTED:
        assert f"| {entry.models} | {entry.reason} |" in rows, (
            f"docs/models.md lacks: | {entry.models} | {entry.reason} |"
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mistral", "is multimodal.*save its text model, a mistral, by itself as docs/models.md#multimodal-models"),
        ("ministral3", "its text model is that of Ministral 3, and its queries grow"),
        ("gemma3_text", "its text model is that of Gemma 1, 2, 3 and 3n, VaultGemma, and its FFN is gated by GELU"),
    ],
)
def test_a_multimodal_model_is_judged_by_its_text_model(source: Path, tmp_path: Path, text: str, message: str) -> None:
    wrapper = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}
    edit_json(source / "config.json", **wrapper, text_config={"model_type": text})
    assert_import_fails(source, tmp_path, message)


def test_the_text_model_of_a_multimodal_model_is_saved_as_the_page_shows(tmp_path: Path) -> None:
    import torch
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"model_type": "mistral", "vocab_size": 99, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": None}
    vision = {"model_type": "pixtral", "image_size": 32, "patch_size": 16}
    config = Mistral3Config(text_config=shape | text, vision_config=shape | vision, tie_word_embeddings=False)
    whole = Mistral3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    save_tokenizer(tmp_path / "whole", num_ids=60)
    (code,) = re.findall(
        r"```python\n(from transformers import AutoModelForCausalLM, AutoModelForImage.+?)```", PAGE.read_text(), re.S
    )
    code = re.sub(
        r"(?m)^name, folder = .+$", f"name, folder = {str(tmp_path / 'whole')!r}, {str(tmp_path / 'text')!r}", code
    )
    exec(code, {})
    hf_to_mcore(tmp_path / "text", tmp_path / "megatron", None)
    assert_logits(our_logits(tmp_path / "megatron"), whole)
