"""--dataloader-inter-document-masking: a document in a packed sample is what it is alone."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from moelpr.data.batch import BatchReader
from moelpr.model.layers.loading import build_model
from moelpr.model.model_spec import ModelSpec
from moelpr.train import forward_step as trainers
from tests.support.gpt_data import gpt_config, training_set

pytestmark = pytest.mark.usefixtures("megatron")

SEQUENCE = 64


@pytest.fixture
def samples(write_corpus: Callable) -> Callable[[bool], list[dict[str, torch.Tensor]]]:
    """Packed samples of a corpus of both language groups, read with the option or without."""
    prefix, *_ = write_corpus("corpus", vocab=128)

    def read(documents_apart: bool) -> list[dict[str, torch.Tensor]]:
        settings = {"sequence_length": SEQUENCE, "inter_document_masking": documents_apart}
        dataset = training_set(6, gpt_config([str(prefix)], vocab_size=128, **settings))
        return [dataset[index] for index in range(6)]

    return read


def losses(model: torch.nn.Module, samples: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Next-token losses [samples, sequence], by way of the trainer's forward step."""
    batch = torch.utils.data.default_collate(samples)
    reader = BatchReader()
    reader.read(model, iter([batch]), 1, tuple(batch["tokens"].shape))
    output, _ = trainers.forward_step(reader, trainers.ForwardClock(), None, model)
    return output


@pytest.fixture
def build(moe_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.nn.Module]:
    """Builds a model with one original expert, or with those of an MoE base."""
    monkeypatch.setattr(trainers, "get_num_microbatches", lambda: 1)

    def build(original_experts: int = 1, **settings: object) -> torch.nn.Module:
        torch.manual_seed(1)
        assert moe_spec.moe is not None
        moe = replace(moe_spec.moe, num_original_experts=original_experts)
        return build_model(replace(moe_spec, moe=moe), **settings).train()

    return build


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}


@pytest.mark.parametrize("settings", [{}, RECOMPUTE, SELECTIVE, {"original_experts": 3}])
def test_the_loss_of_a_packed_document_is_that_of_the_document_alone(samples, build, settings: dict) -> None:
    packed = samples(True)
    model = build(dataloader_inter_document_masking=True, **settings)
    actual = losses(model, packed)
    actual.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    number = 0
    for sample, row in zip(packed, actual, strict=True):
        edges = [*np.flatnonzero(sample["position_ids"].numpy() == 0).tolist(), SEQUENCE]
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            document = {name: tensor[start:stop] for name, tensor in sample.items()}
            assert document["position_ids"].tolist() == list(range(stop - start))
            alone = losses(model, [document])[0]
            torch.testing.assert_close(row[start:stop], alone, rtol=1e-5, atol=1e-6)
            alone.sum().backward()
            number += 1
    assert number > 2 * len(packed)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_without_the_option_documents_see_each_other(samples, build) -> None:
    together, apart = samples(False), samples(True)
    for one, other in zip(together, apart, strict=True):
        assert one.keys() == other.keys()
        for name in ("tokens", "labels", "loss_mask", "is_original", "is_original_label"):
            assert torch.equal(one[name], other[name])
    model = build()
    seen = losses(model, together)
    model.config.dataloader_inter_document_masking = True
    unseen = losses(model, apart)
    is_first = torch.stack([(sample["position_ids"] == 0).cumsum(0) == 1 for sample in apart])
    torch.testing.assert_close(seen[is_first], unseen[is_first], rtol=1e-5, atol=1e-6)
    assert (seen - unseen)[~is_first].abs().mean() > 1e-3
