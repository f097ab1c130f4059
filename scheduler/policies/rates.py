"""What the slices can do for one kind of work within its SLO, and how long its queue may be. Pure."""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple

from scheduler.domain import BatchTable, Kind, Part, Pool, Worker

# The queue never holds less or more than these shares of what the pool can do until a query is due.
LEAST_THETA, MOST_THETA = 0.3, 0.72
# An efficient batch has this share of the throughput of the best one within the SLO.
EFFICIENT = 0.95
# Late work may take batches of so many SLOs.
LATE_SHARE = 1.5


class Fit(NamedTuple):
    """How a slice serves one kind: `cap`, its largest batch within the SLO; `items_per_ns` of the best up to that."""

    table: BatchTable
    cap: int
    late_cap: int
    items_per_ns: float
    efficient_ns: int


def _row(fit: Fit) -> tuple[int, float]:
    return fit.table.ns[1], fit.items_per_ns


class Sizes(NamedTuple):
    """Means of the items of queries, and of their squares."""

    mean: float
    square: float


class Rates:
    """Of one kind, within `slo_ns`. `pool_per_ns`: items of all slices at their best."""

    __slots__ = (
        "_efficient",
        "_elsewhere",
        "_fits",
        "_guard",
        "_kind",
        "_rows",
        "ids",
        "largest_batch",
        "least_ns",
        "pool_per_ns",
        "slo_ns",
        "workers",
    )

    def __init__(self, workers: list[Worker], kind: Kind, slo_ns: float) -> None:
        self.workers = workers
        self.slo_ns = slo_ns
        self._kind = kind
        self._fits = {worker.id: self._fit(worker) for worker in workers}
        self.ids = frozenset(self._fits)
        self._elsewhere: dict[Rates, float] = {}
        fits = self._fits.values()
        self.least_ns = min(fit.table.ns[1] for fit in fits)
        self.largest_batch = max(fit.table.best[fit.cap] for fit in fits)
        self.pool_per_ns = sum(fit.items_per_ns for fit in fits)
        self._efficient = sum(fit.items_per_ns * fit.efficient_ns for fit in fits)
        self._guard = max(fit.table.guard for fit in fits)
        self._rows = [(worker, *_row(self._fits[worker.id])) for worker in workers]

    def _fit(self, worker: Worker) -> Fit:
        table = worker.tables[self._kind]
        cap = max(table.largest_within(self.slo_ns), 1)
        rate = table.best_per_ns[cap]
        efficient_ns = table.ns[bisect.bisect_left(table.best_per_ns, EFFICIENT * rate)]
        if table.ns[1] > self.slo_ns:  # all that it does is late
            return Fit(table, cap, table.knee, table.best_per_ns[table.knee], efficient_ns)
        return Fit(table, cap, table.largest_within(LATE_SHARE * self.slo_ns), rate, efficient_ns)

    def fit(self, worker: Worker) -> Fit:
        """As its table is now: where that has been corrected, so are the sums, when somebody looks."""
        fit = self._fits[worker.id]
        if fit.table is not worker.tables[self._kind]:
            new = self._fits[worker.id] = self._fit(worker)
            self.pool_per_ns += new.items_per_ns - fit.items_per_ns
            self._efficient += new.items_per_ns * new.efficient_ns - fit.items_per_ns * fit.efficient_ns
            self.least_ns = min(each.table.ns[1] for each in self._fits.values())
            self._guard = max(each.table.guard for each in self._fits.values())
            self._rows[self.workers.index(worker)] = worker, *_row(new)
            return new
        return fit

    def least_of(self, part: Part) -> int:
        """The least time in which any slice ends what of it has to run at once."""
        if part.items == 1 or part.may_be_cut:
            return self.least_ns
        return min(fit.table.time_ns(part.items) for fit in self._fits.values())

    def room(self, now_ns: int, due_ns: int, sizes: Sizes) -> tuple[float, float]:
        """How many items of queries of such sizes may wait for what is due then; and what the slices can do by then."""
        items = 0.0
        for worker, least_ns, items_per_ns in self._rows:
            free_ns = worker.free_at_ns
            left_ns = due_ns - (free_ns if free_ns > now_ns else now_ns)
            if left_ns >= least_ns:
                items += items_per_ns * left_ns
        return self._theta(sizes, self._guard * (1 + 1 / len(self.workers))) * items, items

    def elsewhere(self, other: Rates) -> float:
        """Which share of these slices, by what they do, is not among the others."""
        share = self._elsewhere.get(other)
        if share is None:
            items = sum(fit.items_per_ns for worker_id, fit in self._fits.items() if worker_id not in other.ids)
            share = self._elsewhere[other] = items / self.pool_per_ns
        return share

    def _theta(self, sizes: Sizes, longer: float) -> float:
        """How much of what the slices can do may be promised to waiting queries.

        Two standard deviations of the work that arrives within an SLO: its mean is at most R * SLO at full load, its
        variance R * SLO * square / mean (compound Poisson). What is left of the SLO is for batches of a good size;
        where these are short beside the SLO, even with the wait for a slice that begins one (`longer`), the queue may
        be longer.
        """
        within_slo = self.pool_per_ns * self.slo_ns
        deviations = 2 * math.sqrt(sizes.square / (sizes.mean * within_slo))
        floor = LEAST_THETA + self.largest_batch / within_slo
        efficient: float = 1 - longer * self._efficient / self.pool_per_ns / self.slo_ns
        return max(min(max(deviations, floor), MOST_THETA), efficient)


class RateBook:
    """Rates by kind and SLO, made anew when what is served has changed."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._rates: dict[tuple[Kind, int], Rates] = {}
        self._served = -1

    def of(self, kind: Kind, slo_ns: int) -> Rates:
        """SLOs are told apart to a 32nd of them; 0 is none at all."""
        pool = self._pool
        if self._served != pool.changes:
            self._served = pool.changes
            self._rates.clear()
        steps = max(slo_ns.bit_length() - 6, 0)
        key = (kind, slo_ns >> steps << steps)
        rates = self._rates.get(key)
        if rates is None:
            rates = self._rates[key] = Rates(pool.serving[kind], kind, float(slo_ns) if slo_ns else math.inf)
        return rates
