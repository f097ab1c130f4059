"""Loading models on workers: measured once, never twice at a time, and given up when it takes too long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import structlog

from partitioner.geometry import Slice
from scheduler.arena import SharedMemory
from scheduler.channel import Done, Failed, Load, Loaded, ModelSource, ToWorker, Unload
from scheduler.loading import Loader, ModelUnservableError
from scheduler.staff import State, Worker, resolve
from scheduler.tensors import Signature
from tests.stage import WHERE

TABLE = ((1, 1.0), (4, 2.0))
SIGNATURE = Signature((), (), 4)


class Told:
    """Who serves what, as the loader has told it."""

    def __init__(self) -> None:
        self.serving: list[tuple[int, str]] = []
        self.stopped: list[tuple[int, str]] = []

    def worker_up(self, worker_id: int, where: Slice, depth: int) -> None: ...
    def worker_lost(self, worker_id: int, detail: str, *, comes_back: bool, batch_ids: list[int]) -> None: ...
    def drains(self, worker_id: int) -> None: ...
    def batch_done(self, worker_id: int, done: Done, outbox: memoryview) -> None: ...
    def batch_failed(self, worker_id: int, failed: Failed) -> None: ...

    def serves(
        self, worker_id: int, key: str, latency_ns: tuple[int, ...], weight: float, lengths: tuple[int, ...] = ()
    ) -> None:
        self.serving.append((worker_id, key))

    def stops_serving(self, worker_id: int, key: str) -> None:
        self.stopped.append((worker_id, key))


class Workplace:
    """Two workers of one kind that are up, and a loader; what they are told is kept, and answered by the test."""

    def __init__(self, timeout_s: float = 10.0) -> None:
        self.workers = [Worker(index, WHERE, index, SharedMemory("test", 256), State.READY) for index in (0, 1)]
        self.said: list[tuple[int, ToWorker]] = []
        self.told = Told()
        self.loader = Loader(
            lambda each, message: self.said.append((each.id, message)), self.lose, self.told, timeout_s
        )

    def lose(self, each: Worker, detail: str) -> None:
        each.state, each.reason = State.RESTARTING, detail
        each.let_go(detail)

    def loads(self) -> list[tuple[int, str]]:
        return [(number, message.source.key) for number, message in self.said if isinstance(message, Load)]

    async def answer(self, worker_id: int, key: str, *, is_another: bool = False) -> None:
        loaded = Loaded(key, SIGNATURE, TABLE, is_another=is_another)
        resolve(self.workers[worker_id].loading.pop(key), loaded)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    def close(self) -> None:
        for each in self.workers:
            each.outbox.close()


def source(key: str) -> ModelSource:
    return ModelSource(key, key, 1, "torch_export", "")


def at_work(story: Callable[[Workplace], Awaitable[None]], timeout_s: float = 10.0) -> None:
    async def run() -> None:
        place = Workplace(timeout_s)
        try:
            await asyncio.wait_for(story(place), 10)
        finally:
            place.close()

    asyncio.run(run())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_first_worker_measures_and_the_others_take_it_over() -> None:
    async def story(place: Workplace) -> None:
        loading = asyncio.create_task(place.loader.load(source("m"), place.workers))
        await settle()
        assert place.loads() == [(0, "m")]
        await place.answer(0, "m")
        await settle()
        assert place.said[-1] == (1, Load(source("m"), TABLE))
        await place.answer(1, "m")
        assert (await loading).measured_ms == {"cpu": TABLE}
        assert place.told.serving == [(0, "m"), (1, "m")]

    at_work(story)


def test_a_worker_that_comes_back_during_a_load_is_asked_once() -> None:
    """Both wait for the one answer: a second Load would take the place of the first, whose end nobody would see."""

    async def story(place: Workplace) -> None:
        first, second = place.workers
        loading = asyncio.create_task(place.loader.load(source("m"), [first]))
        await settle()
        await place.answer(0, "m")
        await loading
        restoring = asyncio.create_task(place.loader.restore(second))
        introducing = asyncio.create_task(place.loader.introduce([second]))
        await settle()
        assert place.loads() == [(0, "m"), (1, "m")]
        await place.answer(1, "m")
        await asyncio.gather(restoring, introducing)
        assert place.told.serving == [(0, "m"), (1, "m")]

    at_work(story)


def test_a_load_that_takes_too_long_costs_the_worker_and_is_given_up() -> None:
    async def story(place: Workplace) -> None:
        with pytest.raises(ModelUnservableError, match="loading m took more than 0\\.01 s"):
            await place.loader.load(source("m"), place.workers)
        assert [each.state for each in place.workers] == [State.RESTARTING] * 2
        assert place.told.serving == []
        place.workers[0].state = State.READY
        await place.loader.restore(place.workers[0])
        assert len(place.loads()) == 2, "never asked for again"

    at_work(story, timeout_s=0.01)


def test_it_is_told_which_sizes_stand_in_for_those_that_a_table_has_not() -> None:
    async def story(place: Workplace) -> None:
        table = {2: ((1, 5.0),), 4: ((1, 3.0),)}
        given = ModelSource("m", "m", 1, "emulated", "", latency_ms=table)
        with structlog.testing.capture_logs() as lines:
            loading = asyncio.create_task(place.loader.load(given, place.workers))
            await settle()
        assert [line["taken"] for line in lines] == [{"1 GPC": "2 GPCs"}]
        assert place.said == [(0, Load(given, ((1, 5.0),)))]
        loading.cancel()

    at_work(story)


def test_a_file_that_was_replaced_between_two_loads_is_told_until_it_is_unloaded() -> None:
    """As where a worker is started anew: the others serve what the file was before."""

    async def story(place: Workplace) -> None:
        loading = asyncio.create_task(place.loader.load(source("m"), place.workers))
        await settle()
        await place.answer(0, "m")
        await settle()
        assert not place.loader.is_mixed("m")
        with structlog.testing.capture_logs() as said:
            await place.answer(1, "m", is_another=True)
            await loading
        assert (place.loader.is_mixed("m"), len(said)) == (True, 1)
        place.loader.unload("m", place.workers)
        assert not place.loader.is_mixed("m")

    at_work(story)


def test_unloading_is_told_of_every_worker_also_of_one_that_restarts() -> None:
    async def story(place: Workplace) -> None:
        loading = asyncio.create_task(place.loader.load(source("m"), place.workers))
        await settle()
        await place.answer(0, "m")
        await settle()
        await place.answer(1, "m")
        await loading
        place.lose(place.workers[1], "killed")
        place.loader.unload("m", place.workers)
        assert place.told.stopped == [(0, "m"), (1, "m")]
        assert [number for number, message in place.said if isinstance(message, Unload)] == [0]

    at_work(story)
