"""What batches really take, against what the latency table says: a correction and a spread, learned online. Pure.

The correction is the median of the last ratios, the spread their median absolute deviation: up to half of them may be
outliers, and a slice that has turned slow is found out after half a window of batches.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

# Batches that are remembered.
WINDOW = 15
# Before so many, the table is believed.
ENOUGH = 5
LEAST, MOST = 0.25, 16.0
# Sigma of a normal distribution, per median absolute deviation.
SIGMA_PER_MAD = 1.4826
# How many sigmas a batch may take longer and be no surprise.
SIGMAS = 2.0
MOST_GUARD = 1.5
# Smaller changes are not worth a new table; nor is looking for them after every batch.
NOTICED = 0.03
EVERY = 4


class Estimate:
    """Of one model on one worker. Times are to be multiplied by `factor`; `guard` is 1 + 2 sigma, at most 1.5."""

    __slots__ = ("_count", "_last", "_sorted", "factor", "guard")

    def __init__(self) -> None:
        self.factor = 1.0
        self.guard = 1.0
        self._count = 0
        self._last: deque[float] = deque()
        self._sorted: list[float] = []

    def is_none(self) -> bool:
        """Whether the table is believed as it is."""
        return self.factor == 1 and self.guard == 1

    def observe(self, ratio: float) -> bool:
        """A batch took `ratio` times what the table says. Whether `factor` or `guard` has changed by that."""
        ratio = min(max(ratio, LEAST), MOST)
        self._last.append(ratio)
        insort(self._sorted, ratio)
        if len(self._last) > WINDOW:
            del self._sorted[bisect_left(self._sorted, self._last.popleft())]
        self._count += 1
        if len(self._last) < ENOUGH or (len(self._last) == WINDOW and self._count % EVERY):
            return False
        middle = len(self._sorted) // 2
        factor = self._sorted[middle]
        deviations = sorted(abs(each - factor) for each in self._sorted)
        guard = min(1 + SIGMAS * SIGMA_PER_MAD * deviations[middle] / factor, MOST_GUARD)
        if abs(factor - self.factor) <= NOTICED * self.factor and abs(guard - self.guard) <= NOTICED:
            return False
        self.factor, self.guard = factor, guard
        return True
