"""Only rows of new tokens train, whichever tensor-parallel rank has them (tests/distributed covers whole runs)."""

from dataclasses import replace

import pytest
import torch

from moelpr.model.layers.freezing import freeze, parameter_report
from moelpr.model.layers.loading import build_model
from moelpr.model.layers.new_rows import rows_that_train, train_new_rows_only
from moelpr.model.layers.vocabulary import mask_padding
from moelpr.model.model_spec import ModelSpec, NewTokens

pytestmark = pytest.mark.usefixtures("megatron")

TOKENS = NewTokens(first=100, number=20, base_vocab_size=110)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, moe_spec: ModelSpec):
    changes = {"untie_embeddings_and_output_weights": not request.param, "vocab_size": TOKENS.vocab_size}
    return build_model(replace(moe_spec, megatron_args=moe_spec.megatron_args | changes))


@pytest.mark.parametrize(
    ("rank", "expected"), [(0, slice(120, 120)), (1, slice(80, 120)), (2, slice(0, 60)), (3, slice(0, 0))]
)
def test_each_tensor_parallel_rank_trains_its_part_of_the_new_rows(model, monkeypatch, rank, expected) -> None:
    monkeypatch.setattr("megatron.core.parallel_state.get_tensor_model_parallel_rank", lambda: rank)
    train_new_rows_only([model], NewTokens(first=200, number=100, base_vocab_size=250))
    assert len(model.embedding.word_embeddings.weight) == 120
    assert rows_that_train(model.embedding.word_embeddings.weight) == expected
    assert rows_that_train(model.decoder.layers[0].mlp.router.weight) == slice(None)


def test_gradients_of_new_rows_and_of_all_others_are_those_of_autograd(model) -> None:
    """Also of what trains below, with padding masked in place, in two micro-batches."""
    mask_padding([model], TOKENS.end - 3)
    positions = torch.arange(16).expand(2, 16)
    gradients = []
    for only_new in (False, True):
        freeze([model], "stage1", train_everything=not only_new, train_new_embeddings=only_new, new_tokens=TOKENS)
        model.train().zero_grad()
        for seed in (0, 1):
            tokens = torch.randint(0, TOKENS.end - 3, (2, 16), generator=torch.Generator().manual_seed(seed))
            model(tokens, positions, attention_mask=None, labels=tokens.flip(1)).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    expected, actual = gradients
    assert len(actual) == (9 + 1 if model.share_embeddings_and_output_weights else 9 + 2)
    for name, gradient in actual.items():
        rows = slice(TOKENS.first, TOKENS.end) if gradient.dim() == 2 and len(gradient) == 120 else slice(None)
        assert gradient[rows].any()
        torch.testing.assert_close(gradient[rows], expected[name][rows], rtol=1e-5, atol=1e-8)
    if not model.share_embeddings_and_output_weights:
        assert not actual["output_layer.weight"][: TOKENS.first].any()
        assert expected["output_layer.weight"][: TOKENS.first].any()


def test_the_report_counts_only_new_rows_as_trainable(model) -> None:
    matrices = 1 if model.share_embeddings_and_output_weights else 2
    total = sum(parameter.numel() for parameter in model.parameters())
    new = matrices * 20 * 32
    freeze([model], "stage0", new_tokens=TOKENS)
    report = parameter_report([model]).splitlines()
    assert report[-1].split() == ["all", f"{new:,}", f"{total - new:,}"]
    assert ["embedding", f"{20 * 32}", f"{100 * 32:,}"] in [line.split() for line in report]
