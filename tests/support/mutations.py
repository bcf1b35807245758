"""Damaged files, for property-based tests and for the fault campaign (tests/faults)."""

from functools import partial
from random import Random

from hypothesis import strategies as st

# Values of a hostile or broken file in the place of a number.
NUMBERS = (0, 1, -1, 2, 7, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63))


def mutate(content: bytes, random: Random) -> bytes:
    """Content with bytes changed, cut out, put in, or doubled, or with a number written over some of it.

    It may be the same again. Half of the changes are in or just after a header.
    """
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        start = random.randint(0, min(len(changed), 84) if random.random() < 0.5 else len(changed))
        stop = random.randint(start, min(len(changed), start + 16))
        way = random.choice(["flip", "overwrite", "number", "cut", "cut to the end", "double"])
        if way == "flip" and start < len(changed):
            changed[start] ^= 1 << random.randint(0, 7)
        elif way == "overwrite":
            changed[start:stop] = bytes(random.randint(0, 255) for _ in range(random.randint(0, 16)))
        elif way == "number":
            width = random.choice([4, 8])
            # Lengths, offsets and counts begin at a multiple of four bytes, after an .idx's header of 34 two later.
            place = min(start - start % 4 + random.choice([0, 2]), max(len(changed) - width, 0))
            changed[place : place + width] = (random.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
        elif way == "cut":
            del changed[start:stop]
        elif way == "cut to the end":
            del changed[start:]
        elif way == "double":
            changed[start:start] = changed[start:stop]
    return bytes(changed)


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """The results that `mutate` can give."""
    return st.builds(partial(mutate, content), st.randoms(use_true_random=False))
