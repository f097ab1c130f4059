"""Processes that may die of what they decode."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import msgspec
import numpy as np
import pytest

from preprocess import isolated, process
from preprocess.devices import Target
from preprocess.errors import BadInputError
from preprocess.pipeline import PipelineError, PipelineFile
from preprocess.pool import PreprocessPool
from preprocess.process import Made
from preprocess.steps import AudioSteps, ImageSteps
from preprocess.tasks import StoppedError
from preprocess.work import Local
from scheduler import spawn
from scheduler.arena import Arena
from tests.preprocess.pictures import encoded, hostile, photographs
from tests.preprocess.sounds import speech_like, wav
from tests.served import until

PICTURES = PipelineFile(input="image", output="x", image=ImageSteps(preset="imagenet-eval"))
SOUNDS = PipelineFile(input="sound", output="x", length="n", audio=AudioSteps(preset="nemo-80"))
JPEG = encoded(photographs()[0], "JPEG")


def told(story: Callable[[PreprocessPool], Awaitable[None]], count: int = 2, **more: Any) -> None:
    """With a pool of so many processes, ready for pictures."""

    async def run() -> None:
        async with pool_of(count, **more) as pool:
            await pool.prepare(PICTURES)
            await story(pool)

    asyncio.run(run())


@asynccontextmanager
async def pool_of(count: int, **more: Any) -> AsyncIterator[PreprocessPool]:
    pool = PreprocessPool(count, isolated=True, **{"start": spawn.start_other, **more})
    try:
        yield pool
    finally:
        pool.close()


async def written(pool: PreprocessPool, data: bytes, pipeline: PipelineFile = PICTURES) -> np.ndarray:
    values = np.full((1, 3, 224, 224), np.nan, np.float32)
    await pool.write(pipeline, [data], {"x": memoryview(values).cast("B")}).future
    return values


def by_a_thread(data: bytes) -> np.ndarray:
    values = np.full((1, 3, 224, 224), np.nan, np.float32)
    Local("cpu").write_item(PICTURES, data, 0, 1, {"x": memoryview(values).cast("B")})
    return values


def test_what_they_make_is_what_a_thread_makes() -> None:
    # More than a megabyte, in and out: copied by a thread.
    clips = [wav(speech_like(seconds)) for seconds in (1.3, 40.0)]

    async def story(pool: PreprocessPool) -> None:
        for _ in range(3):
            np.testing.assert_array_equal(await written(pool, JPEG), by_a_thread(JPEG))
        for clip, there in zip(clips, await pool.read(SOUNDS, clips).future, strict=True):
            here = Local("cpu").read_item(SOUNDS, clip)
            np.testing.assert_array_equal(there.values, here.values)
            assert there.length == here.length

    told(story)


def test_the_elements_of_a_request_come_to_their_places() -> None:
    others = [encoded(picture, "JPEG") for picture in photographs()]

    async def story(pool: PreprocessPool) -> None:
        values = np.full((6, 3, 224, 224), np.nan, np.float32)
        await pool.write(PICTURES, others * 3, {"x": memoryview(values).cast("B")}).future
        np.testing.assert_array_equal(values, np.concatenate([by_a_thread(data) for data in others * 3]))

    assert len(others) == 2
    told(story)


def test_what_is_wrong_is_told_in_the_same_words() -> None:
    async def story(pool: PreprocessPool) -> None:
        for name in ("text", "a JPEG cut off", "a PNG that claims 60000 x 60000"):
            data, message = hostile()[name]
            with pytest.raises(BadInputError, match="input image, element 0: ") as refused:
                await written(pool, data)
            assert message in str(refused.value)

    told(story)


def test_those_that_die_are_started_anew_and_what_they_were_at_is_tried_again() -> None:
    async def story(pool: PreprocessPool) -> None:
        before = pool.pids()
        for pid in before:
            os.kill(pid, signal.SIGSTOP)  # so that both have something when they die
        under_way = [asyncio.ensure_future(written(pool, JPEG)) for _ in range(5)]
        await asyncio.sleep(0)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        for each in under_way:
            np.testing.assert_array_equal(await each, by_a_thread(JPEG))
        assert set(pool.pids()).isdisjoint(before)

    told(story)


def test_one_that_dies_of_nothing_is_started_anew() -> None:
    async def story(pool: PreprocessPool) -> None:
        (before,) = pool.pids()
        os.kill(before, signal.SIGKILL)
        assert np.isfinite(await written(pool, JPEG)).all()
        assert pool.pids() != [before]

    told(story, 1)


def test_what_always_kills_its_decoder_is_refused_and_harms_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    send = process.Process.send

    def dies_of_poison(self: process.Process, pipeline: PipelineFile, nbytes: int, span: Any) -> None:
        send(self, pipeline, nbytes, span)
        if nbytes == len(poison):
            os.kill(self.pid, signal.SIGSEGV)

    poison = JPEG + b"poison"
    monkeypatch.setattr(process.Process, "send", dies_of_poison)

    async def story(pool: PreprocessPool) -> None:
        neighbours = [asyncio.ensure_future(written(pool, JPEG)) for _ in range(4)]
        with pytest.raises(BadInputError, match="its decoder died of it twice"):
            await written(pool, poison)
        for each in neighbours:
            assert np.isfinite(await each).all()
        assert np.isfinite(await written(pool, JPEG)).all()

    told(story)


def test_one_that_takes_too_long_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "ELEMENT_TIMEOUT_S", 0.1)

    async def story(pool: PreprocessPool) -> None:
        os.kill(pool.pids()[0], signal.SIGSTOP)
        with pytest.raises(BadInputError, match=r"it took more than 0\.1 s"):
            await written(pool, JPEG)
        monkeypatch.undo()
        assert np.isfinite(await written(pool, JPEG)).all()

    told(story, 1)


def test_what_is_our_own_fault_is_not_told_as_the_clients() -> None:
    assert PICTURES.image is not None
    broken = PICTURES.model_copy(update={"image": PICTURES.image.model_copy(update={"interpolation": "nope"})})

    async def story(pool: PreprocessPool) -> None:
        before = pool.pids()
        with pytest.raises(RuntimeError, match="Anti-alias option"):
            await written(pool, JPEG, broken)
        assert np.isfinite(await written(pool, JPEG)).all()
        assert pool.pids() == before

    told(story)


def test_what_nobody_waits_for_any_more_is_not_begun() -> None:
    async def story(pool: PreprocessPool) -> None:
        os.kill(pool.pids()[0], signal.SIGSTOP)
        first = asyncio.ensure_future(written(pool, JPEG))
        await asyncio.sleep(0)
        place = memoryview(bytearray(4 * 3 * 224 * 224))
        job = pool.write(PICTURES, [JPEG], {"x": place})
        job.stop()
        os.kill(pool.pids()[0], signal.SIGCONT)
        await first
        with pytest.raises(StoppedError):
            await job.future
        assert not any(place)

    told(story, 1)


def test_a_decoder_that_cannot_be_had_is_told_of_at_the_start() -> None:
    with pytest.raises(PipelineError, match="no decoder is called 'nope'"):
        told(lambda pool: asyncio.sleep(0), decoder="nope")


def test_where_none_can_be_started_any_more_requests_end_with_an_error() -> None:
    calls: list[int] = []

    def start(*arguments: Any) -> BaseProcess:
        calls.append(1)
        if len(calls) in (2, 3):
            raise OSError("no memory")
        return spawn.start_other(*arguments)

    async def story(pool: PreprocessPool) -> None:
        os.kill(pool.pids()[0], signal.SIGSTOP)
        both = [asyncio.ensure_future(written(pool, JPEG)) for _ in range(2)]
        await asyncio.sleep(0)
        os.kill(pool.pids()[0], signal.SIGKILL)
        for each in both:
            with pytest.raises(PipelineError, match="does not start: no memory"):
                await each
        await until(lambda: len(calls) == 4)  # it goes on trying
        assert np.isfinite(await written(pool, JPEG)).all()

    told(story, 1, start=start)


async def held_up(pool: PreprocessPool, pids: list[int]) -> list[asyncio.Future[Any]]:
    """A request for each of the processes, which are stopped."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    requests = [asyncio.ensure_future(written(pool, JPEG)) for _ in pids]
    await asyncio.sleep(0)
    return requests


