"""That strict queries end in time: for all of them that wait there is a plan, on whose slice and in which order. Pure.

A plan is a witness, no decision. What starts, and where, is decided late, and only has to leave a plan for the rest:
1. A strict query is accepted if its items find places: in planned batches of its own kind, or in new ones, in order of
   class and due time, so that every planned batch ends before the earliest due time of its items.
2. Places are for any items of a kind and company that may be cut, the earliest due first. When such items start
   elsewhere, as many places are given up: on the slice that they start on, if they are the first in the line; else
   the ones that are due last. What must not be cut has places of its own.
3. A slice may start what leaves its plan in time. Where nothing else starts on a free slice, its first planned batch
   does.
4. Nothing is planned for a class but after the higher ones, and these do not look after it.

With exact times, one class, and slices that neither fail nor drain, no promise is broken. Times are with their guard.
Ours. (marginal.py decides by such plans, and binds early.)
"""

from __future__ import annotations

import math

from scheduler.domain import BatchTable, Part, Worker
from scheduler.policies.lanes import Lanes, LanesKey, key_of


class _Slot:
    """A planned batch: `places` for items that may be cut, and `fixed` parts that must not."""

    __slots__ = ("due_ns", "fixed", "key", "places", "worker")

    def __init__(self, worker: Worker, key: LanesKey, due_ns: int) -> None:
        self.worker = worker
        self.key = key
        self.due_ns = due_ns
        self.places = 0
        self.fixed: dict[Part, None] = {}

    @property
    def items(self) -> int:
        return self.places + sum(part.items for part in self.fixed)

    @property
    def table(self) -> BatchTable:
        return self.worker.tables[self.key[1]]

    def add(self, part: Part, items: int) -> None:
        assert part.due_ns is not None
        self.due_ns = min(self.due_ns, part.due_ns)
        if is_fixed(part):
            self.fixed[part] = None
        else:
            self.places += items


class Promises:
    """The plans of all workers, in order of class and due time."""

    def __init__(self) -> None:
        self._plans: dict[int, list[_Slot]] = {}

    def __bool__(self) -> bool:
        return bool(self._plans)

    # ---- promising ----

    def book(self, now_ns: int, lanes: Lanes, part: Part) -> bool:
        """Rule 1. False: there is no place for all of it, and nothing has changed."""
        found: list[tuple[_Slot, int, int]] = []
        left = part.items
        for joins in (True, False):
            for worker in lanes.rates.workers:
                slots = self._plans.get(worker.id, [])
                if joins:
                    own = [slot for slot in slots if slot.key == key_of(part)]
                else:
                    own = [_Slot(worker, key_of(part), part.due_ns or 0)]
                for slot in own if not (joins and lanes.lone) else []:
                    items = min(_room(now_ns, slots, slot, part), left)
                    if not items or (is_fixed(part) and items < part.items):
                        continue
                    found.append((slot, items, slot.due_ns))
                    self._add(slot, part, items)
                    left -= items
                    if not left:
                        return True
        for slot, items, due_ns in found:
            self._take_back(slot, part, items, due_ns)
        return False

    def _add(self, slot: _Slot, part: Part, items: int) -> None:
        slots = self._plans.setdefault(slot.worker.id, [])
        if slot not in slots:
            slots.insert(_position(slots, slot), slot)
        slot.add(part, items)

    def _take_back(self, slot: _Slot, part: Part, items: int, due_ns: int) -> None:
        if is_fixed(part):
            del slot.fixed[part]
        else:
            slot.places -= items
        slot.due_ns = due_ns
        self._sweep(slot)

    # ---- starting ----

    def room(self, now_ns: int, worker: Worker, lanes: Lanes, *, spare_own: bool = False) -> int:
        """Rule 3: the most items of a batch there; with `spare_own`, if its items had all the lanes' places there."""
        slots = self._plans.get(worker.id)
        table = worker.tables[lanes.kind]
        if not slots:
            return table.max_batch
        start_ns = max(now_ns, worker.free_at_ns)
        latest_ns = _latest_ns(slots, lanes, spare_own)
        return table.max_batch if latest_ns == math.inf else table.largest_within((latest_ns - start_ns) / table.guard)

    def own_places(self, worker: Worker, lanes: Lanes) -> int:
        return sum(slot.places for slot in self._plans.get(worker.id, ()) if slot.key == lanes.key)

    def started(self, worker: Worker, lanes: Lanes, parts: list[Part], *, first: bool) -> None:
        """Rule 2. `parts` of the timely lane; `first`: no other that may be cut was before them."""
        items = 0
        for part in parts:
            if part.query.request.strict:
                if is_fixed(part):
                    self._forget_fixed(part)
                else:
                    items += part.items
        if items and first:
            items = self._give_up([s for s in self._plans.get(worker.id, ()) if s.key == lanes.key], items)
        if items:
            self._give_up_last(lanes.key, items)

    def planned(self, worker: Worker, priority: int) -> tuple[LanesKey, int, list[Part]] | None:
        """The first planned batch of that class on a worker: places, and what must not be cut."""
        for slot in self._plans.get(worker.id, ()):
            if slot.key[0] == priority:
                return slot.key, slot.places, list(slot.fixed)
        return None

    # ---- giving up ----

    def forget(self, part: Part) -> None:
        """It leaves the timely lane, and does not start."""
        if self._plans and part.query.request.strict:
            if is_fixed(part):
                self._forget_fixed(part)
            else:
                self._give_up_last(key_of(part), part.items)

    def drop(self, worker: Worker, model: str | None = None) -> None:
        """What is planned on a worker (for one model, or all)."""
        for slot in list(self._plans.get(worker.id, ())):
            if model is None or slot.key[1][0] == model:
                self._remove(slot)

    def drop_first(self, worker: Worker, key: LanesKey) -> None:
        """A planned batch that nothing is left for."""
        self._remove(next(slot for slot in self._plans[worker.id] if slot.key == key))

    def _give_up_last(self, key: LanesKey, items: int) -> None:
        slots = [slot for slots in self._plans.values() for slot in slots if slot.key == key and slot.places]
        self._give_up(sorted(slots, key=lambda slot: -slot.due_ns), items)

    def _give_up(self, slots: list[_Slot], items: int) -> int:
        """Returns how many are left."""
        for slot in slots:
            fewer = min(items, slot.places)
            slot.places -= fewer
            items -= fewer
            self._sweep(slot)
        return items

    def _forget_fixed(self, part: Part) -> None:
        for slots in list(self._plans.values()):
            for slot in slots:
                if part in slot.fixed:
                    del slot.fixed[part]
                    self._sweep(slot)
                    return

    def _sweep(self, slot: _Slot) -> None:
        if not slot.places and not slot.fixed:
            self._remove(slot)

    def _remove(self, slot: _Slot) -> None:
        slots = self._plans[slot.worker.id]
        slots.remove(slot)
        if not slots:
            del self._plans[slot.worker.id]


