"""Batches of lines become token IDs, language bits and counts."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus.tokenized import Documents, as_tokens, joined, joined_runs, run_edges, runs_of
from data_tools.preprocessing.batches import Batch
from data_tools.preprocessing.conversations import counted_tokens
from data_tools.preprocessing.parsing import DocumentParser, LongDocument, RandomShare, Text
from data_tools.preprocessing.tagging import LanguageGroups
from moelpr.base.errors import UserError
from moelpr.data.manifest import LanguageCount
from moelpr.data.text.documents import FIX_OR_SKIP, BadLine
from moelpr.data.text.language_id import UNDETECTED, Detector
from moelpr.data.tokenizers.base import Encoded, Tokenizer
from moelpr.data.tokenizers.gigatoken import Gigatoken

VALIDATION = "validation"
PROBLEMS_SHOWN = 10
# The first document of a batch up to this length is encoded by both libraries, to check that they still agree.
_SPOT_CHECK_CHARACTERS = 1000


@dataclass
class CorpusTally:
    """Counts of one corpus."""

    languages: dict[str, LanguageCount] = field(default_factory=dict)  # counts by language name
    sources: Counter[str] = field(default_factory=Counter)  # number of documents by input file
    num_empty: int = 0  # number of documents without tokens

    def add(self, other: "CorpusTally") -> None:
        for name, count in other.languages.items():
            self.languages.setdefault(name, LanguageCount(count.bit)).add(count.documents, count.tokens, count.bytes)
        self.sources.update(other.sources)
        self.num_empty += other.num_empty


@dataclass
class Tally:
    """Counts of a job."""

    corpora: dict[str, CorpusTally] = field(default_factory=dict)  # counts by the corpus's name within the job
    num_read: int = 0  # number of lines or rows, including malformed but not blank ones
    num_skipped: int = 0  # number of malformed lines or rows
    num_long: int = 0  # number of documents left out because they are too long
    num_undetected: int = 0  # number of documents omitted because their language is uncertain
    num_filtered: int = 0  # number of documents omitted by --filter
    # about malformed lines and long documents; in a job, the first PROBLEMS_SHOWN
    problems: list[str] = field(default_factory=list)
    audit: dict[str, Counter[str]] = field(default_factory=dict)  # number of documents by stated and detected language

    def corpus(self, name: str) -> CorpusTally:
        return self.corpora.setdefault(name, CorpusTally())

    def add(self, other: "Tally") -> None:
        for name, corpus in other.corpora.items():
            self.corpus(name).add(corpus)
        self.num_read += other.num_read
        self.num_skipped += other.num_skipped
        self.num_long += other.num_long
        self.num_undetected += other.num_undetected
        self.num_filtered += other.num_filtered
        self.problems += other.problems
        for stated, detected in other.audit.items():
            self.audit.setdefault(stated, Counter()).update(detected)


@dataclass
class Encoder:
    """Encodes batches."""

    tokenizer: Tokenizer
    vocab_size: int
    prefix: list[int]  # IDs added before each text
    suffix: list[int]  # IDs added after each text
    eod_id: int | None  # ID added after each document; None for no ID
    parser: DocumentParser  # reads the texts of a document, one for each of `corpora`
    groups: LanguageGroups  # the original and the expanded languages
    corpora: list[str]  # names of the corpora; validation documents go into "<name> validation"
    skips_bad_lines: bool = False  # whether to count malformed lines instead of raising an error
    skips_undetected: bool = False  # whether to omit documents of uncertain language
    validation: RandomShare = RandomShare()  # the documents for validation
    auditor: Detector | None = None  # detects languages to compare with the stated ones
    max_tokens: int | None = None  # the longest conversation; None for any
    fast: Gigatoken | None = None  # a library that encodes texts in place of the tokenizer, with the same IDs

    def encode(self, batch: Batch) -> tuple[dict[str, Documents], Tally]:
        """Encode a batch, a piece at a time.

        Returns:
            Documents by corpus, in the order of their lines, and counts, with a message for each line left out.

        Raises:
            UserError: A line is malformed and bad lines are not skipped.
        """
        encoded = [self._encode_piece(piece) for piece in batch.pieces()]
        if len(encoded) == 1:
            return encoded[0]
        tally = Tally()
        for _, counts in encoded:
            tally.add(counts)
        return {name: joined([documents[name] for documents, _ in encoded]) for name in encoded[0][0]}, tally

    def _encode_piece(self, batch: Batch) -> tuple[dict[str, Documents], Tally]:
        source = batch.share.source
        tally = Tally()
        groups: dict[str, list[Text]] = {name: [] for name in self.corpora}
        if self.validation.share:
            groups |= {f"{name} {VALIDATION}": [] for name in self.corpora}
        num_encoded = 0
        for index, item in enumerate(batch.items()):
            if not item:  # a file may consist of empty lines
                continue
            try:
                if not (texts := self.parser.texts(item, source.dataset)):
                    tally.num_filtered += texts is not None
                    continue
                if self.skips_undetected and any(name == UNDETECTED for text in texts for name, _ in text.tagged.spans):
                    tally.num_undetected += 1
                    continue
                texts = [self._prepare(text) for text in texts]
            except BadLine as error:
                problem = f"{batch.where(index)}: {error}"
                is_long = isinstance(error, LongDocument)
                if not self.skips_bad_lines and not is_long:
                    raise UserError(f"{problem}; {FIX_OR_SKIP}") from None
                tally.problems.append(problem)
                tally.num_long += is_long
                continue
            num_encoded += 1
            split = f" {VALIDATION}" if texts[0].tagged.text in self.validation else ""
            for name, text in zip(self.corpora, texts, strict=True):
                groups[name + split].append(text)
            if self.auditor is not None:
                stated = "+".join(sorted({name for name, _ in texts[0].tagged.spans}))
                detected = self.auditor.language(texts[0].tagged.text)
                tally.audit.setdefault(stated, Counter())[detected] += 1
        tally.num_skipped = len(tally.problems) - tally.num_long
        tally.num_read = num_encoded + tally.num_undetected + tally.num_filtered + len(tally.problems)
        documents = {}
        for name, group in groups.items():
            documents[name] = self.documents(group, name, tally)
            if name not in self.corpora:
                lines = b"".join(text.json_line() for text in group if text.tagged.text)
                documents[name] = documents[name]._replace(json_lines=lines)
            tally.corpus(name).sources[source.path] += len(group)
        self._spot_check(text.tagged.text for group in groups.values() for text in group if text.tokens is None)
        return documents, tally

    def _prepare(self, text: Text) -> Text:
        """Encode a conversation; raise `BadLine` if nothing in it is to be learned, or it is too long."""
        if text.turns is None:
            return text
        piece = self.tokenizer.encode_with_starts(text.tagged.text)
        if self.max_tokens is not None and len(piece.ids) > self.max_tokens:
            raise BadLine(f"the conversation has {len(piece.ids):,} tokens, more than --max-tokens {self.max_tokens}")
        is_counted = counted_tokens(piece.starts, text.turns)
        if not is_counted.any():
            raise BadLine("the assistant's turns have no tokens")
        return text._replace(tokens=piece, is_counted=is_counted)

    def documents(self, texts: list[Text], corpus: str, tally: Tally) -> Documents:
        """Encode texts that go into one corpus, and count them."""
        counts = tally.corpus(corpus)
        if all(len(text.tagged.spans) == 1 and text.tokens is None for text in texts):
            encoded = self._wrapped((self.fast or self.tokenizer).encode([text.tagged.text for text in texts]))
            languages = [text.tagged.spans[0][0] for text in texts]
            bits = np.fromiter((name in self.groups.original for name in languages), np.uint8, len(texts))
            run_lengths = encoded.lengths
            for name, text, length in zip(languages, texts, encoded.lengths.tolist(), strict=True):
                count = counts.languages.setdefault(name, LanguageCount(self.groups.bit(name)))
                count.add(1, length, len(text.tagged.text.encode()))
        else:
            parts = zip(*(self._document(text, corpus, tally) for text in texts), strict=True)
            ids, bits, run_lengths, lengths = map(np.concatenate, parts)
            encoded = Encoded(ids, lengths)
        counts.num_empty += int((encoded.lengths == 0).sum())
        ids = as_tokens(encoded.ids, self.vocab_size)
        counted = [text.is_counted for text in texts if text.is_counted is not None]
        loss_runs = runs_of(np.concatenate(counted)) if counted else np.zeros(0, np.int64)
        return Documents(ids, encoded.lengths, joined_runs(bits, run_lengths), loss_runs=loss_runs)

    def _document(
        self, prepared: Text, corpus: str, tally: Tally
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
        """Encode a conversation or mixed text: IDs [tokens], bits and lengths of runs [runs], and its length [1]."""
        text = prepared.tagged
        if prepared.tokens is not None:
            ids, starts = prepared.tokens
        elif len(text.spans) > 1:
            ids, starts = self.tokenizer.encode_with_starts(text.text)
        else:
            ids = (self.fast or self.tokenizer).encode([text.text]).ids
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
            count = tally.corpus(corpus).languages.setdefault(name, LanguageCount(self.groups.bit(name)))
            count.add(name not in seen, num_tokens, num_bytes)
            seen.add(name)
            position += length
        token_bits = np.array([name in self.groups.original for name, _ in text.spans], np.uint8)[span]
        edges = run_edges(token_bits)
        return wrapped, token_bits[edges[:-1]], np.diff(edges), total

    def _wrapped(self, encoded: Encoded) -> Encoded:
        """Put the tokenizer's own tokens around each text, and the end-of-document token after it."""
        is_ended, size = self.eod_id is not None, len(self.prefix) + len(self.suffix)
        added = np.array([*self.prefix, *self.suffix, *([self.eod_id] if is_ended else [])], np.int32)
        if not len(added):
            return encoded
        ends = np.cumsum(encoded.lengths)
        starts = ends - encoded.lengths
        places = np.column_stack([starts] * len(self.prefix) + [ends] * (len(added) - len(self.prefix)))
        is_there = np.ones(places.shape, np.bool_)
        if is_ended:
            is_there[:, -1] = encoded.lengths + size > 0  # an empty document stays empty, as in Megatron
        ids = np.insert(encoded.ids, places[is_there], np.broadcast_to(added, places.shape)[is_there])
        return Encoded(ids, encoded.lengths + is_there.sum(axis=1))

    def _spot_check(self, texts: Iterable[str]) -> None:
        text = next((text for text in texts if len(text) <= _SPOT_CHECK_CHARACTERS), None)
        if self.fast is not None and text is not None and not self.fast.agrees([text]):
            raise UserError(
                f"gigatoken and the tokenizer give different IDs for a text ({text[:60]!r}…); nothing was written, "
                "pass --tokenizer-backend reference"
            )
