"""Timing by torch.utils.benchmark. Contenders take turns in every round, so that all of them see the same machine."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer, timer

Work = Callable[[], object]
Times = dict[str, list[float]]  # contender -> seconds in each round


@dataclass(frozen=True)
class Turns:
    """A way to measure contenders."""

    rounds: int  # number of rounds, in each of which every contender is measured once
    # measure the CPU time of this process, which other processes disturb less, instead of wall time
    cpu_time: bool = False

    @property
    def clock(self) -> Callable[[], float]:
        """A clock in seconds; the one of wall time waits for the device."""
        return time.process_time if self.cpu_time else timer

    def seconds(self, work: Work, min_run_time: float = 0.0) -> float:
        """The time of a call, after one to warm up; the median of as many calls as `min_run_time` seconds take."""
        timed = Timer("work()", timer=self.clock, globals={"work": work}, num_threads=torch.get_num_threads())
        return timed.blocked_autorange(min_run_time=min_run_time).median

    def take[Contender](
        self, contenders: Mapping[str, Contender], measure: Callable[[Contender], float] | None = None
    ) -> Times:
        """The time of every contender in every round, in an order that alternates; default: `seconds` of a call."""
        times: Times = {name: [] for name in contenders}
        for number in range(self.rounds):
            for name in list(contenders)[:: -1 if number % 2 else 1]:
                times[name].append((measure or self.seconds)(contenders[name]))  # type: ignore[arg-type]
        return times


def median_s(times: Times) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def time_ratio(times: Times, name: str, baseline: str) -> float:
    """Median over the rounds of a contender's time divided by the baseline's in the same round."""
    return statistics.median(ours / theirs for ours, theirs in zip(times[name], times[baseline], strict=True))
