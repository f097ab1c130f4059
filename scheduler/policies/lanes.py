"""What waits of one kind, company and class, in three lanes: timely, late, open. Pure."""

from __future__ import annotations

import bisect
import heapq
import math

from scheduler.batching import Entry, Line
from scheduler.domain import LATEST, BatchTable, Company, Kind, Part
from scheduler.policies.rates import Rates, Sizes

LanesKey = tuple[int, Kind, Company]  # the first is the priority

# The request of the company of all that run by themselves.
LONE = -1

# Rule 4: a batch that ends with a whole query may have so much less throughput than one that cuts.
WHOLE_SHARE = 0.98
# Arriving queries whose sizes are remembered, about.
SIZES_KEPT = 256
# What has come, and what has been done, lately: in so many SLOs.
LATELY = 4.0
# So many of the first are needed to tell how fast they come.
CROWD = 16
# Parts of a late lane that are looked at, about.
MARKS = 8


class Decayed:
    """A rate: what was added, an e-th of it after each `tau_ns`, divided by the time that this stands for.

    That time is `tau_ns`; once there are CROWD, less what of it would be before the first, but a LATELY-th at least.
    """

    __slots__ = ("_at_ns", "_before", "_count", "_sum", "tau_ns")

    def __init__(self) -> None:
        self.tau_ns = 1.0
        self._sum = 0.0
        self._before = 1.0
        self._count = 0
        self._at_ns = 0

    def add(self, now_ns: int, amount: float) -> None:
        kept = math.exp((self._at_ns - now_ns) / self.tau_ns)
        if self._sum:
            self._before *= kept
        self._count += 1
        self._sum = self._sum * kept + amount
        self._at_ns = now_ns

    def per_ns(self, now_ns: int) -> float:
        kept = math.exp((self._at_ns - now_ns) / self.tau_ns)
        known = max(1 - self._before * kept, 1 / LATELY) if self._count >= CROWD else 1.0
        return self._sum * kept / (known * self.tau_ns)


def key_of(part: Part) -> LanesKey:
    """What runs by itself has lanes of its own: all such parts together, or each would have the pool for itself."""
    dims, request_id, _ = company = part.company
    return part.query.request.priority, part.kind, (dims, LONE, 0) if request_id else company


