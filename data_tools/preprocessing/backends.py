"""What turns texts into ids: the tokenizer's own library, or gigatoken where it gives the same ids."""

import os
import warnings
from itertools import chain, groupby
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moelpr.errors import UserError

# gigatoken remembers every word it has seen; beyond this a worker forgets them.
_CACHE_BYTES = 64 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# What tokenizers differ in, if they do: white space, digits, case, scripts, controls, emoji, special tokens.
PROBES = [
    *("", " ", "\n", "\t \n\n  x", "a  b   c    d", " leading", "trailing ", "x\r\ny\r\rz"),
    *("\u00a0\u2003\u3000|\u200b", "\0\1\x7f\x85\u2028\ufeff\ufffd\U0010ffff", "\ufb01 \uff2b \u212b A\u030a e\u0301"),
    *("12345678901234567890", "3.14, 1,000,000 and ¼ ² Ⅷ ٣", "It's we'll I'M THEY'RE o'clock 'tis 's"),
    *("Ανάψτε το φως", "打开厨房的灯。你好世界", "ไทยไม่มีช่องว่าง", "हिन्दी में", "العربية", "한국어 띄어쓰기"),
    *("👩‍👩‍👧‍👦 🇬🇷 ☃️", "CamelCase snake_case", "#!/usr/bin/env -S a=`b` && c || (d) {e} [f];", "-" * 100),
    *("<s> </s> <unk>", "a<|endoftext|>b <|im_start|> <0x41> ▁"),
]  # fmt: skip


class Encoded(NamedTuple):
    """Token ids of texts, one after another.

    Attributes:
        ids: int32 [tokens].
        lengths: tokens of each text: int64 [texts].
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]


class Backend(Protocol):
    """Encodes texts without the tokens that a tokenizer puts around them."""

    name: str

    def encode(self, texts: list[str]) -> Encoded: ...

    def encode_with_starts(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """A text's ids, and for each the character that holds its first byte: [tokens] each."""
        ...


class HuggingFaceBackend:
    """The `tokenizers` library.

    Args:
        backend_json: a tokenizer.json's content.
        splits_special_tokens: special tokens in a text are text.
    """

    name = "tokenizers"

    def __init__(self, backend_json: str, splits_special_tokens: bool) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(backend_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = splits_special_tokens
        # Post-processors add tokens around a text, which is done elsewhere, and cut spaces off the offsets.
        self._tokenizer.post_processor = None

    def encode(self, texts: list[str]) -> Encoded:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return _joined([encoding.ids for encoding in encodings])

    def encode_with_starts(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        starts = np.fromiter((start for start, _ in encoding.offsets), np.int64, len(encoding.ids))
        return np.array(encoding.ids, np.int32), starts


class SentencePieceBackend:
    """The `sentencepiece` library, from a .model file's content."""

    name = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_proto=model)
        processor = self._processor
        ids = range(processor.get_piece_size())
        #: Tokens that no text becomes: "<s>" in a text is three characters.
        self.control_tokens = [processor.id_to_piece(id) for id in ids if processor.is_control(id)]

    def encode(self, texts: list[str]) -> Encoded:
        arrays: list[NDArray[np.int32]] = self._processor.encode(texts, return_type="numpy", num_threads=1)
        lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
        return Encoded(np.concatenate(arrays) if arrays else np.zeros(0, np.int32), lengths)

    def encode_with_starts(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        mapping = self._processor.encode(text, return_type="offset_mapping")
        starts = np.fromiter((start for start, _ in mapping["offsets"]), np.int64, len(mapping["ids"]))
        return np.array(mapping["ids"], np.int32), starts


class SlowHuggingFaceBackend:
    """A `transformers` tokenizer in Python, where there is no other."""

    name = "transformers"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: list[str]) -> Encoded:
        return _joined(
            self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            if texts
            else []
        )

    def encode_with_starts(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        raise UserError(
            "the tokenizer has no tokenizer.json, so nobody can tell where its tokens begin; spans and long texts need "
            "that, so convert it to a fast one"
        )


class GigatokenBackend:
    """gigatoken, checked against the library it stands in for.

    Args:
        source: a tokenizer.json's content, or a .model file's.
        reference: what it stands in for.

    Raises:
        Exception: gigatoken doesn't support the tokenizer; it raises what it likes.
    """

    name = "gigatoken"

    def __init__(self, source: str | bytes, reference: Backend) -> None:
        self._source = source
        self._reference = reference
        self._tokenizer: Any = self._load()
        self._full_at_bytes = 0
        # gigatoken takes a control token's name in a text for the token, SentencePiece takes it for text; and gigatoken
        # 0.10 drops a next-line character at a text's end.
        self._not_for_it = [*reference.control_tokens, "\x85"] if isinstance(reference, SentencePieceBackend) else []

    def encode(self, texts: list[str]) -> Encoded:
        if any(token in text for text in texts for token in self._not_for_it):
            groups = groupby(texts, lambda text: any(token in text for token in self._not_for_it))
            parts = [
                self._reference.encode(list(group)) if is_not_for_it else self._encode(list(group))
                for is_not_for_it, group in groups
            ]
            return Encoded(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        return self._encode(texts)

    def encode_with_starts(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return self._reference.encode_with_starts(text)

    def agrees(self, texts: list[str]) -> bool:
        """Whether the ids of these texts are the reference's."""
        ours, theirs = self.encode(texts), self._reference.encode(texts)
        return np.array_equal(ours.lengths, theirs.lengths) and np.array_equal(ours.ids, theirs.ids)

    def _encode(self, texts: list[str]) -> Encoded:
        resident_bytes = _resident_bytes()
        if self._full_at_bytes and resident_bytes > self._full_at_bytes:
            self._tokenizer = None  # first, so that there are never two
            self._tokenizer = self._load()
            # What else has grown since (pages shared with the parent no longer are) is not to be forgotten again and
            # again: the count starts afresh.
            self._full_at_bytes = 0
            resident_bytes = _resident_bytes()
        if not self._full_at_bytes:
            self._full_at_bytes = resident_bytes + _CACHE_BYTES
        # A worker has one core; the library's own threads did not survive the fork.
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
    reference: Backend, source: str | bytes | None, sample: list[str], is_wanted: bool
) -> tuple[Backend, str | None]:
    """gigatoken where it can stand in for the reference, else the reference and the reason.

    Args:
        source: what gigatoken can load; None: the tokenizer is of neither kind.
        sample: texts of the corpus, which both must give the same ids.
        is_wanted: nothing else will do.

    Raises:
        UserError: gigatoken is wanted and can't be used.
    """
    try:
        if source is None:
            raise ValueError("it has no tokenizer.json")
        with warnings.catch_warnings(action="ignore"):
            fast = GigatokenBackend(source, reference)
        if fast.agrees([*PROBES, *sample]):
            return fast, None
        reason = "it gives some texts other ids"
    except ImportError:
        reason = "it is not installed (pip install 'moelpr[fast-tokenizer]')"
    except Exception as error:  # gigatoken's own, of many kinds
        reason = f"it does not support this tokenizer ({' '.join(str(error).split())[:150]})"
    if is_wanted:
        raise UserError(f"--tokenizer-backend gigatoken can't be had: {reason}; leave the flag out")
    return reference, reason


def _joined(ids: list[list[int]]) -> Encoded:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return Encoded(np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES
