"""The state that the core keeps and the policies read: queries and their parts, workers, the pool. Pure."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from copy import copy
from itertools import accumulate

from partitioner import latency
from scheduler.estimates import Estimate
from scheduler.messages import Piece, Request

# Within so many SLOs of its own everything ends, or is refused: rule 7 of the core, and what a rate is judged by.
LATEST = 10
# What was learned so long before the last batch may be of another time.
OLD_NS = 1_000_000_000

# A model, and which of its length buckets: what has one latency table.
Kind = tuple[str, int]
# What may share a batch inside a kind: equal dims; and, where a part runs alone, its request and first item.
Company = tuple[tuple[int, ...], int, int]


class BatchTable:
    """Estimated time of a batch of one kind of work on one worker: `ns[b]` for b items, `ns[0]` = 0.

    `knee`: PARIS's, with 80 % of the peak throughput. `peak`: the smallest batch with all of it.
    `best_per_ns[b]`: most items a ns of any batch up to b, which `best[b]` has. `factor`: by which it was corrected.
    `guard`: how many times its estimate a batch may take and be no surprise.
    """

    __slots__ = ("best", "best_per_ns", "factor", "guard", "knee", "max_batch", "ns", "peak")

    def __init__(self, latency_ns: Sequence[int]) -> None:
        # No batch is done in no time.
        self.ns = (0, *(max(ns, 1) for ns in latency_ns))
        self.factor = 1.0
        self.guard = 1.0
        self.max_batch = len(latency_ns)
        self.knee = latency.knee(latency_ns)
        per_ns = [0.0, *(batch / ns for batch, ns in enumerate(self.ns[1:], start=1))]
        self.best_per_ns = list(accumulate(per_ns, max))
        self.best = [0] * len(per_ns)
        for batch in range(1, len(per_ns)):
            below = self.best[batch - 1]
            self.best[batch] = batch if per_ns[batch] >= per_ns[below] else below
        self.peak = per_ns.index(self.best_per_ns[-1])

    def scaled(self, factor: float, guard: float) -> BatchTable:
        """One whose times are so many times as long; what is best stays the best."""
        table = copy(self)
        table.factor = factor
        table.guard = guard
        if factor != 1:
            table.ns = (0, *(max(int(ns * factor), 1) for ns in self.ns[1:]))
            table.best_per_ns = [per_ns / factor for per_ns in self.best_per_ns]
        return table

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
    """One unfinished request. `unstarted`, `unfinished`: how many of its items are."""

    __slots__ = ("arrived_ns", "gone", "parts", "request", "unfinished", "unstarted")

    def __init__(self, request: Request, arrived_ns: int) -> None:
        self.request = request
        self.arrived_ns = arrived_ns
        self.gone = False  # ended (refused, or the client gone) while parts of it still run
        self.unstarted = self.unfinished = request.items
        self.parts: list[Part] = []  # that wait or run
        part = Part(self, 0, request.items, (request.dims, 0, 0))
        if request.alone:
            part.isolate()


class Part:
    """Some items of a query, one after the other, that wait or run together; at first all of them."""

    __slots__ = (
        "batch_id",
        "company",
        "crashes",
        "due_ns",
        "first",
        "items",
        "kind",
        "late",
        "query",
        "queued",
        "worker_id",
    )

    def __init__(self, query: Query, first: int, items: int, company: Company) -> None:
        self.query = query
        self.kind: Kind = (query.request.model, 0)  # until it is placed
        self.first = first
        self.items = items
        self.company = company
        self.due_ns = query.request.due_ns
        self.crashes = 0
        self.queued = False  # waiting in the policy's queues
        self.late = False  # the policy has given up its due time
        self.batch_id: int | None = None
        self.worker_id: int | None = None
        query.parts.append(self)

    def isolate(self) -> None:
        """From now on it runs in a batch of its own."""
        self.company = (self.company[0], self.query.request.id, self.first + 1)

    @property
    def may_be_cut(self) -> bool:
        request = self.query.request
        return not (request.whole or request.alone or self.company[1])

    def cut(self, items: int) -> Part:
        """Takes the first `items` off, fewer than it has, as a part of their own."""
        piece = Part(self.query, self.first, items, self.company)
        piece.kind = self.kind
        piece.crashes = self.crashes
        piece.late = self.late
        self.first += items
        self.items -= items
        return piece

    def piece(self) -> Piece:
        return Piece(self.query.request.id, self.first, self.items)


class Batch:
    """Parts that run together. `estimate_ns`: by the table as it was corrected then; `sent_ns`: when it was sent."""

    __slots__ = ("estimate_ns", "kind", "parts", "sent_ns")

    def __init__(self, parts: Sequence[Part], kind: Kind, estimate_ns: int, sent_ns: int) -> None:
        self.parts = parts
        self.kind = kind
        self.estimate_ns = estimate_ns
        self.sent_ns = sent_ns


class Worker:
    """One worker that is up. `free_at_ns`: the estimated end of everything it has been sent.

    `tables`: as corrected by what its batches took.
    """

    __slots__ = ("_estimates", "_told", "depth", "ended_ns", "free_at_ns", "gpcs", "id", "in_flight", "tables")

    def __init__(self, worker_id: int, gpcs: int, depth: int) -> None:
        self.id = worker_id
        self.gpcs = gpcs
        self.depth = depth
        self.tables: dict[Kind, BatchTable] = {}
        self.in_flight: dict[int, Batch] = {}
        self.free_at_ns = 0
        self.ended_ns = 0  # its last batch
        self._told: dict[Kind, BatchTable] = {}  # as the worker said
        self._estimates: dict[str, Estimate] = {}  # by model

    def has_room(self) -> bool:
        return len(self.in_flight) < self.depth

    def serve(self, kind: Kind, latency_ns: tuple[int, ...]) -> None:
        self._told[kind] = BatchTable(latency_ns)
        self._correct(kind, self._told[kind], self._estimates.setdefault(kind[0], Estimate()))

    def withdraw(self, model: str) -> list[Kind]:
        """Returns what it served of it."""
        self._estimates.pop(model, None)
        kinds = [kind for kind in self.tables if kind[0] == model]
        for kind in kinds:
            del self.tables[kind], self._told[kind]
        return kinds

    def start(self, now_ns: int, batch_id: int, batch: Batch) -> None:
        self.in_flight[batch_id] = batch
        self.free_at_ns = max(self.free_at_ns, now_ns) + batch.estimate_ns

    def finish(self, now_ns: int, batch_id: int) -> Batch:
        batch = self.in_flight.pop(batch_id)
        self.free_at_ns = now_ns
        for other in self.in_flight.values():
            self.free_at_ns += other.estimate_ns
        return batch

    def learn(self, now_ns: int, batch: Batch) -> bool:
        """From a batch that is done now: how long its model takes here. Whether its tables have changed by that."""
        took_ns = now_ns - max(batch.sent_ns, self.ended_ns)
        self.ended_ns = now_ns
        told = self._told.get(batch.kind)
        if told is None:
            return False  # no longer served
        estimate = self._estimates[batch.kind[0]]
        items = sum(part.items for part in batch.parts)
        if not estimate.observe(took_ns / told.time_ns(max(items, 1))):
            return False
        for kind, table in self._told.items():
            if kind[0] == batch.kind[0]:
                self._correct(kind, table, estimate)
        return True

    def forget_old(self, now_ns: int, model: str) -> bool:
        """What was learned of a model before a long pause is no reason to refuse. Whether its tables have changed."""
        known = self._estimates.get(model)
        if known is None or known.is_none() or self.in_flight or now_ns - self.ended_ns < OLD_NS:
            return False
        estimate = self._estimates[model] = Estimate()
        for kind, table in self._told.items():
            if kind[0] == model:
                self._correct(kind, table, estimate)
        return True

    def _correct(self, kind: Kind, told: BatchTable, estimate: Estimate) -> None:
        """A new table where the times have changed, so that who knows the old one sees that it is old."""
        now = self.tables.get(kind)
        if now is None or (now.factor, now.guard) != (estimate.factor, estimate.guard):
            self.tables[kind] = told.scaled(estimate.factor, estimate.guard)


class Pool:
    """Who is up and who serves what; `serving[kind]` runs from small slices to large ones.

    `ready`: workers that may be given a batch now. `lengths[model]`: upper ends of its length buckets, (0,) where
    it has none. `weights[model]`: its part of slices that it shares. `gpcs`: of all workers. `changes` counts every
    change of what is served, `corrections` of how fast.
    """

    def __init__(self) -> None:
        self.workers: dict[int, Worker] = {}
        self.serving: dict[Kind, list[Worker]] = {}
        self.ready: dict[int, Worker] = {}
        self.lengths: dict[str, tuple[int, ...]] = {}
        self.changes = 0
        self.corrections = 0
        self.weights: dict[str, float] = {}
        self.gpcs = 0

    def add(self, worker: Worker) -> None:
        self.workers[worker.id] = worker
        self.gpcs += worker.gpcs
        self.ready[worker.id] = worker

    def remove(self, worker: Worker) -> None:
        for model in models_of(worker):
            self.withdraw(worker, model)
        del self.workers[worker.id]
        self.gpcs -= worker.gpcs
        self.ready.pop(worker.id, None)

    def kind_of(self, request: Request) -> Kind:
        """The length bucket of a model that somebody serves; what is longer than all counts as the last."""
        lengths = self.lengths[request.model]
        return request.model, min(bisect.bisect_left(lengths, request.length), len(lengths) - 1)

    def padded(self, model: str, length: int) -> int:
        """What a batch is filled up to whose longest item is so long: an edge, or nothing where it is beyond all."""
        edges = self.lengths.get(model, ())
        place = bisect.bisect_left(edges, length)
        return edges[place] if place < len(edges) else length

    def serve(self, worker: Worker, model: str, latency_ns: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        self.withdraw(worker, model)
        self.changes += 1
        self.lengths[model] = lengths or (0,)
        rows = len(latency_ns) // len(self.lengths[model])
        for bucket in range(len(self.lengths[model])):
            kind = (model, bucket)
            worker.serve(kind, latency_ns[bucket * rows : (bucket + 1) * rows])
            servers = [*self.serving.get(kind, ()), worker]
            self.serving[kind] = sorted(servers, key=lambda w: (w.gpcs, w.id))

    def forget_old(self, now_ns: int, kind: Kind) -> bool:
        """Corrections of idle workers fade, or what they refuse by them would never be tried again."""
        idle = [worker for worker in self.ready.values() if kind in worker.tables]
        faded = [worker.forget_old(now_ns, kind[0]) for worker in idle]
        self.corrections += any(faded)
        return any(faded)

    def withdraw(self, worker: Worker, model: str) -> None:
        for kind in worker.withdraw(model):
            self.changes += 1
            self.serving[kind].remove(worker)
            if not self.serving[kind]:
                del self.serving[kind]
                self.lengths.pop(model, None)
                self.weights.pop(model, None)


def models_of(worker: Worker) -> list[str]:
    """Each once."""
    return list(dict.fromkeys(model for model, _ in worker.tables))
