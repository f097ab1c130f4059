"""How long a batch may be beside other models with short SLOs: rule 6 of pool.py. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.domain import Kind, Worker
from scheduler.policies.lanes import Lanes
from scheduler.policies.rates import RateBook

# Of the other models' SLOs.
BLOCKING_SHARE = 0.65
# A batch that is longer than a single item by no more than that may always be.
BLOCKED_ANYWAY = 1.25
# How much more than the other models' load must be left on other slices.
MARGIN = 1.1
# Less of the pool's time than this is none.
IDLE_USE = 0.02


def unblocking(now_ns: int, worker: Worker, kind: Kind, most: int, lanes: Iterable[Lanes], book: RateBook) -> int:
    """The most items that a batch of up to `most` may have; at least one. `lanes`: of all models."""
    table = worker.tables[kind]
    for other in lanes:
        if other.kind[0] == kind[0] or not other.slo_ns or other.kind not in worker.tables:
            continue
        limit_ns = BLOCKING_SHARE * other.slo_ns
        if table.ns[most] > limit_ns and not _carried(now_ns, worker, other, limit_ns, book):
            most = max(min(table.largest_within(max(limit_ns, BLOCKED_ANYWAY * table.ns[1])), most), 1)
    return most


def _carried(now_ns: int, worker: Worker, other: Lanes, limit_ns: float, book: RateBook) -> bool:
    """Whether the slices that are left carry the other's load; those that are busy for longer than that do not."""
    arriving = other.arriving.per_ns(now_ns)
    rates = book.of(other.kind, other.slo_ns)  # its own may be of slices that are no more
    if not other and arriving < IDLE_USE * rates.pool_per_ns:
        return True
    taken = rates.fit(worker).items_per_ns
    for each in rates.workers:
        if each.free_at_ns > now_ns + limit_ns:
            taken += rates.fit(each).items_per_ns
    return taken <= rates.pool_per_ns - MARGIN * arriving
