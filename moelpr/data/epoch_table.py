"""How much of each language one epoch of the training data contains, and how many epochs a run takes."""

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset

from moelpr.base.errors import UserError
from moelpr.base.text_tables import table_text
from moelpr.data.dataset import TaggedGPTDataset
from moelpr.data.manifest import LanguageCount, Manifest


def epoch_table(train: TaggedGPTDataset | BlendedDataset, num_samples: int, seq_length: int) -> str:
    """Format the training data as a table: documents, tokens and samples of one epoch, epochs and shares of the run.

    Args:
        seq_length: Tokens per sample.

    Raises:
        UserError: The corpora have no weights, so they are read once, but the run takes more samples.
    """
    if len(train) < num_samples:
        raise UserError(
            f"corpora without weights are read once, which gives {len(train):,} samples, but the run takes "
            f"{num_samples:,}; give each corpus a weight (--data-path 1 A 1 B), or train fewer steps"
        )
    datasets, shares = [train], [1.0]
    if isinstance(train, BlendedDataset):
        datasets, shares = train.datasets, [weight / sum(train.weights) for weight in train.weights]
    rows = []
    total = {"original": 0.0, "expanded": 0.0}
    for dataset, share in zip(datasets, shares, strict=True):
        prefix = dataset.dataset.path_prefix
        tokens = int(dataset.dataset.sequence_lengths[dataset.indices].sum(dtype=np.int64))
        documents, languages = _languages(dataset, tokens)
        samples, epochs = (tokens - 1) // seq_length, num_samples * share * seq_length / tokens
        if dataset.dataset.loss_bits is not None:  # whole conversations
            samples = len(dataset.sample_index) - 1
            epochs = num_samples * share / samples
        rows.append([prefix, "", f"{documents:,}", f"{tokens:,}", f"{samples:,}", f"{epochs:.2f}", f"{share:.1%}"])
        for name, count in sorted(languages, key=lambda item: (item[1].bit != "original", item[0])):
            if count.tokens:
                part = share * count.tokens / tokens
                total[count.bit] += part
                counts = f"{count.documents:,}", f"{count.tokens:,}"
                rows.append([f"  {name}", count.bit, *counts, "", "", f"{part:.1%}"])
    head = ["one epoch", "bit", "documents", "tokens", "samples", "epochs", "share"]
    parts = " and ".join(f"{part:.1%} are {bit}-language" for bit, part in total.items())
    return (
        f"moelpr: training data in samples of {seq_length:,} tokens; the run takes {num_samples:,}\n"
        f"{table_text(head, rows, (0, 1), indent='  ')}\n  of all tokens the run reads, {parts}"
    )


def _languages(dataset: TaggedGPTDataset, tokens: int) -> tuple[int, list[tuple[str, LanguageCount]]]:
    """Return the documents of one epoch, and counts by language, or by bit (with empty names) without a manifest."""
    manifest = Manifest.read(dataset.dataset.path_prefix)
    if manifest is not None and manifest.tokens == tokens:
        return manifest.documents, list(manifest.languages.items())
    # Part of a corpus (--split), or a corpus without manifest: only the bits are known.
    sequences = dataset.indices
    original, original_tokens = dataset.dataset.count_original(int(sequences[0]), int(sequences[-1]))
    return len(sequences), [
        ("", LanguageCount("original", original, original_tokens)),
        ("", LanguageCount("expanded", len(sequences) - original, tokens - original_tokens)),
    ]
