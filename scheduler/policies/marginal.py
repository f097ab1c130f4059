"""Dispatch by least marginal cost: every query bound on arrival to where it adds the least work in time. Pure.

1. Each slice has a plan: batches in the order in which it will run them, the first as soon as the slice has room.
2. A query is added in one of these ways: as a new batch at the end of a plan; by joining a batch that has not started
   (of the same model and company; the longer length bucket counts for all); or cut into pieces, each of which goes one
   of these ways on another slice.
3. A way is feasible if all of the query ends by its due time, and no batch in the plan ends after the earliest due
   time that has been promised to anybody in it. What has been placed in a feasible way has been promised its due time.
4. A way costs what it adds to the time of the plans, in GPC-ns. The cheapest feasible one is taken, then the one that
   ends first; a query is cut only where it is not feasible in one piece.
5. Where none is feasible, or the query has no due time: what ends first, in one piece, and breaks no promise.
6. A promise that has been lost all the same (a slice failed, a batch took longer than expected) binds nobody.
7. Classes: a new batch goes before the batches of lower classes, and a query joins none behind them, as far as that
   keeps what has been promised. A promise weighs more than a class.
8. Planned times are estimates and twice their guard (`BatchTable.guard`, 2 sigma): batches are filled up to their due
   time, so that whatever takes longer is late. With 5 % noise ResNet-50 on 2 GPUs of 7x1g comes to .34 of the fluid
   bound with the guard once, .58 with it twice, .02 without.

With exact service times, and slices that neither fail nor drain, every promise is kept: rule 3 is checked at every
addition, and all else that happens to a plan (a cancelled query) makes it shorter.

All of it is ours. The cut is greedy: the pieces that are cheapest per item first, at most one a slice. To cut wherever
that is cheaper was slower to decide and no better (W-paper, 2 GPUs of 3g+2g+1g+1g: BERT .73 of the bound, not .80).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from scheduler.domain import BatchTable, Company, Kind, Part, Pool, Worker, models_of
from scheduler.policies import Start

NEVER = float("inf")
# How much of the guard is planned for.
MARGIN = 2


class _Batch:
    """A planned one. `promised`: its parts and the due time that each has been promised, or NEVER."""

    __slots__ = ("company", "due_ns", "items", "kind", "ns", "priority", "promised")

    def __init__(self, company: Company) -> None:
        self.company = company
        self.promised: dict[Part, float] = {}

    def recount(self, plan: _Plan) -> None:
        """After a change of parts or tables; not for an empty one."""
        self.items = sum(part.items for part in self.promised)
        self.kind = max(part.kind for part in self.promised)
        self.priority = min(part.query.request.priority for part in self.promised)
        self.due_ns = min(self.promised.values())
        times_ns = plan.times_ns(self.kind)
        self.ns = times_ns[min(self.items, len(times_ns) - 1)]


class _Plan:
    """Of one worker. `ends_ns[i]`: when batch i ends, from the time on when the worker is free.

    `latest_ns[i]`: when the worker has to be free, so that batch i and all after it keep their promises.
    """

    __slots__ = ("_tables", "_times_ns", "batches", "ends_ns", "latest_ns", "worker")

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._times_ns: dict[Kind, Sequence[int]] = {}
        self._tables: dict[Kind, BatchTable] = {}  # that they are of
        self.batches: list[_Batch] = []
        self.ends_ns: list[int] = []
        self.latest_ns: list[float] = []

    def times_ns(self, kind: Kind) -> Sequence[int]:
        """Planned times of batches, by items."""
        times_ns = self._times_ns.get(kind)
        if times_ns is None:
            table = self._tables[kind] = self.worker.tables[kind]
            times_ns = self._times_ns[kind] = planned_ns(table)
        return times_ns

    def tables_changed(self) -> None:
        changed = [kind for kind, table in self._tables.items() if self.worker.tables.get(kind) is not table]
        if not changed:
            return
        for kind in changed:
            del self._tables[kind], self._times_ns[kind]
        for batch in self.batches:
            batch.recount(self)
        self.recount()

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
        if self._known_at != self._pool.changes + self._pool.corrections:
            self._recount()
        due_ns = NEVER if part.due_ns is None else part.due_ns
        ways = list(self._ways(now_ns, part, NEVER, cuts=False))
        pieces = [] if part.due_ns is None else self._feasible(now_ns, part, part.due_ns, ways)
        if pieces:
            for way in pieces[:-1]:
                self._add(part.cut(way.items), way, due_ns)
            self._add(part, pieces[-1], due_ns)
            return 0
        way = min(ways, key=lambda w: (w.end_ns, w.cost))
        late_ns = 0 if part.due_ns is None else way.end_ns - part.due_ns
        if bound_ns is not None and late_ns > bound_ns:
            return late_ns - bound_ns
        # What is larger than its table, and could not be cut into pieces in time, may be in time here.
        self._add(part, way, NEVER if late_ns > 0 else due_ns)
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
            batch.recount(plan)
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

    def _feasible(self, now_ns: int, part: Part, due_ns: int, ways: list[_Way]) -> list[_Way]:
        """Rule 4: one of `ways`, or one for each piece, in the order of the items; none if nothing is feasible."""
        kind, cuts = part.kind, part.may_be_cut
        in_time = [way for way in ways if way.end_ns <= due_ns]
        if cuts:
            in_time = [way for way in in_time if part.items <= way.plan.worker.tables[kind].max_batch]
        if in_time:
            return [min(in_time, key=lambda w: w[:2])]
        return self._pieces(part, self._ways(now_ns, part, due_ns, cuts=True)) if cuts else []

    def _pieces(self, part: Part, ways: Iterable[_Way]) -> list[_Way]:
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
        batch.recount(plan)
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
        self._known_at = self._pool.changes + self._pool.corrections
        for plan in self._plans.values():
            plan.tables_changed()


def _joins(plan: _Plan, free_ns: int, part: Part, due_ns: float, cuts: bool) -> Iterator[_Way]:
    """Ways to join a batch of the plan, up to the first one of a lower class."""
    kind, company, priority = part.kind, part.company, part.query.request.priority
    for place, batch in enumerate(plan.batches):
        if batch.company == company and batch.kind[0] == kind[0]:
            end_ns = free_ns + plan.ends_ns[place]
            more_ns = min(plan.latest_ns[place] - free_ns, due_ns - end_ns)
            if more_ns >= 0:
                times_ns = plan.times_ns(max(batch.kind, kind))
                items = _fitting(times_ns, batch.items, part.items, batch.ns + more_ns, cuts)
                if items:
                    time_ns = times_ns[batch.items + items] - batch.ns
                    yield _Way(time_ns * plan.worker.gpcs, end_ns + time_ns, items, plan, place, batch)
        if batch.priority > priority:
            return


def _new_batch(plan: _Plan, free_ns: int, part: Part, due_ns: float, cuts: bool) -> _Way | None:
    """The way to add a batch of its own: before those of lower classes, if that breaks no promise, or further back."""
    times_ns = plan.times_ns(part.kind)
    items, rows = part.items, len(times_ns) - 1
    time_ns = times_ns[items if items < rows else rows]
    place = _place(plan, free_ns, part.query.request.priority, time_ns) if plan.batches else 0
    start_ns = free_ns + plan.ends_ns[place - 1] if place else free_ns
    if start_ns + time_ns > due_ns or (cuts and items > rows):
        items = _fitting(times_ns, 0, items, due_ns - start_ns, cuts)
        if not items:
            return None
        time_ns = times_ns[items]
    return _Way(time_ns * plan.worker.gpcs, start_ns + time_ns, items, plan, place, None)


def _place(plan: _Plan, free_ns: int, priority: int, time_ns: int) -> int:
    """Of a new batch: behind its own class and the ones above, as far to the front as promises allow."""
    count = place = len(plan.batches)
    while place and plan.batches[place - 1].priority > priority:
        place -= 1
    while place < count and plan.latest_ns[place] < free_ns + time_ns:
        place += 1
    return place


def _fitting(times_ns: Sequence[int], there: int, items: int, within_ns: float, cuts: bool) -> int:
    """How many of `items` join `there` others in a batch that takes no longer; without `cuts`, all or none."""
    if there + items < len(times_ns) and times_ns[there + items] <= within_ns:
        return items
    return max(min(bisect_right(times_ns, within_ns) - 1 - there, items), 0) if cuts else 0


def _smaller(way: _Way, kind: Kind, items: int) -> _Way:
    """The same way for fewer items."""
    plan, batch = way.plan, way.batch
    if batch is None:
        time_ns = plan.times_ns(kind)[items]
    else:
        time_ns = plan.times_ns(max(kind, batch.kind))[batch.items + items] - batch.ns
    earlier_ns = way.cost // plan.worker.gpcs - time_ns
    return way._replace(cost=time_ns * plan.worker.gpcs, end_ns=way.end_ns - earlier_ns, items=items)


def planned_ns(table: BatchTable) -> Sequence[int]:
    """Rule 8."""
    if table.guard == 1:
        return table.ns
    spread = 1 + MARGIN * (table.guard - 1)
    return [int(ns * spread) for ns in table.ns]
