"""Late binding: one queue a model; a query is bound to a slice when that slice is free, never before. Pure.

Rules:
1. A query that finds an idle slice starts there at once: on the smallest one that meets its due time, on the
   fastest one where it has none or none meets it.
2. Otherwise it waits in the queue of its model, in one of two lanes: *timely*, while some slice could still
   meet its due time, by due time; *open*, by arrival, where it has no due time or has missed it.
3. A slice that is free serves the highest priority class that it can. Inside a class timely work goes before
   open work, and of its models the one whose first query has the least laxity: (due - now - time) / SLO.
4. The batch starts with the first query of that model that this slice can serve in time, takes on others of
   its bucket in order, stays within the earliest due time of all of them, and ends where items per time are
   the most.
5. Open work is batched up to the knee. When its oldest has waited a second, one batch of it goes before the
   timely work of its class, as long as this takes no more than a tenth of the slice's time: so it never
   starves, and never takes more than that from those that can still be served in time.
6. A crowded model (what waits takes its slices, at their best, more than half of the time its last query has)
   must not be worked off in the small batches that its oldest queries leave time for: it would never recover.
   If such a batch has less than 90 % of the throughput of the best one for what waits, those oldest ones are
   given up: they go to the open lane.

Late binding and relative laxity: our own; nothing is ever bound and taken back.
"""

from __future__ import annotations

import bisect

from scheduler.batching import Line
from scheduler.domain import BatchTable, Pool, Query, Worker
from scheduler.policies import Waiting

# How much longer than its table says a batch may take and still end in time, when batches are made.
GUARD = 1.1
# How many waiting queries are looked at to make one batch: keeps a decision short however many wait.
LOOK_AHEAD = 512
# Rule 6
CROWDED = 0.5
EFFICIENT = 0.9
PATIENCE_NS = 1_000_000_000
OPEN_SHARE = 0.05

Rank = tuple[int, int, float, int]


class _Queue:
    """What waits for one model, and how fast its slices are, as of the pool's `changes`."""

    __slots__ = ("changes", "fastest", "open", "peak_per_ns", "timely")

    def __init__(self) -> None:
        self.timely = Line()
        self.open = Line()
        self.changes = -1
        self.fastest: BatchTable | None = None
        self.peak_per_ns = 0.0


