from functools import partial
from itertools import groupby

from benchmarks.timing import Turns, median_s, time_ratio


def test_contenders_take_turns_in_alternating_order() -> None:
    calls: list[str] = []
    times = Turns(3).take({name: partial(calls.append, name) for name in "ab"})
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in times.values())
    assert [name for name, _ in groupby(calls)] == ["a", "b", "a", "b"]  # a, b, then b, a, then a, b


def test_ratios_are_of_the_same_round() -> None:
    times = {"ours": [2.0, 40.0, 6.0], "peer": [1.0, 10.0, 2.0]}
    assert time_ratio(times, "ours", "peer") == 3.0
    assert median_s(times) == {"ours": 6.0, "peer": 2.0}
