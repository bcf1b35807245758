"""mergekit-moe makes a model of the base's FFNs and others, with rows of mean hidden states."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from examples.experiments.routers import PROMPTS, write_mergekit
from tests.support.experts import EXPANDED, KEPT, trained, with_tokenizer
from tests.support.hf_models import load_stock, make_model  # noqa: F401


def test_rows_are_mean_states_of_the_last_token_of_prompts(make_model: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    base = make_model("LlamaForCausalLM", tie_word_embeddings=True)
    base = with_tokenizer(Path(shutil.copytree(base, tmp_path / "base")))
    ffns = trained(base, tmp_path / "ffn-hf", EXPANDED["el"], steps=5)
    write_mergekit(base, ffns, KEPT, EXPANDED, tmp_path / "mergekit/hf")
    dense, tuned, model = load_stock(base), load_stock(ffns), load_stock(tmp_path / "mergekit/hf", "MixtralForCausalLM")
    assert model.config.num_experts_per_tok == 1
    tokenizer, states = AutoTokenizer.from_pretrained(base), []
    for texts in (KEPT, EXPANDED):
        prompts = torch.tensor([tokenizer(text).input_ids for its in texts.values() for text in its[:PROMPTS]])
        with torch.no_grad():
            hidden = dense(prompts, output_hidden_states=True).hidden_states
        states.append([one[:, -1].mean(0) for one in hidden])
    for number, layers in enumerate(zip(*(one.model.layers for one in (dense, tuned, model)), strict=True)):
        old, new, moe = (layer.mlp for layer in layers)
        assert torch.equal(moe.experts.down_proj[0], old.down_proj.weight)
        assert torch.equal(moe.experts.down_proj[1], new.down_proj.weight)
        for row_H, its in zip(moe.gate.weight, states, strict=True):
            assert row_H.norm().item() == pytest.approx(1, abs=0.01)  # it computes in bf16
            assert torch.cosine_similarity(row_H, its[number], dim=0).item() == pytest.approx(1, abs=0.001)
