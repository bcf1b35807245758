"""The tokenizer of a preprocessing job: loaded once, and run by its own library or by gigatoken."""

import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import chain, groupby
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from data_tools.preprocessing.workers import started_pool
from moelpr.data.manifest import TokenizerRecord
from moelpr.data.tokenizer import Tokenizer, load_tokenizer
from moelpr.process.command import deferred_signals
from moelpr.process.errors import UserError, reports_panics

# gigatoken caches every word it has seen; above this size a worker drops its cache.
_CACHE_BYTES = 64 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Where tokenizer libraries may differ: white space, digits, case, scripts, controls, emoji, special tokens.
PROBES = [
    *("", " ", "\n", "\t \n\n  x", "a  b   c    d", " leading", "trailing ", "x\r\ny\r\rz"),
    *("\u00a0\u2003\u3000|\u200b", "\0\1\x7f\x85\u2028\ufeff\ufffd\U0010ffff", "\ufb01 \uff2b \u212b A\u030a e\u0301"),
    *("12345678901234567890", "3.14, 1,000,000 and ¼ ² Ⅷ ٣", "It's we'll I'M THEY'RE o'clock 'tis 's"),
    *("Ανάψτε το φως", "打开厨房的灯。你好世界", "ไทยไม่มีช่องว่าง", "हिन्दी में", "العربية", "한국어 띄어쓰기"),
    *("👩‍👩‍👧‍👦 🇬🇷 ☃️", "CamelCase snake_case", "#!/usr/bin/env -S a=`b` && c || (d) {e} [f];", "-" * 100),
    *("<s> </s> <unk>", "a<|endoftext|>b <|im_start|> <0x41> ▁"),
]  # fmt: skip


class Encoded(NamedTuple):
    """Token IDs of several texts, concatenated.

    Attributes:
        ids: int32 [tokens].
        lengths: tokens of each text, int64 [texts].
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]


_NOTHING = Encoded(np.zeros(0, np.int32), np.zeros(0, np.int64))


class Piece(NamedTuple):
    """Tokens of a part of a text.

    Attributes:
        ids: int32 [tokens].
        starts: the character of the text that contains each token's first byte, int64 [tokens].
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]


class Backend(Protocol):
    """A tokenizer library. It does not add the tokens that a tokenizer puts around a text. Can be pickled."""

    name: str

    def encode(self, texts: list[str]) -> Encoded: ...

    def encode_with_starts(self, text: str) -> Piece: ...


class HuggingFaceBackend:
    """The `tokenizers` library, loaded from the content of a tokenizer.json file.

    With `splits_special_tokens`, special tokens that occur in a text are encoded as ordinary text.
    """

    name = "tokenizers"

    def __init__(self, tokenizer_json: str, splits_special_tokens: bool) -> None:
        from tokenizers import Tokenizer

        self._arguments = tokenizer_json, splits_special_tokens
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = splits_special_tokens
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.added_tokens = [token.content for token in added]
        #: Special tokens that text never becomes.
        self.split_tokens = [token.content for token in added if token.special and splits_special_tokens]
        # A post-processor adds tokens around a text, which the encoder does itself, and trims spaces off the offsets.
        self._tokenizer.post_processor = None

    def __reduce__(self) -> tuple[type[Self], tuple[str, bool]]:
        return type(self), self._arguments

    def encode(self, texts: list[str]) -> Encoded:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return _concatenate([encoding.ids for encoding in encodings])

    def encode_with_starts(self, text: str) -> Piece:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        starts = np.fromiter((start for start, _ in encoding.offsets), np.int64, len(encoding.ids))
        return Piece(np.array(encoding.ids, np.int32), starts)


class SentencePieceBackend:
    """The `sentencepiece` library, loaded from the content of a .model file."""

    name = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_proto=model)
        ids = range(self._processor.get_piece_size())
        #: Tokens that text never becomes: "<s>" in a text is three characters.
        self.control_tokens = [self._processor.id_to_piece(id) for id in ids if self._processor.is_control(id)]

    def encode(self, texts: list[str]) -> Encoded:
        arrays: list[NDArray[np.int32]] = self._processor.encode(texts, return_type="numpy", num_threads=1)
        return Encoded(np.concatenate([_NOTHING.ids, *arrays]), np.array([*map(len, arrays)], np.int64))

    def encode_with_starts(self, text: str) -> Piece:
        mapping = self._processor.encode(text, return_type="offset_mapping")
        starts = np.fromiter((start for start, _ in mapping["offsets"]), np.int64, len(mapping["ids"]))
        return Piece(np.array(mapping["ids"], np.int32), starts)


