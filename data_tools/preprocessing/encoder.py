"""From a batch of lines to token ids, language bits and counts; lives in the workers."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus_writer import Documents, as_tokens
from data_tools.preprocessing.backends import Backend, Encoded, GigatokenBackend
from data_tools.preprocessing.detection import Detector
from data_tools.preprocessing.languages import UNDETECTED, Bits, TaggedText, Tagger
from data_tools.preprocessing.long_texts import LONG_TEXT_CHARACTERS, Piece, encode_long_text
from data_tools.preprocessing.readers import Batch, LinesAt, Place
from data_tools.preprocessing.tally import Tally
from moelpr.documents import BadLine, parse
from moelpr.errors import UserError

VALIDATION = "validation"
# A document that is worth being encoded twice, to see that the fast library still agrees.
_SPOT_CHECK_CHARACTERS = 1000


class PreparedText(NamedTuple):
    """A text, and of a long one its tokens."""

    tagged: TaggedText
    tokens: Piece | None


@dataclass
class EncodedBatch:
    """A batch's documents, in the order of their lines.

    Attributes:
        documents: by corpus.
        problems: a sentence per broken line that was skipped.
        after, num_bytes, file_bytes: the batch's.
    """

    documents: dict[str, Documents]
    tally: Tally
    after: Place
    num_bytes: int
    file_bytes: int
    problems: list[str] = field(default_factory=list)


@dataclass
class Encoder:
    """Turns lines into token ids.

    Attributes:
        keys: by dataset, the keys of the texts that go into each of `corpora`.
        corpora: names of the corpora, one per key; validation documents go into "<name> validation".
        prefix, suffix: ids around each text.
        eod_id: the id behind each document; None: none.
        skips_bad_lines: broken lines are counted; else they raise.
        skips_undetected: documents of uncertain language are left out.
        validation_share: of the documents, 0 to 1.
        seed: for drawing them.
        auditor: tells languages for comparison with those stated.
    """

    backend: Backend
    vocab_size: int
    prefix: list[int]
    suffix: list[int]
    eod_id: int | None
    tagger: Tagger
    bits: Bits
    keys: list[list[str]]
    corpora: list[str]
    skips_bad_lines: bool = False
    skips_undetected: bool = False
    validation_share: float = 0.0
    seed: int = 0
    auditor: Detector | None = None

    def encode(self, batch: Batch) -> EncodedBatch:
        """Encode a batch.

        Raises:
            UserError: the first line that can't be used, unless bad lines are skipped.
        """
        tally = Tally()
        texts: dict[str, list[PreparedText]] = {name: [] for name in self.corpora}
        if self.validation_share:
            texts |= {f"{name} {VALIDATION}": [] for name in self.corpora}
        problems: list[str] = []
        for index, item in enumerate(batch.items()):
            if isinstance(item, bytes) and (not item or item.isspace()):
                continue
            tally.num_read += 1
            try:
                found = [self.prepared(text) for text in self.texts(item, batch.share.source.dataset)]
            except BadLine as error:
                problems.append(self.problem(batch, index, error))
                continue
            if self.skips_undetected and any(name == UNDETECTED for text in found for name, _ in text.tagged.spans):
                tally.num_undetected += 1
                continue
            suffix = self.part([found[0].tagged.text])
            for name, text in zip(self.corpora, found, strict=True):
                texts[name + suffix].append(text)
            self.audit(found[0].tagged, tally)
        tally.num_skipped, tally.problems = len(problems), problems
        documents = {}
        for name, group in texts.items():
            documents[name] = self.documents(group, name, tally)
            tally.corpus(name).sources[batch.share.source.path] += len(group)
        self._spot_check([text.tagged.text for group in texts.values() for text in group])
        if isinstance(batch.content, LinesAt) and batch.content.is_temporary:
            os.unlink(batch.content.path)
        return EncodedBatch(documents, tally, batch.after, batch.num_bytes, batch.file_bytes, problems)

    def texts(self, item: bytes | dict[str, Any], dataset: int) -> list[TaggedText]:
        """A line's or row's texts, one per corpus.

        Raises:
            BadLine: it can't be used.
        """
        keys = self.keys[dataset]
        document = parse(item, [*keys, *self.tagger.columns()]) if isinstance(item, bytes) else item
        return self.tagger.texts(document, dataset, keys)

    def prepared(self, text: TaggedText) -> PreparedText:
        """A text, encoded already where it is long.

        Raises:
            BadLine: it can't be encoded.
        """
        if len(text.text) <= LONG_TEXT_CHARACTERS:
            return PreparedText(text, None)
        pieces = list(encode_long_text(self.backend, [text.text]))
        return PreparedText(text, Piece(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True))))

    def problem(self, batch: Batch, index: int, error: BadLine) -> str:
        """A sentence about a broken line.

        Raises:
            UserError: with it, unless bad lines are skipped.
        """
        problem = f"{batch.where(index)}: {error}"
        if not self.skips_bad_lines:
            raise UserError(f"{problem}; mend the line or pass --on-error skip") from None
        return problem

    def part(self, text: Iterable[str]) -> str:
        """What a document's text, which comes in parts, adds to the name of its corpus.

        It decides by itself: whatever the order and the number of jobs, and copies of a text never part.
        """
        if not self.validation_share:
            return ""
        drawn = hashlib.blake2b(digest_size=8, salt=self.seed.to_bytes(16, "little"))
        for characters in text:
            drawn.update(characters.encode())
        is_validation = int.from_bytes(drawn.digest(), "little") < self.validation_share * (1 << 64)
        return f" {VALIDATION}" if is_validation else ""

    def audit(self, text: TaggedText, tally: Tally) -> None:
        """Count the language stated and the one detected."""
        if self.auditor is not None:
            stated = "+".join(sorted({name for name, _ in text.spans}))
            tally.audit.setdefault(stated, Counter())[self.auditor.language(text.text)] += 1

    def documents(self, texts: list[PreparedText], corpus: str, tally: Tally) -> Documents:
        """Encode texts that go into one corpus, and count them."""
        is_plain = [len(text.tagged.spans) == 1 and text.tokens is None for text in texts]
        counts = tally.corpus(corpus)
        if all(is_plain):
            encoded = self._wrapped(self.backend.encode([text.tagged.text for text in texts]))
            languages = [text.tagged.spans[0][0] for text in texts]
            runs = (
                np.fromiter((name in self.bits.original for name in languages), np.uint8, len(texts)),
                encoded.lengths,
            )
            for name, text, length in zip(languages, texts, encoded.lengths.tolist(), strict=True):
                count = counts.count(name, self.bits)
                count.documents += 1
                count.tokens += length
                count.bytes += len(text.tagged.text.encode())
        else:
            pieces = [self._document(text, corpus, tally) for text in texts]
            encoded = Encoded(
                np.concatenate([ids for ids, _, _ in pieces]), np.array([len(ids) for ids, _, _ in pieces], np.int64)
            )
            runs = np.concatenate([bits for _, bits, _ in pieces]), np.concatenate([runs for _, _, runs in pieces])
        counts.num_empty += int((encoded.lengths == 0).sum())
        return Documents(as_tokens(encoded.ids, self.vocab_size), encoded.lengths, *_merged_runs(*runs))

    def _document(
        self, prepared: PreparedText, corpus: str, tally: Tally
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int64]]:
        """One text, however long or mixed: ids [tokens], and bits and lengths of its runs [runs]."""
        text = prepared.tagged
        if prepared.tokens is not None:
            ids, starts = prepared.tokens
        elif len(text.spans) > 1:
            ids, starts = self.backend.encode_with_starts(text.text)
        else:
            ids = self.backend.encode([text.text]).ids
            starts = np.zeros(len(ids), np.int64)
        borders = np.cumsum([length for _, length in text.spans])[:-1]
        span = np.searchsorted(borders, starts, side="right")
        wrapped = self._wrapped(Encoded(ids, np.array([len(ids)], np.int64)))
        behind = len(wrapped.ids) - len(ids) - len(self.prefix)
        # What is put before a text belongs to its first span, what is put behind it to its last token's.
        span = np.pad(span, (len(self.prefix), behind), "edge") if len(ids) else np.zeros(len(wrapped.ids), np.int64)
        tokens = np.bincount(span, minlength=len(text.spans)).tolist()
        position = 0
        for index, (name, length) in enumerate(text.spans):
            count = tally.corpus(corpus).count(name, self.bits)
            count.documents += name not in {other for other, _ in text.spans[:index]}
            count.tokens += tokens[index]
            count.bytes += len(text.text[position : position + length].encode())
            position += length
        is_original = np.array([name in self.bits.original for name, _ in text.spans], np.uint8)
        token_bits = is_original[span]
        edges = np.concatenate([[0], np.flatnonzero(np.diff(token_bits)) + 1, [len(token_bits)]])
        return wrapped.ids, token_bits[edges[:-1]] if len(token_bits) else token_bits, np.diff(edges)[: len(token_bits)]

    def _wrapped(self, encoded: Encoded) -> Encoded:
        """Put the tokenizer's own tokens around each text, and the end-of-document token behind."""
        before, behind, has_eod = len(self.prefix), len(self.suffix), self.eod_id is not None
        if not before and not behind and not has_eod:
            return encoded
        lengths = encoded.lengths + before + behind
        lengths += (lengths > 0) & has_eod  # an empty document stays empty, as in Megatron
        stops = np.cumsum(lengths)
        starts = stops - lengths
        ids = np.empty(int(lengths.sum()), np.int32)
        is_text = np.ones(len(ids), np.bool_)
        for offset, id in enumerate(self.prefix):
            ids[starts + offset] = id
            is_text[starts + offset] = False
        if self.eod_id is not None:
            ends = stops[lengths > 0] - 1
            ids[ends] = self.eod_id
            is_text[ends] = False
        for offset, id in enumerate(self.suffix):
            places = stops - has_eod - behind + offset
            ids[places] = id
            is_text[places] = False
        ids[is_text] = encoded.ids
        return Encoded(ids, lengths)

    def _spot_check(self, texts: list[str]) -> None:
        if not isinstance(self.backend, GigatokenBackend):
            return
        for text in texts:
            if len(text) <= _SPOT_CHECK_CHARACTERS:
                if not self.backend.agrees([text]):
                    raise UserError(
                        f"gigatoken gives a text other ids than the tokenizer does ({text[:60]!r}…); nothing was "
                        f"written, pass --tokenizer-backend reference"
                    )
                return


def _merged_runs(bits: NDArray[np.uint8], lengths: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Neighbouring runs of one bit as one."""
    if not len(bits):
        return bits, lengths
    firsts = np.concatenate([[0], np.flatnonzero(np.diff(bits)) + 1])
    return bits[firsts], np.add.reduceat(lengths, firsts)
