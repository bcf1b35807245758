"""Attention that keeps a sample's documents apart, against plain causal attention over the full sequence.

Forward and backward of one layer's attention on PyTorch's kernels; in the baseline a token attends to other documents
too. The contenders are our attention, one call per document, and one call with a mask. Set OMP_NUM_THREADS.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.common import install_megatron
from benchmarks.timing import Times, Turns

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


DEFAULTS = {"seq_length": (512, 4096), "document_tokens": (100, 1000), "heads": 8, "micro_batch_size": 2}


def run(turns: Turns, settings: Namespace) -> Iterator[tuple[str, Times]]:
    batch, heads = settings.micro_batch_size, settings.heads
    install_megatron()
    from megatron.core.transformer.enums import AttnMaskType

    from moelpr.model.attention import SDPACoreAttention, document_edges
    from moelpr.model.config import MoELPRConfig

    config = MoELPRConfig(num_layers=1, hidden_size=64 * heads, num_attention_heads=heads, attention_dropout=0.0)
    attend = SDPACoreAttention(config, 1, AttnMaskType.causal, "self")
    for length, mean in product(settings.seq_length, settings.document_tokens):
        positions = random_positions(batch, length, mean)
        inputs = [torch.randn(length, batch, heads, 64, requires_grad=True) for _ in range(3)]
        contenders: dict[str, Callable[[], Tensor]] = {
            "causal": partial(attend, *inputs, None),
            "with a mask": partial(with_a_mask(positions), *inputs),
            "a call per document": partial(attend, *inputs, document_edges(positions)),
        }
        masked, packed = (contenders[name]() for name in ("with a mask", "a call per document"))
        torch.testing.assert_close(masked, packed, rtol=1e-4, atol=1e-5)
        case = f"{length:,} tokens, documents of {mean:,}"
        yield case, turns.take({name: lambda one=one: one().sum().backward() for name, one in contenders.items()})


def random_positions(batch: int, length: int, mean: int) -> Tensor:
    """[batch, length]: each token's position in its document, whose lengths are exponentially distributed."""
    torch.manual_seed(1)
    starts = torch.rand(batch, length) < 1 / mean
    starts[:, 0] = True
    indices = torch.arange(length).expand(batch, length)
    return indices - torch.where(starts, indices, 0).cummax(dim=1).values


def with_a_mask(positions: Tensor) -> Attention:
    """One call for all documents, with a mask [batch, 1, length, length]."""
    documents = (positions == 0).cumsum(dim=1)
    mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return context.permute(2, 0, 1, 3).flatten(start_dim=2)

    return attend
