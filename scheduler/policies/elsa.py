"""ELSA: a query goes to the smallest slice that still meets its SLO (Kim, Choi, Rhu, DAC'22). Pure.

From the paper (arXiv 2202.13481): slack(p) = SLO_remaining - alpha * (T_wait(p) + beta * T_est(query, p)),
with alpha = beta = 1. A: scan slices from small to large, take the first with slack > 0, inside a size the
shortest wait. B: where none has slack, take the least T_wait + T_est.

Ours: queues are worked off in batches up to the knee, so T_wait counts batches, and T_est is what the query
adds to them. A query without an SLO goes by B alone. Queries are never cut.
"""

from __future__ import annotations

from collections.abc import Callable

from scheduler.batching import BucketQueue
from scheduler.domain import Company, Kind, Part, Pool, Worker
from scheduler.policies import Start

Bucket = tuple[Kind, Company]


class _Lane:
    """What waits for one worker; `backlog_ns` estimates the time of all of it."""

    __slots__ = ("backlog_ns", "buckets")

    def __init__(self) -> None:
        self.buckets: dict[Bucket, BucketQueue] = {}
        self.backlog_ns = 0


class Elsa:
    """One queue a worker, bound on arrival."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lanes: dict[int, _Lane] = {}

    def offer(self, now_ns: int, part: Part, bound_ns: int | None) -> int:
        worker, late_ns = self._bind(now_ns, part)
        if bound_ns is not None and late_ns > bound_ns:
            return late_ns - bound_ns
        part.worker_id = worker.id
        lane = self._lanes.setdefault(worker.id, _Lane())
        key = (part.kind, part.company)
        bucket = lane.buckets.get(key)
        if bucket is None:
            bucket = lane.buckets[key] = BucketQueue()
        bucket.push(part)
        self._recount(lane, worker, key)
        return 0

    def _bind(self, now_ns: int, part: Part) -> tuple[Worker, int]:
        """The worker that ELSA's rule names, and by how many ns the part would be late there."""
        due_ns = part.due_ns
        workers = self._pool.serving[part.kind]
        best = workers[0]
        if len(workers) == 1 and due_ns is None:
            return best, 0
        best_ns = self._finish_ns(now_ns, best, part)
        for worker in workers[1:]:
            if due_ns is not None and best_ns < due_ns and worker.gpcs > best.gpcs:
                break  # step A: a smaller slice has slack
            finish_ns = self._finish_ns(now_ns, worker, part)
            if finish_ns < best_ns:
                best, best_ns = worker, finish_ns
        return best, 0 if due_ns is None else max(best_ns - due_ns, 0)

    def next(self, now_ns: int) -> Start | None:
        for worker_id, lane in self._lanes.items():
            worker = self._pool.ready.get(worker_id)
            if worker is not None and lane.buckets:
                return self._take(now_ns, worker, lane)
        return None

    def _take(self, now_ns: int, worker: Worker, lane: _Lane) -> Start:
        key = next(iter(lane.buckets)) if len(lane.buckets) == 1 else min(lane.buckets, key=_by_head(lane))
        kind = key[0]
        batch = lane.buckets[key].take(max(now_ns, worker.free_at_ns), worker.tables[kind])
        self._recount(lane, worker, key)
        return Start(worker, kind, batch)

    def wake_ns(self, now_ns: int) -> int | None:
        return None

    def discard(self, part: Part) -> None:
        assert part.worker_id is not None  # it was offered
        lane = self._lanes[part.worker_id]
        key = (part.kind, part.company)
        lane.buckets[key].discard(part)
        self._recount(lane, self._pool.workers[part.worker_id], key)

    def evict(self, worker: Worker, model: str | None = None) -> list[Part]:
        lane = self._lanes.get(worker.id)
        if lane is None:
            return []
        parts: list[Part] = []
        for key in [key for key in lane.buckets if model is None or key[0][0] == model]:
            parts += lane.buckets[key].drain()
            self._recount(lane, worker, key)
        if model is None:
            del self._lanes[worker.id]
        return parts

    def backlog_ns(self, now_ns: int, model: str) -> int:
        workers = {w.id: w for (name, _), serving in self._pool.serving.items() if name == model for w in serving}
        waits = [max(worker.free_at_ns - now_ns, 0) + self._backlog_ns(worker) for worker in workers.values()]
        return min(waits, default=0)

    def _backlog_ns(self, worker: Worker) -> int:
        lane = self._lanes.get(worker.id)
        return 0 if lane is None else lane.backlog_ns

    def _finish_ns(self, now_ns: int, worker: Worker, part: Part) -> int:
        """T_wait + T_est from now on, as a point in time."""
        table = worker.tables[part.kind]
        start_ns = max(worker.free_at_ns, now_ns)
        lane = self._lanes.get(worker.id)
        if lane is None:
            return start_ns + table.backlog_ns(part.items)
        bucket = lane.buckets.get((part.kind, part.company))
        items, backlog_ns = (bucket.items, bucket.backlog_ns) if bucket is not None else (0, 0)
        return start_ns + lane.backlog_ns + table.backlog_ns(items + part.items) - backlog_ns

    def _recount(self, lane: _Lane, worker: Worker, key: Bucket) -> None:
        """After the number of items in a bucket has changed."""
        bucket = lane.buckets[key]
        backlog_ns = worker.tables[key[0]].backlog_ns(bucket.items)
        lane.backlog_ns += backlog_ns - bucket.backlog_ns
        bucket.backlog_ns = backlog_ns
        if bucket.items == 0:
            del lane.buckets[key]


def _by_head(lane: _Lane) -> Callable[[Bucket], tuple[int, int]]:
    """Sorts buckets by their first part; an empty bucket is never in a lane."""
    return lambda key: lane.buckets[key].head() or (0, 0)