class SlowHuggingFaceBackend:
    """A `transformers` tokenizer written in Python, used if there is no other."""

    name = "transformers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: list[str]) -> Encoded:
        return _concatenate(self._tokenizer.encode_batch(texts, False) if texts else [])

    def encode_with_starts(self, text: str) -> Piece:
        raise UserError(
            "the tokenizer has no tokenizer.json, so token offsets are unavailable; spans and long texts require them, "
            "so convert it to a fast tokenizer"
        )


class GigatokenBackend:
    """gigatoken, used in place of a reference library that gives the same IDs.

    Args:
        source: content of a tokenizer.json (str) or .model file (bytes).
        reference: the library it replaces.

    Raises:
        Exception: gigatoken does not support the tokenizer.
    """

    name = "gigatoken"

    def __init__(self, source: str | bytes, reference: Backend) -> None:
        self._source = source
        self._reference = reference
        self._tokenizer: Any = self._load()
        self._full_at_bytes = 0
        # gigatoken turns a control token's name in a text into the token. SentencePiece encodes it as text, as does a
        # Hugging Face tokenizer with `split_special_tokens`. And for SentencePiece, gigatoken 0.10 drops a next-line
        # character at a text's end and Khmer's inherent vowels after some characters.
        self._unsupported: list[str] = []
        if isinstance(reference, HuggingFaceBackend):
            self._unsupported = reference.split_tokens
        if isinstance(reference, SentencePieceBackend):
            self._unsupported = [*reference.control_tokens, "\x85", "\u17b4", "\u17b5"]

    def encode(self, texts: list[str]) -> Encoded:
        groups = groupby(texts, lambda text: any(token in text for token in self._unsupported))
        parts = [(self._reference.encode if slow else self._encode)(list(group)) for slow, group in groups]
        return parts[0] if len(parts) == 1 else Encoded(*map(np.concatenate, zip(_NOTHING, *parts, strict=True)))

    def encode_with_starts(self, text: str) -> Piece:
        return self._reference.encode_with_starts(text)

    def agrees(self, texts: list[str]) -> bool:
        """Return whether the IDs of these texts are the reference's."""
        ours, theirs = self.encode(texts), self._reference.encode(texts)
        return np.array_equal(ours.lengths, theirs.lengths) and np.array_equal(ours.ids, theirs.ids)

    def _encode(self, texts: list[str]) -> Encoded:
        if self._full_at_bytes and _resident_bytes() > self._full_at_bytes:
            self._tokenizer = None  # first, so that there are never two
            self._tokenizer = self._load()
            # Measure again: other memory has grown too (pages no longer shared with the parent) and must not trigger
            # another reload.
            self._full_at_bytes = 0
        if not self._full_at_bytes:
            self._full_at_bytes = _resident_bytes() + _CACHE_BYTES
        # A worker has one core; the library's own threads did not survive the fork.
        with deferred_signals():  # the library calls Python, and panics at its exceptions
            rows = self._tokenizer.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(rows.offsets.data)
        ids = np.asarray(rows.content.data)[: offsets[-1]]
        return Encoded(ids.astype(np.int32), np.diff(offsets).astype(np.int64))

    def _load(self) -> Any:
        import gigatoken

        if isinstance(self._source, bytes):
            return gigatoken.Tokenizer.from_sentencepiece(self._source)
        return gigatoken.Tokenizer.from_json(self._source)


