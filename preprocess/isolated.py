"""Elements done by processes of their own: what a native decoder dies of costs one of them, and not the daemon.

A process is handed one element at a time, through memory that both map, and a message of a few bytes. A picture is
written straight to its place in the daemon's arena, which they map as well. One that dies, or that takes too long, is
started anew, and its element tried once more.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import queue
import select
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import numpy as np
import structlog

from preprocess import stages
from preprocess.errors import BadInputError, ClosedError
from preprocess.items import Item
from preprocess.pipeline import PipelineError, PipelineFile
from preprocess.places import Places, array

log = structlog.get_logger(__name__)

# Room for an element, and behind it for what becomes of it. Sparse: only what is used takes memory.
ELEMENT_BYTES = 64 << 20
RESULT_BYTES = 1 << 30
# No element that the gate lets through takes a tenth of it.
ELEMENT_TIMEOUT_S = 30.0
START_TIMEOUT_S = 120.0


class DiedError(RuntimeError):
    """The process is no more."""


Start = Callable[..., BaseProcess]


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A new process, from a fork server; the daemon has a way of its own, whose server has torch imported."""
    process = get_context("forkserver").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


class _Shared:
    """A file descriptor, as an argument of a process that is being started."""

    def __init__(self, file: int) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _received, (DupFd(self._file),)


def _received(duplicate: Any) -> int:
    file: int = duplicate.detach()
    return file


class Arena:
    """Shared memory where places are: `file` is its descriptor, `memory` all of it."""

    def __init__(self, file: int, memory: memoryview) -> None:
        self.file = file
        self._begin = _address(memory)
        self._size = len(memory)

    def offset(self, place: memoryview) -> int | None:
        """Where in the arena a place is; None if it is elsewhere."""
        offset = _address(place) - self._begin
        return offset if 0 <= offset <= self._size - len(place) else None


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Span(NamedTuple):
    """Of the arena: where all items of a request go, how many there are, and which of them this one is."""

    offset: int
    nbytes: int
    items: int
    item: int


class Worker:
    """One of the processes."""

    def __init__(
        self, decoder: str, environment: Mapping[str, str], start: Start = start, arena: Arena | None = None
    ) -> None:
        file = os.memfd_create("preprocess", os.MFD_CLOEXEC)
        os.truncate(file, ELEMENT_BYTES + RESULT_BYTES)
        self._memory = memoryview(mmap.mmap(file, ELEMENT_BYTES + RESULT_BYTES))
        self._connection, theirs = Pipe()
        self._readable = select.poll()  # once: Connection.poll makes a selector each time, 40 us
        self._readable.register(self._connection, select.POLLIN)
        shared = None if arena is None else _Shared(arena.file)
        self._process = start(main, theirs, _Shared(file), shared, decoder, dict(environment))
        theirs.close()
        os.close(file)
        self._known: dict[PipelineFile, int] = {}  # those that the process knows by number
        self._ready = False

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def wait_until_ready(self) -> None:
        """Raises PipelineError if it cannot start, DiedError if it does not."""
        if not self._ready and (reason := self._answer(START_TIMEOUT_S)):
            raise PipelineError(reason)
        self._ready = True

    def run(
        self, pipeline: PipelineFile, data: bytes, span: Span | None = None
    ) -> tuple[np.ndarray[Any, Any] | None, int]:
        """The item, in memory that the next call overwrites, and its length. Raises BadInputError, DiedError.

        `span`: where it is to be written; it is not returned then.
        """
        self.wait_until_ready()
        self._memory[: len(data)] = data
        number = self._known.get(pipeline)
        new = None if number is not None else pipeline
        number = self._known.setdefault(pipeline, len(self._known))
        try:
            self._connection.send_bytes(pickle.dumps((len(data), number, new, span)))
        except OSError as error:
            raise self._died() from error
        wrong, failed, shape, length, took_ns = self._answer(ELEMENT_TIMEOUT_S)
        stages.note(took_ns)
        if failed:
            raise RuntimeError(failed)
        if wrong:
            raise BadInputError(wrong)
        if span is not None:
            return None, length
        return array(self._memory[ELEMENT_BYTES:], pipeline.steps.dtype, shape), length

    def _answer(self, timeout_s: float) -> Any:
        try:
            if self._readable.poll(1e3 * timeout_s):
                return pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            pass
        raise self._died()

    def _died(self) -> DiedError:
        self.kill()
        self.wait()
        return DiedError(f"exit code {self._process.exitcode}")

    def kill(self) -> None:
        """At once; does nothing to one that is dead."""
        self._process.kill()

    def wait(self) -> None:
        """For its end, once it is killed."""
        self._process.join()

    def close(self) -> None:
        self.kill()
        self.wait()
        self._connection.close()


class Isolated:
    """As `work.Local`, in `count` processes. `environments`: theirs in turn, beside the daemon's own; `start`: how they
    are.
    """

    def __init__(
        self,
        count: int,
        decoder: str,
        environments: Sequence[Mapping[str, str]] = (),
        start: Start = start,
        arena: Arena | None = None,
    ) -> None:
        """Raises PipelineError where the decoder cannot be had."""
        self._decoder = decoder
        self._arena = arena
        self._environments = environments or ({},)
        self._start = start
        self._closed = False
        self._changing = threading.Lock()
        self._all = [self._new(index) for index in range(count)]
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        try:
            for worker in self._all:
                worker.wait_until_ready()
                self._free.put(worker)
        except DiedError as error:
            self.close()
            raise PipelineError(f"a preprocessing process does not start: {error}") from error
        except PipelineError:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._all]

    def _new(self, index: int) -> Worker:
        environment = self._environments[index % len(self._environments)]
        worker = Worker(self._decoder, environment, self._start, self._arena)
        log.info("preprocessing process started", pid=worker.pid)
        return worker

    def write_item(self, pipeline: PipelineFile, data: bytes, index: int, items: int, places: Places) -> None:
        """As `work.Local`'s."""
        place = places[pipeline.output]
        offset = self._arena.offset(place) if self._arena is not None and pipeline.image is not None else None

        def taken(item: np.ndarray[Any, Any] | None, length: int) -> None:
            if item is not None:
                array(place, pipeline.steps.dtype, (items, *pipeline.steps.shape))[index] = item
            if pipeline.length is not None:
                array(places[pipeline.length], "INT64", (items,))[index] = length

        self._run(pipeline, data, taken, None if offset is None else Span(offset, len(place), items, index))

    def read_item(self, pipeline: PipelineFile, data: bytes) -> Item:
        """As `work.Local`'s."""
        items: list[Item] = []
        self._run(pipeline, data, lambda values, length: items.append(Item(values.copy(), length)))
        return items[0]

    def _run(self, pipeline: PipelineFile, data: bytes, take: Any, span: Span | None = None) -> None:
        if len(data) > ELEMENT_BYTES:
            raise BadInputError(f"{len(data)} bytes; at most {ELEMENT_BYTES} are taken")
        worker = self._free.get()
        try:
            try:
                made = worker.run(pipeline, data, span)
            except DiedError:
                worker = self._replaced(worker)
                made = worker.run(pipeline, data, span)
            take(*made)
        except DiedError as error:
            if self._closed:
                raise ClosedError("its decoders were ended") from None
            worker = self._replaced(worker)
            raise BadInputError(f"its decoder died of it twice ({error})") from error
        finally:
            self._free.put(worker)

    def _replaced(self, worker: Worker) -> Worker:
        worker.close()
        with self._changing:  # one that is being started while all are ended would stay
            if self._closed:
                return worker
            log.warning("a preprocessing process died", pid=worker.pid)
            index = self._all.index(worker)
            new = self._all[index] = self._new(index)
            return new

    def close(self) -> None:
        """Kills them; who waits for one is told that it died."""
        with self._changing:
            self._closed = True
        for worker in self._all:
            worker.kill()
        for worker in self._all:
            worker.wait()


# ---- in the process ----


def main(
    connection: Connection[Any, Any],
    memory_fd: int,
    arena_fd: int | None,
    decoder: str,
    environment: dict[str, str],
) -> None:
    """Until the daemon is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the daemon's, which ends this
        signal.signal(number, signal.SIG_IGN)
    os.environ.update(environment)
    memory = memoryview(mmap.mmap(memory_fd, ELEMENT_BYTES + RESULT_BYTES))
    os.close(memory_fd)
    arena = memoryview(b"")
    if arena_fd is not None:
        arena = memoryview(mmap.mmap(arena_fd, os.fstat(arena_fd).st_size))
        os.close(arena_fd)
    try:
        from preprocess.work import Local  # torch, which the daemon itself does not need

        local = Local(decoder)
    except (PipelineError, ImportError) as error:
        advice = "; pip install 'migserve[torch]'" if isinstance(error, ImportError) else ""
        connection.send_bytes(pickle.dumps(f"{error}{advice}"))
        return
    connection.send_bytes(pickle.dumps(""))
    pipelines: dict[int, PipelineFile] = {}
    while True:
        try:
            nbytes, number, new, span = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        if new is not None:
            pipelines[number] = new
        whole = memory[ELEMENT_BYTES:] if span is None else arena[span.offset : span.offset + span.nbytes]
        answer = _element(local, pipelines[number], bytes(memory[:nbytes]), whole, span or Span(0, 0, 1, 0))
        connection.send_bytes(pickle.dumps((*answer, stages.take())))


def _element(local: Any, pipeline: PipelineFile, data: bytes, result: memoryview, span: Span) -> Any:
    """What is wrong with it, how this failed, shape, and length; its values are in `result`, a picture's by `span`."""
    try:
        if pipeline.image is None:
            item = local.read_item(pipeline, data)
            array(result, pipeline.steps.dtype, item.values.shape)[:] = item.values
            return "", "", item.values.shape, item.length
        local.write_item(pipeline, data, span.item, span.items, {pipeline.output: result})
        return "", "", pipeline.steps.shape, 0
    except BadInputError as error:
        return str(error), "", (), 0
    except Exception:  # our own fault: the daemon says so in its log
        return "", traceback.format_exc(), (), 0
