"""Late binding: one queue a model; a query is bound to a slice when that slice is free, never before. Pure.

Rules:
1. A query that finds an idle slice starts there at once: on the smallest one that meets its due time, on the
   fastest one where it has none or none meets it. Where only a busy slice meets it, it waits for that.
2. Otherwise it waits in the queue of its model, in one of two lanes: *timely*, while some slice could still
   meet its due time, by due time; *open*, by arrival, where it has no due time or will miss it.
3. A slice that is free serves the highest priority class that it can. Inside a class timely work goes before
   open work, and of its models the one whose first query has the least laxity: (due - now - time) / SLO.
4. The batch starts with the first query of that model that this slice can serve in time, takes on others of
   its bucket in order, stays within the earliest due time of all of them, and ends where items per time are
   the most. Beside other models it takes no longer than two thirds of the least of their SLOs.
5. A crowded slice (what waits for its models takes longer, with all their slices at their best, than half of
   the time that the last query has) must not work in the small batches that the oldest queries leave time
   for: it would never recover. If such a batch has less than 90 % of the throughput of the best one for what
   waits, those oldest ones are given up: they go to the open lane.
6. Open work is batched up to the knee, or as is most efficient where much waits. When its oldest has waited a
   second, one batch of it goes before the timely work of its class, as long as this takes no more than a
   twentieth of the slice's time: it never starves, and takes no more from what can still be in time.

Late binding and relative laxity: our own; nothing is ever bound and taken back.
"""

from __future__ import annotations

import bisect

from scheduler.batching import Line
from scheduler.domain import BatchTable, Pool, Query, Worker
from scheduler.policies import Waiting

# How much longer than its table says a batch may take, when one is made to end in time.
GUARD = 1.03
# Rule 4, the share of the least SLO of the slice's other models.
BLOCKING_SHARE = 0.65
# Rule 5.
CROWDED_SHARE = 0.5
EFFICIENT_SHARE = 0.9
# Rule 6.
PATIENCE_NS = 1_000_000_000
OPEN_SHARE = 0.05

# Rule 3: what comes first inside a priority class.
_OPEN_FIRST, _TIMELY, _OPEN = 0, 1, 2
Rank = tuple[int, int, float, int]  # priority, one of these, laxity, request id


class _Queue:
    """What waits for one model, and how fast its slices are, as of the pool's `changes`.

    `slo_ns`: of the last query that waited with one, 0 before.
    """

    __slots__ = ("changes", "least_ns", "open", "peak_per_ns", "slo_ns", "tables", "timely")

    def __init__(self) -> None:
        self.timely = Line()
        self.open = Line()
        self.slo_ns = 0
        self.changes = -1
        self.tables: list[BatchTable] = []
        self.least_ns: dict[int, int] = {}  # by items, as it was asked for
        self.peak_per_ns = 0.0

    def is_late(self, now_ns: int, query: Query) -> bool:
        """Whether no slice could meet its due time, even if it were free now."""
        due_ns = query.request.due_ns
        assert due_ns is not None  # asked of timely ones only
        items = query.request.items
        least_ns = self.least_ns.get(items)
        if least_ns is None:  # which slice is the fastest depends on how many items there are
            least_ns = self.least_ns[items] = min(table.time_ns(items) for table in self.tables)
        return now_ns + least_ns > due_ns

    def give_up(self, queries: list[Query]) -> None:
        for query in queries:
            self.timely.remove(query)
            self.open.push(query, query.request.id)


