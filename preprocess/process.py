"""A process that does one element after the other, and the daemon's hold on it.

An element reaches it through memory that both map, and a message of a few bytes. A picture is written straight to its
place in the daemon's arena, which it maps as well; whatever else comes of an element lies in the memory of both.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from preprocess import stages
from preprocess.errors import BadInputError
from preprocess.items import Item
from preprocess.pipeline import PipelineError, PipelineFile
from preprocess.places import array

# Room for an element, and behind it for what becomes of it. Sparse: only what is used takes memory.
ELEMENT_BYTES = 64 << 20
RESULT_BYTES = 1 << 30
START_TIMEOUT_S = 120.0
# Of a message: a pipeline is the longest. What is said of an element, a traceback perhaps, is cut.
MESSAGE_BYTES = 1 << 17
MOST_CHARS = 4000


class DiedError(RuntimeError):
    """The process is no more."""


Start = Callable[..., BaseProcess]
Said = TypeVar("Said")


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


class Made(NamedTuple):
    """What became of an element. `wrong`: with its bytes, `failed`: on our side; "" where nothing is.

    `shape`: of what lies in the memory of both, where it has not gone to a span of the arena.
    """

    wrong: str
    failed: str
    shape: tuple[int, ...]
    length: int
    stages_ns: dict[str, int]

    @property
    def error(self) -> Exception | None:
        if self.wrong:
            return BadInputError(self.wrong)
        return RuntimeError(self.failed) if self.failed else None


# Not pickled, as what goes to it is: hostile bytes may have taken the process over.
_encode = msgspec.msgpack.Encoder().encode
_decode_first_words = msgspec.msgpack.Decoder(str).decode
_decode_made = msgspec.msgpack.Decoder(Made).decode


class Process:
    """The daemon's hold on one: `put` an element, `send` for it to be done, `receive` what became of it."""

    def __init__(self, decoder: str, environment: Mapping[str, str], start: Start, arena: Arena | None) -> None:
        """Raises OSError."""
        self.started_s = time.monotonic()
        shared = None if arena is None else _Shared(arena.file)
        with ExitStack() as undone, ExitStack() as handed_over:
            file = os.memfd_create("preprocess", os.MFD_CLOEXEC)
            handed_over.callback(os.close, file)
            os.truncate(file, ELEMENT_BYTES + RESULT_BYTES)
            self._memory = memoryview(mmap.mmap(file, ELEMENT_BYTES + RESULT_BYTES))
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undone.enter_context(self._socket)
            handed_over.enter_context(theirs)
            self._process = start(main, theirs, _Shared(file), shared, decoder, dict(environment))
            undone.pop_all()
        self._known: dict[PipelineFile, int] = {}  # those that the process knows by number

    def wait_until_ready(self) -> None:
        """Raises PipelineError if it cannot start, DiedError if it does not."""
        ready = select.poll()
        ready.register(self._socket, select.POLLIN)
        if not ready.poll(1e3 * START_TIMEOUT_S):
            raise DiedError(f"it is not ready after {START_TIMEOUT_S:g} s")
        if reason := self._received(_decode_first_words):
            raise PipelineError(reason)

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def fileno(self) -> int:
        """Readable when there is something to receive, and when it has died."""
        return self._socket.fileno()

    def put(self, data: bytes) -> None:
        """An element of at most ELEMENT_BYTES, in the place of the last one and of what became of it."""
        self._memory[: len(data)] = data

    def send(self, pipeline: PipelineFile, nbytes: int, span: Span | None) -> None:
        """For what was put to be done. `span`: where a picture is to be written. Raises OSError if it has died."""
        number = self._known.get(pipeline)
        new = None if number is not None else pipeline
        number = self._known.setdefault(pipeline, len(self._known))
        self._socket.send(pickle.dumps((nbytes, number, new, span)))

    def receive(self) -> Made:
        """Once it is readable. Raises DiedError, also for what it should not say."""
        made = self._received(_decode_made)
        times_ns = made.stages_ns
        if not stages.STAGES.issuperset(times_ns) or min(times_ns.values(), default=0) < 0:
            raise DiedError(f"it tells of stages that there are not: {list(times_ns)[:3]}")
        if not 0 <= made.length <= RESULT_BYTES:
            raise DiedError(f"it tells of a length of {made.length}")
        return made

    def _received(self, decode: Callable[[bytes], Said]) -> Said:
        try:
            message = self._socket.recv(MESSAGE_BYTES)
            if not message:
                raise DiedError("it has died")
            return decode(message)
        except (OSError, msgspec.MsgspecError) as error:
            raise DiedError(str(error)) from error

    def values(self, made: Made, datatype: str) -> np.ndarray[Any, Any]:
        """Of an item that has not gone to a span, in memory that the next `put` overwrites. Raises ValueError."""
        return array(self._memory[ELEMENT_BYTES:], datatype, made.shape)

    def kill(self) -> None:
        """At once; does nothing to one that is dead. From any thread."""
        self._process.kill()

    def end(self) -> str:
        """Kills it, waits for its end, and says how it ended."""
        self._process.kill()
        self._process.join()
        return f"exit code {self._process.exitcode}"

    def close(self) -> None:
        """Once it has ended, and nobody looks whether it is readable."""
        self._socket.close()


# ---- in the process ----


def main(sock: socket.socket, memory_fd: int, arena_fd: int | None, decoder: str, environment: dict[str, str]) -> None:
    """Until the daemon is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the daemon's, which ends this
        signal.signal(number, signal.SIG_IGN)
    # Whoever hands out pictures or computes with them is to run at once, and a picture to stay in its core's cache.
    with suppress(OSError):  # where it is forbidden
        if os.sched_getscheduler(0) == os.SCHED_OTHER:  # else whoever has chosen another (`chrt`) knows why
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
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
        sock.send(_encode(f"{error}{advice}"))
        return
    with suppress(BrokenPipeError, ConnectionResetError):  # the daemon is gone
        sock.send(_encode(""))
        _elements(sock, local, memory, arena)


def _elements(sock: socket.socket, local: Any, memory: memoryview, arena: memoryview) -> None:
    pipelines: dict[int, PipelineFile] = {}
    while message := sock.recv(MESSAGE_BYTES):
        nbytes, number, new, span = pickle.loads(message)
        if new is not None:
            pipelines[number] = new
        whole = memory[ELEMENT_BYTES:] if span is None else arena[span.offset : span.offset + span.nbytes]
        made = _element(local, pipelines[number], bytes(memory[:nbytes]), whole, span or Span(0, 0, 1, 0))
        sock.send(_encode(made))


def _element(local: Any, pipeline: PipelineFile, data: bytes, result: memoryview, span: Span) -> Made:
    """Its values are in `result`, a picture's by `span`."""
    wrong = failed = ""
    shape: tuple[int, ...] = ()
    length = 0
    try:
        if pipeline.image is None:
            item: Item = local.read_item(pipeline, data)
            shape, length = item.values.shape, item.length
            array(result, pipeline.steps.dtype, shape)[:] = item.values
        else:
            local.write_item(pipeline, data, span.item, span.items, {pipeline.output: result})
            shape = pipeline.steps.shape
    except BadInputError as error:
        wrong = str(error)[:MOST_CHARS]
    except Exception:  # our own fault: the daemon says so in its log
        failed = traceback.format_exc()[-MOST_CHARS:]
    return Made(wrong, failed, shape, length, stages.take())