def is_fixed(part: Part) -> bool:
    return bool(part.company[1]) or not (part.items == 1 or part.may_be_cut)


def _time_ns(slot: _Slot) -> float:
    return slot.table.guard * slot.table.time_ns(slot.items)


def _position(slots: list[_Slot], new: _Slot) -> int:
    order = (new.key[0], new.due_ns)
    return next((index for index, slot in enumerate(slots) if (slot.key[0], slot.due_ns) > order), len(slots))


def _latest_ns(slots: list[_Slot], lanes: Lanes, spare_own: bool) -> float:
    """When a worker must be free at the latest for what is planned for this class and higher ones."""
    latest_ns, taken_ns = math.inf, 0.0
    for slot in slots:
        if slot.key[0] > lanes.priority:
            break
        if spare_own and slot.key == lanes.key:
            items = slot.items - slot.places
            taken_ns += slot.table.guard * slot.table.time_ns(items)
        else:
            taken_ns += _time_ns(slot)
        latest_ns = min(latest_ns, slot.due_ns - taken_ns)
    return latest_ns


def _room(now_ns: int, slots: list[_Slot], slot: _Slot, part: Part) -> int:
    """How many items of the part the slot, one of `slots` or a new one, still holds."""
    assert part.due_ns is not None
    there = slot.items
    place = slots.index(slot) if there else _position(slots, slot)
    end_ns = float(max(now_ns, slot.worker.free_at_ns))
    for each in slots[:place]:
        end_ns += _time_ns(each)
    start_ns = end_ns
    end_ns += _time_ns(slot) if there else 0
    more_ns = min(part.due_ns, slot.due_ns) - end_ns
    for each in slots[place + 1 if there else place :]:
        if each.key[0] > slot.key[0]:
            break
        end_ns += _time_ns(each)
        more_ns = min(more_ns, each.due_ns - end_ns)
    own_ns = (_time_ns(slot) if there else 0) + more_ns
    if own_ns <= 0 or start_ns > part.due_ns:
        return 0
    return max(slot.table.largest_within(own_ns / slot.table.guard) - there, 0)
