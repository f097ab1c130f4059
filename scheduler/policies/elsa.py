"""ELSA: a query goes to the smallest slice that still meets its SLO (Kim, Choi, Rhu, DAC'22). Pure.

From the paper (arXiv 2202.13481): slack(p) = SLO_remaining - alpha * (T_wait(p) + beta * T_est(query, p)),
with alpha = beta = 1. A: scan slices from small to large, take the first with slack > 0, inside a size the
shortest wait. B: where none has slack, take the least T_wait + T_est.

Ours: queues are worked off in batches up to the knee, so T_wait counts batches, and T_est is what the query
adds to them. A query without an SLO goes by B alone. A new query that no slice can serve in time is refused.
"""

from __future__ import annotations

from collections.abc import Callable

from scheduler.batching import BucketQueue
from scheduler.domain import Pool, Query, Worker
from scheduler.policies import Waiting

BucketKey = tuple[str, tuple[int, ...], int]


class _Lane:
    """What waits for one worker; `backlog_ns` estimates the time of all of it."""

    __slots__ = ("backlog_ns", "buckets")

    def __init__(self) -> None:
        self.buckets: dict[BucketKey, BucketQueue] = {}
        self.backlog_ns = 0


class Elsa:
    """One queue a worker, bound on arrival."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lanes: dict[int, _Lane] = {}

    def choose(self, now_ns: int, query: Query) -> tuple[Worker | None, int]:
        worker, late_ns = self._bind(now_ns, query)
        query.worker_id = worker.id
        return (worker if not worker.in_flight and not self._waiting_items(worker) else None), late_ns

    def _bind(self, now_ns: int, query: Query) -> tuple[Worker, int]:
        """The worker that ELSA's rule names, and by how many ns the query would be late there."""
        due_ns = query.request.due_ns
        workers = self._pool.serving[query.request.model]
        best = workers[0]
        if len(workers) == 1 and due_ns is None:
            return best, 0
        best_ns = self._finish_ns(now_ns, best, query)
        for worker in workers[1:]:
            if due_ns is not None and best_ns < due_ns and worker.gpcs > best.gpcs:
                break  # step A: a smaller slice has slack
            finish_ns = self._finish_ns(now_ns, worker, query)
            if finish_ns < best_ns:
                best, best_ns = worker, finish_ns
        return best, 0 if due_ns is None else max(best_ns - due_ns, 0)

    def add(self, now_ns: int, query: Query) -> None:
        worker = self._worker(query)
        lane = self._lane(worker)
        bucket = lane.buckets.get(query.bucket)
        if bucket is None:
            bucket = lane.buckets[query.bucket] = BucketQueue()
        bucket.push(query)
        self._recount(lane, worker, query.bucket)

    def waiting(self, worker: Worker) -> Waiting:
        items = self._waiting_items(worker)
        if items and items >= max(table.knee for table in worker.tables.values()):
            return Waiting.FULL
        return Waiting.SOME if items else Waiting.NOTHING

    def discard(self, query: Query) -> None:
        worker = self._worker(query)
        lane = self._lanes[worker.id]
        lane.buckets[query.bucket].discard(query)
        self._recount(lane, worker, query.bucket)

    def take(self, now_ns: int, worker: Worker) -> list[Query]:
        lane = self._lanes.get(worker.id)
        if lane is None or not lane.buckets:
            return []
        key = next(iter(lane.buckets)) if len(lane.buckets) == 1 else min(lane.buckets, key=_by_head(lane))
        batch = lane.buckets[key].take(max(now_ns, worker.free_at_ns), worker.tables[key[0]])
        self._recount(lane, worker, key)
        return batch

    def evict(self, worker: Worker, model: str | None = None) -> list[Query]:
        lane = self._lanes.get(worker.id)
        if lane is None:
            return []
        queries: list[Query] = []
        for key in [key for key in lane.buckets if model is None or key[0] == model]:
            queries += lane.buckets[key].drain()
            self._recount(lane, worker, key)
        if model is None:
            del self._lanes[worker.id]
        return sorted(queries, key=lambda query: query.request.id)

    def backlog_ns(self, now_ns: int, model: str) -> int:
        waits = [
            max(worker.free_at_ns - now_ns, 0) + self._lane(worker).backlog_ns
            for worker in self._pool.serving.get(model, ())
        ]
        return min(waits, default=0)

    def _waiting_items(self, worker: Worker) -> int:
        lane = self._lanes.get(worker.id)
        return 0 if lane is None else sum(bucket.items for bucket in lane.buckets.values())

    def _worker(self, query: Query) -> Worker:
        assert query.worker_id is not None  # it was chosen for
        return self._pool.workers[query.worker_id]

    def _finish_ns(self, now_ns: int, worker: Worker, query: Query) -> int:
        """T_wait + T_est from now on, as a point in time."""
        request = query.request
        lane = self._lane(worker)
        bucket = lane.buckets.get(query.bucket)
        items, backlog_ns = (bucket.items, bucket.backlog_ns) if bucket is not None else (0, 0)
        added_ns = worker.tables[request.model].backlog_ns(items + request.items) - backlog_ns
        return max(worker.free_at_ns, now_ns) + lane.backlog_ns + added_ns

    def _recount(self, lane: _Lane, worker: Worker, key: BucketKey) -> None:
        """After the number of items in a bucket has changed."""
        bucket = lane.buckets[key]
        backlog_ns = worker.tables[key[0]].backlog_ns(bucket.items)
        lane.backlog_ns += backlog_ns - bucket.backlog_ns
        bucket.backlog_ns = backlog_ns
        if bucket.items == 0:
            del lane.buckets[key]

    def _lane(self, worker: Worker) -> _Lane:
        lane = self._lanes.get(worker.id)
        if lane is None:
            lane = self._lanes[worker.id] = _Lane()
        return lane


def _by_head(lane: _Lane) -> Callable[[BucketKey], tuple[int, int]]:
    """Sorts buckets by their first query; an empty bucket is never in a lane."""
    return lambda key: lane.buckets[key].head() or (0, 0)
