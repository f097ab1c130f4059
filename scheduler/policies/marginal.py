"""Dispatch by least marginal cost: every query bound on arrival to where it adds the least work in time. Pure.

1. Each slice has a plan: batches in the order in which it will run them, the first as soon as the slice has room.
2. A query is added in one of these ways: as a new batch at the end of a plan; by joining a batch that has not started
   (of the same model and company; the longer length bucket counts for all); or cut into pieces, each of which goes one
   of these ways on another slice.
3. A way is feasible if all of the query ends by its due time, and no batch in the plan ends after the earliest due
   time that has been promised to anybody in it. What has been placed in a feasible way has been promised its due time.
4. A way costs what it adds to the time of the plans, in GPC-ns. The cheapest feasible one is taken, then the one that
   ends first.
5. Where none is feasible, or the query has no due time: what ends first, in one piece, and breaks no promise.
6. A promise that has been lost all the same (a slice failed, a batch took longer than expected) binds nobody.
7. Classes: a new batch goes before the batches of lower classes, and a query joins none behind them, as far as that
   keeps what has been promised. A promise weighs more than a class.
8. Planned times are estimates with their spread (`BatchTable.guard`).

With exact service times, and slices that neither fail nor drain, every promise is kept: rule 3 is checked at every
addition, and all else that happens to a plan (a cancelled query) makes it shorter.

Ours, after the idea in marginal-cost dispatch: rules 4 and 5 are its price list; the cut is greedy, the cheapest
pieces per item first, and at most one a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from scheduler.domain import BatchTable, Company, Kind, Part, Pool, Worker, models_of
from scheduler.policies import Start

NEVER = float("inf")


class _Batch:
    """A planned one. `promised`: its parts and the due time that each has been promised, or NEVER."""

    __slots__ = ("company", "due_ns", "items", "kind", "ns", "priority", "promised")

    def __init__(self, company: Company) -> None:
        self.company = company
        self.promised: dict[Part, float] = {}

    def recount(self, tables: dict[Kind, BatchTable]) -> None:
        """After a change of parts or tables; not for an empty one."""
        self.items = sum(part.items for part in self.promised)
        self.kind = max(part.kind for part in self.promised)
        self.priority = min(part.query.request.priority for part in self.promised)
        self.due_ns = min(self.promised.values())
        self.ns = _time_ns(tables[self.kind], self.items)


class _Plan:
    """Of one worker. `ends_ns[i]`: when batch i ends, from the time on when the worker is free.

    `latest_ns[i]`: when the worker has to be free, so that batch i and all after it keep their promises.
    """

    __slots__ = ("batches", "ends_ns", "latest_ns", "worker")

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.batches: list[_Batch] = []
        self.ends_ns: list[int] = []
        self.latest_ns: list[float] = []

    def recount(self) -> None:
        """After a change of batches."""
        end_ns = 0
        self.ends_ns = [end_ns := end_ns + batch.ns for batch in self.batches]
        latest_ns = NEVER
        self.latest_ns = [NEVER] * len(self.batches)
        for index in range(len(self.batches) - 1, -1, -1):
            latest_ns = min(latest_ns, self.batches[index].due_ns - self.ends_ns[index])
            self.latest_ns[index] = latest_ns

    def total_ns(self) -> int:
        return self.ends_ns[-1] if self.ends_ns else 0

    def forget_lost(self, free_ns: int) -> None:
        """Rule 6."""
        for batch, end_ns in zip(self.batches, self.ends_ns, strict=True):
            if batch.due_ns < free_ns + end_ns:
                for part, due_ns in batch.promised.items():
                    if due_ns < free_ns + end_ns:
                        batch.promised[part] = NEVER
                batch.due_ns = min(batch.promised.values())
        self.recount()


class _Way(NamedTuple):
    """To add `items` to a plan: by joining `batch`, or, where that is None, as a new one that is the `place`-th."""

    cost: int
    end_ns: int
    items: int
    plan: _Plan
    place: int
    batch: _Batch | None


class MarginalCost:
    """Early binding at the least GPC-time, with every promise kept."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._plans: dict[int, _Plan] = {}
        self._where: dict[Part, tuple[_Plan, _Batch]] = {}
        self._known_at = 0

    # ---- the signature ----

    def offer(self, now_ns: int, part: Part, bound_ns: int | None) -> int:
        if self._known_at != self._pool.changes:
            self._recount()
        due_ns = part.due_ns
        ways = [] if due_ns is None else self._feasible(now_ns, part, due_ns)
        if ways:
            assert due_ns is not None
            for way in ways[:-1]:
                self._add(part.cut(way.items), way, due_ns)
            self._add(part, ways[-1], due_ns)
            return 0
        way = min(self._ways(now_ns, part, NEVER, cuts=False), key=lambda w: (w.end_ns, w.cost))
        if bound_ns is not None and due_ns is not None and way.end_ns - due_ns > bound_ns:
            return way.end_ns - due_ns - bound_ns
        self._add(part, way, NEVER)
        return 0

    def next(self, now_ns: int) -> Start | None:
        for worker in self._pool.ready.values():
            plan = self._plans.get(worker.id)
            if plan is not None and plan.batches:
                batch = plan.batches.pop(0)
                plan.recount()
                return Start(worker, batch.kind, self._released(batch))
        return None

    def wake_ns(self, now_ns: int) -> int | None:
        return None

    def discard(self, part: Part) -> None:
        part.queued = False
        plan, batch = self._where.pop(part)
        del batch.promised[part]
        if batch.promised:
            batch.recount(plan.worker.tables)
        else:
            plan.batches.remove(batch)
        plan.recount()

    def evict(self, worker: Worker, model: str | None = None) -> list[Part]:
        plan = self._plans.get(worker.id)
        if plan is None:
            return []
        evicted = [batch for batch in plan.batches if model is None or batch.kind[0] == model]
        plan.batches = [batch for batch in plan.batches if batch not in evicted]
        plan.recount()
        if model is None:
            del self._plans[worker.id]
        return [part for batch in evicted for part in self._released(batch)]

    def backlog_ns(self, now_ns: int, model: str) -> int:
        return min(
            (
                max(worker.free_at_ns - now_ns, 0) + self._plan(worker).total_ns()
                for worker in self._pool.workers.values()
                if model in models_of(worker)
            ),
            default=0,
        )

    # ---- pricing ----

    def _feasible(self, now_ns: int, part: Part, due_ns: int) -> list[_Way]:
        """Rule 4: one way, or one for each piece, in the order of the items; none if nothing is feasible."""
        ways = list(self._ways(now_ns, part, due_ns, cuts=part.may_be_cut))
        whole = min((way for way in ways if way.items == part.items), key=lambda w: w[:2], default=None)
        pieces = self._pieces(part, ways) if part.may_be_cut else []
        if whole is None or (pieces and sum(way.cost for way in pieces) < whole.cost):
            return pieces
        return [whole]

    def _pieces(self, part: Part, ways: list[_Way]) -> list[_Way]:
        """The cheapest ways per item, no two on a slice, that together take all of the part; none if they do not."""
        left = part.items
        used: set[int] = set()
        pieces: list[_Way] = []
        for way in sorted(ways, key=lambda w: (w.cost / w.items, w.end_ns)):
            if way.plan.worker.id in used:
                continue
            used.add(way.plan.worker.id)
            if way.items > left:
                way = _smaller(way, part.kind, left)
            pieces.append(way)
            left -= way.items
            if not left:
                return pieces
        return []

    def _ways(self, now_ns: int, part: Part, due_ns: float, *, cuts: bool) -> Iterator[_Way]:
        """Every feasible way to add the part, on every slice that serves it; with `cuts`, also to add some of it."""
        for worker in self._pool.serving[part.kind]:
            plan = self._plan(worker)
            free_ns = max(worker.free_at_ns, now_ns)
            if plan.batches:
                if plan.latest_ns[0] < free_ns:
                    plan.forget_lost(free_ns)
                yield from _joins(plan, free_ns, part, due_ns, cuts)
            way = _new_batch(plan, free_ns, part, due_ns, cuts)
            if way is not None:
                yield way

    # ---- plans ----

    def _plan(self, worker: Worker) -> _Plan:
        plan = self._plans.get(worker.id)
        if plan is None:
            plan = self._plans[worker.id] = _Plan(worker)
        return plan

    def _add(self, part: Part, way: _Way, promised_ns: float) -> None:
        plan, batch = way.plan, way.batch
        if batch is None:
            batch = _Batch(part.company)
            plan.batches.insert(way.place, batch)
        batch.promised[part] = promised_ns
        batch.recount(plan.worker.tables)
        plan.recount()
        part.queued = True
        part.worker_id = plan.worker.id
        self._where[part] = (plan, batch)

    def _released(self, batch: _Batch) -> list[Part]:
        for part in batch.promised:
            part.queued = False
            del self._where[part]
        return list(batch.promised)

    def _recount(self) -> None:
        """After tables have changed."""
        self._known_at = self._pool.changes
        for plan in self._plans.values():
            for batch in plan.batches:
                batch.recount(plan.worker.tables)
            plan.recount()