def test_where_one_cannot_be_started_any_more_the_others_do_its_work() -> None:
    pids: list[int] = []

    def start(*arguments: Any) -> BaseProcess:
        if len(pids) == 2:
            raise OSError("no memory")
        started = spawn.start_other(*arguments)
        pids.append(started.pid or 0)
        return started

    async def story(pool: PreprocessPool) -> None:
        both = await held_up(pool, pids)
        os.kill(pids[0], signal.SIGKILL)
        os.kill(pids[1], signal.SIGCONT)
        for each in both:
            assert np.isfinite(await each).all()

    told(story, start=start)


def test_where_one_cannot_be_started_any_more_the_others_may_still_be_on_their_way() -> None:
    pids: list[int] = []
    refused = threading.Event()
    lock = threading.Lock()

    def start(*arguments: Any) -> BaseProcess:
        with lock:
            if len(pids) == 2 and not refused.is_set():
                refused.set()
                raise OSError("no memory")
        started = spawn.start_other(*arguments)
        pids.append(started.pid or 0)
        return started

    async def story(pool: PreprocessPool) -> None:
        both = await held_up(pool, pids)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for each in both:
            assert np.isfinite(await each).all()
        assert refused.is_set()

    told(story, start=start)


def talks_nonsense(sock: socket.socket, *_: Any) -> None:
    """A decoder that hostile bytes have taken over; a pickle that would be run, if it were."""
    sock.send(b"\xa0")
    while sock.recv(1 << 17):
        sock.send(b"cos\nsystem\n(S'exit 1'\ntR.")


