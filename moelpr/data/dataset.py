"""Megatron's indexed dataset and GPT dataset, with one language bit beside every token.

Packing, shuffling and blending stay Megatron's: the indexed dataset notes from where it read the parts of a sample, and
the GPT dataset looks up the bits of all these places at once.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray

from moelpr.data.corpus_index import CorpusIndex
from moelpr.data.language_bits import open_language_bits
from moelpr.errors import UserError

_SEQUENCES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class TokenIds:
    """What Megatron's datasets ask a tokenizer for. `eod` -1: the corpus has no end-of-document token."""

    vocab_size: int
    eod: int = -1
    pad: int = -1  # never in a corpus, so that no real token is taken for padding
    unique_identifiers: dict[str, Any] = field(default_factory=dict)


class TaggedIndexedDataset(IndexedDataset):
    """`<prefix>.bin/.idx/.lang`; like Megatron's, it trusts the .idx.

    Attributes:
        bits: the language bits.
        edges: start and stop, in tokens, of everything that `get` has read since `edges` was emptied.

    Raises:
        UserError: `.lang` is missing or damaged, or doesn't cover `.bin`.
    """

    def __init__(self, path_prefix: str, **options: Any) -> None:
        super().__init__(path_prefix, **options)
        self._open_bits()

    def __setstate__(self, state: tuple) -> None:
        super().__setstate__(state)
        self._open_bits()

    def _open_bits(self) -> None:
        num_tokens = int(self.index.sequence_lengths.sum(dtype=np.int64))
        self.bits = open_language_bits(self.path_prefix, num_tokens)
        self.edges: list[int] = []
        self._pointers, self._lengths = self.index.sequence_pointers, self.index.sequence_lengths
        self._token_bytes = DType.size(self.index.dtype)
        # A slice of all tokens costs a third of what Megatron's way to one sequence does.
        self._tokens = self.bin_reader.read(self.index.dtype, num_tokens, 0) if self.mmap else None

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[np.number]:
        sequence = self._pointers.item(idx) // self._token_bytes
        start = sequence + offset
        stop = sequence + self._lengths.item(idx) if length is None else start + int(length)
        self.edges += (start, stop)
        return super().get(idx, offset, length) if self._tokens is None else self._tokens[start:stop]

    def count_original(self, first: int, last: int) -> tuple[int, int]:
        """Of sequences `first` to `last`, both included: those that begin with an original-language token, and the
        number of original-language tokens."""
        sequences = 0
        for start in range(first, last + 1, _SEQUENCES_AT_ONCE):
            pointers = self._pointers[start : min(start + _SEQUENCES_AT_ONCE, last + 1)]
            lengths = self._lengths[start : min(start + _SEQUENCES_AT_ONCE, last + 1)]
            sequences += int(self.bits.at(pointers[lengths > 0] // self._token_bytes).sum())
        start, stop = (
            self._pointers.item(first) // self._token_bytes,
            self._pointers.item(last) // self._token_bytes + self._lengths.item(last),
        )
        return sequences, self.bits.count(start, stop)


class TaggedGPTDataset(GPTDataset):
    """Megatron's GPT samples plus two uint8 tensors [sequence length]: `is_original` and `is_original_label`.

    They are the language bits of `tokens` and of `labels` (the tokens one step later).
    """

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> TaggedIndexedDataset:
        if not IndexedDataset.exists(dataset_path):
            raise UserError(
                f"{dataset_path}.bin and .idx are not both there; build them with data_tools/preprocess_data.py"
            )
        if not CorpusIndex.open(dataset_path).num_tokens:
            raise UserError(f"{dataset_path}.bin holds no tokens; leave it out of the training data")
        return TaggedIndexedDataset(dataset_path, multimodal=False, mmap=config.mmap_bin_files)

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample = super().__getitem__(idx)  # asks _query_document_sample_shuffle_indices, which leaves the bits here
        bits = self._sample_bits
        # Where Megatron keeps documents apart, position_ids say where they begin; these would say it once more.
        sample.pop("cu_seqlens", None), sample.pop("max_seqlen", None)
        sample["is_original"], sample["is_original_label"] = torch.from_numpy(bits[:-1]), torch.from_numpy(bits[1:])
        return sample

    def _query_document_sample_shuffle_indices(
        self, idx: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
        edges = self.dataset.edges
        edges.clear()
        tokens, document_ids, document_lengths = super()._query_document_sample_shuffle_indices(idx)
        self._sample_bits, largest = self.dataset.bits.of_sample(edges, tokens)
        if largest >= self.config.tokenizer.vocab_size:
            raise UserError(
                f"{self.dataset_path}.bin holds token id {largest}, but the model's vocabulary has "
                f"{self.config.tokenizer.vocab_size} entries; tokenize the corpus with the model's own tokenizer"
            )
        return tokens, document_ids, document_lengths