def choose_backend(
    reference: Backend, source: str | bytes | None, sample: list[str], is_required: bool
) -> tuple[Backend, str | None]:
    """Choose gigatoken if it gives the reference's IDs, else the reference.

    Args:
        source: what gigatoken can load; None if the tokenizer is of another kind.
        sample: texts of the corpus, on which both libraries must agree.

    Returns:
        The backend, and the reason why it is not gigatoken.

    Raises:
        UserError: gigatoken is required but can't be used.
    """
    try:
        if source is None:
            raise ValueError("it has no tokenizer.json")
        with warnings.catch_warnings(action="ignore"):
            fast = GigatokenBackend(source, reference)
        added = reference.added_tokens if isinstance(reference, HuggingFaceBackend) else []
        if fast.agrees([*PROBES, *(f"a{token}b {token} c" for token in added), *sample]):
            return fast, None
        reason = "it gives different IDs for some texts"
    except ImportError:
        reason = "it is not installed (extra fast-tokenizer, docs/install.md)"
    except Exception as error:  # gigatoken's own, of many kinds
        message, _, _ = str(error).partition("Location:")  # in its source
        reason = f"it does not support this tokenizer ({' '.join(message.split())[:150]})"
    if is_required:
        raise UserError(f"--tokenizer-backend gigatoken is unavailable: {reason}; remove the flag")
    return reference, reason


class JobTokenizer(NamedTuple):
    """What a job needs of a tokenizer.

    Attributes:
        backend: the library that the tokenizer was made for.
        source: content of a tokenizer.json (str) or .model file (bytes); None if the tokenizer is of another kind.
        prefix, suffix: IDs added before and after each text.
    """

    record: TokenizerRecord
    backend: Backend
    source: str | bytes | None
    prefix: list[int]
    suffix: list[int]


def load_job_tokenizer(type: str, model: str, special_tokens: bool, eod_token: str | None) -> JobTokenizer:
    """Load a tokenizer in a separate process, so that workers do not inherit the imports of transformers.

    Raises:
        UserError: The tokenizer can't be loaded, or has no token `eod_token`.
    """
    with started_pool(1) as pool:
        try:
            return pool.submit(_load, type, model, special_tokens, eod_token).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"the process that loads the tokenizer {model} was killed, probably out of memory; free some memory"
            ) from error


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Rust prints a panic, with a stack trace, before it raises it. In a process of its own, nothing else is lost."""
    before, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nothing)


@reports_panics()
def _load(type: str, model: str, special_tokens: bool, eod_token: str | None) -> JobTokenizer:
    if "torch" not in sys.modules:
        # transformers imports torch if it is installed, which takes a second; a tokenizer doesn't need it.
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # nor the warning that torch is missing
    tokenizer = load_tokenizer(type, model, special_tokens, must_keep_text=True)
    eod_id = tokenizer.eod_id
    if eod_token is not None:
        vocabulary = tokenizer.vocabulary()
        if eod_token not in vocabulary:
            near = get_close_matches(eod_token, [name for name in vocabulary if name[:1] in "<[|"], 3, 0.5)
            hint = f"; similar tokens are {', '.join(near)}" if near else ""
            raise UserError(f"--eod-token {eod_token} is not in the tokenizer's vocabulary{hint}")
        eod_id = vocabulary[eod_token]
    record = TokenizerRecord.of(type, model, tokenizer, eod_id, special_tokens)
    source = tokenizer.serialized()
    backend: Backend = SlowHuggingFaceBackend(tokenizer)
    if isinstance(source, str):
        try:
            with _without_stderr():
                backend = HuggingFaceBackend(source, tokenizer.splits_special_tokens)
        except Exception as error:  # tokenizers raises no other
            raise UserError(f"the tokenizer in {model} is damaged ({error}); download it again") from error
    elif source is not None:
        backend = SentencePieceBackend(source)
    return JobTokenizer(record, backend, source, *_added_ids(tokenizer, model))


def _added_ids(tokenizer: Tokenizer, model: str) -> tuple[list[int], list[int]]:
    """Return the IDs that a tokenizer adds before and after each text."""
    [added] = tokenizer.encode_batch([""])
    [inside], [full] = tokenizer.encode_batch(["x"], False), tokenizer.encode_batch(["x"])
    for length in range(len(added) + 1):
        if full == [*added[:length], *inside, *added[length:]]:
            return added[:length], added[length:]
    raise UserError(
        f"the tokenizer {model} adds different tokens to different texts; pass --tokenizer-hf-no-include-special-tokens"
    )


def _concatenate(ids: list[list[int]]) -> Encoded:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return Encoded(np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES
