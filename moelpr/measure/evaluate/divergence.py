"""The distance of a model from a base that reads the same tokens: KL(base‖model), and the loss of the model."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moelpr.base.errors import UserError
from moelpr.measure.evaluate.models import LoadedModel
from moelpr.measure.evaluate.scoring import IGNORED, Settings, make_batches, make_tensors, tokenize

_SETTINGS = Settings(context=0).resolve({})
_MEMORY_BYTES = 2 << 30
_CHUNK_BYTES = 32 << 20  # a model's log-probabilities


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
    return _distances(base, loaded, documents, settings, torch.double)


def remembering(loaded: LoadedModel) -> LoadedModel:
    """The model, which keeps in host memory what it has returned for a batch, up to `_MEMORY_BYTES`."""
    memory: dict[tuple[torch.Size, bytes], Tensor] = {}

    def logits(tokens_BS: Tensor) -> Tensor:
        batch = tokens_BS.shape, tokens_BS.cpu().numpy().tobytes()
        if batch in memory:
            return memory[batch]
        logits_BSV = loaded.logits(tokens_BS)
        if sum(one.nbytes for one in memory.values()) + logits_BSV.nbytes <= _MEMORY_BYTES:
            memory[batch] = logits_BSV.cpu()
        return logits_BSV

    return replace(loaded, logits=logits)


@torch.inference_mode()
def distance(base: LoadedModel, loaded: LoadedModel, pieces: list[list[int]]) -> float:
    """KL(base‖model) in nats per token of some pieces, which both models read alike, in fp32 (to about 1e-6)."""
    return sum(_distances(base, loaded, pieces, _SETTINGS, torch.float)) / sum(map(len, pieces))


@torch.inference_mode()
def mean_loss(loaded: LoadedModel, pieces: list[list[int]]) -> float:
    """The mean loss of the tokens of some pieces, in nats."""
    losses = []
    for batch in make_batches(loaded, pieces, _SETTINGS):
        tokens, targets, _ = make_tensors(batch, loaded.device)
        is_token = targets != IGNORED
        logits = loaded.logits(tokens).to(targets.device)[is_token]  # a model that remembers has them in host memory
        losses.append(F.cross_entropy(logits.float(), targets[is_token], reduction="none"))
    return torch.cat(losses).mean().item()


def _distances(
    base: LoadedModel, loaded: LoadedModel, documents: list[list[int]], settings: Settings, dtype: torch.dtype
) -> list[float]:
    nats = [0.0] * len(documents)
    chunk = max(1, _CHUNK_BYTES // (dtype.itemsize * loaded.vocab_size))
    for batch in make_batches(loaded, documents, settings):
        inputs, targets, _ = make_tensors(batch, loaded.device)
        rows = base.logits(inputs.to(base.device)), loaded.logits(inputs), targets != IGNORED
        for window, of_base, of_model, is_predicted in zip(batch, *rows, strict=True):
            pairs = zip(of_base.split(chunk), of_model.split(chunk), is_predicted.split(chunk), strict=True)
            for expected, actual, counted in pairs:
                old, new = (logits.to(loaded.device)[counted].to(dtype) for logits in (expected, actual))
                # Σ p (log p - log q), of which the difference of logits is exact.
                logs = old.logsumexp(-1), new.logsumexp(-1)
                of_tokens = ((old - logs[0][:, None]).exp_() * (old - new)).sum(-1) - logs[0] + logs[1]
                nats[window.document] += of_tokens.double().clamp(min=0).sum().item()
    return nats
