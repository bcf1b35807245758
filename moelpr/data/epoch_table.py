"""How much of each language one epoch of the training data contains, and how many epochs a run takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset

from moelpr.data.dataset import TaggedGPTDataset
from moelpr.data.manifest import Manifest
from moelpr.errors import UserError


@dataclass(frozen=True)
class EpochLanguage:
    """One epoch's part in a language, or in all languages of one bit if no manifest names them."""

    name: str
    bit: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class EpochCorpus:
    """One corpus of the training data.

    Attributes:
        prefix: corpus prefix.
        languages: part of each language in one epoch.
        documents, tokens: counts of one epoch.
        samples: number of packed sequences in one epoch.
        used: number of samples that the run takes from the corpus.
        epochs: the same in epochs.
    """

    prefix: str
    languages: Sequence[EpochLanguage]
    documents: int
    tokens: int
    samples: int
    used: float
    epochs: float


def epoch_table(train: TaggedGPTDataset | BlendedDataset, num_samples: int, seq_length: int) -> str:
    """Format the training data as a table.

    Args:
        train: training dataset as Megatron's builder makes it.
        num_samples: number of samples that the run takes.
        seq_length: tokens per sample.

    Raises:
        UserError: The corpora have no weights, so they are read once, but the run takes more samples.
    """
    if len(train) < num_samples:
        raise UserError(
            f"corpora without weights are read once, which gives {len(train):,} samples, but the run takes "
            f"{num_samples:,}; give each corpus a weight (--data-path 1 A 1 B), or lower --train-iters"
        )
    datasets, weights = [train], [1.0]
    if isinstance(train, BlendedDataset):
        datasets, weights = train.datasets, [weight / sum(train.weights) for weight in train.weights]
    corpora = [
        _corpus(dataset, num_samples * weight, seq_length) for dataset, weight in zip(datasets, weights, strict=True)
    ]
    return "\n".join(_lines(corpora, num_samples, seq_length))


def _corpus(dataset: TaggedGPTDataset, used: float, seq_length: int) -> EpochCorpus:
    prefix, sequences = dataset.dataset.path_prefix, dataset.indices
    tokens = int(dataset.dataset.sequence_lengths[sequences].sum(dtype=np.int64))
    manifest = Manifest.read(prefix)
    if manifest is not None and manifest.tokens == tokens:
        documents = manifest.documents
        languages = [
            EpochLanguage(name, count.bit, count.documents, count.tokens) for name, count in manifest.languages.items()
        ]
    else:  # part of a corpus (--split), or a corpus without manifest: only the bits are known
        documents = len(sequences)
        original, original_tokens = dataset.dataset.count_original(int(sequences[0]), int(sequences[-1]))
        languages = [
            EpochLanguage("", "original", original, original_tokens),
            EpochLanguage("", "expanded", documents - original, tokens - original_tokens),
        ]
    languages = [language for language in languages if language.tokens]
    languages.sort(key=lambda language: (language.bit != "original", language.name))
    samples, epochs = (tokens - 1) // seq_length, used * seq_length / tokens
    return EpochCorpus(prefix, languages, documents, tokens, samples, used, epochs)


def _lines(corpora: list[EpochCorpus], num_samples: int, seq_length: int) -> Iterator[str]:
    width = max(len("language"), *(len(corpus.prefix) for corpus in corpora)) + 2
    yield f"moelpr: training data in samples of {seq_length:,} tokens; the run takes {num_samples:,}"
    yield f"  {'one epoch':<{width}}{'bit':<10}{'documents':>13}{'tokens':>18}{'samples':>13}{'epochs':>9}{'share':>9}"
    shares = {"original": 0.0, "expanded": 0.0}
    for corpus in corpora:
        share = corpus.used / num_samples
        yield (
            f"  {corpus.prefix:<{width}}{'':<10}{corpus.documents:>13,}{corpus.tokens:>18,}{corpus.samples:>13,}"
            f"{corpus.epochs:>9.2f}{share:>9.1%}"
        )
        for language in corpus.languages:
            part = share * language.tokens / corpus.tokens
            shares[language.bit] += part
            yield (
                f"    {language.name:<{width - 2}}{language.bit:<10}{language.documents:>13,}{language.tokens:>18,}"
                f"{'':>22}{part:>9.1%}"
            )
    total = " and ".join(f"{part:.1%} are {bit}-language" for bit, part in shares.items())
    yield f"  of all tokens the run reads, {total}"
