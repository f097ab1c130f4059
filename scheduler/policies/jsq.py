"""Join the shortest queue: a query goes where the fewest queries are. Pure.

1. Each slice has a queue. A query joins, when it arrives, that of the slice with the fewest queries (that wait or
   run); among equals the one with the least estimated work, then the lowest id.
2. A slice works off its queue one query after the other, a query a batch, higher classes first.

The textbook policy for like servers with queues of their own (Winston, 1977). Ours: the ties.
"""

from __future__ import annotations

from scheduler.domain import Part, Pool, Worker
from scheduler.policies import Start
from scheduler.policies.central import Queue


class ShortestQueue:
    """One queue a worker, bound on arrival, nothing merged."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lanes: dict[int, Queue] = {}

    def offer(self, now_ns: int, part: Part, bound_ns: int | None) -> int:
        worker = self._shortest(now_ns, self._pool.serving[part.kind])
        time_ns = worker.tables[part.kind].time_ns(part.items)
        if bound_ns is not None and part.due_ns is not None:
            late_ns = now_ns + self._wait_ns(now_ns, worker, part.query.request.priority) + time_ns - part.due_ns
            if late_ns > bound_ns:
                return late_ns - bound_ns
        part.worker_id = worker.id
        lane = self._lanes.get(worker.id)
        if lane is None:
            lane = self._lanes[worker.id] = Queue()
        lane.push(part, time_ns)
        return 0

    def _shortest(self, now_ns: int, workers: list[Worker]) -> Worker:
        lanes = self._lanes
        counts = [len(worker.in_flight) + len(lanes.get(worker.id, ())) for worker in workers]
        least = min(counts)
        shortest = [worker for worker, count in zip(workers, counts, strict=True) if count == least]
        return min(shortest, key=lambda worker: (self._wait_ns(now_ns, worker), worker.id))

    def _wait_ns(self, now_ns: int, worker: Worker, priority: float = float("inf")) -> int:
        """Until what is there of this class and those above it has been worked off."""
        lane = self._lanes.get(worker.id)
        work_ns = sum(ns for each, ns in lane.work_ns.items() if each <= priority) if lane else 0
        return max(worker.free_at_ns - now_ns, 0) + work_ns

    def next(self, now_ns: int) -> Start | None:
        for worker in self._pool.ready.values():
            lane = self._lanes.get(worker.id)
            if lane:
                (part,) = lane.take(0)
                return Start(worker, part.kind, [part])
        return None

    def wake_ns(self, now_ns: int) -> int | None:
        return None

    def discard(self, part: Part) -> None:
        assert part.worker_id is not None  # it was offered
        self._lanes[part.worker_id].discard(part)

    def evict(self, worker: Worker, model: str | None = None) -> list[Part]:
        lane = self._lanes.pop(worker.id, None)
        parts = lane.drain() if lane else []
        if model is None:
            return parts
        for part in parts:
            if part.kind[0] != model:
                self._lanes.setdefault(worker.id, Queue()).push(part, worker.tables[part.kind].time_ns(part.items))
        return [part for part in parts if part.kind[0] == model]

    def backlog_ns(self, now_ns: int, model: str) -> int:
        workers = [w for kind, serving in self._pool.serving.items() if kind[0] == model for w in serving]
        return min((self._wait_ns(now_ns, worker) for worker in workers), default=0)
