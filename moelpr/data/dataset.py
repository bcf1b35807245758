"""Megatron's indexed dataset and GPT dataset with a language bit for every token, and their configuration.

Packing, shuffling and blending are Megatron's: the indexed dataset records where it read the parts of a sample, and
the GPT dataset looks up the bits of all these ranges at once.
"""

import argparse
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from numpy.typing import NDArray
from torch import Tensor

from moelpr.base.errors import DISK_FULL, UserError
from moelpr.base.run_folder import HF_FOLDER
from moelpr.data.corpus_index import CorpusIndex
from moelpr.data.language_bits import loss_bits_path, open_bits
from moelpr.data.manifest import FileRecord, Manifest
from moelpr.data.mixing import Share, share_table
from moelpr.data.packing import windows_of
from moelpr.model.families.hf_config import read_config

_SHORTER = "raise --seq-length, or preprocess them again with --max-tokens"


@dataclass(frozen=True)
class TokenIds:
    """The values of a tokenizer that Megatron's datasets need."""

    vocab_size: int  # vocabulary size of the model
    eod: int = -1  # ID of the end-of-document token; -1 if the corpus has none
    pad: int = -1  # ID of padding; -1 is never in a corpus, so no real token is taken for padding
    unique_identifiers: dict[str, Any] = field(default_factory=dict)  # part of the name of Megatron's cache


class TaggedIndexedDataset(IndexedDataset):
    """`<prefix>.bin/.idx/.lang`. Like Megatron's, it does not check the .idx.

    Attributes:
        bits: Language bits.
        loss_bits: Which tokens count in the loss; None unless the corpus has conversations.
        edges: Start and stop, in tokens, of every range that `get` has read since `edges` was cleared, flattened.
    """

    def __init__(self, path_prefix: str, **options: Any) -> None:
        super().__init__(path_prefix, **options)
        self._open_bits()

    def __setstate__(self, state: tuple) -> None:
        super().__setstate__(state)
        self._open_bits()

    def _open_bits(self) -> None:
        num_tokens = int(self.index.sequence_lengths.sum(dtype=np.int64))
        self.bits, self.loss_bits = open_bits(self.path_prefix, num_tokens)
        self.edges: list[int] = []
        self._pointers, self._lengths = self.index.sequence_pointers, self.index.sequence_lengths
        self._token_bytes = DType.size(self.index.dtype)
        # Slicing one array of all tokens takes a third of the time that Megatron's `get` needs.
        self._tokens = self.bin_reader.read(self.index.dtype, num_tokens, 0) if self.mmap else None

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[np.number]:
        sequence = self._pointers.item(idx) // self._token_bytes
        start = sequence + offset
        stop = sequence + self._lengths.item(idx) if length is None else start + int(length)
        self.edges += (start, stop)
        return super().get(idx, offset, length) if self._tokens is None else self._tokens[start:stop]


