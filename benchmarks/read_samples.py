"""What do the language bits cost when samples are read? TaggedGPTDataset against Megatron's own GPTDataset.

Both read the same samples of the same files, in turns, in one process; the fastest round of each counts, and rounds are
short, for machines that others use too. Without --data-path the corpora are made of random tokens, with documents as
long as --document-tokens says.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import numpy as np

from moelpr.megatron_patches import cpu, megatron_fixes

cpu.install()
megatron_fixes.install()

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402

from data_tools.corpus_writer import CorpusWriter  # noqa: E402
from moelpr.data.dataset import TaggedGPTDataset, TokenIds  # noqa: E402

WANTED_RATIO = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", metavar="PREFIX", help="a corpus of your own (default: random ones)")
    parser.add_argument("--vocab-size", type=int, help="of --data-path's tokenizer, in tokens")
    parser.add_argument(
        "--seq-length", type=int, nargs="+", default=[512, 4096], help="tokens per sample (default: 512 and 4096)"
    )
    parser.add_argument(
        "--document-tokens", type=int, nargs="+", default=[100, 1000], help="tokens per document (default: 100, 1000)"
    )
    parser.add_argument("--samples", type=int, default=100, help="samples per round (default: 100)")
    parser.add_argument("--rounds", type=int, default=100, help="rounds (default: 100)")
    arguments = parser.parse_args()
    if arguments.data_path and not arguments.vocab_size:
        parser.error("--data-path needs --vocab-size")

    logging.disable(logging.INFO)  # Megatron tells of every file it opens
    print(f"{'corpus':<34}{'seq-length':>11}{'Megatron':>14}{'tagged':>14}{'ratio':>8}")
    worst = float("inf")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data_path:
            corpora = [(arguments.data_path, arguments.data_path, arguments.vocab_size)]
        else:
            corpora = [
                random_corpus(Path(folder), vocab_size, length)
                for vocab_size in (32_000, 152_000)
                for length in arguments.document_tokens
            ]
        for name, prefix, vocab_size in corpora:
            for seq_length in arguments.seq_length:
                plain, tagged = (
                    build(kind, prefix, vocab_size, seq_length, Path(folder) / "cache")
                    for kind in (GPTDataset, TaggedGPTDataset)
                )
                plain_s, tagged_s = fastest_s([plain, tagged], arguments.samples, arguments.rounds)
                worst = min(worst, plain_s / tagged_s)
                print(
                    f"{name:<34}{seq_length:>11,}{1 / plain_s:>10,.0f} /s{1 / tagged_s:>11,.0f} /s"
                    f"{plain_s / tagged_s:>8.2f}",
                    flush=True,
                )
    print(f"lowest ratio {worst:.2f}, wanted at least {WANTED_RATIO}: {'yes' if worst >= WANTED_RATIO else 'NO'}")


def random_corpus(folder: Path, vocab_size: int, mean_length: int, tokens: int = 4_000_000) -> tuple[str, str, int]:
    """A name to print, the prefix and the vocabulary of a corpus whose documents are of both language groups."""
    rng = np.random.default_rng(1)
    prefix = folder / f"{vocab_size}-{mean_length}"
    with CorpusWriter(prefix, vocab_size) as writer:
        while writer.num_tokens < tokens:
            length = 1 + int(rng.lognormal(np.log(mean_length) - 0.5, 1.0))  # a long tail, as crawled text has
            writer.add_document(rng.integers(0, vocab_size, length, dtype=np.int32), bool(rng.integers(2)))
        writer.finalize()
        writer.commit()
    return f"{np.dtype(writer.dtype).name}, {mean_length:,} tokens a document", str(prefix), vocab_size


def build(kind: type, prefix: str, vocab_size: int, seq_length: int, cache: Path) -> GPTDataset:
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        blend=([prefix], None),
        split="100,0,0",
        path_to_cache=str(cache),
        tokenizer=TokenIds(vocab_size=vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(kind, [None, None, None], lambda: True, config).build()
    return train


def fastest_s(datasets: list[GPTDataset], samples: int, rounds: int) -> list[float]:
    """Seconds per sample of each dataset in its fastest round."""
    count = min(samples, len(datasets[0]))
    best = [float("inf")] * len(datasets)
    for _ in range(rounds):
        for index, dataset in enumerate(datasets):
            started = time.perf_counter()
            for sample in range(count):
                dataset[sample]
            best[index] = min(best[index], (time.perf_counter() - started) / count)
    return best


if __name__ == "__main__":
    main()