def _joins(plan: _Plan, free_ns: int, part: Part, due_ns: float, cuts: bool) -> Iterator[_Way]:
    """Ways to join a batch of the plan, up to the first one of a lower class."""
    model, priority = part.kind[0], part.query.request.priority
    tables, gpcs = plan.worker.tables, plan.worker.gpcs
    for index, batch in enumerate(plan.batches):
        if batch.kind[0] == model and batch.company == part.company:
            end_ns = free_ns + plan.ends_ns[index]
            table = tables[max(batch.kind, part.kind)]
            within_ns = batch.ns + min(plan.latest_ns[index] - free_ns, due_ns - end_ns)
            items = _fitting(table, batch.items, part.items, within_ns, cuts)
            if items:
                more_ns = _time_ns(table, batch.items + items) - batch.ns
                yield _Way(more_ns * gpcs, end_ns + more_ns, items, plan, index, batch)
        if batch.priority > priority:
            return


def _new_batch(plan: _Plan, free_ns: int, part: Part, due_ns: float, cuts: bool) -> _Way | None:
    """The way to add a batch of its own: before those of lower classes, if that breaks no promise, or further back."""
    table = plan.worker.tables[part.kind]
    time_ns = _time_ns(table, part.items)
    index = _place(plan, free_ns, part.query.request.priority, time_ns)
    start_ns = free_ns + (plan.ends_ns[index - 1] if index else 0)
    end_ns = start_ns + time_ns
    if end_ns <= due_ns and (part.items <= table.max_batch or not cuts):
        return _Way(time_ns * plan.worker.gpcs, end_ns, part.items, plan, index, None)
    items = _fitting(table, 0, part.items, due_ns - start_ns, cuts)
    if not items:
        return None
    time_ns = _time_ns(table, items)
    return _Way(time_ns * plan.worker.gpcs, start_ns + time_ns, items, plan, index, None)


