"""When a batch closes: queues of queries that may run together, and what one batch takes of them. Pure."""

from __future__ import annotations

import bisect
import heapq

from scheduler.domain import BatchTable, Query


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


class Line:
    """Waiting queries of one model, sorted by priority, then a key of the policy's, then arrival.

    `entries` may be read: (priority, key, request id, query). `items` counts them.
    """

    __slots__ = ("_keys", "entries", "items")

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, int, Query]] = []
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

    def first(self, count: int) -> list[tuple[int, int, int, Query]]:
        return self.entries[:count]

    def remove(self, query: Query) -> None:
        request = query.request
        query.queued = False
        self.items -= request.items
        place = (request.priority, self._keys.pop(request.id), request.id)
        del self.entries[bisect.bisect_left(self.entries, place)]

    def take(self, batch: list[Query]) -> list[Query]:
        """Removes these and returns them."""
        for query in batch:
            self.remove(query)
        return batch

    def drain(self) -> list[Query]:
        return self.take([entry[3] for entry in self.entries])
