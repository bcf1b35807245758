"""Windows of whole conversations."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moelpr.data.packing import windows_of


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60), size=st.integers(20, 40))
def test_every_conversation_is_in_one_window_that_holds_it_and_no_two_windows_fit_into_one(lengths, size) -> None:
    order, starts = windows_of(np.array(lengths, np.int32), size, True)
    assert sorted(order.tolist()) == list(range(len(lengths))) and starts[0] == 0 and starts[-1] == len(lengths)
    filled = [int(np.array(lengths)[part].sum()) for part in np.split(order, starts[1:-1])]
    assert all(0 < tokens <= size for tokens in filled)
    smallest = sorted(filled)[:2]
    assert len(filled) == 1 or sum(smallest) > size


def test_windows_by_hand() -> None:
    order, starts = windows_of(np.array([3, 7, 5, 2, 10]), 10, True)
    assert [part.tolist() for part in np.split(order, starts[1:-1])] == [[4], [1, 0], [2, 3]]
    order, starts = windows_of(np.array([3, 7]), 10, False)
    assert order.tolist() == [0, 1] and starts.tolist() == [0, 1, 2]
