"""One pool, late binding, a late lane: nothing is bound to a slice before that slice is free. Our own. Pure.

What waits of one kind (model and length bucket), company and class has three lanes: timely, late, and open for what
has no due time. Timely lanes are in order of due time, late ones of when they must have ended, open ones of arrival.
What runs by itself shares lanes with its like. SLOs are the geometric means of those of the last queries.

Rules:
1. A new query is timely, unless the timely lane then holds more than theta times the items that the slices can do
   until the query is due (`rates.Rates`). Then the largest ones waiting go to the late lane until it fits: one late
   query is one late query, however much room it gives to others. What slices could do in their next batches, free ones
   or any for a query that is the only one, is never too much. Where several lines (a line: one kind, company and class)
   have timely work, all of them together get ALL_THETA of what the slices can do; what is within a line's part of that
   is let in whatever others have, and a line that asks for more than its part gets theta times that part. Parts are
   max-min fair among models, by their weights (`shares.py`). Late work that will have gone first by then (3a) counts
   too. (`admission.py`)
2. What no slice could end in time, were it idle, goes to the late lane; all of what must not be cut has to be in time.
3. A slice that is free serves the highest class that it can, whatever lower ones were accepted for; within a class
   a. late work, where in order of their bounds all slices would end some of it less than PRESSES SLOs before its bound;
   b. timely work, first the line whose first query has the least relative laxity, (due - now - time) / SLO;
   c. late work, the oldest first; d. open work, the oldest first. Open work that has waited a second goes first, while
      that takes no more than a twentieth of the slice's time.
4. A timely batch ends before its first query is due, with the spread of the estimates as margin (`BatchTable.guard`),
   and is the one with the most items per time. Of the free slices it goes to the one that it uses best. Queries are
   cut freely where that gains more than 2 %; a batch cuts one query at most, the last. Where the timely lane is
   empty then, late and open items fill the batch up, as far as its due time allows. Where the free slices can do all
   that is timely in UNHURRIED of the time that is left, no batch takes longer: it may take longer than it should.
   Where much waits, those that leave time for less than half a good batch become late: or all would, one by one.
5. Late batches may take one and a half SLOs; open ones go up to the knee, or the peak where much waits.
6. A batch takes no longer than 0.65 SLOs of the slice's other models, unless the slices that are left carry them, or
   one item takes as long. (`blocking.py`)
7. The late lanes take no more than ends within its bound in what timely work has left of the slices lately, late work
   that had to go first, and timely work that it displaced, not being left; and next to nothing while more is asked for
   than the slices can do, since what is late then takes the place of what could be in time. What finds them full is
   refused, and so is a strict query that would be late. What was accepted is never refused.
8. For every strict query that waits there is a plan in which it ends in time, and nothing is started that does not
   leave one, but what is late, strict itself, and must go first (3a). (`promises.py`)

docs/scheduling.md has a picture, the figures, and what was tried and dropped.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator

from scheduler.domain import Kind, Part, Pool, Worker, models_of
from scheduler.policies import Start
from scheduler.policies.admission import Admission, pressing
from scheduler.policies.blocking import unblocking
from scheduler.policies.lanes import Lanes, LanesKey, first_in_time, key_of, slo_of, take_efficient
from scheduler.policies.promises import Promises
from scheduler.policies.rates import RateBook

# Rule 3d.
PATIENCE_NS = 1_000_000_000
OPEN_SHARE = 0.05
# Rule 4: a batch with less than this share of the items per time of the best one.
CROWDED = 0.5
# Rule 4: so much of the time until its first query is due a batch takes where several slices are free.
UNHURRIED = 0.8
# Empty lanes that are kept, with what they know of sizes and rates.
KEPT = 64


class OnePool:
    """The lanes of all lines of work, and what starts next."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._rates = RateBook(pool)
        self._lanes: dict[LanesKey, Lanes] = {}
        self._waiting: dict[LanesKey, Lanes] = {}  # those where something waits
        self._promises = Promises()
        self._admission = Admission(pool, self._rates, self._lanes, self._waiting.values(), self._promises)
        self._open_first_ns: dict[int, int] = {}  # by worker: when open work may go first again

    # ---- arrivals ----

    def offer(self, now_ns: int, part: Part, bound_ns: int | None) -> int:
        key = key_of(part)
        lanes = self._lanes.get(key)
        if lanes is None:
            lanes = Lanes(key, self._rates.of(part.kind, 0))
        else:
            del self._lanes[key]
        self._lanes[key] = lanes  # the last one that was used, now
        if part.due_ns is None:
            lanes.rates = self._rates.of(part.kind, lanes.slo_ns)
            lanes.open.push(part, 0)
            self._waiting[key] = lanes
            return 0
        lanes.arrived(now_ns, part.items, slo_of(part))
        lanes.rates = self._rates.of(part.kind, lanes.slo_ns)
        retry_ns = self._admission.admit(now_ns, lanes, part, part.due_ns, bound_ns)
        lanes.arriving.add(now_ns, part.items)  # not before: one large query is no crowd
        if lanes:
            self._waiting[key] = lanes
        elif len(self._lanes) > KEPT:
            self._forget_oldest()
        return retry_ns

    # ---- batches ----

    def next(self, now_ns: int) -> Start | None:
        waiting = self._waiting
        if not waiting:
            return None
        start = None
        if len(waiting) == 1:
            start = self._next_of(now_ns, list(waiting.values()))
        else:
            for priority in sorted({lanes.priority for lanes in waiting.values()}):
                start = self._next_of(now_ns, [lanes for lanes in waiting.values() if lanes.priority == priority])
                if start is not None:
                    break
        self._sweep()
        return start

    def _sweep(self) -> None:
        for key in [key for key, lanes in self._waiting.items() if not lanes]:
            self._waiting.pop(key, None)  # that may be forgotten already
            if len(self._lanes) > KEPT:
                self._forget_oldest()

    def _forget_oldest(self) -> None:
        """Of the empty lanes that which no query came for the longest. It may still be listed as waiting."""
        key = next(key for key, lanes in self._lanes.items() if not lanes)
        del self._lanes[key]
        self._waiting.pop(key, None)

    def _next_of(self, now_ns: int, group: list[Lanes]) -> Start | None:
        """Of one class."""
        for lanes in group:
            lanes.rates = self._rates.of(lanes.kind, lanes.slo_ns)
            self._put_back_the_hopeless(now_ns, lanes)
        return (
            self._overdue(now_ns, group)
            or self._timely(now_ns, group)
            or self._first(now_ns, [lanes for lanes in group if lanes.late.entries], late=True)
            or self._first(now_ns, [lanes for lanes in group if lanes.open.entries], late=False)
            or self._promised(now_ns, group[0].priority)
        )

    def _put_back_the_hopeless(self, now_ns: int, lanes: Lanes) -> None:
        entries = lanes.timely.entries
        while entries and entries[0][0] < now_ns + lanes.rates.least_of(entries[0][3]):
            part = entries[0][3]
            lanes.put_back(part)
            self._promises.forget(lanes, part)

    def _overdue(self, now_ns: int, group: list[Lanes]) -> Start | None:
        """Rules 3a, and 3d's second half."""
        for lanes in pressing(now_ns, group):
            start = self._bulk(now_ns, lanes, late=True, forced=True)
            if start is not None:
                return start
        for lanes in group:
            entries = lanes.open.entries
            if entries and now_ns - entries[0][3].query.arrived_ns > PATIENCE_NS:
                start = self._bulk(now_ns, lanes, late=False, forced=True)
                if start is not None:
                    return start
        return None

    def _timely(self, now_ns: int, group: list[Lanes]) -> Start | None:
        """Rule 3b."""
        ranked = []
        for number, lanes in enumerate(group):
            if lanes.timely.entries:
                laxity = (lanes.timely.entries[0][0] - now_ns - lanes.rates.least_ns) / lanes.slo_ns
                ranked.append((laxity, number, lanes))
        if len(ranked) > 1:
            ranked.sort()
        for *_, lanes in ranked:
            while lanes.timely.entries:
                start = self._timely_batch(now_ns, lanes)
                if start is not None:
                    return start
                if self._promises or any(worker.in_flight for worker in lanes.rates.workers):
                    break  # one that is busy may still be quick enough
                if lanes.timely.entries:
                    lanes.put_back(lanes.timely.entries[0][3])
        return None

    def _timely_batch(self, now_ns: int, lanes: Lanes) -> Start | None:
        """Rule 4."""
        kind, rates, entries = lanes.kind, lanes.rates, lanes.timely.entries
        best: tuple[float, Worker, int, int, int] | None = None
        promised = bool(self._promises)
        seen: set[int] = set()
        of_time = UNHURRIED if self._many_free(now_ns, lanes) else 1.0
        for worker in self._pool.ready.values():
            if worker.gpcs in seen or kind not in worker.tables or _is_overdue(now_ns, worker):
                continue
            fit = rates.fit(worker)
            table = fit.table
            start_ns = worker.free_at_ns if worker.free_at_ns > now_ns else now_ns
            index = first_in_time(entries, start_ns, table)
            if index == len(entries):
                continue  # another slice may still be quick enough
            due_ns, _, _, head = entries[index]
            most = max(table.largest_within(of_time * (due_ns - start_ns) / table.guard), 1)
            most = self._cap(now_ns, worker, kind, min(most, lanes.timely.items, fit.late_cap))
            if not head.may_be_cut:  # it goes as it is or never
                most = min(max(most, head.items), table.max_batch)
            least = 0
            if promised:
                most, least = self._promises.timely_room(now_ns, worker, lanes, index, most)
                if not most or (head.items > most and not head.may_be_cut):
                    continue
            value = table.best_per_ns[most] / fit.items_per_ns
            seen.add(worker.gpcs)
            if best is None or value > best[0]:
                best = value, worker, index, most, least
        if best is None:
            return None
        value, worker, index, most, least = best
        if value < CROWDED and self._gives_up(now_ns, worker, lanes, index):
            return self._timely_batch(now_ns, lanes) if entries else None
        due_ns = entries[index][0]
        parts = take_efficient(lanes.timely, index, most, worker.tables[kind], least)
        if self._promises:
            self._promises.started(worker, lanes, parts, first=index == 0)
        if not entries and not lanes.lone:
            self._fill_up(now_ns, worker, lanes, parts, due_ns)
        self._count_use(now_ns, worker, lanes.priority, worker.tables[kind].time_ns(sum(part.items for part in parts)))
        return Start(worker, kind, parts)

    def _many_free(self, now_ns: int, lanes: Lanes) -> bool:
        """Whether the free slices could do all that is timely in UNHURRIED of the time that is left."""
        ready = self._pool.ready
        if len(ready) < 2:
            return False
        left_ns = UNHURRIED * (lanes.timely.entries[0][0] - now_ns)
        room, items = 0, lanes.timely.items
        for worker in ready.values():
            table = worker.tables.get(lanes.kind)
            if table is not None:
                room += table.largest_within(left_ns / table.guard)
                if room >= items:
                    return True
        return False

    def _gives_up(self, now_ns: int, worker: Worker, lanes: Lanes, index: int) -> bool:
        """The last of rule 4: puts those back that leave no time for a good batch, if there would be enough for two."""
        fit = lanes.rates.fit(worker)
        if lanes.timely.items < 2 * fit.table.best[fit.cap]:
            return False
        enough_ns = max(now_ns, worker.free_at_ns) + fit.table.guard * fit.efficient_ns
        end = bisect.bisect_left(lanes.timely.entries, (math.ceil(enough_ns),))
        hurried = [each[3] for each in lanes.timely.entries[index:end] if not each[3].query.request.strict]
        for part in hurried:
            lanes.put_back(part)
        return bool(hurried)

    def _promised(self, now_ns: int, priority: int) -> Start | None:
        """What is planned first on a slice that is still free, and must not wait."""
        if not self._promises:
            return None
        for worker in self._pool.ready.values():
            while (planned := self._promises.planned(worker, priority)) is not None:
                key, places, fixed = planned
                lanes = self._lanes.get(key)
                parts = []
                if lanes is not None:
                    time_ns = worker.tables[lanes.kind].time_ns(places + sum(part.items for part in fixed))
                    parts = lanes.take_strict(places, fixed, max(now_ns, worker.free_at_ns) + time_ns)
                if lanes is not None and parts:
                    self._promises.started(worker, lanes, parts, first=True)
                    time_ns = worker.tables[lanes.kind].time_ns(sum(part.items for part in parts))
                    self._count_use(now_ns, worker, priority, time_ns)
                    return Start(worker, lanes.kind, parts)
                self._promises.drop_first(worker, key)
        return None

    def _count_use(self, now_ns: int, worker: Worker, priority: int, time_ns: int) -> None:
        """For rule 7: what each kind of work of that class or a lower one could have had of that time here."""
        for lanes in self._lanes.values():
            if lanes.priority >= priority and lanes.slo_ns and lanes.kind in worker.tables:
                rates = self._rates.of(lanes.kind, lanes.slo_ns)
                lanes.timely_use.add(now_ns, time_ns * rates.fit(worker).items_per_ns)

    def _fill_up(self, now_ns: int, worker: Worker, lanes: Lanes, parts: list[Part], due_ns: int) -> None:
        """The end of rule 4."""
        table = worker.tables[lanes.kind]
        items = sum(part.items for part in parts)
        most = min(
            table.largest_within((due_ns - max(now_ns, worker.free_at_ns)) / table.guard),
            lanes.rates.fit(worker).late_cap,
            self._promises.room(now_ns, worker, lanes),
        )
        most = min(most, self._cap(now_ns, worker, lanes.kind, most))
        for line in (lanes.late, lanes.open):
            if not line.entries or items >= most:
                continue
            room = table.best[min(items + line.items, most)] - items
            head = line.entries[0][3]
            if room >= (1 if head.may_be_cut else head.items):
                more = line.take(room)
                items += sum(part.items for part in more)
                parts += more

    def _first(self, now_ns: int, group: list[Lanes], *, late: bool) -> Start | None:
        """Rules 3c and 3d."""
        if len(group) > 1:
            group.sort(key=lambda lanes: (lanes.late if late else lanes.open).entries[0][:3])
        for lanes in group:
            start = self._bulk(now_ns, lanes, late=late)
            if start is not None:
                return start
        return None

    def _bulk(self, now_ns: int, lanes: Lanes, *, late: bool, forced: bool = False) -> Start | None:
        """Rule 5, on the fastest slice that is free."""
        kind, rates = lanes.kind, lanes.rates
        ready = [
            w for w in self._ready(now_ns, kind) if late or not forced or now_ns >= self._open_first_ns.get(w.id, 0)
        ]
        line = lanes.late if late else lanes.open
        head, room = line.entries[0][3], self._promises.room
        above = forced and late and head.query.request.strict
        if self._promises:
            least = 1 if head.may_be_cut else head.items
            ready = [w for w in ready if room(now_ns, w, lanes, above=above) >= min(least, w.tables[kind].max_batch)]
        if not ready:
            return None
        worker = max(ready, key=lambda w: rates.fit(w).items_per_ns)
        table = worker.tables[kind]
        if late:
            most = min(line.items, rates.fit(worker).late_cap, room(now_ns, worker, lanes, above=above))
            parts = take_efficient(line, 0, self._cap(now_ns, worker, kind, most), table)
        else:
            most = table.peak if line.items > 2 * table.knee else table.knee
            places = room(now_ns, worker, lanes)
            most = self._cap(now_ns, worker, kind, min(most, places))
            whole = not lanes.lone and head.items <= places
            parts = line.take_whole(most) if whole else line.take(0 if lanes.lone else most)
        start = Start(worker, kind, parts)
        time_ns = table.time_ns(sum(part.items for part in parts))
        if forced and late:
            self._count_use(now_ns, worker, lanes.priority, time_ns)
        elif forced:
            self._open_first_ns[worker.id] = now_ns + int(time_ns / OPEN_SHARE)
        return start

    def _ready(self, now_ns: int, kind: Kind) -> Iterator[Worker]:
        return (w for w in self._pool.ready.values() if kind in w.tables and not _is_overdue(now_ns, w))

    def _cap(self, now_ns: int, worker: Worker, kind: Kind, most: int) -> int:
        return (
            most
            if len(worker.tables) == 1
            else unblocking(now_ns, worker, kind, most, self._lanes.values(), self._rates)
        )

    def wake_ns(self, now_ns: int) -> int | None:
        return None

    # ---- leaving ----

    def discard(self, part: Part) -> None:
        lanes = self._lanes[key_of(part)]
        lanes.discard(part)
        if not part.late:
            self._promises.forget(lanes, part)

    def evict(self, worker: Worker, model: str | None = None) -> list[Part]:
        self._promises.drop(worker, model)
        models = models_of(worker) if model is None else [model]
        parts: list[Part] = []
        for key in [key for key in self._lanes if key[1][0] in models]:
            if self._pool.serving.get(key[1]) == [worker]:
                parts += self._lanes.pop(key).drain()
                self._waiting.pop(key, None)
        if model is None:
            self._open_first_ns.pop(worker.id, None)
        return parts

    def backlog_ns(self, now_ns: int, model: str) -> int:
        free_ns = math.inf
        wait_ns = 0.0
        for lanes in self._waiting.values():
            if lanes.kind[0] == model:
                wait_ns += lanes.items / lanes.rates.pool_per_ns
                free_ns = min(free_ns, *(worker.free_at_ns for worker in lanes.rates.workers))
        return int(wait_ns + (max(free_ns - now_ns, 0) if free_ns < math.inf else 0))


def _is_overdue(now_ns: int, worker: Worker) -> bool:
    """Nobody knows when its batch will end: nothing is to wait behind that."""
    return bool(worker.in_flight) and worker.free_at_ns < now_ns
