"""A sample of the documents of each dataset (--max-samples)."""

import random

import numpy as np
from numpy.typing import NDArray

from data_tools.preprocessing.shares import Share
from moelpr.data.text.documents import is_blank
from moelpr.data.text.sources import Form
from moelpr.data.text.streams import BLOCK_BYTES, name_damaged, open_stream
from moelpr.data.text.tables import open_table


def sample_documents(
    shares: list[Share], names: list[str], max_samples: int, seed: int
) -> tuple[list[NDArray[np.int64]], list[str]]:
    """Sample `max_samples` documents of each dataset, without replacement.

    Reads every file once to count its documents; memory is needed only for those chosen.

    Args:
        shares: Complete files.
        names: Dataset names; the sample depends only on a dataset's name, its documents and the seed.

    Returns:
        The chosen documents of each share, counted from 0, ascending; and a note for each dataset that has no more.
    """
    counts = [_count_documents(share) for share in shares]
    chosen = [np.zeros(0, np.int64) for _ in shares]
    notes = []
    for dataset, name in enumerate(names):
        members = [index for index, share in enumerate(shares) if share.source.dataset == dataset]
        total = sum(counts[index] for index in members)
        if total <= max_samples:
            label = f"the dataset {name}" if name else "the input"
            notes.append(f"{label} contains {total:,} documents, so --max-samples {max_samples:,} takes all of them")
        sampled = np.sort(random.Random(f"{seed} {name}").sample(range(total), min(max_samples, total)))
        start = 0
        for index in members:
            first, last = np.searchsorted(sampled, [start, start + counts[index]])
            chosen[index] = sampled[first:last] - start
            start += counts[index]
    return chosen, notes


def _count_documents(share: Share) -> int:
    """Count the rows, or the lines that are not blank, of a complete file."""
    with name_damaged(share.source):
        if share.source.form is Form.PARQUET:
            with open_table(share.source, []) as file:
                return int(file.metadata.num_rows)
        with open_stream(share.source) as (stream, _):
            documents, at_line_start = 0, True
            while piece := stream.readline(BLOCK_BYTES):
                documents += at_line_start and not is_blank(piece)
                at_line_start = piece.endswith(b"\n")
            return documents
