"""When enough runs were timed: the median is steady, and outliers are told apart. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Fewer runs say nothing of their spread.
LEAST_RUNS = 7
# Beyond so many standard deviations, by the median of the distances from the median, a run is an outlier.
OUTLIER = 6.0
_DEVIATIONS_PER_MAD = 1.4826


@dataclass(frozen=True, slots=True)
class Steady:
    """The median of some runs. `within`: the share of it that it is known to, with 95 % confidence.

    `outliers`: how many were very slow. They count in the median, which they hardly move; tails are made of them.
    """

    median_ms: float
    within: float
    outliers: int
    runs: int


def summary(times_ms: Sequence[float]) -> Steady:
    """Of at least one run. The interval is that of order statistics: it presumes no distribution."""
    ordered = sorted(times_ms)
    runs = len(ordered)
    median_ms = statistics.median(ordered)
    off = statistics.median(abs(each - median_ms) for each in ordered)
    # A clock has ticks, and equal times would make every other one an outlier.
    limit_ms = median_ms + OUTLIER * max(_DEVIATIONS_PER_MAD * off, 0.01 * median_ms)
    outliers = sum(each > limit_ms for each in ordered)
    reach = 0.98 * math.sqrt(runs)
    low, high = math.floor((runs - 1) / 2 - reach), math.ceil((runs - 1) / 2 + reach)
    if low < 0 or runs < LEAST_RUNS:
        return Steady(median_ms, math.inf, outliers, runs)
    return Steady(median_ms, (ordered[high] - ordered[low]) / 2 / median_ms, outliers, runs)
