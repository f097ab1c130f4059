"""That strict queries end in time: for all of them that wait there is a plan, on whose slice and in which order. Pure.

A plan is a witness, no decision. What starts, and where, is decided late, and only has to leave a plan for the rest:
1. A strict query is accepted if its items find places: in planned batches of its own kind, or in new ones, in order of
   class and due time, so that every planned batch ends before the earliest due time of its items.
2. Places are for any items of a kind and company that may be cut, the earliest due first. When such items start
   elsewhere, places are given up: on the slice that they start on, if they are the first in the line; then, due last
   first, as long as there are more than items that wait. What must not be cut has places of its own.
3. A slice may start what leaves its plan in time. Where nothing else starts on a free slice, its first planned batch
   does. Places that cannot be in time any more bind nobody: their items wait for what others leave, and may be late.
   Those that are so late that they must go first heed the plans of higher classes only.
4. Nothing is planned for a class but after the higher ones, and these do not look after it.

With exact times, one class, and slices that neither fail nor drain, no promise is broken. Places are found by times
with their guard; what starts beside them counts only what is expected, or a batch that took long would stop everything.
Ours. (marginal.py decides by such plans, and binds early.)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

from scheduler.domain import Part, Worker
from scheduler.policies.lanes import Lanes, LanesKey


class _Slot:
    """A planned batch: `places` for items that may be cut, and `fixed` parts that must not."""

    __slots__ = ("due_ns", "fixed", "items", "key", "plan")

    def __init__(self, plan: _Plan, key: LanesKey, due_ns: int) -> None:
        self.plan = plan
        self.key = key
        self.due_ns = due_ns
        self.items = 0
        self.fixed: dict[Part, None] = {}

    @property
    def places(self) -> int:
        return self.items - sum(part.items for part in self.fixed)

    def add(self, part: Part, items: int) -> None:
        assert part.due_ns is not None
        self.due_ns = min(self.due_ns, part.due_ns)
        self.items += items
        if is_fixed(part):
            self.fixed[part] = None
        self.plan.recount()

    def remove(self, items: int, part: Part | None = None) -> None:
        self.items -= items
        if part is not None:
            del self.fixed[part]
        if not self.items:
            self.plan.slots.remove(self)
        self.plan.recount()

    def time_ns(self, items: int) -> int:
        return self.plan.worker.tables[self.key[1]].time_ns(items)


class _Plan:
    """Of one worker. `ends_ns[i]`: when slot i ends, from when the worker is free, with guard.

    `latest_ns[i]`: when the worker must be free, so that slot i and those of its class after it end in time.
    `more_ns[i]`: what one more item in slot i takes.
    """

    __slots__ = ("ends_ns", "latest_ns", "more_ns", "slots", "worker")

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.slots: list[_Slot] = []
        self.ends_ns: list[float] = []
        self.latest_ns: list[float] = []
        self.more_ns: list[float] = []

    def recount(self) -> None:
        end_ns = 0.0
        self.ends_ns = []
        self.more_ns = []
        for slot in self.slots:
            table, items = self.worker.tables[slot.key[1]], slot.items
            end_ns += table.guard * table.time_ns(items)
            self.ends_ns.append(end_ns)
            full = items >= table.max_batch
            self.more_ns.append(math.inf if full else table.guard * (table.ns[items + 1] - table.ns[items]))
        self.latest_ns = []
        latest_ns, priority = math.inf, 0
        for slot, end_ns in zip(reversed(self.slots), reversed(self.ends_ns), strict=True):
            latest_ns = min(slot.due_ns - end_ns, latest_ns if slot.key[0] == priority else math.inf)
            priority = slot.key[0]
            self.latest_ns.append(latest_ns)
        self.latest_ns.reverse()

    def room(self, start_ns: float, index: int, due_ns: int) -> int:
        """How many more items, due then, slot `index` holds."""
        slot = self.slots[index]
        table = self.worker.tables[slot.key[1]]
        more_ns = min(self.latest_ns[index], due_ns - self.ends_ns[index]) - start_ns
        if more_ns < 0:
            return 0
        return table.largest_within(table.time_ns(slot.items) + more_ns / table.guard) - slot.items

    def room_for_new(self, start_ns: float, key: LanesKey, due_ns: int) -> int:
        """How many items a new slot there could hold."""
        place = self.place(key, due_ns)
        start_ns += self.ends_ns[place - 1] if place else 0.0
        room_ns = due_ns - start_ns
        if place < len(self.slots) and self.slots[place].key[0] == key[0]:
            room_ns = min(room_ns, self.latest_ns[place] + (self.ends_ns[place - 1] if place else 0.0) - start_ns)
        table = self.worker.tables[key[1]]
        return table.largest_within(room_ns / table.guard)

    def place(self, key: LanesKey, due_ns: int) -> int:
        priority = key[0]
        place = len(self.slots)
        for slot in reversed(self.slots):
            if slot.key[0] < priority or (slot.key[0] == priority and slot.due_ns <= due_ns):
                break
            place -= 1
        return place

    def forget_lost(self, start_ns: float) -> None:
        """The end of rule 3."""
        for slot in list(self.slots):
            if start_ns + slot.time_ns(slot.items) > slot.due_ns:
                room = self.worker.tables[slot.key[1]].largest_within(slot.due_ns - start_ns)
                if room < max(slot.items - slot.places, 1):
                    self.slots.remove(slot)
                    continue
                slot.items = room
            start_ns += slot.time_ns(slot.items)
        self.recount()


class Promises:
    """The plans of all workers, in order of class and due time."""

    def __init__(self) -> None:
        self._plans: dict[int, _Plan] = {}

    def __bool__(self) -> bool:
        return bool(self._plans) and any(plan.slots for plan in self._plans.values())

    # ---- promising ----

    def book(self, now_ns: int, lanes: Lanes, part: Part) -> bool:
        """Rule 1. False: there is no place for all of it, and nothing has changed."""
        assert part.due_ns is not None
        plans = [self._plans.get(worker.id) or self._new_plan(worker) for worker in lanes.rates.workers]
        least = part.items if is_fixed(part) else 1
        found: list[tuple[_Slot, int, int]] = []
        left = part.items
        for slot, room in self._rooms(now_ns, plans, lanes, part, part.due_ns):
            if room >= least:
                items = min(room, left)
                found.append((slot, items, slot.due_ns))
                if not slot.items:
                    slot.plan.slots.insert(slot.plan.place(slot.key, slot.due_ns), slot)
                slot.add(part, items)
                left -= items
                if not left:
                    return True
        for slot, items, due_ns in found:
            slot.due_ns = due_ns
            slot.remove(items, part if is_fixed(part) else None)
        return False

    def _new_plan(self, worker: Worker) -> _Plan:
        plan = self._plans[worker.id] = _Plan(worker)
        return plan

    def _rooms(
        self, now_ns: int, plans: list[_Plan], lanes: Lanes, part: Part, due_ns: int
    ) -> Iterable[tuple[_Slot, int]]:
        """Places for the part: in planned batches of its own, then in new ones; how many items they hold."""
        key = lanes.key
        if not lanes.lone:
            for plan in plans:
                if plan.slots:
                    free_ns = plan.worker.free_at_ns
                    start_ns = free_ns if free_ns > now_ns else now_ns
                    for index, slot in enumerate(list(plan.slots)):
                        more_ns = plan.more_ns[index] + start_ns
                        latest_ns = min(plan.latest_ns[index], due_ns - plan.ends_ns[index])
                        if more_ns <= latest_ns and slot.key == key:
                            yield slot, plan.room(start_ns, index, due_ns)
        for plan in plans:
            start_ns = max(now_ns, plan.worker.free_at_ns)
            if start_ns + plan.worker.tables[key[1]].ns[1] <= due_ns:
                room = plan.room_for_new(start_ns, key, due_ns)
                if room:
                    yield _Slot(plan, key, due_ns), room

    # ---- starting ----

    def room(self, now_ns: int, worker: Worker, lanes: Lanes, given_up: int = 0, *, above: bool = False) -> int:
        """Rule 3: the most items of a batch there, if so many of the lanes' own places there are given up for it.

        `above`: only what is planned for higher classes counts.
        """
        plan = self._plans.get(worker.id)
        table = worker.tables[lanes.kind]
        if plan is None or not plan.slots:
            return table.max_batch
        start_ns = max(now_ns, worker.free_at_ns)
        latest_ns = _latest_ns(plan.slots, lanes, given_up, above=above)
        if latest_ns < start_ns and not given_up:
            plan.forget_lost(start_ns)
            latest_ns = _latest_ns(plan.slots, lanes, 0, above=above)
        return table.max_batch if latest_ns == math.inf else table.largest_within(latest_ns - start_ns)

    def timely_room(self, now_ns: int, worker: Worker, lanes: Lanes, index: int, most: int) -> tuple[int, int]:
        """How many items a batch from the `index`-th timely part on may have by what is promised, and must have."""
        room = self.room(now_ns, worker, lanes)
        best = worker.tables[lanes.kind].best[most]
        if room >= best or index:
            return min(room, most), 0
        while best > room:
            strict = _strict_items(lanes, best)
            instead = self.room(now_ns, worker, lanes, strict) if strict else 0
            if instead >= best:
                return best, best
            best = worker.tables[lanes.kind].best[instead]
        return room, 0

    def started(self, worker: Worker, lanes: Lanes, parts: list[Part], *, first: bool) -> None:
        """Rule 2. `parts` of the timely lane; `first`: no other that may be cut was before them."""
        items = 0
        for part in parts:
            if part.query.request.strict:
                if is_fixed(part):
                    self._forget_fixed(part)
                else:
                    items += part.items
        plan = self._plans.get(worker.id)
        if items and first and plan:
            _give_up([slot for slot in plan.slots if slot.key == lanes.key], items)
        if items:
            self._give_up_last(lanes)

    def planned(self, worker: Worker, priority: int) -> tuple[LanesKey, int, list[Part]] | None:
        """The first planned batch of that class on a worker: places, and what must not be cut."""
        plan = self._plans.get(worker.id)
        for slot in plan.slots if plan else ():
            if slot.key[0] == priority:
                return slot.key, slot.places, list(slot.fixed)
        return None

    # ---- giving up ----

    def forget(self, lanes: Lanes, part: Part) -> None:
        """It has left the timely lane, and does not start."""
        if part.query.request.strict and self:
            if is_fixed(part):
                self._forget_fixed(part)
            else:
                self._give_up_last(lanes)

    def drop(self, worker: Worker, model: str | None = None) -> None:
        """What is planned on a worker (for one model, or all)."""
        plan = self._plans.get(worker.id)
        if plan and model is not None:
            plan.slots = [slot for slot in plan.slots if slot.key[1][0] != model]
            plan.recount()
        elif plan:
            del self._plans[worker.id]

    def drop_first(self, worker: Worker, key: LanesKey) -> None:
        """A planned batch that nothing is left for."""
        plan = self._plans[worker.id]
        plan.slots.remove(next(slot for slot in plan.slots if slot.key == key))
        plan.recount()

    def _give_up_last(self, lanes: Lanes) -> None:
        """Places that nobody waits for any more: of some that wait the places are lost."""
        slots = [slot for plan in self._plans.values() for slot in plan.slots if slot.key == lanes.key]
        vacant = sum(slot.places for slot in slots) - _strict_items(lanes)
        if vacant > 0:
            _give_up(sorted(slots, key=lambda slot: -slot.due_ns), vacant)

    def _forget_fixed(self, part: Part) -> None:
        for plan in self._plans.values():
            for slot in plan.slots:
                if part in slot.fixed:
                    slot.remove(part.items, part)
                    return


def is_fixed(part: Part) -> bool:
    return bool(part.company[1]) or not (part.items == 1 or part.may_be_cut)


def _strict_items(lanes: Lanes, most: int = sys.maxsize) -> int:
    """Of the first so many timely items, those that places are for."""
    strict = total = 0
    for entry in lanes.timely.entries:
        part = entry[3]
        items = min(part.items, most - total)
        total += items
        if part.query.request.strict and not is_fixed(part):
            strict += items
        if total >= most:
            break
    return strict


def _give_up(slots: list[_Slot], items: int) -> int:
    """Returns how many are left."""
    for slot in slots:
        fewer = min(items, slot.places)
        if fewer:
            slot.remove(fewer)
            items -= fewer
        if not items:
            break
    return items


def _latest_ns(slots: list[_Slot], lanes: Lanes, given_up: int, *, above: bool) -> float:
    """When a worker must be free for what is planned for this class and higher ones, less places of these lanes."""
    latest_ns, taken_ns = math.inf, 0
    for slot in slots:
        if slot.key[0] > lanes.priority - above:
            break
        items = slot.items
        if given_up and slot.key == lanes.key:
            fewer = min(given_up, slot.places)
            given_up -= fewer
            items -= fewer
        if items:
            taken_ns += slot.time_ns(items)
            latest_ns = min(latest_ns, slot.due_ns - taken_ns)
    return latest_ns
