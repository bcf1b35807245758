"""Bits per byte: how well a model predicts held-out text, comparable between languages and tokenizers.

    bits per byte = − Σ over documents and their tokens of log2 p(token | context)  /  UTF-8 bytes of those documents

Context. Each document is scored by itself, as if at the start of a model's input: [start, t1, ..., tn], where start is
the tokenizer's BOS, or its EOS if it has no BOS (training separates documents by EOS). Each of t1..tn is predicted
exactly once; neither start nor an end of document is predicted. Neighboring documents are not context, so the result
depends neither on the order of the file nor on the batch size.

Long documents. Windows of `sequence_length` input tokens. Each window after the first begins with `context` tokens
that were predicted before and only serve as context: every token is predicted from all tokens before it in the
document, or from at least `context` + 1 of them.

The first `skip_tokens` tokens of a document may be left out: they are context, and neither they nor their bytes count.
"""

import math
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from moelpr.base.errors import UserError, reports_panics
from moelpr.measure.evaluate.models import LoadedModel
from moelpr.measure.evaluate.routing import Routing, RoutingObserver

DEFAULT_SEQUENCE_LENGTH = 512
# Limit of one batch's logits if no batch size is given. A CPU is fastest while they fit in its caches: a model of 7M
# parameters scored 5,900 tokens/s with 16 MiB and 2,600 with 256 MiB.
LOGITS_BYTES = {"cpu": 16 << 20, "cuda": 2 << 30}
LETTERS_SAMPLE = 100  # documents that are checked for text the tokenizer omits
MAX_LOST_SHARE = 0.01  # fraction of letters; some tokenizers remove a few by normalization
IGNORED = -100  # target of padding and of tokens that are only context


@dataclass(frozen=True)
class Settings:
    """How text is cut into windows and batches."""

    sequence_length: int | None = None  # input tokens per window; None: 512, or the model's maximum if that is less
    context: int | None = None  # overlap with the previous window, in tokens; None: a quarter of the window
    batch_size: int | None = None  # full windows per batch; None: as many as LOGITS_BYTES allows
    skip_tokens: int = 0  # tokens at the start of a document that do not count

    def resolve(self, max_positions: Mapping[str, int | None]) -> "Settings":
        """The same settings for all models, with only the batch size possibly None.

        `max_positions`: model -> longest input in tokens, None for no limit. A UserError if a number is out of range.
        """
        limits = [(limit, name) for name, limit in max_positions.items() if limit is not None]
        longest, narrowest = min(limits, default=(sys.maxsize, ""))
        length = min(DEFAULT_SEQUENCE_LENGTH, longest) if self.sequence_length is None else self.sequence_length
        context = length // 4 if self.context is None else self.context
        if length > longest:
            raise UserError(f"--sequence-length must be at most {longest}, which {narrowest} supports, got {length}")
        if not 0 <= context < length:
            raise UserError(f"--context must be at least 0 and below --sequence-length ({length}), got {context}")
        return replace(self, sequence_length=length, context=context)


def metrics(bits: Any, size: Any, tokens: Any, correct: Any, nats: Any = None) -> dict[str, Any]:
    """Metrics from sums over documents (numbers or arrays), in the order of `LanguageScore`.

    Perplexity, accuracy (fraction of tokens that were the most likely next token) and distance from the base are per
    token, so they cannot be compared between models with different tokenizers.
    """
    with np.errstate(over="ignore"):  # a model that has diverged has an infinite one
        perplexity = np.exp2(bits / tokens)
    per_token = {"perplexity": perplexity, "accuracy": correct / tokens, "bytes_per_token": size / tokens}
    return {"bits_per_byte": bits / size} | per_token | ({} if nats is None else {"distance": nats / tokens})


@dataclass(frozen=True)
class LanguageScore:
    """One model's score on one language. Lists run over documents."""

    document_bits: list[float]  # negative log2-likelihood
    document_bytes: list[int]  # UTF-8
    document_tokens: list[int]
    document_correct: list[int]  # tokens that were the model's most likely next token
    unknown_tokens: int  # tokens that represent text the tokenizer cannot encode
    routing: Routing | None  # None for a dense model
    document_distances: list[float] | None = None  # KL(base‖model) in nats; None without a base

    @property
    def columns(self) -> list[Sequence[float]]:
        """The lists that the metrics are computed from."""
        counts = self.document_bits, self.document_bytes, self.document_tokens, self.document_correct
        return [*counts, *([] if self.document_distances is None else [self.document_distances])]

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of all documents together, see `metrics`."""
        return metrics(*map(sum, self.columns))

    def warning(self, model: str, language: str) -> str:
        """A warning about text that the model's tokenizer cannot encode; "" without such text."""
        share = f"{self.unknown_tokens / sum(self.document_tokens):.1%} of the {language} tokens (unknown tokens)"
        return f"{model} cannot encode {share}; its scores there are unreliable" if self.unknown_tokens else ""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "LanguageScore":
        """Read what `asdict` returned."""
        routing = content["routing"]
        return cls(**{**content, "routing": None if routing is None else Routing(**routing)})


