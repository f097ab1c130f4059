"""The fleet with real worker processes: they start, come back, are given up, and end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from partitioner.geometry import Slice
from scheduler.arena import Arena
from scheduler.channel import Done, Failed, RunBatch
from scheduler.fleet import Fleet
from scheduler.loading import ModelUnservableError
from scheduler.staff import State
from scheduler.tensors import InputLayout
from server.model_files import read_model
from tests import repositories
from tests.stage import WHERE

PLACES = [replace(WHERE, device_uuid=f"MIG-{start}", gi_id=start, start=start) for start in (0, 1)]


class Story:
    """What the fleet has told of, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.outputs: list[list[float]] = []  # of each batch, its first one

    def _add(self, what: str, worker_id: int) -> None:
        self.events.append((what, worker_id))

    def worker_up(self, worker_id: int, where: Slice, depth: int) -> None:
        self._add("up", worker_id)

    def worker_lost(self, worker_id: int, detail: str, *, comes_back: bool, batch_ids: list[int]) -> None:
        self._add("lost", worker_id)

    def serves(
        self, worker_id: int, key: str, latency_ns: tuple[int, ...], weight: float, lengths: tuple[int, ...] = ()
    ) -> None:
        self._add(f"serves {key}", worker_id)

    def stops_serving(self, worker_id: int, key: str) -> None:
        self._add(f"stops {key}", worker_id)

    def drains(self, worker_id: int) -> None: ...
    def batch_done(self, worker_id: int, done: Done, outbox: memoryview) -> None:
        self.outputs.append(np.frombuffer(outbox[done.offsets[0] :][: done.sizes[0]], np.float32).tolist())

    def batch_failed(self, worker_id: int, failed: Failed) -> None: ...


def with_fleet(
    story: Callable[[Fleet, Story], Awaitable[None]], load_timeout_s: float = 60.0, arena: Arena | None = None
) -> None:
    async def run(arena: Arena) -> None:
        fleet = Fleet(arena, outbox_bytes=1 << 16, load_timeout_s=load_timeout_s)
        told = Story()
        try:
            await fleet.start(told, PLACES)
            await asyncio.wait_for(story(fleet, told), 60)
        finally:
            await fleet.stop(1.0)
            assert fleet.pids() == []
            arena.close()

    asyncio.run(run(arena or Arena(1 << 16)))


def two_inputs(folder: Path) -> Path:
    """An emulated model: y = a[0] + b[0] + b[1]."""
    repositories.emulated(folder, 1)
    (folder / "config.pbtxt").write_text(
        'backend: "emulated" max_batch_size: 8 '
        'input { name: "a" data_type: TYPE_FP32 dims: [1] } input { name: "b" data_type: TYPE_INT16 dims: [-1] } '
        'output { name: "y" data_type: TYPE_FP32 dims: [1] }'
    )
    return folder


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # what it looks at is not told of
            await asyncio.sleep(0.005)


def test_a_killed_worker_comes_back_with_its_models(tmp_path: Path) -> None:
    source, *_ = read_model(repositories.emulated(tmp_path / "m", 1), 1, 1)

    async def story(fleet: Fleet, told: Story) -> None:
        loaded = await fleet.load(source)
        assert loaded.signature.max_batch == 8
        assert len(fleet.serving(source.key)) == 2
        pid = fleet.workers[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: told.events.count((f"serves {source.key}", 0)) == 2)
        assert told.events[-3:] == [("lost", 0), ("up", 0), (f"serves {source.key}", 0)]
        assert len(fleet.pids()) == 2
        fleet.unload(source.key)
        assert fleet.serving(source.key) == []

    with_fleet(story)


def test_a_model_that_hangs_while_it_is_measured_is_given_up_and_harms_no_other(tmp_path: Path) -> None:
    hangs, *_ = read_model(repositories.endless(tmp_path / "hangs"), 1, 1)
    good, *_ = read_model(repositories.emulated(tmp_path / "good", 1), 1, 2)

    async def story(fleet: Fleet, told: Story) -> None:
        with pytest.raises(ModelUnservableError, match="loading hangs took more than 1 s"):
            await fleet.load(hangs)
        await until(lambda: all(each.state == State.READY for each in fleet.workers))
        await fleet.load(good)
        assert len(fleet.serving(good.key)) == 2

    with_fleet(story, load_timeout_s=1.0)


def test_a_worker_takes_the_rows_of_a_cut_request_and_no_others(tmp_path: Path) -> None:
    source, *_ = read_model(two_inputs(tmp_path / "m"), 1, 1)
    arena = Arena(1 << 16)

    def write(layout: InputLayout, first: int, items: int) -> int:
        """A request of items whose answers are 111 times first, first + 1, ..."""
        slot = layout.slot(items, (2,))
        offset = arena.allocate(slot.nbytes)
        numbers = np.arange(first, first + items)
        a, b = (100 * numbers).astype(np.float32), np.stack([10 * numbers, numbers], axis=1).astype(np.int16)
        for place, array in zip(slot.places, (a, b), strict=True):
            arena.memory[offset + place.offset :][: place.nbytes] = array.tobytes()
        return offset

    async def story(fleet: Fleet, told: Story) -> None:
        layout = InputLayout((await fleet.load(source)).signature)
        cut, whole = write(layout, 1, 7), write(layout, 8, 2)
        pieces = {"offsets": [cut, whole, cut], "items": [3, 2, 1], "cut": {0: (1, 7), 2: (6, 7)}}
        fleet.send(0, RunBatch(1, source.key, (2,), **pieces))
        await until(lambda: bool(told.outputs))
        assert told.outputs == [[111.0 * number for number in (2, 3, 4, 8, 9, 7)]]

    with_fleet(story, arena=arena)
