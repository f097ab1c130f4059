"""Processes that may die of what they decode."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import pytest

from preprocess import isolated
from preprocess.devices import Target
from preprocess.errors import BadInputError, ClosedError
from preprocess.isolated import DiedError, Isolated, Worker
from preprocess.pipeline import PipelineError, PipelineFile
from preprocess.pool import PreprocessPool
from preprocess.steps import AudioSteps, ImageSteps
from preprocess.work import Local
from scheduler.arena import Arena
from tests.preprocess.pictures import encoded, hostile, photographs
from tests.preprocess.sounds import speech_like, wav

PICTURES = PipelineFile(input="image", output="x", image=ImageSteps(preset="imagenet-eval"))
SOUNDS = PipelineFile(input="sound", output="x", length="n", audio=AudioSteps(preset="nemo-80"))
JPEG = encoded(photographs()[0], "JPEG")


@pytest.fixture(scope="module")
def processes() -> Iterator[Isolated]:
    started = Isolated(2, "cpu")
    yield started
    started.close()


def written(runner: Isolated | Local, data: bytes) -> np.ndarray:
    values = np.full((1, 3, 224, 224), np.nan, np.float32)
    runner.write_item(PICTURES, data, 0, 1, {"x": memoryview(values).cast("B")})
    return values


def test_what_they_make_is_what_a_thread_makes(processes: Isolated) -> None:
    local = Local("cpu")
    clip = wav(speech_like(1.3))
    for _ in range(3):
        np.testing.assert_array_equal(written(processes, JPEG), written(local, JPEG))
        here, there = local.read_item(SOUNDS, clip), processes.read_item(SOUNDS, clip)
        np.testing.assert_array_equal(there.values, here.values)
        assert there.length == here.length


def test_what_is_wrong_is_told_in_the_same_words(processes: Isolated) -> None:
    for name in ("text", "a JPEG cut off", "a PNG that claims 60000 x 60000"):
        data, message = hostile()[name]
        with pytest.raises(BadInputError) as refused:
            written(processes, data)
        assert message in str(refused.value)


def test_one_that_dies_is_started_anew_and_its_element_tried_again(processes: Isolated) -> None:
    before = processes.pids
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert np.isfinite(written(processes, JPEG)).all()
    assert np.isfinite(written(processes, JPEG)).all()
    assert set(processes.pids).isdisjoint(before)


def test_what_always_kills_its_decoder_is_refused(processes: Isolated, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(self: Worker, pipeline: PipelineFile, data: bytes, span: object = None) -> None:
        os.kill(self.pid, signal.SIGSEGV)
        self._answer(10)

    monkeypatch.setattr(Worker, "run", dies)
    with pytest.raises(BadInputError, match="its decoder died of it twice"):
        written(processes, JPEG)
    monkeypatch.undo()
    assert np.isfinite(written(processes, JPEG)).all()


def test_one_that_takes_too_long_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker("cpu", {})
    worker.wait_until_ready()
    os.kill(worker.pid, signal.SIGSTOP)
    monkeypatch.setattr(isolated, "ELEMENT_TIMEOUT_S", 0.1)
    with pytest.raises(DiedError, match="exit code -9"):
        worker.run(PICTURES, JPEG)
    worker.close()


def test_what_is_our_own_fault_is_not_told_as_the_clients(processes: Isolated) -> None:
    for _ in processes.pids:
        written(processes, JPEG)  # whoever died in a test before is replaced
    before = processes.pids
    broken = PICTURES.model_copy(update={"image": PICTURES.image.model_copy(update={"interpolation": "nope"})})
    with pytest.raises(RuntimeError, match="Anti-alias option"):
        processes.write_item(broken, JPEG, 0, 1, {"x": memoryview(bytearray(4 * 3 * 224 * 224))})
    assert np.isfinite(written(processes, JPEG)).all()
    assert processes.pids == before


def test_a_decoder_that_cannot_be_had_is_told_of_at_the_start() -> None:
    with pytest.raises(PipelineError, match="no decoder is called 'nope'"):
        Isolated(1, "nope")


def in_pool(story: Callable[[PreprocessPool], Awaitable[None]]) -> None:
    async def run() -> None:
        pool = PreprocessPool(2, isolated=True)
        try:
            await story(pool)
        finally:
            pool.close()

    asyncio.run(run())


def test_the_pool_hands_elements_to_them() -> None:
    async def story(pool: PreprocessPool) -> None:
        await pool.prepare(PICTURES)
        values = np.full((3, 3, 224, 224), np.nan, np.float32)
        await pool.write(PICTURES, [JPEG] * 3, {"x": memoryview(values).cast("B")}).future
        np.testing.assert_array_equal(values, np.repeat(written(Local("cpu"), JPEG), 3, 0))
        (clip,) = await pool.read(SOUNDS, [wav(speech_like(1.3))]).future
        assert clip.length == 130

    in_pool(story)


def test_a_picture_goes_straight_to_its_place_where_that_is_in_the_arena() -> None:
    """And nowhere else: what lies before and behind the request's slot stays as it was."""
    arena = Arena(1 << 22)
    nbytes = 3 * 3 * 224 * 224 * 4
    arena.memory[:] = b"\x55" * len(arena.memory)

    async def story() -> None:
        pool = PreprocessPool(2, isolated=True, arena=(arena.fd, arena.memory))
        try:
            await pool.prepare(PICTURES)
            await pool.write(PICTURES, [JPEG] * 3, {"x": arena.memory[4096 : 4096 + nbytes]}).future
            elsewhere = np.empty((1, 3, 224, 224), np.float32)
            await pool.write(PICTURES, [JPEG], {"x": memoryview(elsewhere).cast("B")}).future
            np.testing.assert_array_equal(elsewhere, written(Local("cpu"), JPEG))
            with pytest.raises(BadInputError, match="element 1"):
                await pool.write(PICTURES, [JPEG, b"text"], {"x": arena.memory[: nbytes * 2 // 3]}).future
        finally:
            pool.close()

    try:
        asyncio.run(story())
        values = np.frombuffer(arena.memory[4096 : 4096 + nbytes], np.float32).reshape(3, 3, 224, 224)[1:].copy()
        np.testing.assert_array_equal(values, np.repeat(written(Local("cpu"), JPEG), 2, 0))
        assert set(bytes(arena.memory[4096 + nbytes :])) == {0x55}
    finally:
        arena.close()


def test_a_pool_that_is_closed_leaves_no_process() -> None:
    pids: list[int] = []

    async def story(pool: PreprocessPool) -> None:
        await pool.prepare(PICTURES)
        pids.extend(pool.pids())

    in_pool(story)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_process_that_is_being_started_while_they_are_ended_is_ended_too() -> None:
    ending: list[threading.Thread] = []
    pids: list[int] = []

    def start(*arguments: Any) -> BaseProcess:
        if pids:  # this one stands for the first, which has died; meanwhile they are ended
            ending.append(threading.Thread(target=processes.close))
            ending[0].start()
            ending[0].join(0.2)
        process = isolated.start(*arguments)
        pids.append(process.pid or 0)
        return process

    processes = Isolated(1, "cpu", start=start)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(ClosedError):
        written(processes, JPEG)
    ending[0].join()
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_is_being_started_on_a_device_that_must_be_left_leaves_it() -> None:
    leaving: list[threading.Thread] = []

    def start(*arguments: Any) -> BaseProcess:
        if not leaving:
            leaving.append(threading.Thread(target=pool.leave, args=(["MIG-a"],)))
            leaving[0].start()
            leaving[0].join(0.2)
        return isolated.start(*arguments)

    async def story() -> None:
        try:
            await pool.prepare(PICTURES, Target("cpu", ("MIG-a",)))
            await asyncio.to_thread(leaving[0].join)
            assert pool.pids("MIG-a") == []
        finally:
            pool.close()

    pool = PreprocessPool(1, isolated=True, start=start)
    asyncio.run(story())