@dataclass(frozen=True)
class Window:
    """Input tokens and their targets: targets[i] follows inputs[i], or is IGNORED. document: its index."""

    document: int
    inputs: list[int]
    targets: list[int]
    starts_document: bool


def cut_into_windows(
    document: int, tokens: list[int], start_id: int, length: int, context: int, skipped: int = 0
) -> Iterator[Window]:
    """Windows of at most `length` inputs whose targets are all of `tokens` but the first `skipped`, each exactly once.

    See the module.
    """
    sequence = [start_id, *tokens]
    predicted = 0  # tokens that have been a target
    while predicted < len(tokens):
        first = max(0, predicted - context)
        last = min(first + length, len(tokens))
        counted = min(last, max(predicted, skipped))
        targets = [IGNORED] * (counted - first) + sequence[counted + 1 : last + 1]
        if counted < last:
            yield Window(document, sequence[first:last], targets, starts_document=first == 0)
        predicted = last


def score_each(
    loaded: LoadedModel, documents: Mapping[str, Sequence[str]], settings: Settings, name: str
) -> Iterator[tuple[str, LanguageScore]]:
    """Score one language after another, and count an MoE's routing, in one forward pass over its documents.

    Args:
        name: The model's name in progress output.

    Raises:
        UserError: The tokenizer returns IDs without an embedding, no tokens for a document, or omits text.
    """
    tokens = {language: tokenize(loaded, language, texts) for language, texts in documents.items()}
    unknown_id = loaded.unknown_id
    skipped = settings.skip_tokens
    total = sum(max(0, len(ids) - skipped) for documents in tokens.values() for ids in documents)
    # disable=None: only on a terminal.
    with tqdm(total=total, desc=name, unit=" tokens", unit_scale=True, leave=False, disable=None) as progress:
        for language, texts in documents.items():
            start, observer = time.monotonic(), RoutingObserver(loaded)
            if skipped >= (longest := max(map(len, tokens[language]))):
                raise UserError(
                    f"--skip-tokens {skipped} leaves nothing of the {language} documents, the longest of which has "
                    f"{longest} tokens; pass a smaller number, or longer documents"
                )
            bits, correct = score_documents(loaded, tokens[language], settings, observer, progress)
            result = LanguageScore(
                document_bits=bits,
                document_bytes=[
                    _bytes_after(loaded, text, ids, skipped) for text, ids in zip(texts, tokens[language], strict=True)
                ],
                document_tokens=[max(0, len(ids) - skipped) for ids in tokens[language]],
                document_correct=correct,
                unknown_tokens=sum(token == unknown_id for ids in tokens[language] for token in ids[skipped:]),
                routing=observer.result(),
            )
            if warning := result.warning(name, language):
                tqdm.write(f"warning: {warning}", file=sys.stderr)
            if progress.disable:  # a log file gets one line per language instead of a bar
                rate = f"{sum(result.document_tokens):,} tokens, {time.monotonic() - start:.1f} s"
                bits_per_byte = result.metrics["bits_per_byte"]
                print(f"{name} {language}: {bits_per_byte:.4f} bits per byte, {rate}", file=sys.stderr, flush=True)
            yield language, result


