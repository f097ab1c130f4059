"""When a batch closes: queues of queries that may run together, and what one batch takes of them. Pure."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator
from itertools import islice

from scheduler.domain import BatchTable, Query

# How many waiting queries are looked at to make one batch.
LOOK_AHEAD = 512


class BucketQueue:
    """Waiting queries of one bucket, by priority, then arrival. `items` counts what truly waits.

    `backlog_ns` is for the policy: its estimate of the time that all of them take.
    """

    __slots__ = ("_heap", "backlog_ns", "items")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Query]] = []
        self.items = 0
        self.backlog_ns = 0

    def push(self, query: Query) -> None:
        query.queued = True
        self.items += query.request.items
        heapq.heappush(self._heap, (query.request.priority, query.request.id, query))

    def discard(self, query: Query) -> None:
        """Takes a query out from anywhere; its place in the heap is swept when it comes up."""
        query.queued = False
        self.items -= query.request.items

    def head(self) -> tuple[int, int] | None:
        """(priority, request id) of the first one, None if nothing waits."""
        self._sweep()
        return self._heap[0][:2] if self._heap else None

    def take(self, start_ns: int, table: BatchTable) -> list[Query]:
        """Queries for one batch that starts then: up to the knee of the table.

        The first one always goes, whatever its size. More join it while the batch stays within the knee and
        the estimate still meets the earliest due time among those that could be met so far.
        """
        batch: list[Query] = []
        items = 0
        due_ns: int | None = None
        while self._heap:
            query = self._heap[0][2]
            if query.queued:
                total = items + query.request.items
                end_ns = start_ns + table.time_ns(total)
                if batch and (total > table.knee or (due_ns is not None and end_ns > due_ns)):
                    break
                self.discard(query)
                batch.append(query)
                items = total
                own_due_ns = query.request.due_ns
                if own_due_ns is not None and own_due_ns >= end_ns:
                    due_ns = own_due_ns if due_ns is None else min(due_ns, own_due_ns)
            heapq.heappop(self._heap)
        return batch

    def drain(self) -> list[Query]:
        """Everything that waits, in order."""
        waiting = [query for _, _, query in sorted(self._heap, key=lambda e: e[:2]) if query.queued]
        for query in waiting:
            self.discard(query)
        self._heap.clear()
        return waiting

    def _sweep(self) -> None:
        while self._heap and not self._heap[0][2].queued:
            heapq.heappop(self._heap)


Entry = tuple[int, int, int, Query]  # priority, key, request id, query


class Line:
    """Waiting queries of one model, of any bucket, sorted by priority, then a key, then arrival.

    The key is the due time where `take_efficient` or `due_before` is asked for. `entries` is for reading;
    `items` counts what they carry.
    """

    __slots__ = ("_keys", "entries", "items")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.items = 0
        self._keys: dict[int, int] = {}  # by request id

    def __contains__(self, query: Query) -> bool:
        return query.request.id in self._keys

    def push(self, query: Query, key: int) -> None:
        request = query.request
        query.queued = True
        self.items += request.items
        self._keys[request.id] = key
        bisect.insort(self.entries, (request.priority, key, request.id, query))

    def remove(self, query: Query) -> None:
        request = query.request
        query.queued = False
        self.items -= request.items
        place = (request.priority, self._keys.pop(request.id), request.id)
        del self.entries[bisect.bisect_left(self.entries, place)]

    def drain(self) -> list[Query]:
        """Everything that waits, in order."""
        return self._take([entry[3] for entry in self.entries])

    def looked_at(self, start: int = 0) -> Iterator[Entry]:
        """The first so many from `start` on: a decision stays short however many wait."""
        return islice(self.entries, start, start + LOOK_AHEAD)

    def due_before(self, index: int, due_ns: int) -> list[Query]:
        """The queries from `index` on, of its priority, that are due before that; none if all of them are."""
        priority = self.entries[index][0]
        until = bisect.bisect_left(self.entries, (priority, due_ns), index)
        if until == len(self.entries) or self.entries[until][0] != priority:
            return []
        return [entry[3] for entry in self.entries[index:until]]

    def take_efficient(self, index: int, start_ns: int, table: BatchTable, most_ns: float, guard: float) -> list[Query]:
        """The query at `index`, with those of its bucket that make the most items per time of one batch.

        The batch, `guard` times longer than its table says, meets every due time and takes at most `most_ns`.
        The first one goes in any case.
        """
        _, due_ns, _, seed = self.entries[index]
        limit_ns = min(due_ns - start_ns, most_ns)
        batch = [seed]
        items = seed.request.items
        best_count, best_per_ns = 1, items / max(table.time_ns(items), 1)
        for _, other_due_ns, _, query in self.looked_at(index + 1):
            total = items + query.request.items
            if total > table.peak or query.bucket != seed.bucket:
                continue
            own_limit_ns = min(limit_ns, other_due_ns - start_ns)
            if table.ns[total] * guard > own_limit_ns:
                continue
            batch.append(query)
            items, limit_ns = total, own_limit_ns
            per_ns = total / max(table.ns[total], 1)
            if per_ns >= best_per_ns:
                best_count, best_per_ns = len(batch), per_ns
            if total == table.peak:
                break
        return self._take(batch[:best_count])

    def take_many(self, table: BatchTable) -> list[Query]:
        """The first query with what follows in its bucket: up to the knee, or the peak where twice as much waits."""
        most = table.peak if self.items > 2 * table.knee else table.knee
        seed = self.entries[0][3]
        batch = [seed]
        items = seed.request.items
        for *_, query in self.looked_at(1):
            if items >= most:
                break
            if query.bucket == seed.bucket and items + query.request.items <= most:
                batch.append(query)
                items += query.request.items
        return self._take(batch)

    def _take(self, batch: list[Query]) -> list[Query]:
        for query in batch:
            self.remove(query)
        return batch