def _place(plan: _Plan, free_ns: int, priority: int, time_ns: int) -> int:
    """Of a new batch: behind its own class and the ones above, as far to the front as promises allow."""
    count = index = len(plan.batches)
    while index and plan.batches[index - 1].priority > priority:
        index -= 1
    while index < count and plan.latest_ns[index] < free_ns + time_ns:
        index += 1
    return index


def _fitting(table: BatchTable, there: int, items: int, within_ns: float, cuts: bool) -> int:
    """How many of `items` join `there` others in a batch that takes no longer; without `cuts`, all or none."""
    if there + items <= table.max_batch and _time_ns(table, there + items) <= within_ns:
        return items
    return max(min(table.largest_within(within_ns / table.guard) - there, items), 0) if cuts else 0


def _smaller(way: _Way, kind: Kind, items: int) -> _Way:
    """The same way for fewer items."""
    worker, batch = way.plan.worker, way.batch
    there, ns = (0, 0) if batch is None else (batch.items, batch.ns)
    table = worker.tables[kind if batch is None else max(kind, batch.kind)]
    more_ns = _time_ns(table, there + items) - ns
    way_ns = way.cost // worker.gpcs
    return way._replace(cost=more_ns * worker.gpcs, end_ns=way.end_ns - way_ns + more_ns, items=items)


def _time_ns(table: BatchTable, items: int) -> int:
    """With the spread, rule 8."""
    return int(table.time_ns(items) * table.guard)