class TaggedGPTDataset(GPTDataset):
    """Megatron's GPT samples plus two uint8 tensors [sequence length]: `is_original` and `is_original_label`.

    They are the language bits of `tokens` and of `labels` (the tokens one step later).

    Of a corpus of conversations, a sample has whole ones, several only with `inter_document_masking`, and `loss_mask`
    is 1 for the assistant's tokens. Every epoch reads the same windows in another order.
    """

    cached_loss_mask: Tensor  # Megatron's

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> TaggedIndexedDataset:
        if not CorpusIndex.open(dataset_path).num_tokens:
            raise UserError(f"{dataset_path}.bin contains no tokens; remove it from the training data")
        return TaggedIndexedDataset(dataset_path, multimodal=False, mmap=config.mmap_bin_files)

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample = super().__getitem__(idx)  # calls _query_document_sample_shuffle_indices, which sets the bits
        mask: Tensor = sample["loss_mask"]
        if self.masks_and_position_ids_are_cached and self.cached_loss_mask is mask:
            # Megatron masks the padding of the first sample that it reads in the mask that it keeps for all others.
            self.cached_loss_mask = torch.ones_like(mask)
        bits = self._sample_bits
        # Redundant: if Megatron separates documents, position_ids already say where they begin.
        sample.pop("cu_seqlens", None), sample.pop("max_seqlen", None)
        if self._is_counted is not None:
            sample["loss_mask"] = mask * torch.from_numpy(self._is_counted[1:])
        sample["is_original"], sample["is_original_label"] = torch.from_numpy(bits[:-1]), torch.from_numpy(bits[1:])
        return sample

    def _query_document_sample_shuffle_indices(
        self, idx: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
        edges = self.dataset.edges
        edges.clear()
        loss_bits = self.dataset.loss_bits
        read = super()._query_document_sample_shuffle_indices if loss_bits is None else self._window
        tokens, document_ids, document_lengths = read(idx)
        self._sample_bits, largest = self.dataset.bits.of_sample(edges, tokens)
        self._is_counted = None if loss_bits is None else loss_bits.of_sample(edges, tokens)[0]
        if largest >= self.config.tokenizer.vocab_size:
            raise UserError(
                f"{self.dataset_path}.bin contains token ID {largest}, but the model's vocabulary has "
                f"{self.config.tokenizer.vocab_size} entries; tokenize the corpus with the model's own tokenizer"
            )
        return tokens, document_ids, document_lengths

    def __len__(self) -> int:
        return super().__len__() if self.dataset.loss_bits is None else len(self.shuffle_index)

    def _build_document_sample_shuffle_indices(self) -> tuple[NDArray, NDArray, NDArray]:
        """The order of conversations, where in it windows start, and the windows in the order of training."""
        if self.dataset.loss_bits is None:
            return super()._build_document_sample_shuffle_indices()
        lengths, length = self.dataset.sequence_lengths[self.indices], self.config.sequence_length
        if lengths.max() > length:
            raise UserError(f"{self.dataset_path} has conversations of more than {length:,} tokens; {_SHORTER}")
        order, starts = windows_of(lengths, length, self.config.inter_document_masking)
        random, windows = np.random.RandomState(self.config.random_seed), len(starts) - 1
        epochs = max(1, -(-(self.num_samples or 0) // windows))
        return self.indices[order], starts, np.concatenate([random.permutation(windows) for _ in range(epochs)])

    def _window(self, idx: int) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
        """A window of conversations. The rest of it repeats them, so that routers see text, but counts nowhere."""
        start, stop = self.sample_index[self.shuffle_index[idx] :][:2]
        documents = self.document_index[start:stop]
        parts = [self.dataset.get(document) for document in documents.tolist()]
        size = self.config.sequence_length + self.config.add_extra_token_to_sequence
        tokens = np.resize(np.concatenate(parts), size).astype(np.int64)
        lengths = [*map(len, parts)]
        return tokens, documents, [*lengths, size - sum(lengths)]


def build_datasets(num_samples: Sequence[int | None], config: GPTDatasetConfig) -> list[Any]:
    """Training, validation and test datasets, None where there are no samples. Every rank must call this.

    They are on tensor rank 0 of *every* pipeline stage, because routers read the bits.

    Raises:
        UserError: The order of samples can't be saved, in a folder that has orders of other settings.
        OSError: The disk is full.
    """
    builder = BlendedMegatronDatasetBuilder(
        TaggedGPTDataset, list(num_samples), lambda: get_tensor_model_parallel_rank() == 0, config
    )
    try:
        return list(builder.build())
    except Exception as error:
        cause = error.__cause__  # the builder raises a bare Exception from an OSError
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"can't save the order of samples: {cause.filename} can't be written ({cause.strerror}); pass "
                "--data-cache-path with a folder of your own"
            ) from error
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            raise cause from None
        raise


def corpus_table(train: TaggedGPTDataset | BlendedDataset, num_samples: int) -> str:
    """Say what a run of so many samples reads: each corpus's share, how often, and the original languages' share.

    Raises:
        UserError: The corpora have no weights, so they are read once, but the run takes more samples.
    """
    if len(train) < num_samples:
        raise UserError(
            f"corpora without weights are read once, which gives {len(train):,} samples, but the run takes "
            f"{num_samples:,}; give each corpus a weight (--data-path 1 A 1 B), or train fewer steps"
        )
    datasets, weights = (train.datasets, train.weights) if isinstance(train, BlendedDataset) else ([train], [1.0])
    parts, original, length = [], 0.0, train.config.sequence_length
    for dataset, weight in zip(datasets, weights, strict=True):
        bits, share = dataset.dataset.bits, weight / sum(weights)
        is_whole = dataset.dataset.loss_bits is not None  # conversations, which share samples
        samples = len(dataset.sample_index) - 1 if is_whole else bits.num_tokens / length
        parts.append((dataset.dataset.path_prefix, Share(bits.num_tokens, share, num_samples * share / samples)))
        original += share * bits.num_original / bits.num_tokens
    return (
        f"moelpr: the run takes {num_samples:,} samples of {length:,} tokens, of which {original:.1%} are "
        f"original-language:\n{share_table(parts, 'corpus')}"
    )


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """Convert the trainer's arguments to Megatron's dataset configuration.

    Raises:
        UserError: `--eod-mask-loss` has no end-of-document token, or several.
    """
    blend = get_blend_from_list(args.data_path)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=token_ids(args, sorted(set(blend[0])) if blend else []),
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        reset_position_ids=False,
        reset_attention_mask=False,
        inter_document_masking=args.dataloader_inter_document_masking,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,  # attention is causal without it
    )


def index_checksums(prefixes: Iterable[str], shares_windows: bool = False) -> dict[str, str]:
    """Identify corpora of one name: the checksum of each .idx, from its manifest if it has one.

    Megatron's cache holds the order of samples by name and settings, so that a corpus that was made again would be read
    in the order of the old one.
    """
    checksums = {}
    for prefix in prefixes:
        manifest, path = Manifest.read(prefix), Path(f"{prefix}.idx")
        if manifest is not None and "idx" in manifest.files:
            checksums[prefix] = manifest.files["idx"].sha256
        elif path.is_file():  # else its reader reports it
            checksums[prefix] = _checksum(path, path.stat().st_mtime_ns)
        if prefix in checksums and loss_bits_path(prefix).exists():
            checksums[prefix] += f" conversations {shares_windows}"
    return checksums


@cache
def _checksum(path: Path, mtime_ns: int) -> str:
    """The SHA-256 of a file, cached until its mtime changes; the .idx of 100 million documents has 2 GB."""
    return FileRecord.of(path).sha256


def token_ids(args: argparse.Namespace, corpora: Iterable[str]) -> TokenIds:
    """The model's vocabulary, with what tells these corpora apart; only --eod-mask-loss needs the end-of-document ID.

    Raises:
        UserError: `--eod-mask-loss` has no end-of-document token, or several.
    """
    return TokenIds(
        vocab_size=args.vocab_size,
        eod=_eod_id(args, corpora) if args.eod_mask_loss else -1,
        unique_identifiers=index_checksums(corpora, args.dataloader_inter_document_masking),
    )


def _eod_id(args: argparse.Namespace, corpora: Iterable[str]) -> int:
    """The token that ends the corpora's documents according to their manifests; without any, the model's."""
    manifests = {prefix: manifest for prefix in corpora if (manifest := Manifest.read(prefix)) is not None}
    for prefix, manifest in manifests.items():
        if not manifest.append_eod:
            raise UserError(
                f"--eod-mask-loss requires an end-of-document token, but {prefix} was made without --append-eod; "
                "remove the flag"
            )
    ids: set[int | None] = {manifest.tokenizer.eod_id for manifest in manifests.values()}
    if len(ids) > 1:
        raise UserError(
            f"--eod-mask-loss requires one end-of-document token, but the corpora have "
            f"{' and '.join(sorted(map(str, ids)))}; remove the flag, or preprocess them with the same --eod-token"
        )
    config_file = Path(args.model_source) / HF_FOLDER / "config.json"
    if not ids and config_file.is_file():
        eod = read_config(config_file.parent).get("eos_token_id")
        ids = {eod[0] if isinstance(eod, list) else eod}
    if (eod_id := next(iter(ids), None)) is None:
        raise UserError(
            f"--eod-mask-loss requires an end-of-document token, but {config_file} has no eos_token_id; remove the flag"
        )
    return eod_id
