"""gigatoken: a library that is several times as fast, used wherever it gives the same IDs."""

import os
import warnings
from itertools import groupby
from typing import Any

import numpy as np

from moelpr.base.command import deferred_signals
from moelpr.base.errors import UserError, reports_panics
from moelpr.data.tokenizers.base import Encoded, Tokenizer
from moelpr.data.tokenizers.libraries import SentencePieceTokenizer

# gigatoken caches every word it has seen; above this size a worker drops its cache.
_CACHE_BYTES = 64 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Texts on which libraries may differ: white space, digits, case, scripts, controls, emoji and special tokens.
PROBES = """\
a  b   c    d
 leading
trailing\x20
12345678901234567890
3.14, 1,000,000 and ¼ ² Ⅷ ٣
It's we'll I'M THEY'RE o'clock 'tis 's
Ανάψτε το φως
打开厨房的灯。你好世界
ไทยไม่มีช่องว่าง
हिन्दी में
العربية
한국어 띄어쓰기
👩‍👩‍👧‍👦 🇬🇷 ☃️
CamelCase snake_case
#!/usr/bin/env -S a=`b` && c || (d) {e} [f];
<s> </s> <unk>
a<|endoftext|>b <|im_start|> <0x41> ▁""".split("\n")
PROBES += ["", " ", "\n", "\t \n\n  x", "x\r\ny\r\rz", "-" * 100, "\u00a0\u2003\u3000|\u200b"]
PROBES += ["\0\1\x7f\x85\u2028\ufeff\ufffd\U0010ffff", "\ufb01 \uff2b \u212b A\u030a e\u0301"]


class Gigatoken:
    """gigatoken, which encodes in place of a reference tokenizer if it gives the same IDs.

    Raises:
        Exception: gigatoken does not support the tokenizer.
    """

    def __init__(self, reference: Tokenizer) -> None:
        self._reference = reference
        self._tokenizer: Any = self._load()
        self._full_at_bytes = 0
        # gigatoken turns the name of a special token in a text into the token. For SentencePiece, gigatoken 0.10 also
        # drops a next-line character at a text's end and Khmer's inherent vowels after some characters.
        lost = ["\x85", "\u17b4", "\u17b5"] if isinstance(reference, SentencePieceTokenizer) else []
        self._unsupported = [*reference.literal_tokens, *lost]

    def encode(self, texts: list[str]) -> Encoded:
        """Encode texts like `Tokenizer.encode`."""
        groups = groupby(texts, lambda text: any(token in text for token in self._unsupported))
        parts = [(self._reference.encode if slow else self._encode)(list(group)) for slow, group in groups]
        return parts[0] if len(parts) == 1 else Encoded(*map(np.concatenate, zip(Encoded.of([]), *parts, strict=True)))

    def agrees(self, texts: list[str]) -> bool:
        """Return whether the IDs of these texts are the reference's."""
        ours, theirs = self.encode(texts), self._reference.encode(texts)
        return np.array_equal(ours.lengths, theirs.lengths) and np.array_equal(ours.ids, theirs.ids)

    def _encode(self, texts: list[str]) -> Encoded:
        if self._full_at_bytes and _resident_bytes() > self._full_at_bytes:
            self._tokenizer = None  # first, so that there are never two
            self._tokenizer = self._load()
            # The limit is measured again: other memory has grown too (pages that are no longer shared with the parent)
            # and must not trigger another reload.
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

        source = self._reference.source
        if isinstance(source, str):
            return gigatoken.Tokenizer.from_json(source)
        return gigatoken.Tokenizer.from_sentencepiece(source)


@reports_panics()
def load_gigatoken(reference: Tokenizer, sample: list[str], is_required: bool) -> tuple[Gigatoken | None, str]:
    """Return gigatoken if it gives the reference's IDs, or the reason why it is not used.

    Args:
        sample: Texts of the corpus, on which both libraries must agree.

    Raises:
        UserError: gigatoken is required but can't be used.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            fast = Gigatoken(reference)
        if fast.agrees([*PROBES, *(f"a{token}b {token} c" for token in reference.added_tokens), *sample]):
            return fast, ""
        reason = "it gives different IDs for some texts"
    except ImportError:
        reason = "it is not installed (extra fast-tokenizer, docs/install.md)"
    except Exception as error:  # gigatoken's own, of many kinds
        message, _, _ = str(error).partition("Location:")  # in its source
        reason = f"it does not support this tokenizer ({' '.join(message.split())[:150]})"
    if is_required:
        raise UserError(f"--tokenizer-backend gigatoken is unavailable: {reason}; remove the flag")
    return None, reason


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES
