"""Counts of text: words of new text, uses of token pairs in original text, and tokens before and after.

Workers count batches of documents; the results are added in order, so they do not depend on the number of workers. One
document in many is held out, chosen by a hash of its text: from the words that merges are learned from, and from the
original text that they are tried on first.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_tools.preprocessing.batches import Batch, ReadCursor, Reader, shares_of
from data_tools.preprocessing.parsing import DocumentParser, LongDocument, RandomShare
from data_tools.preprocessing.tagging import OneLanguage
from data_tools.preprocessing.workers import worker_pool
from data_tools.vocabulary.bpe_tokenizer import BpeTokenizer
from moelpr.base.errors import UserError
from moelpr.data.text.documents import BadLine
from moelpr.data.text.sources import Source
from moelpr.data.tokenizers.base import Tokenizer

# Distinct words of a language beyond this number are forgotten, the rarest first.
MAX_WORDS = 1_000_000


@dataclass
class TextFiles:
    """Files of several languages."""

    languages: list[str]
    sources: list[Source]  # the dataset of each is the index of its language
    key: str  # JSON key of the text
    held_out_share: float  # fraction of the documents that is held out

    def documents(self, batch: Batch) -> Iterator[tuple[str, bool]]:
        """Yield each document that has text and is not too long, and whether it is held out."""
        parser = DocumentParser(OneLanguage(self.languages), [[self.key]] * len(self.languages))
        held_out = RandomShare(self.held_out_share)
        for index, item in enumerate(batch.items()):
            if not item:  # a blank line
                continue
            try:
                for text in parser.texts(item, batch.share.source.dataset) or ():
                    if text.tagged.text:
                        yield text.tagged.text, text.tagged.text in held_out
            except LongDocument as error:
                print(f"note: {batch.where(index)}: {error}; it is left out", file=sys.stderr)
            except BadLine as error:
                raise UserError(f"{batch.where(index)}: {error}; fix or remove the line") from None

    def process[T](self, work: Callable[..., T], workers: int, label: str) -> Iterator[tuple[int, T]]:
        """Yield `work(batch, files=…)` of each batch with the index of its language, in order, and show progress."""
        shares = list(shares_of(self.sources, 0, 1))
        columns = [[self.key]] * len(self.languages)
        total = sum(source.bytes for source in self.sources)
        with (
            worker_pool(partial(work, files=self), workers) as run,
            tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False, disable=None) as bar,
        ):
            if bar.disable:
                print(f"{label}: {total / 1e6:,.1f} MB", file=sys.stderr, flush=True)
            for batch, result in run(Reader(shares, columns, None).batches(ReadCursor())):
                yield batch.share.source.dataset, result
                bar.update(batch.file_bytes)


@dataclass
class NewText:
    """Words of one expanded language, without held-out documents."""

    words: Counter[str] = field(default_factory=Counter)  # number of occurrences of each
    bytes: int = 0  # UTF-8 bytes of the text
    held_out: int = 0  # number of documents held out

    def add(self, other: "NewText") -> None:
        self.words.update(other.words)
        self.bytes += other.bytes
        self.held_out += other.held_out
        limit = 1
        while len(self.words) > MAX_WORDS:
            limit += 1
            self.words = Counter({word: count for word, count in self.words.items() if count >= limit})


def count_words(files: TextFiles, bpe: BpeTokenizer, workers: int) -> list[NewText]:
    """Count the words of each language of `files`."""
    counted = [NewText() for _ in files.languages]
    for language, text in files.process(partial(_words, bpe=bpe), workers, "counting words of expanded languages"):
        counted[language].add(text)
    return counted


def _words(batch: Batch, files: TextFiles, bpe: BpeTokenizer) -> NewText:
    counted_text = NewText()
    for text, is_held_out in files.documents(batch):
        if is_held_out:
            counted_text.held_out += 1
            continue
        counted_text.words.update(bpe.words(text))
        counted_text.bytes += len(text.encode())
    return counted_text


class PairCounts:
    """In how many documents each pair of neighboring tokens occurs: 16 bytes of memory per pair.

    It counts neighbors in a text, also across the boundaries of words, where no merge applies. That is cautious, and
    almost free, for tokens on both sides of a boundary are rarely neighbors inside a word.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._keys, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._pending: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._num_pending = 0

    def add(self, keys: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        self._pending.append((keys, counts))
        self._num_pending += len(keys)
        if self._num_pending > len(self._keys) + (1 << 20):
            self._merge()

    def documents_with(self, left: int, right: int) -> int:
        if self._pending:
            self._merge()
        key = left * self._vocab_size + right
        place = int(np.searchsorted(self._keys, key))
        return int(self._counts[place]) if place < len(self._keys) and self._keys[place] == key else 0

    def _merge(self) -> None:
        keys, counts = (
            np.concatenate(arrays) for arrays in zip((self._keys, self._counts), *self._pending, strict=True)
        )
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        firsts = np.flatnonzero(np.diff(keys, prepend=-1))
        self._keys, self._counts = keys[firsts], np.add.reduceat(counts, firsts) if len(firsts) else counts
        self._pending, self._num_pending = [], 0


@dataclass
class OriginalText:
    """The token pairs of original-language text that a new token might change."""

    pairs: PairCounts  # pairs of neighboring tokens
    # documents with what would be taken whole (`BpeTokenizer.taken_whole`)
    whole: Counter[str] = field(default_factory=Counter)
    documents: int = 0


def find_uses(
    files: TextFiles, bpe: BpeTokenizer, tokenizer: Tokenizer, workers: int
) -> tuple[OriginalText, OriginalText]:
    """Return what the documents of `files` contain: those that are not held out, and those that are."""
    originals = tuple(OriginalText(PairCounts(bpe.first_new_id)) for _ in range(2))
    for _, parts in files.process(partial(_uses, bpe=bpe, tokenizer=tokenizer), workers, "reading original languages"):
        for text, (pairs, pair_documents, whole, documents) in zip(originals, parts, strict=True):
            text.pairs.add(pairs, pair_documents)
            text.whole.update(whole)
            text.documents += documents
    return originals[0], originals[1]


def _uses(
    batch: Batch, files: TextFiles, bpe: BpeTokenizer, tokenizer: Tokenizer
) -> list[tuple[NDArray[np.int64], NDArray[np.int64], Counter[str], int]]:
    """Return pairs, the number of documents with each, the uses of what is taken whole, and the number of documents."""
    groups: tuple[list[str], list[str]] = ([], [])
    for text, is_held_out in files.documents(batch):
        groups[is_held_out].append(text)
    uses = []
    for texts in groups:
        keys = [distinct_pairs(ids, bpe.first_new_id) for ids in token_ids(tokenizer, texts)]
        pairs, pair_documents = np.unique(np.concatenate([np.zeros(0, np.int64), *keys]), return_counts=True)
        whole: Counter[str] = Counter()
        for text in texts:
            whole.update(set(bpe.taken_whole(text)))
        uses.append((pairs, pair_documents, whole, len(texts)))
    return uses


def distinct_pairs(ids: NDArray[np.int32], vocab_size: int) -> NDArray[np.int64]:
    """Return the distinct pairs of neighboring tokens of a text."""
    tokens = ids.astype(np.int64)
    return np.unique(tokens[:-1] * vocab_size + tokens[1:])


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> list[NDArray[np.int32]]:
    """Return the tokens of each text."""
    encoded = tokenizer.encode(texts)
    return np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1]) if texts else []


@dataclass
class Comparison:
    """How a language's documents are tokenized before and after."""

    documents: int = 0
    bytes: int = 0
    before: int = 0  # tokens before
    after: int = 0  # tokens after
    changed: int = 0  # number of documents that are tokenized differently

    def add(self, other: "Comparison") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def compare(
    files: TextFiles, before: Tokenizer, after: Tokenizer, only_held_out: bool, workers: int
) -> list[Comparison]:
    """Tokenize the documents of each language with both tokenizers."""
    compared = [Comparison() for _ in files.languages]
    work = partial(_compare, before=before, after=after, only_held_out=only_held_out)
    label = f"tokenizing {'held-out text of expanded' if only_held_out else 'original'} languages"
    for language, comparison in files.process(work, workers, label):
        compared[language].add(comparison)
    return compared


def _compare(batch: Batch, files: TextFiles, before: Tokenizer, after: Tokenizer, only_held_out: bool) -> Comparison:
    texts = [text for text, is_held_out in files.documents(batch) if is_held_out or not only_held_out]
    comparison = Comparison(len(texts), sum(len(text.encode()) for text in texts))
    for old_ids, new_ids in zip(token_ids(before, texts), token_ids(after, texts), strict=True):
        comparison.before += len(old_ids)
        comparison.after += len(new_ids)
        comparison.changed += not np.array_equal(old_ids, new_ids)
    return comparison
