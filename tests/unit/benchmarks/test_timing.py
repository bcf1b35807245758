"""Contenders take turns, and ratios compare times of the same round."""

import pytest

from benchmarks.timing import fastest_s, median_s, take_turns, time_ratio, time_ratios


def test_contenders_take_turns_in_alternating_order_after_the_warm_up() -> None:
    calls: list[str] = []

    def measure(name: str) -> tuple[float, float]:
        calls.append(name)
        return float(len(calls)), -float(len(calls))

    wall, cpu = take_turns({"a": "a", "b": "b"}, rounds=3, measure=measure)
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"], "the first round is the warm-up"
    assert wall == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}
    assert cpu == {name: [-seconds for seconds in times] for name, times in wall.items()}


def test_times_are_those_of_the_work() -> None:
    def work() -> None:
        total = 0
        for number in range(200_000):
            total += number

    wall, cpu = take_turns({"work": work}, rounds=2)
    assert min(wall["work"]) > 1e-3 and min(cpu["work"]) > 1e-3


def test_ratios_are_of_the_same_round() -> None:
    times = {"ours": [2.0, 40.0, 6.0], "peer": [1.0, 10.0, 2.0]}
    assert time_ratios(times, "ours", "peer") == [2.0, 4.0, 3.0]
    assert time_ratio(times, "ours", "peer") == 3.0
    assert median_s(times) == {"ours": 6.0, "peer": 2.0}
    assert fastest_s(times) == {"ours": 2.0, "peer": 1.0}
    with pytest.raises(ValueError):
        time_ratio({"ours": [1.0], "peer": []}, "ours", "peer")