@reports_panics()
def tokenize(loaded: LoadedModel, language: str, texts: Sequence[str]) -> list[list[int]]:
    """The token IDs of each text; UserError if the model or its tokenizer does not support them."""
    encoded = loaded.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    documents = encoded["input_ids"]
    if empty := [number for number, ids in enumerate(documents, start=1) if not ids]:
        raise UserError(
            f"the tokenizer in {loaded.directory} returns no tokens for {len(empty) / len(documents):.1%} of the "
            f"{language} documents, number {empty[0]} among them; remove them, or use a tokenizer that supports "
            f"{language}"
        )
    if loaded.unknown_id is None:
        # A tokenizer with neither byte tokens nor an unknown token omits text, and the rest would score too well.
        pairs = list(zip(texts, documents, strict=True))[:LETTERS_SAMPLE]
        expected = sum(_num_letters(text) for text, _ in pairs)
        kept = sum(min(_num_letters(text), _num_letters(loaded.tokenizer.decode(ids))) for text, ids in pairs)
        if expected - kept > MAX_LOST_SHARE * expected:
            raise UserError(
                f"the tokenizer in {loaded.directory} omits {1 - kept / expected:.1%} of the letters of {language} "
                f"text, so its bits per byte would be wrong; use a tokenizer that supports {language}"
            )
    largest = max(loaded.start_id, *(max(ids) for ids in documents))
    if largest >= loaded.vocab_size:
        raise UserError(
            f"the tokenizer in {loaded.directory} returns ID {largest} on {language} text, but the model has only "
            f"{loaded.vocab_size} embeddings; use the tokenizer the model was trained with"
        )
    return documents


def _bytes_after(loaded: LoadedModel, text: str, ids: list[int], skipped: int) -> int:
    """UTF-8 bytes of a document without the characters that its first tokens complete."""
    size = len(text.encode("utf-8"))
    if skipped == 0 or skipped >= len(ids):
        return size if skipped == 0 else 0
    return max(0, size - len(loaded.tokenizer.decode(ids[:skipped]).rstrip("\ufffd").encode("utf-8")))


def _num_letters(text: str) -> int:
    """A tokenizer may compose letters: a Korean syllable is written as one letter or as up to three."""
    return sum(character.isalpha() for character in unicodedata.normalize("NFKC", text))


@torch.inference_mode()
def score_documents(
    loaded: LoadedModel, documents: list[list[int]], settings: Settings, observer: RoutingObserver, progress: tqdm
) -> tuple[list[float], list[int]]:
    """Negative log2-likelihood, and number of tokens that were the most likely, of each tokenized document."""
    bits, correct = [0.0] * len(documents), [0] * len(documents)
    for batch in make_batches(loaded, documents, settings):
        inputs, targets, is_routed = make_tensors(batch, loaded.device)
        with observer.observe(is_routed):
            logits = loaded.logits(inputs)
        # Row by row, because the scores of all in fp32 take several times the memory of the logits.
        nats = torch.stack(
            [
                F.cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="none")
                for row, target in zip(logits, targets, strict=True)
            ]
        )
        is_correct = logits.max(dim=-1).indices == targets  # argmax takes 8 times as long on a CPU
        sums = torch.stack([nats.double().sum(dim=1), is_correct.double().sum(dim=1)], dim=1).tolist()
        for window, (window_nats, window_correct) in zip(batch, sums, strict=True):
            bits[window.document] += window_nats / math.log(2)
            correct[window.document] += int(window_correct)
        progress.update(int((targets != IGNORED).sum()))
    return bits, correct


def make_batches(loaded: LoadedModel, documents: list[list[int]], settings: Settings) -> Iterator[list[Window]]:
    """The windows of all documents in batches of similar length, the longest first.

    The rows of a batch times its longest row is at most the batch size times the window, or what LOGITS_BYTES allows.
    """
    length, context = settings.sequence_length, settings.context
    assert length is not None and context is not None
    windows = [
        window
        for number, tokens in enumerate(documents)
        for window in cut_into_windows(number, tokens, loaded.start_id, length, context, settings.skip_tokens)
    ]
    windows.sort(key=lambda window: len(window.inputs), reverse=True)
    if settings.batch_size is not None:
        max_tokens = settings.batch_size * length
    else:
        budget = LOGITS_BYTES.get(loaded.device.type, LOGITS_BYTES["cpu"])
        max_tokens = max(length, budget // (4 * loaded.vocab_size))
    first = 0
    while first < len(windows):
        rows = max(1, max_tokens // len(windows[first].inputs))
        yield windows[first : first + rows]
        first += rows


def make_tensors(batch: list[Window], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets and whether routing is counted, each [rows, longest].

    Routing is counted for tokens that have a target, so not for padding and context, except for the start token, which
    belongs to no language.
    """
    longest = len(batch[0].inputs)
    inputs = torch.tensor([window.inputs + [0] * (longest - len(window.inputs)) for window in batch])
    targets = torch.tensor([window.targets + [IGNORED] * (longest - len(window.targets)) for window in batch])
    is_routed = targets != IGNORED
    is_routed[:, 0] &= ~torch.tensor([window.starts_document for window in batch])
    return inputs.to(device), targets.to(device), is_routed.to(device)
