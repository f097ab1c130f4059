"""PREBA's dynamic batching, and the least-loaded slice (arXiv 2411.19114). Pure.

From the paper:
1. One queue for each length bucket.
2. Batch_max = Batch_knee of (model, slice size, bucket), Time_queue = Time_knee / number of slices.
3. A bucket leaves when it holds Batch_max, or when its oldest query has waited for Time_queue.
4. A batch that leaves short takes queries from adjacent buckets, shorter neighbours first, and keeps to the Batch_max
   of its longest input.
5. It goes to the least loaded slice.

Ours: the knee is read off the latency table (`BatchTable.knee`: the first batch with 80 % of the peak throughput).
Slices may differ in size: Time_queue = 1 / sum over slices of 1 / Time_knee, which is rule 2 where they are alike;
Batch_max is that of the slice that takes the batch: the least loaded ready one whose Batch_max the bucket has reached
or, once Time_queue is over, the least loaded ready one. Least loaded is the one that is, or was, free first. Neighbours
are asked outward from the bucket, all shorter ones first. Queries are not cut; one above Batch_max goes by itself. What
nobody may join does not wait. Classes: inside a bucket, and between buckets that may leave, higher ones first.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.domain import BatchTable, Kind, Part, Worker
from scheduler.policies import Start
from scheduler.policies.central import Central, Key, Queue


class Preba(Central):
    """A queue a bucket, batches up to the knee, at most Time_queue of waiting for company."""

    def _start(self, now_ns: int, key: Key, queue: Queue) -> Start | None:
        kind = key[0]
        in_time = queue.oldest_ns() + self._hold_ns(key) > now_ns
        free = [
            worker
            for worker in self._pool.ready.values()
            if kind in worker.tables and not (in_time and queue.items < worker.tables[kind].knee)
        ]
        if not free:
            return None
        worker = min(free, key=lambda w: (w.free_at_ns, w.id))
        knee = worker.tables[kind].knee
        short = queue.items < knee
        parts = queue.take(knee)
        self._sweep(key)
        return self._filled_up(worker, key, parts) if short else Start(worker, kind, parts)

    def _filled_up(self, worker: Worker, key: Key, parts: list[Part]) -> Start:
        """Rule 4."""
        longest, company = key
        items = sum(part.items for part in parts)
        for kind in self._neighbours(key[0], worker):
            cap = worker.tables[max(longest, kind)].knee
            queue = self._queues.get((kind, company))
            if queue is not None and items < cap:
                taken = queue.take(cap - items, first=False)
                self._sweep((kind, company))
                if taken:
                    longest = max(longest, kind)
                    items += sum(part.items for part in taken)
                    parts += taken
        return Start(worker, longest, parts)

    def _neighbours(self, kind: Kind, worker: Worker) -> Iterator[Kind]:
        """Buckets of the same model that the worker serves, in the order in which they are asked."""
        model, bucket = kind
        for shorter in range(bucket - 1, -1, -1):
            yield model, shorter
        longer = bucket + 1
        while (model, longer) in worker.tables:
            yield model, longer
            longer += 1

    def _hold_ns(self, key: Key) -> int:
        """Time_queue."""
        kind, company = key
        if company[1]:
            return 0  # it is isolated
        tables = [worker.tables[kind] for worker in self._pool.serving[kind]]
        return round(1 / sum(1 / max(table.ns[table.knee], 1) for table in tables))

    def _usual_items(self, kind: Kind, table: BatchTable) -> int:
        return table.knee
