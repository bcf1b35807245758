"""Reading samples with language bits, TaggedGPTDataset, against Megatron's own GPTDataset.

Both datasets read the same samples of the same files; rounds are short because other processes may use the machine.
"""

import logging
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import install_megatron, write_corpus
from benchmarks.timing import Times, Turns

# A corpus of one's own needs its vocabulary size; otherwise corpora are random.
DEFAULTS = {"data_path": "", "vocab_size": 0, "seq_length": (512, 4096), "document_tokens": (100, 1000), "samples": 100}


def run(turns: Turns, settings: Namespace) -> Iterator[tuple[str, Times]]:
    install_megatron()
    logging.disable(logging.INFO)  # Megatron logs every file it opens
    with tempfile.TemporaryDirectory() as folder:
        corpora: Any = [(settings.data_path, settings.data_path, settings.vocab_size)]
        if not settings.data_path:
            corpora = (
                random_corpus(Path(folder), *size) for size in product((32_000, 152_000), settings.document_tokens)
            )
        for (name, prefix, size), length in product(corpora, settings.seq_length):
            datasets = build_datasets(prefix, size, length, Path(folder, "cache"))
            count = min(settings.samples, *map(len, datasets.values()))
            readers = {name: partial(read, dataset, count) for name, dataset in datasets.items()}
            yield f"{name}, {length:,} tokens per sample", turns.take(readers)
    logging.disable(logging.NOTSET)


def random_corpus(folder: Path, vocab_size: int, mean_length: int, tokens: int = 4_000_000) -> tuple[str, str, int]:
    """(description, prefix, vocabulary size) of a corpus of documents of both language groups."""
    rng = np.random.default_rng(1)
    # A long tail as in crawled text.
    lengths = 1 + rng.lognormal(np.log(mean_length) - 0.5, 1.0, 2 * tokens // mean_length).astype(int)
    lengths = lengths[: np.searchsorted(lengths.cumsum(), tokens) + 1]
    documents = ((rng.integers(0, vocab_size, n, dtype=np.int32), bool(rng.integers(2))) for n in lengths)
    prefix = write_corpus(folder / f"{vocab_size}-{mean_length}", vocab_size, documents)
    return f"vocabulary of {vocab_size:,}, documents of {mean_length:,}", str(prefix), vocab_size


def build_datasets(prefix: str, vocab_size: int, seq_length: int, cache: Path) -> dict[str, Any]:
    """Megatron's dataset and ours of the same samples."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from moelpr.data.dataset import TaggedGPTDataset, TokenIds

    off = "reset_position_ids reset_attention_mask eod_mask_loss create_attention_mask".split()
    tokenizer, fields = TokenIds(vocab_size=vocab_size), {"random_seed": 1, "sequence_length": seq_length}
    fields |= {"blend": ([prefix], None), "split": "100,0,0", "path_to_cache": str(cache), **dict.fromkeys(off, False)}
    config = GPTDatasetConfig(**fields, tokenizer=tokenizer)
    return {
        kind.__name__: BlendedMegatronDatasetBuilder(kind, [None, None, None], lambda: True, config).build()[0]
        for kind in (GPTDataset, TaggedGPTDataset)
    }


def read(dataset: Any, count: int) -> None:
    for index in range(count):
        dataset[index]
