"""What a model predicts on some text: its loss, and its distance from a base that reads the same tokens.

The distance is KL(base‖model) with the base's most likely tokens one by one and all others together, for which few
numbers of the base have to be kept. It is at most KL over the whole vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moelpr.evaluate.models import LoadedModel
from moelpr.evaluate.scoring import IGNORED, Settings, make_batches, make_tensors

_SETTINGS = Settings(context=0).resolve({})
_MOST_LIKELY = 256  # tokens


@torch.inference_mode()
def mean_loss(loaded: LoadedModel, pieces: list[list[int]]) -> float:
    """The mean loss of the tokens of some pieces, in nats."""
    losses = [F.cross_entropy(logits, targets, reduction="none") for logits, targets in _logits(loaded, pieces)]
    return torch.cat(losses).mean().item()


@dataclass(frozen=True)
class Predictions:
    """What a model predicts after each token of some pieces: its most likely tokens, and all others as one.

    Attributes:
        tokens: IDs of the most likely tokens [tokens, M].
        log_probabilities: Theirs, and that of all others [tokens, M + 1].
    """

    tokens: Tensor
    log_probabilities: Tensor


@torch.inference_mode()
def predictions(loaded: LoadedModel, pieces: list[list[int]]) -> Predictions:
    """The most likely tokens of a model, on the CPU."""
    found = []
    for logits, _ in _logits(loaded, pieces):
        tokens = logits.topk(min(_MOST_LIKELY, logits.shape[1] - 1)).indices
        found.append((tokens.int().cpu(), _grouped(logits, tokens).cpu()))
    tokens, log_probabilities = map(torch.cat, zip(*found, strict=True))
    return Predictions(tokens, log_probabilities)


@torch.inference_mode()
def distance(loaded: LoadedModel, pieces: list[list[int]], of_base: Predictions) -> float:
    """KL(base‖model) in nats per token."""
    total, first = 0.0, 0
    for logits, _ in _logits(loaded, pieces):
        of_tokens = slice(first, first := first + len(logits))
        base = of_base.log_probabilities[of_tokens].to(logits.device)
        model = _grouped(logits, of_base.tokens[of_tokens].to(logits.device))
        total += F.kl_div(model, base, reduction="sum", log_target=True).item()
    return total / first


def _logits(loaded: LoadedModel, pieces: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [tokens, V] and targets [tokens] of each batch; in the same order for all models of a vocabulary."""
    for batch in make_batches(loaded, pieces, _SETTINGS):
        tokens, targets, _ = make_tensors(batch, loaded.device)
        is_token = targets != IGNORED
        yield loaded.logits(tokens)[is_token].float(), targets[is_token]


def _grouped(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of some tokens, and that of all others together."""
    some = logits.log_softmax(-1).gather(-1, tokens.long())
    others = torch.log1p(-some.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat([some, others], dim=-1)
