"""docs/models.md lists the supported architectures, and the converter refuses others with its address."""

import re
from pathlib import Path

import pytest
import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from checkpoint_convert.conversions.upcycled_checkpoint import hf_to_mcore
from moelpr.model.families.families import FAMILIES
from tests.support.hf_models import assert_import_fails, assert_logits, edit_json, our_logits, save_tokenizer

PAGE = Path(__file__).parents[4] / "docs" / "models.md"


@pytest.mark.parametrize(
    "config", [{"architectures": ["SmolLM3ForCausalLM"]}, {"architectures": None, "model_type": "smollm3"}]
)
def test_another_architecture_is_refused_with_its_name_and_those_that_are_not(source, tmp_path, config) -> None:
    edit_json(source / "config.json", **config)
    assert_import_fails(
        source, tmp_path, "a (SmolLM3ForCausalLM|smollm3) .*docs/models.md#supported-models.*LlamaForCausalLM"
    )


def test_the_page_lists_every_architecture_with_its_moe_class() -> None:
    for family in FAMILIES.values():
        row = next(row for row in PAGE.read_text().splitlines() if f"`{family.architecture}`" in row)
        assert f"`{family.moe_class.architecture}`" in row


def test_the_text_model_of_a_multimodal_model_is_saved_as_the_page_shows(tmp_path: Path) -> None:
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
