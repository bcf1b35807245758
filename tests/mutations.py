"""Damaged files for property-based tests."""

from hypothesis import strategies as st

# What a hostile or broken file may contain in the place of a number.
NUMBERS = st.sampled_from([0, 1, -1, 2, 7, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63)])


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Content with bytes changed, cut out, put in, or doubled, or with a number written over some of it.

    It may be the same again. Half of the changes are in or just after a header.
    """
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.one_of(st.integers(0, min(len(changed), 84)), st.integers(0, len(changed))))
        stop = draw(st.integers(start, min(len(changed), start + 16)))
        way = draw(st.sampled_from(["flip", "overwrite", "number", "cut", "cut to the end", "double"]))
        if way == "flip" and start < len(changed):
            changed[start] ^= 1 << draw(st.integers(0, 7))
        elif way == "overwrite":
            changed[start:stop] = draw(st.binary(max_size=16))
        elif way == "number":
            width = draw(st.sampled_from([4, 8]))
            # Lengths, offsets and counts begin at a multiple of four bytes, after an .idx's header of 34 two later.
            place = min(start - start % 4 + draw(st.sampled_from([0, 2])), max(len(changed) - width, 0))
            changed[place : place + width] = (draw(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
        elif way == "cut":
            del changed[start:stop]
        elif way == "cut to the end":
            del changed[start:]
        elif way == "double":
            changed[start:start] = changed[start:stop]
    return bytes(changed)
