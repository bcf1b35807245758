from benchmarks.timing import Turns, median_s, time_ratio


def test_contenders_take_turns_in_alternating_order() -> None:
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    assert Turns(3).take({"a": "a", "b": "b"}, measure) == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}
    assert calls == ["a", "b", "b", "a", "a", "b"]


def test_ratios_are_of_the_same_round() -> None:
    times = {"ours": [2.0, 40.0, 6.0], "peer": [1.0, 10.0, 2.0]}
    assert time_ratio(times, "ours", "peer") == 3.0
    assert median_s(times) == {"ours": 6.0, "peer": 2.0}