class LateBinding:
    """The queues, and when each slice may next put open work first."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._queues: dict[str, _Queue] = {}
        self._open_first_ns: dict[int, int] = {}

    # ---- arrivals ----

    def choose(self, now_ns: int, query: Query) -> tuple[Worker | None, int]:
        model, items, due_ns = query.request.model, query.request.items, query.request.due_ns
        worker = self._idle_worker(now_ns, query) if self._pool.idle else None
        if due_ns is None:
            return worker, 0
        if worker is not None:
            late_ns = now_ns + worker.tables[model].time_ns(items) - due_ns
            if late_ns <= 0:
                return worker, 0
        late_ns = self._finish_ns(now_ns, query) - due_ns
        if late_ns <= 0 and worker is not None:
            return None, 0  # a slice that is busy now will still be in time, the idle ones would not
        return worker, max(late_ns, 0)

    def add(self, now_ns: int, query: Query) -> None:
        queue = self._queue(query.request.model)
        due_ns = query.request.due_ns
        if due_ns is None or self._is_late(now_ns, queue, query):
            queue.open.push(query, query.request.id)
        else:
            queue.timely.push(query, due_ns)

    def discard(self, query: Query) -> None:
        queue = self._queues[query.request.model]
        if query in queue.timely:
            queue.timely.remove(query)
        else:
            queue.open.remove(query)

    # ---- batches ----

    def waiting(self, worker: Worker) -> Waiting:
        for model in worker.tables:
            queue = self._queues.get(model)
            if queue is not None and (queue.timely.entries or queue.open.entries):
                return Waiting.SOME
        return Waiting.NOTHING

    def take(self, now_ns: int, worker: Worker) -> list[Query]:
        start_ns = max(now_ns, worker.free_at_ns)
        best: Rank | None = None
        model = ""
        index = 0
        for name, table in worker.tables.items():
            queue = self._queues.get(name)
            if queue is None:
                continue
            if queue.timely.entries:
                first = self._first_timely(now_ns, start_ns, queue, table)
                if first is not None and (best is None or first[0] < best):
                    best, index = first
                    model = name
            if queue.open.entries:
                rank = self._rank_open(start_ns, worker, queue)
                if best is None or rank < best:
                    best, index, model = rank, 0, name
        if best is None:
            return []
        queue, table = self._queues[model], worker.tables[model]
        if best[1] == _TIMELY:
            index = self._give_up(start_ns, queue, index, table)
            return _most_efficient(queue.timely, index, start_ns, table)
        return self._take_open(start_ns, worker, queue, table)

    def _first_timely(self, now_ns: int, start_ns: int, queue: _Queue, table: BatchTable) -> tuple[Rank, int] | None:
        """The first query that a slice with this table serves in time, and its place in the line.

        Those that no slice can serve in time any more are moved to the open lane on the way.
        """
        late: list[Query] = []
        found: tuple[Rank, int] | None = None
        for index, (priority, due_ns, request_id, query) in enumerate(queue.timely.first(LOOK_AHEAD)):
            left_ns = due_ns - start_ns - table.time_ns(query.request.items)
            if left_ns >= 0:
                laxity = left_ns / (due_ns - query.arrived_ns)
                found = (priority, _TIMELY, laxity, request_id), index - len(late)
                break
            if self._is_late(now_ns, queue, query):
                late.append(query)
        for query in late:
            queue.timely.remove(query)
            queue.open.push(query, query.request.id)
        return found

    def _give_up(self, start_ns: int, queue: _Queue, index: int, table: BatchTable) -> int:
        """Rule 6. Returns the place in the line of the query to start the batch with."""
        entries = queue.timely.entries
        priority, due_ns = entries[index][:2]
        last_ns = entries[-1][1] - start_ns
        if queue.timely.items / queue.peak_per_ns <= CROWDED * last_ns:
            return index
        possible = min(queue.timely.items, table.largest_within(last_ns / GUARD), table.peak)
        wanted = bisect.bisect_left(table.best_per_ns, EFFICIENT * table.best_per_ns[possible])
        wanted_ns = start_ns + int(table.ns[wanted] * GUARD)
        if due_ns >= wanted_ns:
            return index
        until = bisect.bisect_left(entries, (priority, wanted_ns), index)
        if until == len(entries) or entries[until][0] != priority:
            return index
        for *_, query in list(entries[index:until]):
            queue.timely.remove(query)
            queue.open.push(query, query.request.id)
        return index

    def _rank_open(self, start_ns: int, worker: Worker, queue: _Queue) -> Rank:
        priority, _, request_id, query = queue.open.entries[0]
        waited_ns = start_ns - query.arrived_ns
        first = waited_ns > PATIENCE_NS and start_ns >= self._open_first_ns.get(worker.id, 0)
        return (priority, _OPEN_FIRST if first else _OPEN, 0.0, request_id)

    def _take_open(self, start_ns: int, worker: Worker, queue: _Queue, table: BatchTable) -> list[Query]:
        batch = _up_to_the_knee(queue.open, table)
        time_ns = table.time_ns(sum(query.request.items for query in batch))
        self._open_first_ns[worker.id] = start_ns + int(time_ns / OPEN_SHARE)
        return batch

    # ---- workers that go ----

    def evict(self, worker: Worker, model: str | None = None) -> list[Query]:
        if model is None:
            self._open_first_ns.pop(worker.id, None)
        queries: list[Query] = []
        for name in list(worker.tables) if model is None else [model]:
            queue = self._queues.get(name)
            if queue is not None and self._pool.serving[name] == [worker]:
                queries += queue.timely.drain() + queue.open.drain()
                del self._queues[name]
        return sorted(queries, key=lambda query: query.request.id)

    # ---- estimates ----

    def backlog_ns(self, now_ns: int, model: str) -> int:
        workers = self._pool.serving.get(model)
        if not workers:
            return 0
        queue = self._queue(model)
        free_ns = min(worker.free_at_ns for worker in workers)
        return max(free_ns - now_ns, 0) + int((queue.timely.items + queue.open.items) / queue.peak_per_ns)

    def _finish_ns(self, now_ns: int, query: Query) -> int:
        """An optimist's estimate of when a new query ends, so that nothing is refused that could be in time.

        What waits before it takes as long as all slices need at their best, and is done as one batch with
        it where that is sooner; work of other models is not counted.
        """
        model, items = query.request.model, query.request.items
        queue = self._queue(model)
        ahead = queue.timely.items
        drain_ns = int(ahead / queue.peak_per_ns)
        best_ns = -1
        for worker in self._pool.serving[model]:
            table = worker.tables[model]
            time_ns = drain_ns + table.time_ns(items)
            if ahead + items <= table.max_batch:
                time_ns = min(time_ns, table.ns[ahead + items])
            finish_ns = max(worker.free_at_ns, now_ns) + time_ns
            if best_ns < 0 or finish_ns < best_ns:
                best_ns = finish_ns
        return best_ns

    def _idle_worker(self, now_ns: int, query: Query) -> Worker | None:
        """The smallest idle one that meets the due time, else the fastest; of equal ones the lowest id."""
        model, items, due_ns = query.request.model, query.request.items, query.request.due_ns
        best: Worker | None = None
        best_key: tuple[int, int, int] | None = None
        for worker in self._pool.idle.values():
            table = worker.tables.get(model)
            if table is None:
                continue
            time_ns = table.time_ns(items)
            in_time = due_ns is not None and now_ns + time_ns <= due_ns
            key = (0, worker.gpcs, worker.id) if in_time else (1, time_ns, worker.id)
            if best_key is None or key < best_key:
                best, best_key = worker, key
        return best

    def _is_late(self, now_ns: int, queue: _Queue, query: Query) -> bool:
        """Whether no slice could meet its due time, even if it were free now."""
        assert query.request.due_ns is not None  # it is in the timely lane
        assert queue.fastest is not None  # set with the queue
        return now_ns + queue.fastest.time_ns(query.request.items) > query.request.due_ns

    def _queue(self, model: str) -> _Queue:
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = _Queue()
        if queue.changes != self._pool.changes:
            queue.changes = self._pool.changes
            tables = [worker.tables[model] for worker in self._pool.serving[model]]
            queue.fastest = min(tables, key=lambda table: table.ns[1])
            queue.peak_per_ns = sum(table.best_per_ns[-1] for table in tables)
        return queue


_OPEN_FIRST, _TIMELY, _OPEN = 0, 1, 2


def _most_efficient(line: Line, index: int, start_ns: int, table: BatchTable) -> list[Query]:
    """Out of the line: the query at `index`, with those that make the most of the time it leaves."""
    _, due_ns, _, seed = line.entries[index]
    batch = [seed]
    items = seed.request.items
    limit_ns = due_ns - start_ns
    best_count, best_per_ns = 1, items / max(table.time_ns(items), 1)
    for _, other_due_ns, _, query in line.entries[index + 1 : index + LOOK_AHEAD]:
        total = items + query.request.items
        if query.bucket != seed.bucket or total > table.peak:
            continue
        own_limit_ns = min(limit_ns, other_due_ns - start_ns)
        if table.ns[total] * GUARD > own_limit_ns:
            continue
        batch.append(query)
        items, limit_ns = total, own_limit_ns
        per_ns = total / max(table.ns[total], 1)
        if per_ns >= best_per_ns:
            best_count, best_per_ns = len(batch), per_ns
        if total == table.peak:
            break
    return line.take(batch[:best_count])


def _up_to_the_knee(line: Line, table: BatchTable) -> list[Query]:
    """Out of the line: its first query, with what follows in its bucket as far as the knee."""
    seed = line.entries[0][3]
    batch = [seed]
    items = seed.request.items
    for *_, query in line.entries[1:LOOK_AHEAD]:
        if query.bucket == seed.bucket and items + query.request.items <= table.knee:
            batch.append(query)
            items += query.request.items
    return line.take(batch)
