"""The state that the core keeps and the policies read: queries, workers, the pool. Pure."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate

from partitioner import latency
from scheduler.messages import Request


class BatchTable:
    """Estimated time of a batch of one model on one worker: `ns[b]` for b items, `ns[0]` = 0.

    `knee`: PARIS's, with 80 % of the peak throughput. `peak`: the smallest batch with all of it.
    `best_per_ns[b]`: most items a ns of any batch up to b.
    """

    __slots__ = ("best_per_ns", "knee", "max_batch", "ns", "peak")

    def __init__(self, latency_ns: Sequence[int]) -> None:
        self.ns = (0, *latency_ns)
        self.max_batch = len(latency_ns)
        self.knee = latency.knee(latency_ns)
        per_ns = [batch / max(ns, 1) for batch, ns in enumerate(self.ns)]
        self.best_per_ns = list(accumulate(per_ns, max))
        self.peak = per_ns.index(self.best_per_ns[-1])

    def time_ns(self, items: int) -> int:
        """Of one batch; what is larger than the table counts as its last row."""
        return self.ns[items] if items <= self.max_batch else self.ns[-1]

    def largest_within(self, ns: float) -> int:
        """The largest batch that takes no longer; 0 if none."""
        return bisect.bisect_right(self.ns, ns) - 1 if ns >= 0 else 0

    def backlog_ns(self, items: int) -> int:
        """Time to work off `items` items in batches of the knee."""
        full, rest = divmod(items, self.knee)
        return full * self.ns[self.knee] + self.ns[rest]


class Query:
    """One unfinished request. `bucket`: only queries of one bucket may share a batch."""

    __slots__ = ("arrived_ns", "batch_id", "bucket", "crashes", "gone", "queued", "request", "worker_id")

    def __init__(self, request: Request, arrived_ns: int) -> None:
        self.request = request
        self.arrived_ns = arrived_ns
        self.crashes = 0
        self.gone = False  # ended (client gone) while its batch still runs
        self.queued = False  # waiting in the policy's queues
        self.batch_id: int | None = None
        self.worker_id: int | None = None
        self.bucket: tuple[str, tuple[int, ...], int] = (request.model, request.dims, 0)
        if request.alone:
            self.isolate()

    def isolate(self) -> None:
        """From now on it runs in a batch of its own."""
        self.bucket = (self.request.model, self.request.dims, self.request.id)


class Batch:
    """Queries that run together, and the estimated time of it."""

    __slots__ = ("estimate_ns", "queries")

    def __init__(self, queries: Sequence[Query], estimate_ns: int) -> None:
        self.queries = queries
        self.estimate_ns = estimate_ns


class Worker:
    """One worker that is up. `free_at_ns`: the estimated end of everything it has been sent."""

    __slots__ = ("depth", "free_at_ns", "gpcs", "id", "in_flight", "tables")

    def __init__(self, worker_id: int, gpcs: int, depth: int) -> None:
        self.id = worker_id
        self.gpcs = gpcs
        self.depth = depth
        self.tables: dict[str, BatchTable] = {}
        self.in_flight: dict[int, Batch] = {}
        self.free_at_ns = 0

    def start(self, now_ns: int, batch_id: int, batch: Batch) -> None:
        self.in_flight[batch_id] = batch
        self.free_at_ns = max(self.free_at_ns, now_ns) + batch.estimate_ns

    def finish(self, now_ns: int, batch_id: int) -> Batch:
        batch = self.in_flight.pop(batch_id)
        self.free_at_ns = now_ns
        for other in self.in_flight.values():
            self.free_at_ns += other.estimate_ns
        return batch


class Pool:
    """Who is up and who serves what; `serving[model]` runs from small slices to large ones.

    `idle`: workers with nothing under way. `changes` counts every change of what is served.
    """

    def __init__(self) -> None:
        self.workers: dict[int, Worker] = {}
        self.serving: dict[str, list[Worker]] = {}
        self.idle: dict[int, Worker] = {}
        self.changes = 0

    def add(self, worker: Worker) -> None:
        self.workers[worker.id] = worker
        self.idle[worker.id] = worker

    def remove(self, worker: Worker) -> None:
        for model in list(worker.tables):
            self.withdraw(worker, model)
        del self.workers[worker.id]
        self.idle.pop(worker.id, None)

    def start(self, now_ns: int, worker: Worker, batch_id: int, batch: Batch) -> None:
        worker.start(now_ns, batch_id, batch)
        self.idle.pop(worker.id, None)

    def finish(self, now_ns: int, worker: Worker, batch_id: int) -> Batch:
        batch = worker.finish(now_ns, batch_id)
        if not worker.in_flight:
            self.idle[worker.id] = worker
        return batch

    def serve(self, worker: Worker, model: str, table: BatchTable) -> None:
        self.withdraw(worker, model)
        self.changes += 1
        worker.tables[model] = table
        servers = [*self.serving.get(model, ()), worker]
        self.serving[model] = sorted(servers, key=lambda w: (w.gpcs, w.id))

    def withdraw(self, worker: Worker, model: str) -> None:
        if worker.tables.pop(model, None) is None:
            return
        self.changes += 1
        self.serving[model].remove(worker)
        if not self.serving[model]:
            del self.serving[model]
