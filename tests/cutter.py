"""A policy for tests of what is around the core: it cuts requests wherever it may."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.batching import Line
from scheduler.domain import Company, Kind, Part, Pool, Worker
from scheduler.policies import Start


class Cutter:
    """First come, first served, in batches of `size()` items: cuts what may be cut, mixes what may be mixed."""

    def __init__(self, pool: Pool, size: Callable[[], int]) -> None:
        self._pool = pool
        self._size = size
        self._lines: dict[tuple[Kind, Company], Line] = {}

    def offer(self, now_ns: int, part: Part, bound_ns: int | None) -> int:
        self._lines.setdefault((part.kind, part.company), Line()).push(part, 0)
        return 0

    def next(self, now_ns: int) -> Start | None:
        for worker in self._pool.ready.values():
            for (kind, _), line in self._lines.items():
                if line.entries and kind in worker.tables:
                    return Start(worker, kind, line.take(self._size()))
        return None

    def wake_ns(self, now_ns: int) -> int | None:
        return None

    def discard(self, part: Part) -> None:
        self._lines[part.kind, part.company].remove(part, 0)

    def evict(self, worker: Worker, model: str | None = None) -> list[Part]:
        alone = [kind for kind in worker.tables if self._pool.serving[kind] == [worker]]
        return [part for (kind, _), line in self._lines.items() if kind in alone for part in line.drain()]

    def backlog_ns(self, now_ns: int, model: str) -> int:
        return 0