class Lanes:
    """What is to be in time, by due time; what is late, by when it must end (`limit_ns`); what is open, by arrival.

    `lone`: its parts run by themselves. `slo_ns`: the geometric mean of the last queries', 0 before. `arriving`: items
    a ns. `timely_use`: of these slices' time by timely work of any model, in the items that it could have done.
    """

    __slots__ = (
        "_count",
        "_largest",
        "_log_slo",
        "_profile",
        "_profiled",
        "arriving",
        "key",
        "kind",
        "late",
        "lone",
        "open",
        "priority",
        "rates",
        "sizes",
        "slo_ns",
        "timely",
        "timely_use",
    )

    def __init__(self, key: LanesKey, rates: Rates) -> None:
        self.key = key
        self.priority, self.kind, company = key
        self.lone = company[1] == LONE
        self.timely = Line()
        self.late = Line()
        self.open = Line()
        self.rates = rates
        self.slo_ns = 0
        self.arriving = Decayed()
        self.timely_use = Decayed()
        self.sizes = Sizes(0.0, 0.0)
        self._log_slo = 0.0
        self._profile: list[tuple[int, float]] = []
        self._profiled = 0, 0
        self._count = 0
        self._largest: list[tuple[int, int, int, Part]] = []  # heap of timely ones; may hold some that are gone

    def __bool__(self) -> bool:
        return bool(self.timely.entries or self.late.entries or self.open.entries)

    @property
    def items(self) -> int:
        return self.timely.items + self.late.items + self.open.items

    def arrived(self, now_ns: int, items: int, slo_ns: int) -> None:
        """Learns the sizes of queries, and how soon they are due."""
        self._count += 1
        weight = 1 / min(self._count, SIZES_KEPT)
        if slo_ns != self.slo_ns:
            self._log_slo += weight * (math.log(slo_ns) - self._log_slo)
            self.slo_ns = slo_ns if self._count == 1 else round(math.exp(self._log_slo))
        mean, square = self.sizes
        self.sizes = Sizes(mean + weight * (items - mean), square + weight * (items * items - square))
        self.arriving.tau_ns = self.timely_use.tau_ns = LATELY * self.slo_ns

    def late_items(self, until_ns: float) -> float:
        """Of late work that must end by then."""
        return _items_until(self.late, until_ns)

    def timely_items(self, until_ns: float) -> float:
        """Of timely work that is due by then."""
        return _items_until(self.timely, until_ns)

    def late_marks(self) -> list[int]:
        """When late work must have ended: of a few parts all along the lane, the last one among them."""
        entries = self.late.entries
        step = max(len(entries) // MARKS, 1)
        return [entry[0] for entry in entries[len(entries) - 1 :: -step]]

    def late_profile(self) -> list[tuple[int, float]]:
        """The marks, and how many items must have ended by then."""
        seen = self.late.items, len(self.late.entries)
        if seen != self._profiled:
            self._profiled = seen
            self._profile = [(end_ns, self.late_items(end_ns)) for end_ns in self.late_marks()]
        return self._profile

    def push_timely(self, part: Part) -> None:
        assert part.due_ns is not None
        part.late = False
        self.timely.push(part, part.due_ns)
        if part.query.request.strict:
            return
        if len(self._largest) > 2 * len(self.timely.entries) + SIZES_KEPT:
            waiting = [entry[3] for entry in self.timely.entries if not entry[3].query.request.strict]
            self._largest = [_by_size(each) for each in waiting]
            heapq.heapify(self._largest)
        else:
            heapq.heappush(self._largest, _by_size(part))

    def push_late(self, part: Part) -> None:
        assert part.due_ns is not None
        part.late = True
        self.late.push(part, limit_ns(part))

    def put_back(self, part: Part) -> None:
        """From the timely lane to the late one."""
        assert part.due_ns is not None
        self.timely.remove(part, part.due_ns)
        self.push_late(part)

    def largest(self) -> Part | None:
        """The timely part with the most items that may be put back; strict ones may not."""
        heap = self._largest
        while heap:
            size, _, _, part = heap[0]
            if not part.queued or part.late:
                heapq.heappop(heap)
            elif part.items != -size:  # it was cut
                heapq.heapreplace(heap, _by_size(part))
            else:
                return part
        return None

    def take_strict(self, places: int, fixed: list[Part], end_ns: float) -> list[Part]:
        """Of the timely ones so many strict items that may be cut, the first that is due then or later, and `fixed`."""
        parts: list[Part] = []
        entries = self.timely.entries
        for due_ns, _, _, part in entries[bisect.bisect_left(entries, (end_ns,)) :] + entries:
            if not part.queued:
                continue
            if part in fixed:
                parts.append(self.timely.take_part(part, due_ns, part.items))
            elif places and part.query.request.strict and (part.items == 1 or part.may_be_cut):
                piece = self.timely.take_part(part, due_ns, min(places, part.items))
                places -= piece.items
                parts.append(piece)
            if not places and not any(part.queued for part in fixed):
                break
        return parts

    def discard(self, part: Part) -> None:
        if part.due_ns is None:
            self.open.remove(part, 0)
        elif part.late:
            self.late.remove(part, limit_ns(part))
        else:
            self.timely.remove(part, part.due_ns)

    def drain(self) -> list[Part]:
        self._largest.clear()
        return self.timely.drain() + self.late.drain() + self.open.drain()


def slo_of(part: Part) -> int:
    assert part.due_ns is not None
    return max(part.due_ns - part.query.arrived_ns, 1)


def limit_ns(part: Part) -> int:
    """When late work is to have ended."""
    assert part.due_ns is not None
    return part.due_ns + (LATEST - 1) * slo_of(part)


def take_efficient(line: Line, index: int, most: int, table: BatchTable, least: int = 0) -> list[Part]:
    """Of at most `most` items from the `index`-th part on those that make the most items per time of one batch.

    The batch ends with a whole query where that costs next to nothing; else its last query is cut. It has `least` items
    or more. What runs by itself does so.
    """
    if line.entries[index][3].company[1]:
        return line.take(0, index)
    batch = table.best[most]
    wanted = WHOLE_SHARE * table.best_per_ns[batch]
    whole = total = 0
    for entry in line.entries[index : index + most]:
        total += entry[3].items
        if total > most:
            break
        if total >= max(wanted * table.ns[total], least):
            whole = total
    return line.take(whole or max(batch, least), index)


def first_in_time(entries: list[Entry], start_ns: int, table: BatchTable) -> int:
    """The first part that a batch which starts then could end in time; their number if none."""
    index, guard = 0, table.guard
    least_ns = start_ns + guard * table.ns[1]
    if entries[0][0] < least_ns:
        index = bisect.bisect_left(entries, (math.ceil(least_ns),))
    while index < len(entries):
        due_ns, _, _, part = entries[index]
        if part.items == 1 or part.may_be_cut or start_ns + guard * table.time_ns(part.items) <= due_ns:
            break
        index += 1
    return index


def _items_until(line: Line, until_ns: float) -> float:
    """Of those whose key is no later: estimated, as if all parts were of one size."""
    entries = line.entries
    if not entries or entries[-1][0] <= until_ns:
        return line.items
    return line.items * bisect.bisect_right(entries, (until_ns, math.inf)) / len(entries)


def _by_size(part: Part) -> tuple[int, int, int, Part]:
    return (-part.items, -part.query.request.id, -part.first, part)  # of equal ones the newest
