"""What the lanes of one pool take: timely work that its slices can do, late work that ends within its bound. Pure.

Work of others counts where it is of the same class or a higher one and has slices in common.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from scheduler.domain import Part, Pool
from scheduler.policies.lanes import Lanes, LanesKey, limit_ns, slo_of
from scheduler.policies.promises import Promises
from scheduler.policies.rates import RateBook
from scheduler.policies.shares import Shares

# So many SLOs before it is to have ended, late work goes first.
PRESSES = 2.5
# What of the slices' time may be promised to all lines together.
ALL_THETA = 0.5
# Of all slices' best, what late work gets at least.
LEAST_LATE = 0.005


class Admission:
    """`lanes`: all that are known; `waiting`: those where something waits."""

    def __init__(
        self,
        pool: Pool,
        rates: RateBook,
        lanes: Mapping[LanesKey, Lanes],
        waiting: Iterable[Lanes],
        promises: Promises,
    ) -> None:
        self._pool = pool
        self._shares = Shares(pool, rates, lanes)
        self._waiting = waiting
        self._promises = promises

    def admit(self, now_ns: int, lanes: Lanes, part: Part, due_ns: int, bound_ns: int | None) -> int:
        """Into the timely or the late lane, and returns 0; or into none: in how many ns a new try has a chance."""
        lanes.push_timely(part)
        excess_ns = self._excess_ns(now_ns, lanes, part, due_ns)
        if excess_ns <= 0 and part.query.request.strict and not self._promises.book(now_ns, lanes, part):
            excess_ns = lanes.timely.items / lanes.rates.pool_per_ns
        if excess_ns <= 0:
            return 0
        if bound_ns is not None:
            late_excess_ns = math.inf if bound_ns == 0 else self._late_excess_ns(now_ns, lanes, part)
            if late_excess_ns > 0:
                lanes.discard(part)
                return max(int(min(excess_ns, late_excess_ns)), 1)
        self._put_back(now_ns, lanes, part, excess_ns, bounded=bound_ns is not None)
        return 0

    def _put_back(self, now_ns: int, lanes: Lanes, part: Part, excess_ns: float, *, bounded: bool) -> None:
        """The largest that the late lane takes, until enough is gone, or the new one itself is."""
        excess = excess_ns * lanes.rates.pool_per_ns
        while excess > 0 and not part.late:
            victim = lanes.largest() if now_ns + lanes.rates.least_of(part) <= (part.due_ns or 0) else part
            if victim is None or (bounded and self._late_excess_ns(now_ns, lanes, victim) > 0):
                victim = part
            lanes.put_back(victim)
            excess -= victim.items

    def _excess_ns(self, now_ns: int, lanes: Lanes, part: Part, due_ns: int) -> float:
        """Rules 1 and 2: how much too late a part of the timely lane is, or by how much that is too long with it."""
        rates = lanes.rates
        short_ns = now_ns + rates.least_of(part) - due_ns
        if short_ns > 0:
            return short_ns
        beside = self._beside(lanes)
        taken = self._taken_until(beside, lanes, due_ns)
        forced = self._forced_until(beside, lanes, due_ns)
        if self._fits(now_ns, lanes, due_ns - int((taken + forced) / rates.pool_per_ns)):
            return 0
        items = lanes.timely.items
        room, left = rates.room(now_ns, due_ns, lanes.sizes)
        share = self._shares.of(now_ns, lanes.key)
        excess = items - room * (1 - share.pressed * (1 - share.part))
        if taken and items > ALL_THETA * left * share.part:
            excess = max(excess, items + taken - ALL_THETA * left)
        if excess <= 0 < excess + forced:
            # Late work takes its place. It is not to go on like that.
            for each in beside:
                if each.priority == lanes.priority:
                    each.timely_use.add(now_ns, part.items / rates.pool_per_ns * each.rates.pool_per_ns)
        return (excess + forced) / rates.pool_per_ns

    def _fits(self, now_ns: int, lanes: Lanes, due_ns: int) -> bool:
        """Whether the next batches could do all that is timely: of free slices, or of any if only one query waits."""
        kind, items = lanes.kind, lanes.timely.items
        room = 0
        for worker in self._pool.ready.values():
            table = worker.tables.get(kind)
            if table is not None:
                room += table.largest_within((due_ns - max(now_ns, worker.free_at_ns)) / table.guard)
                if room >= items:
                    return True
        if len(lanes.timely.entries) == 1:
            for worker in lanes.rates.workers:
                table = worker.tables[kind]
                if table.largest_within((due_ns - max(now_ns, worker.free_at_ns)) / table.guard) >= items:
                    return True
        return False

    def _beside(self, lanes: Lanes) -> list[Lanes]:
        ids, priority = lanes.rates.ids, lanes.priority
        return [
            each
            for each in self._waiting
            if each is lanes or (each.priority <= priority and not ids.isdisjoint(each.rates.ids))
        ]

    def _taken_until(self, beside: list[Lanes], lanes: Lanes, due_ns: int) -> float:
        """What others have been promised by then, less what they do elsewhere: in items of these lanes."""
        taken_ns = 0.0
        for each in beside:
            if each.timely.entries and each is not lanes:
                needed_ns = each.timely_items(due_ns) / each.rates.pool_per_ns
                taken_ns += needed_ns * (1 - each.rates.elsewhere(lanes.rates))
        return taken_ns * lanes.rates.pool_per_ns

    def _forced_until(self, beside: list[Lanes], lanes: Lanes, due_ns: int) -> float:
        """Late work that will have gone first by then, in items of these lanes."""
        late = [each for each in beside if each.late.entries]
        if not late:
            return 0.0
        if len(late) == 1:  # the usual case, made to be quick: at the marks only
            return _forced_of(late[0], due_ns) * lanes.rates.pool_per_ns
        work_ns = _late_ns(late, due_ns, presses=True)
        for each in late:
            for end_ns in each.late_marks():
                begin_ns = end_ns - int(PRESSES * each.slo_ns)
                work_ns = max(work_ns, _late_ns(late, end_ns) - max(begin_ns - due_ns, 0))
        return work_ns * lanes.rates.pool_per_ns

    def _late_excess_ns(self, now_ns: int, lanes: Lanes, part: Part) -> float:
        """Rule 7: by how much the late lanes are too long, with that part, for it or for those that may end later.

        At the rate that timely work has left lately.
        """
        left = [(each, self._left_per_ns(now_ns, each)) for each in self._beside(lanes) if each.late.entries]
        part_end_ns = limit_ns(part)
        ends = [(part_end_ns, PRESSES * slo_of(part))]
        ends += [
            (end_ns, PRESSES * each.slo_ns) for each, _ in left if (end_ns := each.late.entries[-1][0]) > part_end_ns
        ]
        work_ns = part.items / self._left_per_ns(now_ns, lanes)
        return max(
            work_ns + sum(_batches_ns(each, end_ns, per_ns) for each, per_ns in left) + margin_ns - (end_ns - now_ns)
            for end_ns, margin_ns in ends
        )

    def _left_per_ns(self, now_ns: int, lanes: Lanes) -> float:
        """Items of these lanes that there is time for beside timely work."""
        pool_per_ns = lanes.rates.pool_per_ns
        left = (pool_per_ns - lanes.timely_use.per_ns(now_ns)) * (1 - self._shares.of(now_ns, lanes.key).full)
        return max(left, LEAST_LATE * pool_per_ns)


def pressing(now_ns: int, group: list[Lanes]) -> list[Lanes]:
    """Those with late work, the oldest first, where all slices together have little time left for some of it."""
    late = [lanes for lanes in group if lanes.late.entries]
    if not late:
        return []
    first_ns = min(lanes.late.entries[0][0] for lanes in late)
    longest_ns = max(lanes.slo_ns for lanes in late)
    if first_ns - now_ns - sum(lanes.late.items / lanes.rates.pool_per_ns for lanes in late) > PRESSES * longest_ns:
        return []
    late.sort(key=lambda lanes: lanes.late.entries[0][:3])
    for lanes in late:
        for end_ns in lanes.late_marks():
            if min(lanes.late.entries[0][0], end_ns - _late_ns(late, end_ns)) - now_ns <= PRESSES * lanes.slo_ns:
                return late
    return []


def _forced_of(lanes: Lanes, due_ns: int) -> float:
    """How long late work of these lanes will have gone first by then, if there is no other."""
    before_ns = int(PRESSES * lanes.slo_ns)
    per_ns = lanes.rates.pool_per_ns
    extra_ns = lanes.rates.least_ns / len(lanes.rates.workers)
    most_ns = 0.0
    for end_ns, items in lanes.late_profile():
        work_ns = items / per_ns + extra_ns
        later_ns = end_ns - before_ns - due_ns
        if later_ns > 0:
            work_ns -= later_ns
        if work_ns > most_ns:
            most_ns = work_ns
    return most_ns


def _late_ns(late: list[Lanes], until_ns: int, *, presses: bool = False) -> float:
    """How long all slices take for what of it must end by then, or, with `presses`, goes first by then."""
    return sum(
        _batches_ns(lanes, until_ns + int(presses * PRESSES * lanes.slo_ns), lanes.rates.pool_per_ns) for lanes in late
    )


def _batches_ns(lanes: Lanes, until_ns: int, per_ns: float) -> float:
    """Of late work that must end by then: full batches at that rate, and one that is not."""
    items = lanes.late_items(until_ns)
    return items / per_ns + lanes.rates.least_ns / len(lanes.rates.workers) if items else 0.0
