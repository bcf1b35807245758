"""MLX: the log-probabilities that mlx-lm computes."""

from pathlib import Path

import torch
from torch import Tensor


def generate(folder: Path, prompt: list[int], num_tokens: int, vocab_size: int) -> tuple[list[int], Tensor]:
    """Greedy tokens, and the log-probabilities [num_tokens, vocab_size] before each."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    steps = list(generate_step(mx.array(prompt), model, max_tokens=num_tokens))
    return [int(token) for token, _ in steps], torch.stack([torch.tensor(scores.tolist()) for _, scores in steps])
