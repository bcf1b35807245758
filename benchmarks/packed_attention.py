"""What does it cost to keep a sample's documents apart? Our attention against one call with a mask.

    OMP_NUM_THREADS=1 python -m benchmarks.packed_attention

Forward and backward of one layer's attention on PyTorch's kernels in one process; contenders take turns, and the
fastest round of each counts. The baseline is plain causal attention over the full sequence, in which a token attends to
other documents too.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import argument_parser, install_megatron, print_table
from benchmarks.timing import fastest_s, take_turns

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--seq-length", type=int, nargs="+", default=[512, 4096], help="sequence lengths, in tokens")
    parser.add_argument("--document-tokens", type=int, nargs="+", default=[100, 1000],
                        help="mean document lengths, in tokens")  # fmt: skip
    parser.add_argument("--heads", type=int, default=8, help="number of attention heads of size 64")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="sequences per call")
    args = parser.parse_args()
    install_megatron()
    shapes = [(length, args.micro_batch_size, args.heads, 64) for length in args.seq_length]
    print_table([measure(shape, mean, args.rounds) for shape in shapes for mean in args.document_tokens])


def measure(shape: tuple[int, int, int, int], mean: int, rounds: int) -> dict[str, float]:
    """Milliseconds of each contender, and speed relative to causal; shape is [sequence, batch, heads, head size]."""
    from megatron.core.transformer.enums import AttnMaskType

    from moelpr.model.attention import SDPACoreAttention, document_edges
    from moelpr.model.config import MoELPRConfig

    length, batch, heads, size = shape
    config = MoELPRConfig(num_layers=1, hidden_size=size * heads, num_attention_heads=heads, attention_dropout=0.0)
    attend = SDPACoreAttention(config, 1, AttnMaskType.causal, "self")
    positions = random_positions(batch, length, mean)
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    contenders: dict[str, Callable[[], Tensor]] = {
        "causal": partial(attend, *inputs, None),
        "with_mask": partial(with_a_mask(positions), *inputs),
        "call_per_document": partial(attend, *inputs, document_edges(positions)),
    }
    torch.testing.assert_close(contenders["with_mask"](), contenders["call_per_document"](), rtol=1e-4, atol=1e-5)
    steps = {name: lambda one=one: one().sum().backward() for name, one in contenders.items()}
    best = fastest_s(take_turns(steps, rounds, warmup=0)[0])
    speedups = {f"{name}_speedup": best["causal"] / best[name] for name in ("with_mask", "call_per_document")}
    milliseconds = {f"{name}_ms": 1e3 * seconds for name, seconds in best.items()}
    return {"seq_length": length, "document_tokens": mean, **milliseconds, **speedups}


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


if __name__ == "__main__":
    main()