def tells_of_stages_that_there_are_not(sock: socket.socket, *_: Any) -> None:
    """Each would be a metric of its own, for ever."""
    lies(sock, Made("", "", (3, 224, 224), 0, {"mine": 1}))


def tells_of_a_length_that_cannot_be(sock: socket.socket, *_: Any) -> None:
    lies(sock, Made("", "", (3, 224, 224), 1 << 40, {}))


def lies(sock: socket.socket, made: Made) -> None:
    sock.send(b"\xa0")
    while sock.recv(1 << 17):
        sock.send(msgspec.msgpack.encode(made))


@pytest.mark.parametrize(
    "decoder", [talks_nonsense, tells_of_stages_that_there_are_not, tells_of_a_length_that_cannot_be]
)
def test_what_a_decoder_says_is_not_believed(decoder: Callable[..., None]) -> None:
    async def story(pool: PreprocessPool) -> None:
        with pytest.raises(BadInputError, match="its decoder died of it twice"):
            await written(pool, JPEG)

    told(story, 1, start=lambda target, *arguments: spawn.start_other(decoder, *arguments))


def test_a_picture_goes_straight_to_its_place_where_that_is_in_the_arena() -> None:
    """And nowhere else: what lies before and behind the request's slot stays as it was."""
    arena = Arena(1 << 22)
    nbytes = 3 * 3 * 224 * 224 * 4
    arena.memory[:] = b"\x55" * len(arena.memory)

    async def story(pool: PreprocessPool) -> None:
        await pool.write(PICTURES, [JPEG] * 3, {"x": arena.memory[4096 : 4096 + nbytes]}).future
        np.testing.assert_array_equal(await written(pool, JPEG), by_a_thread(JPEG))  # elsewhere
        with pytest.raises(BadInputError, match="element 1"):
            await pool.write(PICTURES, [JPEG, b"text"], {"x": arena.memory[: nbytes * 2 // 3]}).future

    try:
        told(story, arena=(arena.fd, arena.memory))
        values = np.frombuffer(arena.memory[4096 : 4096 + nbytes], np.float32).reshape(3, 3, 224, 224)[1:].copy()
        np.testing.assert_array_equal(values, np.repeat(by_a_thread(JPEG), 2, 0))
        assert set(bytes(arena.memory[4096 + nbytes :])) == {0x55}
    finally:
        arena.close()


def test_a_pool_that_is_closed_leaves_no_process() -> None:
    pids: list[int] = []

    async def story(pool: PreprocessPool) -> None:
        pids.extend(pool.pids())

    told(story)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_process_that_is_being_started_while_they_are_ended_is_ended_too() -> None:
    """What it was started for is done by the CPU."""
    ending: list[threading.Thread] = []
    pids: list[int] = []

    def start(*arguments: Any) -> BaseProcess:
        if pids and not ending:  # this one stands for the first, which has died; meanwhile they are ended
            ending.append(threading.Thread(target=pools[0].leave, args=(["MIG-a"],)))
            ending[0].start()
            ending[0].join(0.2)
        started = spawn.start_other(*arguments)
        pids.append(started.pid or 0)
        return started

    pools: list[PreprocessPool] = []

    async def story() -> None:
        async with pool_of(1, start=start) as pool:
            pools.append(pool)
            await pool.prepare(PICTURES, Target("cpu", ("MIG-a",)))
            os.kill(pids[0], signal.SIGKILL)
            assert np.isfinite(await written(pool, JPEG)).all()
            await asyncio.to_thread(ending[0].join)
            assert len(pids) == 3
            assert pool.pids() == [pids[2]]
            for pid in pids[:2]:
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)

    asyncio.run(story())


def test_what_is_being_started_on_a_device_that_must_be_left_leaves_it() -> None:
    leaving: list[threading.Thread] = []
    pools: list[PreprocessPool] = []

    def start(*arguments: Any) -> BaseProcess:
        if not leaving:
            leaving.append(threading.Thread(target=pools[0].leave, args=(["MIG-a"],)))
            leaving[0].start()
            leaving[0].join(0.2)
        return spawn.start_other(*arguments)

    async def story() -> None:
        async with pool_of(1, start=start) as pool:
            pools.append(pool)
            await pool.prepare(PICTURES, Target("cpu", ("MIG-a",)))
            await asyncio.to_thread(leaving[0].join)
            assert pool.pids("MIG-a") == []

    asyncio.run(story())


def test_a_pool_that_is_closed_while_its_processes_start_leaves_none() -> None:
    begun, closed = threading.Event(), threading.Event()
    started: list[BaseProcess] = []

    def start(*arguments: Any) -> BaseProcess:
        begun.set()
        closed.wait()
        started.append(spawn.start_other(*arguments))
        return started[-1]

    async def story() -> None:
        pool = PreprocessPool(1, isolated=True, start=start)
        preparing = asyncio.create_task(pool.prepare(PICTURES))
        await asyncio.to_thread(begun.wait)
        pool.close()
        closed.set()
        await preparing

    asyncio.run(story())
    assert [each.is_alive() for each in started] == [False]
