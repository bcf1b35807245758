"""Drawing some of a dataset's documents: each with the same chance, not the first ones."""

import random

import numpy as np
from numpy.typing import NDArray

from data_tools.preprocessing.readers import count_documents
from data_tools.preprocessing.sources import Share


def draw_documents(
    shares: list[Share], names: list[str], max_samples: int, seed: int
) -> tuple[list[NDArray[np.int64]], list[str]]:
    """Draw `max_samples` documents of each dataset, without putting any back.

    Every file is read once to count its documents; the draw itself takes memory for the chosen ones only.

    Args:
        shares: whole files.
        names: of the datasets; a dataset's draw depends on its name, the seed and its documents only.

    Returns:
        per share the chosen documents, counted from 0, ascending; and a sentence per dataset that holds no more.
    """
    counts = [count_documents(share) for share in shares]
    chosen = [np.zeros(0, np.int64) for _ in shares]
    notes = []
    for dataset, name in enumerate(names):
        members = [index for index, share in enumerate(shares) if share.source.dataset == dataset]
        total = sum(counts[index] for index in members)
        if total <= max_samples:
            label = f"the dataset {name}" if name else "the input"
            notes.append(f"{label} holds {total:,} documents, so --max-samples {max_samples:,} takes all of them")
        drawn = np.sort(random.Random(f"{seed} {name}").sample(range(total), min(max_samples, total)))
        start = 0
        for index in members:
            stop = start + counts[index]
            first, last = np.searchsorted(drawn, [start, stop])
            chosen[index] = drawn[first:last] - start
            start = stop
    return chosen, notes
