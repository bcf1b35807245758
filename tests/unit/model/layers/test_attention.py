import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from moelpr.model.layers import attention
from moelpr.model.layers.attention import SDPACoreAttention, document_edges
from moelpr.model.layers.loading import transformer_config
from moelpr.model.model_spec import ModelSpec

pytestmark = pytest.mark.usefixtures("megatron")

SEQUENCE, BATCH, HEADS, GROUPS, HEAD_DIM = 40, 3, 4, 2, 8


def ours(spec: ModelSpec, window: tuple[int, int] | None = None, **options: float) -> SDPACoreAttention:
    """With 4 query heads and 2 key-value groups."""
    return SDPACoreAttention(transformer_config(spec, window_size=window), 1, AttnMaskType.causal, "self", **options)


def query_key_value() -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(SEQUENCE, BATCH, heads, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_output_and_gradients_equal_megatrons_local_attention(dense_spec: ModelSpec) -> None:
    config = transformer_config(dense_spec, masked_softmax_fusion=False)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    theirs = DotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    inputs, same = query_key_value(), query_key_value()
    causal = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(diagonal=1).bool()  # True: masked
    actual, expected = ours(dense_spec)(*inputs, None), theirs(*same, causal)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(actual.shape)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(inputs, same, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_tokens_attend_within_their_document_only(dense_spec: ModelSpec) -> None:
    attend = ours(dense_spec)
    inputs, same = query_key_value(), query_key_value()
    lengths = [[40], [1, 30, 9], [13, 13, 13, 1]]  # the documents' lengths in each sequence of the batch
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    edges = document_edges(positions)
    assert edges.tolist() == [0, 40, 41, 71, 80, 93, 106, 119, 120]
    actual = attend(*inputs, edges)
    for row, documents in enumerate(lengths):
        start = 0
        for length in documents:
            alone = attend(*(tensor[start : start + length, row : row + 1] for tensor in same), None)
            torch.testing.assert_close(actual[start : start + length, row : row + 1], alone, rtol=1e-5, atol=1e-6)
            alone.sum().backward(retain_graph=True)
            start += length
    actual.sum().backward()
    for a, b in zip(inputs, same, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("window", [1, 7, SEQUENCE - 1, SEQUENCE + 5])
@pytest.mark.parametrize("apart", [False, True])
def test_a_window_is_a_number_of_previous_tokens(dense_spec: ModelSpec, window: int, apart: bool) -> None:
    """Megatron's window counts the tokens before the token itself."""
    query, key, value = query_key_value()
    positions = torch.arange(SEQUENCE) % 15 if apart else torch.arange(SEQUENCE)
    document = (positions == 0).cumsum(0)
    distance = torch.arange(SEQUENCE)[:, None] - torch.arange(SEQUENCE)
    is_seen = (distance >= 0) & (distance <= window) & (document[:, None] == document)
    scores = torch.einsum("sbhd,tbhd->bhst", query, key.repeat_interleave(2, dim=2)) / HEAD_DIM**0.5
    weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
    expected = torch.einsum("bhst,tbhd->sbhd", weights, value.repeat_interleave(2, dim=2)).flatten(2)
    actual = ours(dense_spec, (window, 0))(
        query, key, value, document_edges(positions.expand(BATCH, -1)) if apart else None
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def varlen_attention(query, key, value, starts, key_starts, longest, longest_key, *, scale, window_size, enable_gqa):  # noqa: ANN001, ANN201, PLR0913
    """As torch's kernel says: from `left` tokens before each to `right` after it, in its document; -1: all."""
    assert torch.equal(starts, key_starts) and longest == longest_key == SEQUENCE
    left, right = window_size
    parts = []
    for start, stop in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        places = torch.arange(stop - start)
        distance = places[None] - places[:, None]  # how far the key is after the query
        is_seen = distance >= (-left if left >= 0 else -SEQUENCE)
        is_seen &= distance <= (right if right >= 0 else SEQUENCE)
        q, k, v = (tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value))
        actual = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_seen, scale=scale, enable_gqa=enable_gqa)
        parts.append(actual[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, (5, 0)])
def test_torchs_kernel_for_documents_gets_what_gives_the_same_result(dense_spec, monkeypatch, window) -> None:
    attend = ours(dense_spec, window, softmax_scale=0.5)
    inputs = [tensor.detach().bfloat16() for tensor in query_key_value()]
    positions = torch.cat([torch.arange(length) for length in (1, 14, SEQUENCE - 15)]).expand(BATCH, -1)
    edges = document_edges(positions)
    expected = attend(*inputs, edges)
    monkeypatch.setattr(attention, "_varlen_attention", lambda: varlen_attention)
    actual = attend(*(tensor.as_subclass(OnGpu) for tensor in inputs), edges)
    torch.testing.assert_close(actual.as_subclass(torch.Tensor), expected, rtol=0.02, atol=0.02)
    assert not torch.equal(actual.as_subclass(torch.Tensor), attend(*inputs, None))
