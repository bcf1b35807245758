"""A fastText model as fastText writes it, whose probabilities follow from the words: the format of version 12."""

import struct
from pathlib import Path

import numpy as np

_MAGIC, _VERSION, _SOFTMAX, _SUPERVISED = 793712314, 12, 3, 3
_WORD, _LABEL = 0, 1


def write_fasttext_model(path: Path, words: dict[str, str], strength: float = 10.0) -> Path:
    """Write a classifier. `words` are words and their labels.

    The probability of a label is softmax(strength * share of its words among the known ones); the end of the text is
    a known word too, as in every model of fastText.
    """
    labels = sorted(set(words.values()))
    size = len(labels)
    # Dimension, window, epochs, least count, negatives, word n-grams, loss, model, buckets, characters, update rate.
    settings = struct.pack("<12id", size, 5, 5, 1, 5, 1, _SOFTMAX, _SUPERVISED, 0, 0, 0, 100, 1e-4)
    counts = struct.pack("<3i2q", len(words) + 1 + size, len(words) + 1, size, len(words) + 1, -1)
    entries = [(word, _WORD) for word in ("</s>", *words)] + [(f"__label__{label}", _LABEL) for label in labels]
    table = b"".join(name.encode() + b"\0" + struct.pack("<qb", 1, kind) for name, kind in entries)
    inputs = strength * np.eye(size)[[labels.index(label) for label in words.values()]]
    inputs = np.vstack([np.zeros(size), inputs])
    matrices = [struct.pack("<?2q", False, *its.shape) + its.astype("<f4").tobytes() for its in (inputs, np.eye(size))]
    path.write_bytes(struct.pack("<2i", _MAGIC, _VERSION) + settings + counts + table + b"".join(matrices))
    return path
