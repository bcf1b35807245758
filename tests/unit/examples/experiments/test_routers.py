"""Routers of others: DUME's formula."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from examples.experiments import routers
from tests.support.experts import EXPANDED, KEPT, trained, with_tokenizer
from tests.support.hf_models import load_stock


def rows_read(folder: Path, texts: dict[str, list[str]]) -> list[Tensor]:
    """The inputs of the layers' FFNs for four of five documents, in stock transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_stock(folder)
    fitted = [text for its in texts.values() for number, text in enumerate(its, start=1) if number % 5]
    rows: list[list[Tensor]] = [[] for _ in model.model.layers]
    for its, layer in zip(rows, model.model.layers, strict=True):
        layer.mlp.register_forward_pre_hook(lambda _, inputs, its=its: its.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model(torch.tensor([[0, *tokenizer(text).input_ids[:-1]] for text in fitted]))
    return [torch.cat(its).double() for its in rows]


def test_dume_routers_decide_as_its_regression_with_a_bias_and_rows_of_one_length(
    make_model, tmp_path: Path, capsys
) -> None:
    base = with_tokenizer(Path(shutil.copytree(make_model("LlamaForCausalLM"), tmp_path / "base")))
    ffns = trained(base, tmp_path / "ffn-hf", EXPANDED["el"], steps=10)
    routers.write_dume(base, ffns, KEPT, EXPANDED, tmp_path / "dume/hf")
    dense, tuned, model = load_stock(base), load_stock(ffns), load_stock(tmp_path / "dume/hf", "MixtralForCausalLM")
    assert model.config.num_experts_per_tok == 1
    inputs = zip(rows_read(base, KEPT), rows_read(ffns, EXPANDED), strict=True)
    for number, (kept_TH, new_TH) in enumerate(inputs):
        layers = [one.model.layers[number].mlp for one in (dense, tuned, model)]
        experts = layers[2].experts.down_proj
        assert torch.equal(experts[0], layers[0].down_proj.weight) and torch.equal(
            experts[1], layers[1].down_proj.weight
        )
        rows_TH = torch.cat([kept_TH, new_TH])
        with_one = torch.cat([rows_TH, torch.ones(len(rows_TH), 1)], dim=1)
        is_of = torch.eye(2).double().repeat_interleave(len(kept_TH), dim=0)
        ridge = routers.RIDGE * len(kept_TH)
        weights = torch.linalg.solve(with_one.T @ with_one + ridge * torch.eye(33), with_one.T @ is_of)
        weights = weights / weights[:-1].norm(dim=0)
        to_one_H = torch.linalg.solve(rows_TH.T @ rows_TH + ridge * torch.eye(32), rows_TH.sum(0))
        expected = weights[:-1].T + weights[-1][:, None] * to_one_H
        borders = [row_EH[0] - row_EH[1] for row_EH in (layers[2].gate.weight.double(), expected)]
        assert torch.cosine_similarity(*borders, dim=0).item() == pytest.approx(1, abs=1e-6)
    for model in (base, ffns):
        routers.show(base, model, KEPT, EXPANDED)
    (of_base, loss), (nats, less) = re.findall(r"(\d\.\d+) nats.* (\d\.\d+)\n", capsys.readouterr().out)
    assert of_base == "0.000" < nats and less < loss, (nats, loss, less)
