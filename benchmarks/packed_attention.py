"""What does it cost to keep a sample's documents apart? Our attention against one call with a mask, in one process.

Forward and backward of one layer's attention on PyTorch's kernels, in turns; the fastest round of each counts. Plain
causal attention over the whole sequence, which lets documents see each other, is the measure.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moelpr.megatron_patches import cpu, megatron_fixes

cpu.install()
megatron_fixes.install()

from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from moelpr.model.attention import SDPACoreAttention  # noqa: E402
from moelpr.model.config import MoELPRConfig  # noqa: E402

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-length", type=int, nargs="+", default=[512, 4096], help="tokens (default: 512 and 4096)")
    parser.add_argument(
        "--document-tokens", type=int, nargs="+", default=[100, 1000], help="mean, in tokens (default: 100 and 1000)"
    )
    parser.add_argument("--heads", type=int, default=8, help="attention heads of 64 (default: 8)")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="samples at a time (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    arguments = parser.parse_args()

    config = MoELPRConfig(
        num_layers=1, hidden_size=64 * arguments.heads, num_attention_heads=arguments.heads, attention_dropout=0.0
    )
    ours = SDPACoreAttention(config, 1, AttnMaskType.causal, "self")
    print("milliseconds for forward and backward, and how many times the speed of plain causal attention")
    print(f"{'seq-length':>10}{'documents of':>14}{'causal':>11}{'with a mask':>20}{'a call per document':>24}")
    for length in arguments.seq_length:
        for mean in arguments.document_tokens:
            shape = (length, arguments.micro_batch_size, arguments.heads, 64)
            positions = random_positions(arguments.micro_batch_size, length, mean)
            ways: list[Attend] = [
                lambda query, key, value: ours(query, key, value, None),
                with_a_mask(positions),
                lambda query, key, value, positions=positions: ours(query, key, value, positions),
            ]
            inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
            torch.testing.assert_close(ways[1](*inputs), ways[2](*inputs), rtol=1e-4, atol=1e-5)
            causal_s, mask_s, ours_s = fastest_s(ways, inputs, arguments.rounds)
            print(
                f"{length:>10,}{mean:>14,}{1e3 * causal_s:>11.1f}{1e3 * mask_s:>11.1f} ({causal_s / mask_s:>5.2f})"
                f"{1e3 * ours_s:>15.1f} ({causal_s / ours_s:>5.2f})",
                flush=True,
            )


def random_positions(batch: int, length: int, mean: int) -> Tensor:
    """[batch, length]: each token's position in its document, whose lengths are exponentially distributed."""
    torch.manual_seed(1)
    starts = torch.rand(batch, length) < 1 / mean
    starts[:, 0] = True
    places = torch.arange(length).expand(batch, length)
    return places - torch.where(starts, places, 0).cummax(dim=1).values


def with_a_mask(positions: Tensor) -> Attend:
    """One call for all documents, made from their numbers."""
    documents = (positions == 0).cumsum(dim=1)
    mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return context.permute(2, 0, 1, 3).flatten(start_dim=2)

    return attend


def fastest_s(ways: list[Attend], inputs: list[Tensor], rounds: int) -> list[float]:
    """Seconds of forward and backward of each way, in its fastest round."""
    best = [float("inf")] * len(ways)
    for _ in range(rounds):
        for index, way in enumerate(ways):
            started = time.perf_counter()
            way(*inputs).sum().backward()
            best[index] = min(best[index], time.perf_counter() - started)
    return best


if __name__ == "__main__":
    main()
