"""What is counted of requests that run in several batches, and of late ones."""

from __future__ import annotations

import asyncio
from typing import Any

from scheduler.driver import now_ns
from scheduler.messages import Request
from server.metrics import Metrics
from tests.stage import KEY, WHERE, Stage


class Counted(Stage):
    """A stage as the metrics see a fleet."""

    places: list[Any]
    workers: list[Any]

    def submit(self, items: int, due_ns: int | None = None) -> None:
        self._ids += 1
        request = Request(self._ids, KEY, items, due_ns=due_ns)
        self.driver.start(self.driver.accept(request, now_ns(), lambda end: None), self.arena.allocate(4 * items))


def counted(stage: Counted) -> Metrics:
    fleet: Any = stage
    stage.places, stage.workers = [(WHERE, 0)], []
    metrics = Metrics()
    metrics.watch(fleet, list, list, lambda: (0, 0))
    for record in stage.seen.records:
        metrics.batch_done(record)
    return metrics


def test_a_cut_request_counts_once_and_its_batches_and_items_each() -> None:
    async def story() -> None:
        stage = Counted(cut_to=2)
        stage.submit(5)
        stage.submit(1)
        for number in range(3):  # two and two of the first, and its last with the second
            stage.finish(number)
        await asyncio.sleep(0)
        metrics = counted(stage)
        stats = metrics.stats("m", "1")
        assert (stats.success, stats.items, stats.batches, stats.late) == (2, 6, 3, 0)
        assert 0 < stats.queue_ns < stats.request_ns
        first, second, last = stage.seen.records
        assert (first.request_ns, second.request_ns, len(last.request_ns)) == ([], [], 2)
        assert last.queue_ns[0] < last.queue_ns[1], "the first one's wait ended with its first piece"

    asyncio.run(story())


def test_what_is_answered_after_its_due_time_is_late() -> None:
    async def story() -> None:
        stage = Counted(cut_to=2)
        due_ns = now_ns() + 1_000_000
        for due in (due_ns, None, due_ns + 60_000_000_000):
            stage.submit(1, due)
        while now_ns() <= due_ns:
            pass
        stage.finish(0)
        stage.finish(1)
        await asyncio.sleep(0)
        metrics = counted(stage)
        assert metrics.stats("m", "1").late == 1
        assert b'migserve_late_requests_total{model="m",version="1"} 1.0' in metrics.exposition()

    asyncio.run(story())
