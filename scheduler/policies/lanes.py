"""What waits of one kind, company and class, in three lanes: timely, late, open. Pure."""

from __future__ import annotations

import heapq
import math

from scheduler.batching import Line
from scheduler.domain import BatchTable, Company, Kind, Part
from scheduler.policies.rates import Rates

LanesKey = tuple[int, Kind, Company]  # the first is the priority

# Rule 4: a batch that ends with a whole query may have so much less throughput than one that cuts.
WHOLE_SHARE = 0.98
# Arriving queries whose sizes are remembered, about.
SIZES_KEPT = 256


class Decayed:
    """A rate: what was added, divided by `tau_ns`, an e-th of it after each `tau_ns`."""

    __slots__ = ("_at_ns", "_sum", "tau_ns")

    def __init__(self, tau_ns: float) -> None:
        self.tau_ns = tau_ns
        self._sum = 0.0
        self._at_ns = 0

    def add(self, now_ns: int, amount: float) -> None:
        self._sum = self._sum * math.exp((self._at_ns - now_ns) / self.tau_ns) + amount
        self._at_ns = now_ns

    def per_ns(self, now_ns: int) -> float:
        return self._sum * math.exp((self._at_ns - now_ns) / self.tau_ns) / self.tau_ns


class Lanes:
    """`timely` and `late`: by due time, what is to be in time and what is not; `open`: by arrival, what has none.

    `slo_ns`: of the last query that came, 0 before. `arriving`: items a ns. `timely_use`: of these
    slices' time by timely work of any model, in items a ns that could have been done in it.
    """

    __slots__ = (
        "_count",
        "_largest",
        "arriving",
        "kind",
        "late",
        "mean",
        "open",
        "priority",
        "rates",
        "slo_ns",
        "square",
        "timely",
        "timely_use",
    )

    def __init__(self, key: LanesKey, rates: Rates, tau_ns: float) -> None:
        self.priority, self.kind, _ = key
        self.timely = Line()
        self.late = Line()
        self.open = Line()
        self.rates = rates
        self.slo_ns = 0
        self.arriving = Decayed(tau_ns)
        self.timely_use = Decayed(tau_ns)
        self.mean = self.square = 0.0
        self._count = 0
        self._largest: list[tuple[int, int, int, Part]] = []  # heap of timely ones; may hold some that are gone

    def __bool__(self) -> bool:
        return bool(self.timely.entries or self.late.entries or self.open.entries)

    @property
    def items(self) -> int:
        return self.timely.items + self.late.items + self.open.items

    def arrived(self, now_ns: int, items: int) -> None:
        """Learns the sizes of queries, and how many come."""
        self._count += 1
        weight = 1 / min(self._count, SIZES_KEPT)
        self.mean += weight * (items - self.mean)
        self.square += weight * (items * items - self.square)
        self.arriving.add(now_ns, items)

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
        self.late.push(part, part.due_ns)

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

    def discard(self, part: Part) -> None:
        if part.due_ns is None:
            self.open.remove(part, 0)
        else:
            (self.late if part.late else self.timely).remove(part, part.due_ns)

    def drain(self) -> list[Part]:
        self._largest.clear()
        return self.timely.drain() + self.late.drain() + self.open.drain()


def take_efficient(line: Line, index: int, most: int, table: BatchTable) -> list[Part]:
    """Of at most `most` items from the `index`-th part on those that make the most items per time of one batch.

    The batch ends with a whole query where that costs next to nothing; else its last query is cut.
    """
    batch = table.best[most]
    wanted = WHOLE_SHARE * table.best_per_ns[batch]
    whole = total = 0
    for entry in line.entries[index : index + most]:
        total += entry[3].items
        if total > most:
            break
        if total >= wanted * table.ns[total]:
            whole = total
    return line.take(whole or batch, index)


def _by_size(part: Part) -> tuple[int, int, int, Part]:
    return (-part.items, -part.query.request.id, -part.first, part)  # of equal ones the newest
