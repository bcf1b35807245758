"""Bits per byte: how well a model predicts held-out text, comparable between languages and tokenizers.

    bits per byte = − Σ over documents and their tokens of log2 p(token | context)  /  UTF-8 bytes of those documents

Context. A document stands alone, as if at the start of a model's input: [start, t1, ..., tn], where start is the
tokenizer's BOS, or its EOS where it has none (training separates documents by EOS). All of t1..tn are predicted,
each exactly once; neither start nor an end of document is. Neighbouring documents are not context, so the result
depends neither on the order of the file nor on the batch size.

Long documents. Windows of `sequence_length` input tokens. Each window after the first begins with `context` tokens
that were predicted already and only serve as context: every token sees its whole document so far, or at least
`context` + 1 tokens of it.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from moelpr.errors import UserError
from moelpr.evaluate.models import LoadedModel
from moelpr.evaluate.routing import Routing, RoutingObserver

DEFAULT_SEQUENCE_LENGTH = 512
# What one batch's logits may take when no batch size is given. A CPU is fastest while they stay in its caches: a model
# of 7M parameters scored 5,900 tokens/s with 16 MiB and 2,600 with 256.
LOGITS_BYTES = {"cpu": 16 << 20, "cuda": 2 << 30}
LETTERS_SAMPLE = 100  # documents that are looked at for text the tokenizer leaves out
MAX_LOST_SHARE = 0.01  # of letters; some tokenizers normalise a few away
IGNORED = -100  # target of padding and of tokens that are only context


@dataclass(frozen=True)
class Settings:
    """How text is cut and batched. None = chosen from the model."""

    sequence_length: int | None = None  # input tokens of a window; None: 512, or the model's maximum where that is less
    context: int | None = None  # tokens seen again at the start of later windows; None: a quarter of the window
    batch_size: int | None = None  # full windows per batch; None: as many as LOGITS_BYTES allows

    @property
    def identity(self) -> dict[str, int | None]:
        """What results depend on; the batch size only changes how fast they come."""
        return {"sequence_length": self.sequence_length, "context": self.context}

    def resolve(self, max_positions: Mapping[str, int | None]) -> "Settings":
        """The same settings for every model, nothing left open but the batch size.

        max_positions: model -> longest input in tokens that it takes, None where it names no limit.
        """
        limits = {name: limit for name, limit in max_positions.items() if limit is not None}
        narrowest = min(limits, key=lambda name: limits[name], default=None)
        longest = limits[narrowest] if narrowest is not None else None
        length = self.sequence_length
        if length is None:
            length = min(DEFAULT_SEQUENCE_LENGTH, longest or DEFAULT_SEQUENCE_LENGTH)
        context = length // 4 if self.context is None else self.context
        if length < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise UserError("the sequence length and the batch size must be at least 1")
        if longest is not None and length > longest:
            raise UserError(
                f"a sequence length of {length} is too long for {narrowest}: it takes at most {longest} tokens"
            )
        if not 0 <= context < length:
            raise UserError(f"a context of {context} tokens does not fit a sequence length of {length}; give less")
        return Settings(length, context, self.batch_size)


@dataclass(frozen=True)
class LanguageScore:
    """One model on one language's documents."""

    document_bits: list[float]  # negative log2-likelihood of each document
    document_bytes: list[int]
    document_tokens: list[int]
    document_correct: list[int]  # tokens that were the model's likeliest next token
    unknown_tokens: int  # tokens that stand for text the tokenizer cannot write
    routing: Routing | None  # None for a dense model

    @property
    def bits_per_byte(self) -> float:
        return sum(self.document_bits) / sum(self.document_bytes)

    @property
    def perplexity(self) -> float:
        """Per token, so it says nothing between models of different tokenizers."""
        return 2 ** (sum(self.document_bits) / sum(self.document_tokens))

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the likeliest next token; per token, as perplexity."""
        return sum(self.document_correct) / sum(self.document_tokens)

    @property
    def unknown_share(self) -> float:
        return self.unknown_tokens / sum(self.document_tokens)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "LanguageScore":
        routing = content["routing"]
        return cls(**{**content, "routing": None if routing is None else Routing(**routing)})


@dataclass(frozen=True)
class Window:
    """Input tokens and what they must predict: targets[i] follows inputs[i], or is IGNORED."""

    document: int
    inputs: list[int]
    targets: list[int]
    starts_document: bool


def cut_into_windows(document: int, tokens: list[int], start_id: int, length: int, context: int) -> Iterator[Window]:
    """Windows of at most `length` inputs whose targets are all of `tokens`, each exactly once (see the module)."""
    sequence = [start_id, *tokens]
    predicted = 0  # tokens that have been a target so far
    while predicted < len(tokens):
        first = max(0, predicted - context)
        last = min(first + length, len(tokens))
        targets = [IGNORED] * (predicted - first) + sequence[predicted + 1 : last + 1]
        yield Window(document, sequence[first:last], targets, starts_document=first == 0)
        predicted = last


def score(
    loaded: LoadedModel,
    documents: Mapping[str, Sequence[str]],
    settings: Settings | None = None,
    *,
    name: str | None = None,
) -> dict[str, LanguageScore]:
    """All that `score_each` yields."""
    return dict(score_each(loaded, documents, settings, name=name))


def score_each(
    loaded: LoadedModel,
    documents: Mapping[str, Sequence[str]],
    settings: Settings | None = None,
    *,
    name: str | None = None,
) -> Iterator[tuple[str, LanguageScore]]:
    """Scores, and routing where the model is an MoE, language after language: one forward pass over its documents.

    documents: language -> texts. name: what progress calls the model. Raises UserError where the tokenizer gives ids
    that the model has no embedding for, or no tokens for a document.
    """
    name = name or loaded.directory.name
    settings = (settings or Settings()).resolve({name: loaded.max_positions})
    tokens = {language: _tokenize(loaded, language, texts) for language, texts in documents.items()}
    observer = RoutingObserver(loaded)
    with tqdm(
        total=sum(len(ids) for documents in tokens.values() for ids in documents),
        desc=name,
        unit=" tokens",
        unit_scale=True,
        disable=None,  # only on a terminal
        leave=False,
    ) as progress:
        for language, texts in documents.items():
            began = time.monotonic()
            bits, correct = score_documents(loaded, tokens[language], settings, observer, progress)
            result = LanguageScore(
                document_bits=bits,
                document_bytes=[len(text.encode("utf-8")) for text in texts],
                document_tokens=[len(ids) for ids in tokens[language]],
                document_correct=correct,
                unknown_tokens=_count_unknown(loaded, tokens[language]),
                routing=observer.result(),
            )
            observer.reset()
            _log(name, language, result, time.monotonic() - began, progress)
            yield language, result


def _tokenize(loaded: LoadedModel, language: str, texts: Sequence[str]) -> list[list[int]]:
    encoded = loaded.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    documents = encoded["input_ids"]
    if empty := [number for number, ids in enumerate(documents, start=1) if not ids]:
        raise UserError(
            f"the tokenizer in {loaded.directory} makes no token of {len(empty) / len(documents):.1%} of the "
            f"{language} documents, number {empty[0]} among them; remove them, or use a tokenizer that knows {language}"
        )
    _refuse_lost_letters(loaded, language, texts, documents)
    largest = max(max(ids) for ids in documents)
    if max(largest, loaded.start_id) >= loaded.vocab_size:
        raise UserError(
            f"the tokenizer in {loaded.directory} gives the id {max(largest, loaded.start_id)} on {language} text, but "
            f"the model has only {loaded.vocab_size} embeddings; use the tokenizer the model was trained with"
        )
    return documents


def _unknown_id(loaded: LoadedModel) -> int | None:
    """None where the tokenizer has no token for what it cannot write."""
    unknown_id = loaded.tokenizer.unk_token_id
    # A tokenizer that names its EOS as unknown token (GPT-2, Qwen2) never has to use it.
    return None if unknown_id == loaded.eos_id else unknown_id


def _count_unknown(loaded: LoadedModel, documents: list[list[int]]) -> int:
    unknown_id = _unknown_id(loaded)
    return 0 if unknown_id is None else sum(ids.count(unknown_id) for ids in documents)


def _refuse_lost_letters(loaded: LoadedModel, language: str, texts: Sequence[str], documents: list[list[int]]) -> None:
    """A tokenizer without bytes and without an unknown token leaves text out; the bits of the rest would look good."""
    if _unknown_id(loaded) is not None:
        return
    pairs = list(zip(texts, documents, strict=True))[:LETTERS_SAMPLE]
    wanted = sum(map(_num_letters, texts[:LETTERS_SAMPLE]))
    found = sum(min(_num_letters(text), _num_letters(loaded.tokenizer.decode(ids))) for text, ids in pairs)
    if wanted - found > MAX_LOST_SHARE * wanted:
        raise UserError(
            f"the tokenizer in {loaded.directory} leaves out {1 - found / wanted:.1%} of the letters of {language} "
            f"text, so its bits per byte would mean nothing; use a tokenizer that can write {language}"
        )


def _num_letters(text: str) -> int:
    return sum(character.isalpha() for character in text)


@torch.inference_mode()
def score_documents(
    loaded: LoadedModel, documents: list[list[int]], settings: Settings, observer: RoutingObserver, progress: tqdm
) -> tuple[list[float], list[int]]:
    """Negative log2-likelihood, and number of tokens that were the likeliest, of each document."""
    bits, correct = [0.0] * len(documents), [0] * len(documents)
    for batch in make_batches(loaded, documents, settings):
        inputs, targets, is_routed = make_tensors(batch, loaded.device)
        with observer.observe(is_routed):
            logits = loaded.logits(inputs)
        nats = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(targets)
        is_correct = logits.max(dim=-1).indices == targets  # argmax takes 8 times as long on a CPU
        sums = torch.stack([nats.double().sum(dim=1), is_correct.double().sum(dim=1)], dim=1).tolist()
        for window, (window_nats, window_correct) in zip(batch, sums, strict=True):
            bits[window.document] += window_nats / math.log(2)
            correct[window.document] += int(window_correct)
        progress.update(int((targets != IGNORED).sum()))
    return bits, correct


def make_batches(loaded: LoadedModel, documents: list[list[int]], settings: Settings) -> Iterator[list[Window]]:
    """The windows of all documents, those of similar length together."""
    assert settings.sequence_length is not None and settings.context is not None
    windows = [
        window
        for number, tokens in enumerate(documents)
        for window in cut_into_windows(number, tokens, loaded.start_id, settings.sequence_length, settings.context)
    ]
    return _batches(windows, _tokens_per_batch(loaded, settings))


def _tokens_per_batch(loaded: LoadedModel, settings: Settings) -> int:
    assert settings.sequence_length is not None
    if settings.batch_size is not None:
        return settings.batch_size * settings.sequence_length
    budget = LOGITS_BYTES.get(loaded.device.type, LOGITS_BYTES["cpu"])
    return max(settings.sequence_length, budget // (4 * loaded.vocab_size))


def _batches(windows: list[Window], max_tokens: int) -> Iterator[list[Window]]:
    """Windows of similar length together, the longest first; a batch's rows × longest row is at most `max_tokens`."""
    windows = sorted(windows, key=lambda window: len(window.inputs), reverse=True)
    first = 0
    while first < len(windows):
        rows = max(1, max_tokens // len(windows[first].inputs))
        yield windows[first : first + rows]
        first += rows


def make_tensors(batch: list[Window], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets and "its routing counts", each [rows, longest].

    Routing counts where a prediction counts, so that padding and what is seen again as context do not, except for the
    start token, which is no text of any language.
    """
    longest = len(batch[0].inputs)
    inputs = torch.tensor([window.inputs + [0] * (longest - len(window.inputs)) for window in batch])
    targets = torch.tensor([window.targets + [IGNORED] * (longest - len(window.targets)) for window in batch])
    is_routed = targets != IGNORED
    is_routed[:, 0] &= ~torch.tensor([window.starts_document for window in batch])
    return inputs.to(device), targets.to(device), is_routed.to(device)


def _log(name: str, language: str, score: LanguageScore, seconds: float, progress: tqdm) -> None:
    tokens = sum(score.document_tokens)
    if score.unknown_tokens:
        tqdm.write(
            f"warning: {name} cannot write {score.unknown_share:.1%} of the {language} tokens (unknown tokens); its "
            "numbers there say little",
            file=sys.stderr,
        )
    if progress.disable:  # a log file gets a line a language instead of a bar
        print(
            f"{name} {language}: {score.bits_per_byte:.4f} bits per byte, {tokens:,} tokens, {seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )
