"""Ratios that hold on a noisy machine: contestants take turns, and medians are compared."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one contestant: the median, and the fastest and slowest turn."""

    median_s: float
    fastest_s: float
    slowest_s: float
    num_turns: int


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    *,
    num_turns: int,
    warm: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Time each contestant once a turn, in turn, after one turn that is not counted.

    The order is reversed every other turn, so that a machine that slows down favours nobody.
    warm: what runs in the turn that is not counted, where contestants themselves take long.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in (contestants if warm is None else warm).values():
        run()
    for turn in range(num_turns):
        names = list(contestants)
        for name in reversed(names) if turn % 2 else names:
            start = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: Timing(
            median_s=statistics.median(values),
            fastest_s=min(values),
            slowest_s=max(values),
            num_turns=len(values),
        )
        for name, values in seconds.items()
    }


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times longer the median turn of `slow` took."""
    return slow.median_s / fast.median_s