class LateBinding:
    """The queues, and when each slice may next put open work first."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._queues: dict[str, _Queue] = {}
        self._open_first_ns: dict[int, int] = {}

    # ---- arrivals ----

    def choose(self, now_ns: int, query: Query) -> tuple[Worker | None, int]:
        idle, in_time = self._idle_worker(now_ns, query) if self._pool.idle else (None, False)
        late_ns = 0 if in_time or query.request.due_ns is None else self._late_ns(now_ns, query)
        if idle is None or self.waiting(idle) is not Waiting.NOTHING:
            return None, late_ns  # where something waits, as when a batch has just failed, `take` says what is first
        if not in_time and query.request.due_ns is not None and not late_ns:
            return None, 0  # a busy slice will still end it in time, this one would not
        return idle, late_ns

    def add(self, now_ns: int, query: Query) -> None:
        queue = self._queue(query.request.model)
        due_ns = query.request.due_ns
        if due_ns is None or queue.is_late(now_ns, query):
            queue.open.push(query, query.request.id)
        else:
            queue.slo_ns = due_ns - query.arrived_ns
            queue.timely.push(query, due_ns)

    def discard(self, query: Query) -> None:
        queue = self._queues[query.request.model]
        (queue.timely if query in queue.timely else queue.open).remove(query)

    # ---- batches ----

    def waiting(self, worker: Worker) -> Waiting:
        queues = (self._queues.get(model) for model in worker.tables)
        some = any(queue is not None and (queue.timely.entries or queue.open.entries) for queue in queues)
        return Waiting.SOME if some else Waiting.NOTHING

    def take(self, now_ns: int, worker: Worker) -> list[Query]:
        start_ns = max(now_ns, worker.free_at_ns)
        best: tuple[Rank, str, int] | None = None
        for model, table in worker.tables.items():
            if model not in self._queues:
                continue
            queue = self._queue(model)
            if queue.timely.entries:
                first = self._first_timely(now_ns, start_ns, queue, table)
                if first is not None and (best is None or first[0] < best[0]):
                    best = first[0], model, first[1]
            if queue.open.entries:
                rank = self._rank_open(start_ns, worker, queue)
                if best is None or rank < best[0]:
                    best = rank, model, 0
        if best is None:
            return []
        rank, model, index = best
        if rank[1] == _TIMELY:
            return self._take_timely(start_ns, worker, model, index)
        return self._take_open(start_ns, worker, model)

    def _first_timely(self, now_ns: int, start_ns: int, queue: _Queue, table: BatchTable) -> tuple[Rank, int] | None:
        """The first query that a slice with this table serves in time, and its place in the line.

        Those that no slice can serve in time any more are given up on the way.
        """
        late: list[Query] = []
        found: tuple[Rank, int] | None = None
        for index, (priority, due_ns, request_id, query) in enumerate(queue.timely.looked_at()):
            left_ns = due_ns - start_ns - table.time_ns(query.request.items)
            if left_ns >= 0:
                laxity = left_ns / max(due_ns - query.arrived_ns, 1)
                found = (priority, _TIMELY, laxity, request_id), index - len(late)
                break
            if queue.is_late(now_ns, query):
                late.append(query)
        queue.give_up(late)
        return found

    def _take_timely(self, start_ns: int, worker: Worker, model: str, index: int) -> list[Query]:
        queue, table = self._queues[model], worker.tables[model]
        most_ns = self._blocking_ns(worker, model)
        line = queue.timely
        last_ns = line.entries[-1][1] - start_ns
        if self._drain_ns(worker) > CROWDED_SHARE * last_ns:
            possible = min(line.items, table.largest_within(min(last_ns, most_ns) / GUARD), table.peak)
            wanted = bisect.bisect_left(table.best_per_ns, EFFICIENT_SHARE * table.best_per_ns[possible])
            queue.give_up(line.due_before(index, start_ns + int(table.ns[wanted] * GUARD)))
        return line.take_efficient(index, start_ns, table, most_ns, GUARD)

    def _blocking_ns(self, worker: Worker, model: str) -> float:
        """How long a batch of `model` may keep the slice from its other models."""
        slos = [self._queues[other].slo_ns for other in worker.tables if other != model and other in self._queues]
        return min((BLOCKING_SHARE * slo_ns for slo_ns in slos if slo_ns), default=float("inf"))

    def _drain_ns(self, worker: Worker) -> float:
        """Time that the timely work of a slice's models takes, if each has all its slices at their best."""
        queues = [self._queues[model] for model in worker.tables if model in self._queues]
        return sum(queue.timely.items / queue.peak_per_ns for queue in queues if queue.timely.items)

    def _rank_open(self, start_ns: int, worker: Worker, queue: _Queue) -> Rank:
        priority, _, request_id, query = queue.open.entries[0]
        waited_ns = start_ns - query.arrived_ns
        first = waited_ns > PATIENCE_NS and start_ns >= self._open_first_ns.get(worker.id, 0)
        return (priority, _OPEN_FIRST if first else _OPEN, 0.0, request_id)

    def _take_open(self, start_ns: int, worker: Worker, model: str) -> list[Query]:
        table = worker.tables[model]
        batch = self._queues[model].open.take_many(table)
        time_ns = table.time_ns(sum(query.request.items for query in batch))
        self._open_first_ns[worker.id] = start_ns + int(time_ns / OPEN_SHARE)
        return batch

    # ---- workers that go ----

    def evict(self, worker: Worker, model: str | None = None) -> list[Query]:
        if model is None:
            self._open_first_ns.pop(worker.id, None)
        queries: list[Query] = []
        for name in list(worker.tables) if model is None else [model]:
            if name in self._queues and self._pool.serving[name] == [worker]:
                queue = self._queues.pop(name)
                queries += queue.timely.drain() + queue.open.drain()
        return sorted(queries, key=lambda query: query.request.id)

    # ---- estimates ----

    def backlog_ns(self, now_ns: int, model: str) -> int:
        workers = self._pool.serving.get(model)
        if not workers:
            return 0
        queue = self._queue(model)
        free_ns = min(worker.free_at_ns for worker in workers)
        return max(free_ns - now_ns, 0) + int((queue.timely.items + queue.open.items) / queue.peak_per_ns)

    def _late_ns(self, now_ns: int, query: Query) -> int:
        """How late a new query would be; an optimist's estimate, so that nothing is refused that could be in time.

        What waits before it takes as long as all slices need at their best, or is done as one batch with it
        where that is sooner. Work of other models is not counted: it may well wait longer than this query.
        """
        model, items, due_ns = query.request.model, query.request.items, query.request.due_ns
        assert due_ns is not None  # nothing is late without
        queue = self._queue(model)
        together = queue.timely.items + items
        drain_ns = int(queue.timely.items / queue.peak_per_ns)
        late_ns: int | None = None
        for worker in self._pool.serving[model]:
            table = worker.tables[model]
            time_ns = drain_ns + table.time_ns(items)
            if together <= table.max_batch:
                time_ns = min(time_ns, table.ns[together])
            own_ns = max(worker.free_at_ns, now_ns) + time_ns - due_ns
            if own_ns <= 0:
                return 0
            if late_ns is None or own_ns < late_ns:
                late_ns = own_ns
        assert late_ns is not None  # somebody serves the model
        return late_ns

    def _idle_worker(self, now_ns: int, query: Query) -> tuple[Worker | None, bool]:
        """The smallest idle one that meets the due time, and True; else the fastest, the first of equal ones."""
        model, items, due_ns = query.request.model, query.request.items, query.request.due_ns
        idle = self._pool.idle
        best: Worker | None = None
        best_ns = 0
        for worker in self._pool.serving[model]:
            if worker.id in idle:
                time_ns = worker.tables[model].time_ns(items)
                if due_ns is not None and now_ns + time_ns <= due_ns:
                    return worker, True
                if best is None or time_ns < best_ns:
                    best, best_ns = worker, time_ns
        return best, False

    def _queue(self, model: str) -> _Queue:
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = _Queue()
        if queue.changes != self._pool.changes:
            queue.changes = self._pool.changes
            tables = [worker.tables[model] for worker in self._pool.serving[model]]
            queue.tables = tables
            queue.least_ns.clear()
            queue.peak_per_ns = sum(table.best_per_ns[-1] for table in tables)
        return queue
