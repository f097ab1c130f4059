"""First idle, first serve: the baseline that PARIS and ELSA are held against (Kim, Choi, Rhu, DAC'22). Pure.

1. One line for all queries, by class, then arrival.
2. An idle slice takes the first query that it serves, by itself: a query is a batch.

From the paper (arXiv 2202.13481): a query goes to any slice that is idle, and waits where none is. Ours: of several
idle slices it is the one that became idle first; and the reckoning for bounds (central.py).
"""

from __future__ import annotations

from scheduler.domain import BatchTable, Kind
from scheduler.policies import Start
from scheduler.policies.central import Central, Key, Queue


class FirstIdle(Central):
    """A query is a batch; the slice that has been idle for longest takes the first one."""

    def _start(self, now_ns: int, key: Key, queue: Queue) -> Start | None:
        worker = self._first_idle(key[0])
        if worker is None:
            return None
        parts = queue.take(0)  # whatever its size
        self._sweep(key)
        return Start(worker, key[0], parts)

    def _usual_items(self, kind: Kind, table: BatchTable) -> int:
        return 1

    def wake_ns(self, now_ns: int) -> int | None:
        return None
