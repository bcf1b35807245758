"""The distance of a model from a base that reads the same tokens: KL(base‖model), and the loss of the model.

`document_distances` is exact and needs both models in memory. Calibration opens one model at a time, so it keeps the
base's most likely tokens one by one and all others together (`predictions`, `distance`): at most the exact distance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moelpr.base.errors import UserError
from moelpr.measure.evaluate.models import LoadedModel
from moelpr.measure.evaluate.scoring import IGNORED, Settings, make_batches, make_tensors, tokenize

_SETTINGS = Settings(context=0).resolve({})
_MOST_LIKELY = 256  # tokens
_CHUNK_BYTES = 32 << 20  # a model's log-probabilities in fp64


@torch.inference_mode()
def document_distances(
    base: LoadedModel, loaded: LoadedModel, language: str, texts: Sequence[str], settings: Settings
) -> list[float]:
    """Σ KL(base‖model) over the predicted tokens of each document, in nats, over the whole vocabulary in fp64.

    Raises:
        UserError: The models do not read the same tokens.
    """
    documents = tokenize(loaded, language, texts)
    read_by = [(one.start_id, one.vocab_size) for one in (base, loaded)]
    if read_by[0] != read_by[1] or documents != tokenize(base, language, texts):
        raise UserError(
            f"KL(base‖model) requires one tokenizer, and that of {loaded.directory} is not that of --base "
            f"{base.directory}; leave out --base, or that model"
        )
    nats = [0.0] * len(documents)
    chunk = max(1, _CHUNK_BYTES // (8 * loaded.vocab_size))
    for batch in make_batches(loaded, documents, settings):
        inputs, targets, _ = make_tensors(batch, loaded.device)
        rows = base.logits(inputs.to(base.device)), loaded.logits(inputs), targets != IGNORED
        for window, of_base, of_model, is_predicted in zip(batch, *rows, strict=True):
            pairs = zip(of_base.split(chunk), of_model.split(chunk), is_predicted.split(chunk), strict=True)
            for expected, actual, counted in pairs:
                old, new = (logits.to(loaded.device).double().log_softmax(-1) for logits in (expected, actual))
                of_tokens = F.kl_div(new, old, reduction="none", log_target=True).sum(-1)
                nats[window.document] += of_tokens[counted].clamp(min=0).sum().item()
    return nats


@torch.inference_mode()
def mean_loss(loaded: LoadedModel, pieces: list[list[int]]) -> float:
    """The mean loss of the tokens of some pieces, in nats."""
    losses = [F.cross_entropy(logits, targets, reduction="none") for logits, targets in _logits(loaded, pieces)]
    return torch.cat(losses).mean().item()


@dataclass(frozen=True)
class Predictions:
    """The predictions of a model after each token of some pieces: its most likely tokens, and all others as one.

    Attributes:
        tokens: IDs of the most likely tokens [tokens, M].
        log_probabilities: Theirs, and that of all others [tokens, M + 1].
    """

    tokens: Tensor
    log_probabilities: Tensor


@torch.inference_mode()
def predictions(loaded: LoadedModel, pieces: list[list[int]]) -> Predictions:
    """The most likely tokens of a model, on the CPU."""
    parts = []
    for logits, _ in _logits(loaded, pieces):
        tokens = logits.topk(min(_MOST_LIKELY, logits.shape[1] - 1)).indices
        parts.append((tokens.int().cpu(), _grouped(logits, tokens).cpu()))
    tokens, log_probabilities = map(torch.cat, zip(*parts, strict=True))
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
