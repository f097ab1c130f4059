"""Static dynamic batching: a largest size and a longest delay, as Triton Inference Server does it. Pure.

1. One queue for each kind and company, by class, then arrival.
2. A batch leaves when the largest size has been reached, or the oldest has waited for the longest delay.
3. It takes queries from the head on as long as they fit. None is cut; one that is larger than that goes by itself.
4. What nobody may join does not wait.

Rules 1-3 are what Triton's user guide documents of `max_batch_size`, `max_queue_delay_microseconds` and priority
levels, with the largest size as the only preferred one. Ours are rule 4, the slice (the one that has been idle for
longest) and the defaults, for which Triton leaves the user to a sweep: the largest size is the largest batch that
takes no more than half the SLO on the smallest slice, at least 1; the delay is a tenth of the SLO. The SLO of a model
is that of its latest query with one; without any, the size is that of the smallest slice's peak throughput, and the
delay is Triton's default, none.
"""

from __future__ import annotations

from scheduler.domain import BatchTable, Kind, Part, Pool
from scheduler.policies import Start
from scheduler.policies.central import Central, Key, Queue

SIZE_SHARE = 0.5
DELAY_SHARE = 0.1


class StaticBatching(Central):
    """`max_items`, `delay_ns`: for every model; None derives them from its SLO and its tables."""

    def __init__(self, pool: Pool, max_items: int | None = None, delay_ns: int | None = None) -> None:
        super().__init__(pool)
        self._max_items = max_items
        self._delay_ns = delay_ns
        self._slo_ns: dict[str, int] = {}

    def offer(self, now_ns: int, part: Part, bound_ns: int | None) -> int:
        if part.due_ns is not None:
            slo_ns = part.due_ns - part.query.arrived_ns
            if self._slo_ns.get(part.kind[0]) != slo_ns:
                self._slo_ns[part.kind[0]] = slo_ns
                self._forget()
        return super().offer(now_ns, part, bound_ns)

    def _start(self, now_ns: int, key: Key, queue: Queue) -> Start | None:
        largest = self._largest(key[0])
        if queue.items < largest and queue.oldest_ns() + self._hold_ns(key) > now_ns:
            return None
        worker = self._first_idle(key[0])
        if worker is None:
            return None
        parts = queue.take(largest)
        self._sweep(key)
        return Start(worker, key[0], parts)

    def _largest(self, kind: Kind) -> int:
        if self._max_items is not None:
            return self._max_items
        table = self._pool.serving[kind][0].tables[kind]
        slo_ns = self._slo_ns.get(kind[0])
        return table.peak if slo_ns is None else max(table.largest_within(SIZE_SHARE * slo_ns), 1)

    def _hold_ns(self, key: Key) -> int:
        kind, company = key
        if company[1]:
            return 0  # it is isolated
        if self._delay_ns is not None:
            return self._delay_ns
        return int(DELAY_SHARE * max(self._slo_ns.get(kind[0], 0), 0))

    def _usual_items(self, kind: Kind, table: BatchTable) -> int:
        return self._largest(kind)
