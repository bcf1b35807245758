import dataclasses

import pytest
import torch

from moelpr.model.layers.loading import build_model
from moelpr.model.layers.vocabulary import mask_padding
from moelpr.model.model_spec import ModelSpec

pytestmark = pytest.mark.usefixtures("megatron")


def test_padding_does_not_change_the_loss(dense_spec: ModelSpec) -> None:
    torch.manual_seed(0)
    plain = build_model(dense_spec)
    padded = build_model(dataclasses.replace(dense_spec, megatron_args={**dense_spec.megatron_args, "vocab_size": 160}))
    state = plain.state_dict()
    weight = state["embedding.word_embeddings.weight"]
    padding = torch.zeros(32, weight.shape[1])
    state = {**state, "embedding.word_embeddings.weight": torch.cat([weight, padding])}
    padded.load_state_dict(state, strict=False)
    tokens = torch.randint(0, 128, (2, 16))
    positions = torch.arange(16).expand(2, 16)
    expected = plain(tokens, positions, None, labels=tokens)
    unmasked = padded(tokens, positions, None, labels=tokens)
    assert (unmasked - expected).abs().max() > 0.1  # log(160 / 128) where all logits are near zero
    mask_padding([padded], vocab_size=128)
    masked = padded(tokens, positions, None, labels=tokens)
    torch.testing.assert_close(masked, expected)
    masked.sum().backward()
    assert torch.equal(padded.embedding.word_embeddings.weight.grad[128:], padding)
