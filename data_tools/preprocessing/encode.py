"""Batches of lines become token IDs, language bits and counts."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import mkstemp
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus.corpus import run_edges
from data_tools.corpus.corpus_writer import Documents, TokenFile, as_tokens
from data_tools.preprocessing import long_documents
from data_tools.preprocessing.batches import Batch, FileRange
from data_tools.preprocessing.long_documents import LongString, encode_long_text, without_long_strings
from data_tools.preprocessing.summary import Tally
from data_tools.preprocessing.tagging import (
    SPAN_KEYS,
    UNDETECTED,
    Bits,
    DetectedLanguages,
    Detector,
    LanguageSpans,
    TaggedText,
    Tagger,
)
from moelpr.data.tokenizers.base import Encoded, Piece, Tokenizer
from moelpr.data.tokenizers.gigatoken import GigatokenTokenizer
from moelpr.process.errors import UserError
from moelpr.store.documents import BadLine, is_blank, parse

VALIDATION = "validation"
# The first document of a batch up to this length is encoded by both libraries, to check that they still agree.
_SPOT_CHECK_CHARACTERS = 1000


class Text(NamedTuple):
    """A text of a document, with its tokens if it must be encoded in pieces.

    Attributes:
        tagged: the text and its languages; of a text that is too long for memory, its first part.
        on_disk: the complete text if it is too long for memory.
        tokens: tokens of a long text, without those that the tokenizer adds; all tokens of a text on disk.
        num_bytes: UTF-8 size of a text on disk.
    """

    tagged: TaggedText
    on_disk: LongString | None = None
    tokens: Piece | TokenFile | None = None
    num_bytes: int = 0

    def parts(self) -> Iterable[str]:
        return [self.tagged.text] if self.on_disk is None else self.on_disk.parts()


@dataclass
class Encoder:
    """Encodes batches.

    Attributes:
        prefix, suffix: IDs added before and after each text.
        eod_id: ID added after each document; None: none.
        bits: the languages that are original.
        keys: for each dataset, the keys of the texts that go into each of `corpora`.
        corpora: names of the corpora, one per key; validation documents go into "<name> validation".
        skips_bad_lines: whether to count malformed lines instead of raising an error.
        skips_undetected: whether to omit documents of uncertain language.
        validation_share: fraction of the documents to use for validation, 0 to 1.
        seed: random seed of that choice.
        auditor: detects languages to compare with the stated ones.
    """

    tokenizer: Tokenizer
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

    def encode(self, batch: Batch, spool: Path) -> tuple[dict[str, Documents], Tally]:
        """Encode a batch. Memory does not depend on the length of its documents.

        Args:
            spool: folder for the tokens of documents that are too long for memory.

        Returns:
            Documents by corpus, in the order of their lines, and counts, with a message for each malformed line.

        Raises:
            UserError: A line is malformed and bad lines are not skipped.
        """
        source = batch.share.source
        tally = Tally()
        groups: dict[str, list[Text]] = {name: [] for name in self.corpora}
        if self.validation_share:
            groups |= {f"{name} {VALIDATION}": [] for name in self.corpora}
        num_encoded = 0
        for index, item in enumerate(batch.items()):
            if not item:  # a file may consist of empty lines
                continue
            try:
                texts = self.texts(item, source.dataset)
                if texts is None:
                    continue
                if self.skips_undetected and any(name == UNDETECTED for text in texts for name, _ in text.tagged.spans):
                    tally.num_undetected += 1
                    continue
                texts = [self._prepare(text, spool) for text in texts]
            except BadLine as error:
                problem = f"{batch.where(index)}: {error}"
                if not self.skips_bad_lines:
                    raise UserError(f"{problem}; fix the line or pass --on-error skip") from None
                tally.problems.append(problem)
                continue
            num_encoded += 1
            split = f" {VALIDATION}" if self.is_validation(texts[0].parts()) else ""
            for name, text in zip(self.corpora, texts, strict=True):
                groups[name + split].append(text)
            if self.auditor is not None:
                stated = "+".join(sorted({name for name, _ in texts[0].tagged.spans}))
                detected = self.auditor.language(texts[0].tagged.text)
                tally.audit.setdefault(stated, Counter())[detected] += 1
        tally.num_skipped = len(tally.problems)
        tally.num_read = num_encoded + tally.num_undetected + tally.num_skipped
        documents = {}
        for name, group in groups.items():
            documents[name] = self.documents(group, name, tally)
            tally.corpus(name).sources[source.path] += len(group)
        self._spot_check(text.tagged.text for group in groups.values() for text in group if text.tokens is None)
        batch.discard()
        return documents, tally

    def texts(self, item: bytes | dict[str, Any] | FileRange, dataset: int) -> list[Text] | None:
        """Return the texts of a line or row, one per corpus; None for a blank line.

        Raises:
            BadLine: The line can't be used.
        """
        keys = self.keys[dataset]
        long_strings: dict[str, LongString] = {}
        if isinstance(item, FileRange):
            item, long_strings = without_long_strings(item)
        if isinstance(item, bytes):
            if is_blank(item):
                return None
            of_spans = SPAN_KEYS if isinstance(self.tagger, LanguageSpans) else ()
            item = parse(item, [*keys, *self.tagger.columns(), *of_spans])
        if not long_strings:
            return [Text(tagged) for tagged in self.tagger.texts(item, dataset, keys)]
        if isinstance(self.tagger, LanguageSpans):
            raise BadLine("a span of more than a million bytes in a long line; split it")
        texts = [long_strings.get(value) if isinstance(value := item.get(key), str) else None for key in keys]
        for key, text in zip(keys, texts, strict=True):
            if text is not None:
                item[key] = next(text.parts())  # its language is detected in its first part
        found = [Text(*pair) for pair in zip(self.tagger.texts(item, dataset, keys), texts, strict=True)]
        is_by_line = isinstance(self.tagger, DetectedLanguages) and self.tagger.by_line
        if any(text.on_disk is not None and (is_by_line or len(text.tagged.spans) > 1) for text in found):
            raise BadLine("a long text can't have a language for each of its lines; split it")
        return found

    def _prepare(self, text: Text, spool: Path) -> Text:
        """Encode a text if it is long; raise `BadLine` if that is impossible."""
        if text.on_disk is not None:
            return self._encode_to_file(text, spool)
        if len(text.tagged.text) <= long_documents.LONG_TEXT_CHARACTERS:
            return text
        pieces = list(encode_long_text(self.tokenizer, text.parts()))
        return text._replace(tokens=Piece(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True))))

    def _encode_to_file(self, text: Text, spool: Path) -> Text:
        descriptor, name = mkstemp(prefix="tokens-", dir=spool)
        tokens_path = Path(name)
        num_bytes = num_tokens = 0

        def counted() -> Iterator[str]:
            nonlocal num_bytes
            for part in text.parts():
                num_bytes += len(part.encode())
                yield part

        after = [*self.suffix, *([] if self.eod_id is None else [self.eod_id])]
        try:
            with open(descriptor, "wb") as file:
                pieces = (piece.ids for piece in encode_long_text(self.tokenizer, counted()))
                for ids in chain([np.array(self.prefix, np.int32)], pieces, [np.array(after, np.int32)]):
                    file.write(as_tokens(ids, self.vocab_size).tobytes())
                    num_tokens += len(ids)
        except BaseException:
            tokens_path.unlink(missing_ok=True)
            raise
        return text._replace(tokens=TokenFile(tokens_path, num_tokens), num_bytes=num_bytes)

    def is_validation(self, text: Iterable[str]) -> bool:
        """Whether a document, whose text comes in parts, is for validation.

        Only the text decides, so the order and the number of jobs do not matter, and copies stay in one split.
        """
        if not self.validation_share:
            return False
        digest = hashlib.blake2b(digest_size=8, salt=self.seed.to_bytes(16, "little"))
        for characters in text:
            digest.update(characters.encode())
        return int.from_bytes(digest.digest(), "little") < self.validation_share * (1 << 64)

    def documents(self, texts: list[Text], corpus: str, tally: Tally) -> Documents:
        """Encode texts that go into one corpus, and count them."""
        counts = tally.corpus(corpus)
        if len(texts) == 1 and isinstance(tokens := texts[0].tokens, TokenFile):  # a batch of its own
            [(language, _)] = texts[0].tagged.spans
            counts.count(language, self.bits).add(documents=1, tokens=len(tokens), bytes=texts[0].num_bytes)
            length = np.array([len(tokens)], np.int64)
            return Documents(tokens, length, np.array([language in self.bits.original], np.uint8), length)
        if all(len(text.tagged.spans) == 1 and text.tokens is None for text in texts):
            encoded = self._wrapped(self.tokenizer.encode([text.tagged.text for text in texts]))
            languages = [text.tagged.spans[0][0] for text in texts]
            bits = np.fromiter((name in self.bits.original for name in languages), np.uint8, len(texts))
            run_lengths = encoded.lengths
            for name, text, length in zip(languages, texts, encoded.lengths.tolist(), strict=True):
                counts.count(name, self.bits).add(1, length, len(text.tagged.text.encode()))
        else:
            parts = zip(*(self._document(text, corpus, tally) for text in texts), strict=True)
            ids, bits, run_lengths, lengths = map(np.concatenate, parts)
            encoded = Encoded(ids, lengths)
        counts.num_empty += int((encoded.lengths == 0).sum())
        firsts = run_edges(bits)[:-1]  # where neighboring runs differ
        run_lengths = np.add.reduceat(run_lengths, firsts)
        return Documents(as_tokens(encoded.ids, self.vocab_size), encoded.lengths, bits[firsts], run_lengths)

    def _document(
        self, prepared: Text, corpus: str, tally: Tally
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
        """Encode one long or mixed text: IDs [tokens], bits and lengths of its runs [runs], and its length [1]."""
        text = prepared.tagged
        if isinstance(prepared.tokens, Piece):
            ids, starts = prepared.tokens
        elif len(text.spans) > 1:
            ids, starts = self.tokenizer.encode_with_starts(text.text)
        else:
            ids = self.tokenizer.encode([text.text]).ids
            starts = np.zeros(len(ids), np.int64)
        borders = np.cumsum([length for _, length in text.spans])[:-1]
        span = np.searchsorted(borders, starts, side="right")
        wrapped, total = self._wrapped(Encoded(ids, np.array([len(ids)], np.int64)))
        num_after = len(wrapped) - len(ids) - len(self.prefix)
        # Tokens before a text belong to its first span, tokens after it to the span of its last token.
        span = np.pad(span, (len(self.prefix), num_after), "edge") if len(ids) else np.zeros(len(wrapped), np.int64)
        tokens = np.bincount(span, minlength=len(text.spans)).tolist()
        position, seen = 0, set()
        for (name, length), num_tokens in zip(text.spans, tokens, strict=True):
            num_bytes = len(text.text[position : position + length].encode())
            tally.corpus(corpus).count(name, self.bits).add(name not in seen, num_tokens, num_bytes)
            seen.add(name)
            position += length
        token_bits = np.array([name in self.bits.original for name, _ in text.spans], np.uint8)[span]
        edges = run_edges(token_bits)
        return wrapped, token_bits[edges[:-1]], np.diff(edges), total

    def _wrapped(self, encoded: Encoded) -> Encoded:
        """Put the tokenizer's own tokens around each text, and the end-of-document token after it."""
        num_before, num_after, has_eod = len(self.prefix), len(self.suffix), self.eod_id is not None
        if not num_before and not num_after and not has_eod:
            return encoded
        lengths = encoded.lengths + num_before + num_after
        lengths += (lengths > 0) & has_eod  # an empty document stays empty, as in Megatron
        stops = np.cumsum(lengths)
        starts = stops - lengths
        ids = np.empty(int(lengths.sum()), np.int32)
        is_text = np.ones(len(ids), np.bool_)

        def put(places: NDArray[np.int64], id: int) -> None:
            ids[places], is_text[places] = id, False

        ends = stops - has_eod - num_after
        for first, added in ((starts, self.prefix), (ends, self.suffix)):
            for offset, id in enumerate(added):
                put(first + offset, id)
        if self.eod_id is not None:
            put(stops[lengths > 0] - 1, self.eod_id)
        ids[is_text] = encoded.ids
        return Encoded(ids, lengths)

    def _spot_check(self, texts: Iterable[str]) -> None:
        if not isinstance(self.tokenizer, GigatokenTokenizer):
            return
        text = next((text for text in texts if len(text) <= _SPOT_CHECK_CHARACTERS), None)
        if text is not None and not self.tokenizer.agrees([text]):
            raise UserError(
                f"gigatoken and the tokenizer give different IDs for a text ({text[:60]!r}…); nothing was written, "
                "pass --tokenizer-backend reference"
            )
