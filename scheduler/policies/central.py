"""Central queues: what the policies have in common that bind when a slice is free, and never cut. Pure.

1. One queue for each (kind, company), by class, then arrival. Queues are asked in the order of their heads.
2. A policy says when the head of a queue may leave, with whom, and to which slice: `_start`.
3. What the policy can tell of the future is rough: a query waits for the first slice that is free, and for its
   share of the work of equal or higher classes of all kinds that its slices serve, as if all of these slices
   worked on it in batches of the policy's usual size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import Counter

from scheduler.domain import BatchTable, Company, Kind, Part, Pool, Worker
from scheduler.policies import Start

Key = tuple[Kind, Company]


class Queue:
    """Waiting parts by class, then arrival. `work_ns`: of each class, by the policy's reckoning."""

    __slots__ = ("_entries", "items", "work_ns")

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, int, Part, int]] = []
        self.items = 0
        self.work_ns: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, part: Part, work_ns: int) -> None:
        request = part.query.request
        part.queued = True
        self.items += part.items
        self.work_ns[request.priority] += work_ns
        insort(self._entries, (request.priority, request.id, part.first, part, work_ns))

    def discard(self, part: Part) -> None:
        request = part.query.request
        index = bisect_left(self._entries, (request.priority, request.id, part.first))
        self._remove(index, index + 1)

    def head(self) -> tuple[int, ...]:
        """(priority, request id, first item) of the first one; there must be one."""
        return self._entries[0][:3]

    def oldest_ns(self) -> int:
        """When the first came of all that wait, of whatever class; there must be one."""
        entries = self._entries
        oldest_ns = entries[0][3].query.arrived_ns
        index = bisect_left(entries, (entries[0][0] + 1,))
        while index < len(entries):
            oldest_ns = min(oldest_ns, entries[index][3].query.arrived_ns)
            index = bisect_left(entries, (entries[index][0] + 1,), index)
        return oldest_ns

    def take(self, items: int, first: bool = True) -> list[Part]:
        """From the head on, what keeps within so many items. `first`: that one goes whatever its size."""
        entries = self._entries
        end = 1 if first else 0
        room = items - sum(entry[3].items for entry in entries[:end])
        while end < len(entries) and entries[end][3].items <= room:
            room -= entries[end][3].items
            end += 1
        return self._remove(0, end)

    def drain(self) -> list[Part]:
        """Everything that waits, in order."""
        return self._remove(0, len(self._entries))

    def _remove(self, begin: int, end: int) -> list[Part]:
        parts = []
        for priority, _, _, part, work_ns in self._entries[begin:end]:
            part.queued = False
            self.items -= part.items
            self.work_ns[priority] -= work_ns
            parts.append(part)
        del self._entries[begin:end]
        return parts


class Central(ABC):
    """The queues and the reckoning; a policy adds `_start`, `_usual_items`, and, where it waits, `_hold_ns`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._queues: dict[Key, Queue] = {}
        # Of the pool as it was at that count of changes and corrections.
        self._known_at = -1
        self._work_of: dict[tuple[Kind, int], int] = {}
        self._sharing: dict[Kind, set[Kind]] = {}

    # ---- what a policy adds ----

    @abstractmethod
    def _start(self, now_ns: int, key: Key, queue: Queue) -> Start | None:
        """Takes a batch out of this queue, if one may leave now and a ready worker can have it."""

    @abstractmethod
    def _usual_items(self, kind: Kind, table: BatchTable) -> int:
        """Of a batch under load."""

    def _hold_ns(self, key: Key) -> int:
        """How long the oldest of a queue may wait for company while a slice is ready."""
        return 0

    # ---- the signature ----

    def offer(self, now_ns: int, part: Part, bound_ns: int | None) -> int:
        if self._known_at != self._pool.changes + self._pool.corrections:
            self._forget()
        if bound_ns is not None:
            late_ns = self._late_ns(now_ns, part)
            if late_ns > bound_ns:
                return late_ns - bound_ns
        key = (part.kind, part.company)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = Queue()
        queue.push(part, self._work_ns(part.kind, part.items))
        return 0

    def next(self, now_ns: int) -> Start | None:
        queues = self._queues
        for key in sorted(queues, key=lambda k: queues[k].head()) if len(queues) > 1 else list(queues):
            start = self._start(now_ns, key, queues[key])
            if start is not None:
                return start
        return None

    def wake_ns(self, now_ns: int) -> int | None:
        if not self._pool.ready:
            return None  # the end of a batch will be event enough
        ends_ns = [queue.oldest_ns() + self._hold_ns(key) for key, queue in self._queues.items()]
        return min((end_ns for end_ns in ends_ns if end_ns > now_ns), default=None)

    def discard(self, part: Part) -> None:
        key = (part.kind, part.company)
        self._queues[key].discard(part)
        self._sweep(key)

    def evict(self, worker: Worker, model: str | None = None) -> list[Part]:
        parts: list[Part] = []
        for key, queue in list(self._queues.items()):
            kind = key[0]
            if (model is None or kind[0] == model) and self._pool.serving[kind] == [worker]:
                parts += queue.drain()
                self._sweep(key)
        return parts

    def backlog_ns(self, now_ns: int, model: str) -> int:
        if self._known_at != self._pool.changes + self._pool.corrections:
            self._forget()
        waits = [
            max(min(worker.free_at_ns for worker in workers) - now_ns, 0) + self._ahead_ns(kind)
            for kind, workers in self._pool.serving.items()
            if kind[0] == model
        ]
        return min(waits, default=0)

    # ---- reckoning ----

    def _late_ns(self, now_ns: int, part: Part) -> int:
        if part.due_ns is None:
            return 0
        kind, items = part.kind, part.items
        start_ns = max(now_ns, part.query.arrived_ns + self._hold_ns((kind, part.company)))
        end_ns = min(
            max(worker.free_at_ns, start_ns) + worker.tables[kind].time_ns(items) for worker in self._pool.serving[kind]
        )
        return max(end_ns + self._ahead_ns(kind, part.query.request.priority) - part.due_ns, 0)

    def _ahead_ns(self, kind: Kind, priority: float = float("inf")) -> int:
        """Work of this class and those above it that the slices of this kind will do."""
        sharing = self._sharing.get(kind)
        if sharing is None:
            sharing = self._sharing[kind] = {other for w in self._pool.serving[kind] for other in w.tables}
        return sum(
            work_ns
            for (other, _), queue in self._queues.items()
            if other in sharing
            for each, work_ns in queue.work_ns.items()
            if each <= priority
        )

    def _work_ns(self, kind: Kind, items: int) -> int:
        """How long so many items keep all slices of their kind busy, in batches of the usual size or of their own."""
        work_ns = self._work_of.get((kind, items))
        if work_ns is None:
            per_ns = 0.0
            for worker in self._pool.serving[kind]:
                table = worker.tables[kind]
                together = max(self._usual_items(kind, table), items)
                per_ns += together / max(table.time_ns(together), 1)
            work_ns = self._work_of[kind, items] = int(items / per_ns)
        return work_ns

    def _forget(self) -> None:
        self._known_at = self._pool.changes + self._pool.corrections
        self._work_of.clear()
        self._sharing.clear()

    # ---- for the policies ----

    def _first_idle(self, kind: Kind) -> Worker | None:
        """Of the ready workers that serve it, the one that has been ready for longest."""
        return next((worker for worker in self._pool.ready.values() if kind in worker.tables), None)

    def _sweep(self, key: Key) -> None:
        if not self._queues[key]:
            del self._queues[key]
