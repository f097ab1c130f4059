"""When a batch closes: queues of parts that may run together, and what one batch takes of them. Pure."""

from __future__ import annotations

import bisect
import heapq
from itertools import islice

from scheduler.domain import BatchTable, Part


class BucketQueue:
    """Waiting parts of one kind and company, by priority, then arrival. `items` counts what truly waits.

    `backlog_ns` is for the policy: its estimate of the time that all of them take.
    """

    __slots__ = ("_heap", "backlog_ns", "items")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, Part]] = []
        self.items = 0
        self.backlog_ns = 0

    def push(self, part: Part) -> None:
        part.queued = True
        self.items += part.items
        request = part.query.request
        heapq.heappush(self._heap, (request.priority, request.id, part.first, part))

    def discard(self, part: Part) -> None:
        """Takes a part out from anywhere; its place in the heap is swept when it comes up."""
        part.queued = False
        self.items -= part.items

    def head(self) -> tuple[int, int] | None:
        """(priority, request id) of the first one, None if nothing waits."""
        self._sweep()
        return self._heap[0][:2] if self._heap else None

    def take(self, start_ns: int, table: BatchTable) -> list[Part]:
        """Parts for one batch that starts then: up to the knee of the table.

        The first one always goes, whatever its size. More join it while the batch stays within the knee and
        the estimate still meets the earliest due time among those that could be met so far.
        """
        batch: list[Part] = []
        items = 0
        due_ns: int | None = None
        while self._heap:
            part = self._heap[0][3]
            if part.queued:
                total = items + part.items
                end_ns = start_ns + table.time_ns(total)
                if batch and (total > table.knee or (due_ns is not None and end_ns > due_ns)):
                    break
                self.discard(part)
                batch.append(part)
                items = total
                if part.due_ns is not None and part.due_ns >= end_ns:
                    due_ns = part.due_ns if due_ns is None else min(due_ns, part.due_ns)
            heapq.heappop(self._heap)
        return batch

    def drain(self) -> list[Part]:
        """Everything that waits, in order."""
        waiting = [entry[3] for entry in sorted(self._heap, key=lambda e: e[:3]) if entry[3].queued]
        for part in waiting:
            self.discard(part)
        self._heap.clear()
        return waiting

    def _sweep(self) -> None:
        while self._heap and not self._heap[0][3].queued:
            heapq.heappop(self._heap)


Entry = tuple[int, int, int, Part]  # key, request id, first item, part

# How many waiting parts are looked at to make one batch.
LOOK_AHEAD = 512


class Line:
    """Waiting parts that may share batches, sorted by a key (the due time, or 0), then arrival.

    `entries` is for reading; `items` counts what they carry.
    """

    __slots__ = ("entries", "items")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.items = 0

    def push(self, part: Part, key: int) -> None:
        part.queued = True
        self.items += part.items
        request_id = part.query.request.id
        bisect.insort(self.entries, (key, request_id, part.first, part))

    def remove(self, part: Part, key: int) -> None:
        part.queued = False
        self.items -= part.items
        index = bisect.bisect_left(self.entries, (key, part.query.request.id))
        while self.entries[index][3] is not part:  # other parts of the same request
            index += 1
        del self.entries[index]

    def drain(self) -> list[Part]:
        """Everything that waits, in order."""
        parts = [entry[3] for entry in self.entries]
        for part in parts:
            part.queued = False
        self.entries.clear()
        self.items = 0
        return parts

    def take(self, items: int, index: int = 0) -> list[Part]:
        """Up to so many items from the `index`-th part on, in order; the last one is cut where it may be.

        The first goes whole if it may not be cut, whatever its size.
        """
        parts: list[Part] = []
        room = items
        keep: list[Entry] = []
        entries = self.entries
        end = index
        for entry in islice(entries, index, index + LOOK_AHEAD):
            part = entry[3]
            if part.items <= room or not (parts or part.may_be_cut):
                parts.append(part)
                room -= part.items
            elif part.may_be_cut:
                parts.append(part.cut(room))
                room = 0
                break
            else:
                keep.append(entry)
            end += 1
            if room <= 0:
                break
        entries[index:end] = keep
        for part in parts:
            part.queued = False
            self.items -= part.items
        return parts

    def take_part(self, part: Part, key: int, items: int) -> Part:
        """One part from anywhere, or the first `items` of it."""
        if items < part.items:
            self.items -= items
            return part.cut(items)
        self.remove(part, key)
        return part

    def take_whole(self, items: int) -> list[Part]:
        """The first part, and those after it, in order, while all of them have no more items than that."""
        count = total = 0
        for entry in self.entries:
            total += entry[3].items
            if count and total > items:
                break
            count += 1
        parts = [entry[3] for entry in self.entries[:count]]
        del self.entries[:count]
        for part in parts:
            part.queued = False
            self.items -= part.items
        return parts
