"""The driver and its core as they are, with batches that end when the test says so. Run it inside an event loop."""

from __future__ import annotations

import struct
from typing import Any

from partitioner.geometry import Slice
from scheduler.arena import Arena
from scheduler.channel import Done, RunBatch
from scheduler.core import SchedulerCore
from scheduler.driver import BatchRecord, Driver
from scheduler.messages import Request
from tests.cutter import Cutter

KEY = "m/1#1"
OUTBOX = memoryview(bytes(4096))
WHERE = Slice(0, "GPU-0", "A100", "MIG-0", "1g.10gb", 1, 9728, 7, 0, 0, 1, 8, True)


class Seen:
    """Told by the driver what is to be counted."""

    def __init__(self) -> None:
        self.records: list[BatchRecord] = []
        self.left: list[bool] = []  # of each cancelled one: before compute?

    def batch_done(self, record: BatchRecord) -> None:
        self.records.append(record)

    def cancelled(self, model: str, *, before_compute: bool) -> None:
        self.left.append(before_compute)


class Stage:
    """One worker, up, which serves one model: an FP32 in, an FP32 out, up to 8 items a batch.

    `cut_to`: a batch has at most so many items, and requests are cut for it.
    """

    def __init__(self, arena_bytes: int = 1 << 16, cut_to: int | None = None) -> None:
        self.arena = Arena(arena_bytes)
        self.seen = Seen()
        self.sent: list[RunBatch] = []
        fleet: Any = self  # it sends, and that is all the driver asks of a fleet
        core = SchedulerCore() if cut_to is None else SchedulerCore(policy=lambda pool: Cutter(pool, lambda: cut_to))
        self.driver = Driver(core, fleet, self.arena, self.seen)
        self.driver.worker_up(0, WHERE, 1)
        self.driver.serves(0, KEY, tuple(range(1000, 1008)), 1.0)
        self._ids = 0

    def send(self, worker_id: int, batch: RunBatch) -> None:
        self.sent.append(batch)

    def finish(self, number: int, *values: float) -> None:
        """The worker says that the `number`-th batch is done: with these values, an item each, or zeros."""
        batch = self.sent[number]
        items = sum(batch.items)
        outbox = memoryview(struct.pack(f"{len(values)}f", *values)) if values else OUTBOX
        self.driver.batch_done(0, Done(batch.batch_id, [0], [4 * items], [(items, 1)], 1, 1, 1), outbox)

    def request(self, expires_ns: int | None = None) -> Request:
        self._ids += 1
        return Request(self._ids, KEY, 1, expires_ns=expires_ns)
