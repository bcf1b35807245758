"""Timing. Contenders take turns in every round, so that all of them see the same machine."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Times = dict[str, list[float]]  # contender -> seconds in each round


def timed_s(work: Callable[[], object]) -> tuple[float, float]:
    """(wall time, CPU time of this process) of one call in seconds; device work is included in the wall time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started, started_cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - started_cpu


def take_turns[Work](
    contenders: Mapping[str, Work],
    rounds: int,
    measure: Callable[[Work], tuple[float, float]] = timed_s,  # type: ignore[assignment]
    warmup: int = 1,
) -> tuple[Times, Times]:
    """Wall times and CPU times of every contender, measured once per round, in an order that alternates.

    `measure` returns the (wall time, CPU time) of a contender in seconds; `warmup` unmeasured rounds come first.
    """
    wall, cpu = ({name: [] for name in contenders} for _ in range(2))
    for number in range(-warmup, rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            wall_s, cpu_s = measure(contenders[name])
            if number >= 0:
                wall[name].append(wall_s)
                cpu[name].append(cpu_s)
    return wall, cpu


def median_s(times: Times) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def fastest_s(times: Times) -> dict[str, float]:
    return {name: min(seconds) for name, seconds in times.items()}


def time_ratios(times: Times, name: str, baseline: str) -> list[float]:
    """Time of a contender divided by that of the baseline in the same round."""
    return [ours / theirs for ours, theirs in zip(times[name], times[baseline], strict=True)]


def time_ratio(times: Times, name: str, baseline: str) -> float:
    """Median of `time_ratios`."""
    return statistics.median(time_ratios(times, name, baseline))
