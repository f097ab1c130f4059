"""What the slices can do for one kind of work within its SLO, and how long its queue may be. Pure."""

from __future__ import annotations

import bisect
import math

from scheduler.domain import Kind, Pool, Worker

# The queue never holds less or more than these shares of what the pool can do until a query is due.
LEAST_THETA, MOST_THETA = 0.3, 0.72
# An efficient batch has this share of the throughput of the best one within the SLO.
EFFICIENT = 0.95
# Late work may take batches of so many SLOs.
LATE_SHARE = 1.5


class Rates:
    """Of one kind, within `slo_ns`. By worker id: `caps`, the largest batch that takes no longer than the SLO (or
    than 1.5 of them, `late_caps`), and `items_per_ns` of the best batch up to that cap. `pool_per_ns` is their sum.
    """

    __slots__ = (
        "_efficient_ns",
        "caps",
        "items_per_ns",
        "largest_batch",
        "late_caps",
        "least_ns",
        "pool_per_ns",
        "slo_ns",
        "version",
        "workers",
    )

    def __init__(self, workers: list[Worker], kind: Kind, slo_ns: float, version: int) -> None:
        self.workers = workers
        self.slo_ns = slo_ns
        self.version = version
        self.caps: dict[int, int] = {}
        self.late_caps: dict[int, int] = {}
        self.items_per_ns: dict[int, float] = {}
        self.largest_batch = 1
        self.least_ns = min(worker.tables[kind].ns[1] for worker in workers)
        efficient_ns = 0.0
        for worker in workers:
            table = worker.tables[kind]
            cap = self.caps[worker.id] = max(table.largest_within(slo_ns), 1)
            self.late_caps[worker.id] = max(table.largest_within(LATE_SHARE * slo_ns), 1)
            rate = self.items_per_ns[worker.id] = table.best_per_ns[cap]
            self.largest_batch = max(self.largest_batch, table.best[cap])
            efficient_ns += rate * table.ns[bisect.bisect_left(table.best_per_ns, EFFICIENT * rate)]
        self.pool_per_ns = sum(self.items_per_ns.values())
        self._efficient_ns = efficient_ns / self.pool_per_ns

    def items_until(self, now_ns: int, due_ns: int) -> float:
        """Items that the slices can do by then, each from when it is free."""
        items = 0.0
        for worker, rate in zip(self.workers, self.items_per_ns.values(), strict=True):
            free_ns = worker.free_at_ns
            left_ns = due_ns - (free_ns if free_ns > now_ns else now_ns)
            if left_ns > 0:
                items += rate * left_ns
        return items

    def theta(self, mean: float, square: float) -> float:
        """How much of that may be promised to waiting queries, by the means of their items and of those squared.

        Two standard deviations of the work that arrives within an SLO: its mean is at most R * SLO at full load, its
        variance R * SLO * square / mean (compound Poisson). What is left of the SLO is for batches of a good size;
        where these are short beside the SLO, the queue may be longer.
        """
        within_slo = self.pool_per_ns * self.slo_ns
        deviations = 2 * math.sqrt(square / (mean * within_slo))
        floor = LEAST_THETA + self.largest_batch / within_slo
        return max(min(max(deviations, floor), MOST_THETA), 1 - self._efficient_ns / self.slo_ns)


class RateBook:
    """Rates by kind and SLO, made anew when what is served, or how fast, has changed."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._rates: dict[tuple[Kind, int], Rates] = {}
        self._served = -1

    def of(self, kind: Kind, slo_ns: int) -> Rates:
        """SLOs are told apart to an eighth of them; 0 is none at all."""
        pool = self._pool
        if self._served != pool.changes:
            self._served = pool.changes
            self._rates.clear()
        steps = max(slo_ns.bit_length() - 4, 0)
        key = (kind, slo_ns >> steps << steps)
        rates = self._rates.get(key)
        if rates is None or rates.version != pool.paces[kind[0]]:
            within_ns = float(slo_ns) if slo_ns else math.inf
            rates = self._rates[key] = Rates(pool.serving[kind], kind, within_ns, pool.paces[kind[0]])
        return rates
