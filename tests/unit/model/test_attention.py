"""SDPACoreAttention equals Megatron's local attention, without materializing the score matrix."""

import pytest
import torch

from moelpr.model_spec import ModelSpec

pytestmark = pytest.mark.usefixtures("megatron")

SEQUENCE, BATCH, HEADS, GROUPS, HEAD_DIM = 40, 3, 4, 2, 8


@pytest.fixture
def attentions(dense_spec: ModelSpec):
    """Ours and Megatron's; 4 query heads, 2 key-value groups."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from moelpr.model.attention import SDPACoreAttention
    from moelpr.model.loading import transformer_config

    config = transformer_config(dense_spec, masked_softmax_fusion=False)
    arguments = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    theirs = DotProductAttention(config, **arguments, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    return SDPACoreAttention(config, **arguments), theirs


def query_key_value() -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(SEQUENCE, BATCH, heads, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_output_and_gradients_equal_megatrons_local_attention(attentions) -> None:
    ours, theirs = attentions
    inputs, same = query_key_value(), query_key_value()
    causal = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(diagonal=1).bool()  # True: masked
    found, expected = ours(*inputs, None), theirs(*same, causal)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(found.shape)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(inputs, same, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_no_score_matrix_is_saved_for_the_backward_pass(attentions) -> None:
    ours, theirs = attentions

    def largest_saved(run) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (sizes.append(tensor.numel()), tensor)[1], lambda x: x
        ):
            run()
        return max(sizes)

    scores = BATCH * HEADS * SEQUENCE * SEQUENCE
    causal = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(diagonal=1).bool()
    assert largest_saved(lambda: theirs(*query_key_value(), causal)) >= scores
    assert largest_saved(lambda: ours(*query_key_value(), None)) <= SEQUENCE * BATCH * HEADS * HEAD_DIM


def test_tokens_attend_within_their_document_only(attentions) -> None:
    from moelpr.model.attention import document_edges

    ours, _ = attentions
    inputs, same = query_key_value(), query_key_value()
    lengths = [[40], [1, 30, 9], [13, 13, 13, 1]]  # of the documents in each sequence of the batch
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    edges = document_edges(positions)
    assert edges.tolist() == [0, 40, 41, 71, 80, 93, 106, 119, 120]
    found = ours(*inputs, edges)
    for row, documents in enumerate(lengths):
        start = 0
        for length in documents:
            alone = ours(*(tensor[start : start + length, row : row + 1] for tensor in same), None)
            torch.testing.assert_close(found[start : start + length, row : row + 1], alone, rtol=1e-5, atol=1e-6)
            alone.sum().backward(retain_graph=True)
            start += length
    found.sum().backward()
    for a, b in zip(inputs, same, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("window", [1, 7, SEQUENCE - 1, SEQUENCE + 5])
@pytest.mark.parametrize("apart", [False, True])
def test_a_window_is_a_number_of_previous_tokens(dense_spec: ModelSpec, window: int, apart: bool) -> None:
    """Megatron's window counts the tokens before the token itself."""
    from megatron.core.transformer.enums import AttnMaskType

    from moelpr.model.attention import SDPACoreAttention, document_edges
    from moelpr.model.loading import transformer_config

    config = transformer_config(dense_spec, window_size=(window, 0))
    ours = SDPACoreAttention(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
    query, key, value = query_key_value()
    positions = torch.arange(SEQUENCE) % 15 if apart else torch.arange(SEQUENCE)
    document = (positions == 0).cumsum(0)
    distance = torch.arange(SEQUENCE)[:, None] - torch.arange(SEQUENCE)
    is_seen = (distance >= 0) & (distance <= window) & (document[:, None] == document)
    scores = torch.einsum("sbhd,tbhd->bhst", query, key.repeat_interleave(2, dim=2)) / HEAD_DIM**0.5
    weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
    expected = torch.einsum("bhst,tbhd->sbhd", weights, value.repeat_interleave(2, dim=2)).flatten(2)
    found = ours(query, key, value, document_edges(positions.expand(BATCH, -1)) if apart else None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
