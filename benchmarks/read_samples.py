"""What do the language bits cost when samples are read? TaggedGPTDataset against Megatron's own GPTDataset.

    python -m benchmarks.read_samples [--data-path PREFIX --vocab-size N]

Both datasets read the same samples of the same files, in turns, in one process; the fastest round of each counts, and
rounds are short because other processes may use the machine. The limit is 0.9 times the samples per second of
GPTDataset.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import argument_parser, install_megatron, print_table, working_folder, write_corpus
from benchmarks.timing import fastest_s, take_turns

LIMIT = 0.9


def main() -> None:
    parser = argument_parser(__doc__, rounds=100)
    parser.add_argument("--data-path", metavar="PREFIX", help="prefix of a corpus (default: random corpora)")
    parser.add_argument("--vocab-size", type=int, help="vocabulary size of the corpus, in tokens")
    parser.add_argument("--seq-length", type=int, nargs="+", default=[512, 4096], help="tokens per sample")
    parser.add_argument("--document-tokens", type=int, nargs="+", default=[100, 1000],
                        help="mean tokens per random document")  # fmt: skip
    parser.add_argument("--samples", type=int, default=100, help="samples per round")
    args = parser.parse_args()
    if args.data_path and not args.vocab_size:
        parser.error("--data-path requires --vocab-size")
    install_megatron()
    logging.disable(logging.INFO)  # Megatron logs every file it opens
    rows = []
    with working_folder(None) as folder:
        if args.data_path:
            corpora = [(args.data_path, args.data_path, args.vocab_size)]
        else:
            sizes = [(vocab_size, length) for vocab_size in (32_000, 152_000) for length in args.document_tokens]
            corpora = [random_corpus(folder, *size) for size in sizes]
        for name, prefix, vocab_size in corpora:
            for seq_length in args.seq_length:
                datasets = build_datasets(prefix, vocab_size, seq_length, folder / "cache")
                rates = samples_per_s(datasets, args.samples, args.rounds)
                ratio = rates["TaggedGPTDataset"] / rates["GPTDataset"]
                rows.append({"corpus": name, "seq_length": seq_length, **rates, "ratio": ratio})
    print_table(rows)
    lowest = min(row["ratio"] for row in rows)
    print(f"lowest ratio {lowest:.2f}, wanted at least {LIMIT}: {'yes' if lowest >= LIMIT else 'NO'}")


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

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=seq_length, blend=([prefix], None), split="100,0,0", path_to_cache=str(cache),
        tokenizer=TokenIds(vocab_size=vocab_size), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    return {
        kind.__name__: BlendedMegatronDatasetBuilder(kind, [None, None, None], lambda: True, config).build()[0]
        for kind in (GPTDataset, TaggedGPTDataset)
    }


def samples_per_s(datasets: dict[str, Any], samples: int, rounds: int) -> dict[str, float]:
    """Samples per second of each dataset in its fastest round."""
    count = min(samples, *map(len, datasets.values()))
    readers = {name: partial(read, dataset, count) for name, dataset in datasets.items()}
    times, _ = take_turns(readers, rounds, warmup=0)
    return {name: count / seconds for name, seconds in fastest_s(times).items()}


def read(dataset: Any, count: int) -> None:
    for index in range(count):
        dataset[index]


if __name__ == "__main__":
    main()
