"""Megatron's indexed dataset and GPT dataset, with one language bit beside every token.

Packing, shuffling and blending stay Megatron's: the indexed dataset hands each bit over in a high bit of the int64
token ids, and the GPT dataset splits it off again before anything looks at the ids.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray

from moelpr.data.language_bits import open_language_bits
from moelpr.errors import UserError

_ORIGINAL_BIT = 1 << 32  # above every token id: .bin files hold at most 32 bits


@dataclass(frozen=True)
class TokenIds:
    """What Megatron's datasets ask a tokenizer for. `eod` -1: the corpus has no end-of-document token."""

    vocab_size: int
    eod: int = -1
    pad: int = -1  # never in a corpus, so that no real token is taken for padding
    unique_identifiers: dict[str, Any] = field(default_factory=dict)


class TaggedIndexedDataset(IndexedDataset):
    """`<prefix>.bin/.idx/.lang`: int64 token ids whose bit 32 is set where the token is original-language text.

    Raises:
        UserError: `.lang` is missing or doesn't cover `.bin`.
    """

    def __init__(self, path_prefix: str, **options: Any) -> None:
        super().__init__(path_prefix, **options)
        self._open_bits()

    def __setstate__(self, state: tuple) -> None:
        super().__setstate__(state)
        self._open_bits()

    def _open_bits(self) -> None:
        self._bits = open_language_bits(
            self.path_prefix, num_tokens=int(self.index.sequence_lengths.sum(dtype=np.int64))
        )

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[np.int64]:
        tokens = super().get(idx, offset, length)
        start = int(self.index.sequence_pointers[idx]) // DType.size(self.index.dtype) + offset
        bits = self._bits.slice(start, start + len(tokens))
        return tokens.astype(np.int64) | (bits.astype(np.int64) << 32)


class TaggedGPTDataset(GPTDataset):
    """Megatron's GPT samples plus two int64 tensors [sequence length]: `is_original` and `is_original_label`.

    They are the language bits of `tokens` and of `labels` (the tokens one step later).
    """

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> TaggedIndexedDataset:
        if not IndexedDataset.exists(dataset_path):
            raise UserError(
                f"{dataset_path}.bin and .idx are not both there; build them with data_tools/preprocess_data.py"
            )
        return TaggedIndexedDataset(dataset_path, multimodal=False, mmap=config.mmap_bin_files)

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample = super().__getitem__(idx)  # asks _query_document_sample_shuffle_indices, which leaves the bits here
        bits = torch.from_numpy(self._sample_bits)
        sample["is_original"], sample["is_original_label"] = bits[:-1].contiguous(), bits[1:].contiguous()
        return sample

    def _query_document_sample_shuffle_indices(
        self, idx: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
        tagged, document_ids, document_lengths = super()._query_document_sample_shuffle_indices(idx)
        is_padding = tagged < 0
        self._sample_bits = np.where(is_padding, 0, tagged >> 32)
        tokens = np.where(is_padding, tagged, tagged & (_ORIGINAL_BIT - 1))
        largest = int(tokens.max())
        if largest >= self.config.tokenizer.vocab_size:
            raise UserError(
                f"{self.dataset_path}.bin holds token id {largest}, but the model's vocabulary has "
                f"{self.config.tokenizer.vocab_size} entries; tokenize the corpus with the model's own tokenizer"
            )
        return tokens, document_ids, document_lengths
