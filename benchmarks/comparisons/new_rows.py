"""What new tokens add to the time of a stage-1 step, at equal numbers of tokens.

The model is Qwen1.5-1.8B with 8,000 new tokens, with a quarter of its layers, width and vocabulary, so that the output
layer has its real share of the work, on one micro-batch. Without new tokens there is no stage 0, so it has no limit.
"""

from argparse import Namespace
from collections.abc import Iterator

import torch

from benchmarks.common import install_megatron
from benchmarks.imposed_routing import impose
from benchmarks.timing import Times, Turns

NEW_SHARE = 8000 / 151_936  # the new tokens in relation to the old vocabulary


DEFAULTS = dict(layers=6, hidden=512, ffn=1376, head=128, vocabulary=9496, sequences=8, length=256)
DEFAULTS |= dict(new_experts=5, original_copies=2, topk=2)


def run(turns: Turns, sizes: Namespace) -> Iterator[tuple[str, Times]]:
    install_megatron()
    from benchmarks.optimizer_steps import DEVICE, our_step, random_batch, spec_of
    from moelpr.megatron_patches.bootstrap import single_process

    with single_process():
        base, new_tokens = spec_of(sizes), round(NEW_SHARE * sizes.vocabulary)
        grown = base.with_new_tokens(sizes.vocabulary, new_tokens)
        batch, grown_batch = (random_batch(spec, sizes.sequences) for spec in (base, grown))
        steps = {
            "stage 1": our_step(base, "stage1", batch),
            "stage 1, new tokens": our_step(grown, "stage1", grown_batch),
            "stage 1, new tokens that train": our_step(grown, "stage1", grown_batch, train_new_embeddings=True),
            "stage 0": our_step(grown, "stage0", grown_batch),
        }
        for layer in range(sizes.layers):  # the same work for all
            places = torch.rand(batch["tokens"].numel(), sizes.new_experts + sizes.original_copies)
            for step in steps.values():
                impose(step.routers[layer], places.topk(sizes.topk).indices.to(DEVICE))
        yield f"{new_tokens} new tokens", turns.take(steps)
