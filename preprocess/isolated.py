"""Elements done by processes of their own: what a native decoder dies of costs one of them, and not the daemon.

All of it runs on the loop's thread, but for what blocks: starting and ending processes, and copying what is large. One
that dies, or that takes too long, is started anew, and its element tried once more.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np
import structlog

from preprocess.copying import by_size
from preprocess.errors import BadInputError, ClosedError
from preprocess.items import Item
from preprocess.pipeline import PipelineError
from preprocess.places import NUMPY, array
from preprocess.process import ELEMENT_BYTES, Arena, DiedError, Made, Process, Span, Start
from preprocess.tasks import Outcome, StoppedError, Task, failed

log = structlog.get_logger(__name__)

# No element that the gate lets through takes a tenth of it.
ELEMENT_TIMEOUT_S = 30.0
# One that dies of nothing is started anew so long after its last start: else starting might be all that is done.
RESTART_S = 1.0
CLOSED = "its decoders were ended"


class _Worker:
    """One of the processes, and what it is doing. `sent`: it knows of its task. `slow`: it was killed for that.
    `lost`: it is dead. `gone`: and none could be started in its place, when that was last tried.
    """

    def __init__(self, index: int, process: Process) -> None:
        self.index = index
        self.process = process
        self.task: Task | None = None
        self.begun_ns = 0
        self.timer: asyncio.TimerHandle | None = None
        self.sent = self.slow = self.lost = self.gone = False


class Isolated:
    """A `tasks.Runner`, of `count` processes. `environments`: theirs in turn, beside the daemon's own."""

    def __init__(
        self,
        count: int,
        decoder: str,
        loop: asyncio.AbstractEventLoop,
        executor: ThreadPoolExecutor,
        start: Start,
        environments: Sequence[Mapping[str, str]] = (),
        arena: Arena | None = None,
    ) -> None:
        """In a thread: blocks until they are ready. Raises PipelineError where the decoder cannot be had."""
        self._arguments = decoder, start, arena
        self._arena = arena
        self._environments = environments or ({},)
        self._loop = loop
        self._executor = executor
        self._waiting: deque[Task] = deque()
        self._workers: dict[int, _Worker] = {}
        self._free: list[_Worker] = []
        self._closed = False
        self._changing = threading.Lock()
        self._processes: dict[int, Process] = {}
        try:
            for process in [self._started(index) for index in range(count)]:
                process.wait_until_ready()
        except (DiedError, OSError) as error:
            self.close()
            raise PipelineError(f"a preprocessing process does not start: {error}") from error
        except PipelineError:
            self.close()
            raise
        loop.call_soon_threadsafe(self._attend_all)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in list(self._processes.values())]

    def begin(self, task: Task) -> None:
        if len(task.data) > ELEMENT_BYTES:
            error = BadInputError(f"{len(task.data)} bytes; at most {ELEMENT_BYTES} are taken")
            self._loop.call_soon(_end, task, error)
            return
        if self._closed:
            self._loop.call_soon(_end, task, ClosedError(CLOSED))
            return
        self._waiting.append(task)
        self._hand_out()

    def close(self) -> None:
        """Kills them; what they have not done ends with ClosedError."""
        with self._changing:  # one that is being started while all are ended would stay
            self._closed = True
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.end()
        self._loop.call_soon_threadsafe(self._let_go)

    def _let_go(self) -> None:
        """Of those that have been ended."""
        for worker in self._workers.values():
            if not worker.lost:
                self._lose(worker)
        for process in self._processes.values():
            process.close()

    # ---- an element's way ----

    def _hand_out(self) -> None:
        while self._free and self._waiting:
            task = self._waiting.popleft()
            if task.wanted():
                self._give(self._free.pop(), task)
            else:
                _end(task, StoppedError())

    def _give(self, worker: _Worker, task: Task) -> None:
        worker.task, worker.sent = task, False
        worker.begun_ns = time.perf_counter_ns()
        put = partial(worker.process.put, task.data)
        by_size(self._loop, self._executor, len(task.data), put, partial(self._send, worker, task))

    def _send(self, worker: _Worker, task: Task, *_: object) -> None:
        if worker.lost:
            return
        worker.timer = self._loop.call_later(ELEMENT_TIMEOUT_S, _kill, worker)
        with suppress(OSError):  # it has died, which the loop is about to hear
            worker.process.send(task.pipeline, len(task.data), self._span(task))
            worker.sent = True

    def _span(self, task: Task) -> Span | None:
        if self._arena is None or task.places is None or task.pipeline.image is None:
            return None
        place = task.places[task.pipeline.output]
        offset = self._arena.offset(place)
        return None if offset is None else Span(offset, len(place), task.items, task.index)

    def _on_readable(self, worker: _Worker) -> None:
        try:
            made = worker.process.receive()
        except DiedError:
            self._lose(worker)
            return
        task, worker.task = worker.task, None
        if task is None:
            worker.process.kill()  # what says something of its own accord does not do what it should
            return
        if worker.timer is not None:
            worker.timer.cancel()
        if made.error is not None or self._span(task) is not None:
            self._finish(worker, task, made, None, made.error)
            return
        nbytes = math.prod(made.shape) * np.dtype(NUMPY[task.pipeline.steps.dtype]).itemsize
        take = partial(_taken, task, made, worker.process)
        by_size(self._loop, self._executor, nbytes, take, partial(self._finish, worker, task, made))

    def _finish(self, worker: _Worker, task: Task, made: Made, item: Item | None, error: BaseException | None) -> None:
        outcome = Outcome(worker.begun_ns, time.perf_counter_ns(), item, error, made.stages_ns)
        if not worker.lost and not worker.slow:  # which was killed just as it answered
            self._free.append(worker)
            self._hand_out()  # first: it works while the rest is done
        task.done(task, outcome)

    # ---- processes ----

    def _started(self, index: int, instead_of: str = "") -> Process:
        """In a thread. Raises OSError; ClosedError if all have been ended."""
        with self._changing:
            if self._closed:
                raise ClosedError(CLOSED)
            decoder, start, arena = self._arguments
            environment = self._environments[index % len(self._environments)]
            process = self._processes[index] = Process(decoder, environment, start, arena)
        log.info("preprocessing process started", pid=process.pid, instead_of=instead_of)
        return process

    def _attend_all(self) -> None:
        for index, process in self._processes.items():
            self._attend(_Worker(index, process))

    def _attend(self, worker: _Worker) -> None:
        self._workers[worker.index] = worker
        self._loop.add_reader(worker.process.fileno(), self._on_readable, worker)
        self._free.append(worker)
        self._hand_out()

    def _lose(self, worker: _Worker) -> None:
        """Its process has died."""
        worker.lost = True
        if worker in self._free:
            self._free.remove(worker)
        if worker.timer is not None:
            worker.timer.cancel()
        self._loop.remove_reader(worker.process.fileno())
        worker.process.close()
        if self._closed:
            self._fail(worker, ClosedError(CLOSED))
            return
        log.warning("a preprocessing process died", pid=worker.process.pid)
        early_s = worker.process.started_s + RESTART_S - time.monotonic()
        if worker.task is not None and not worker.sent:
            self._waiting.appendleft(worker.task)
            worker.task = None
            self._hand_out()
        elif worker.task is not None:
            early_s = 0.0
            worker.task.deaths += 1
            if worker.slow or worker.task.deaths > 1:
                slow = f"it took more than {ELEMENT_TIMEOUT_S:g} s"
                _end(worker.task, BadInputError(slow if worker.slow else "its decoder died of it twice"))
                worker.task = None
        self._loop.call_later(max(0.0, early_s), self._replace, worker)

    def _replace(self, worker: _Worker) -> None:
        if self._closed:  # and with it perhaps the executor
            self._fail(worker, ClosedError(CLOSED))
            return
        starting = self._loop.run_in_executor(self._executor, self._replacement, worker)
        starting.add_done_callback(partial(self._replaced, worker))

    def _replacement(self, worker: _Worker) -> Process:
        """In a thread. Raises DiedError, PipelineError, OSError, ClosedError."""
        how = worker.process.end()
        process = self._started(worker.index, f"{worker.process.pid}, {how}")
        try:
            process.wait_until_ready()
        except Exception:
            process.end()
            process.close()
            raise
        return process

    def _replaced(self, worker: _Worker, starting: asyncio.Future[Process]) -> None:
        if self._closed:
            self._fail(worker, ClosedError(CLOSED))
        elif error := starting.exception():
            self._fail(worker, error)
        else:
            if worker.task is not None:
                self._waiting.appendleft(worker.task)
            self._attend(_Worker(worker.index, starting.result()))

    def _fail(self, worker: _Worker, error: BaseException) -> None:
        """None can be started in its place, or is to be. Its task is for the others, while there are any."""
        if worker.task is not None:
            self._waiting.appendleft(worker.task)
            worker.task = None
        worker.gone = True
        if self._closed or all(each.gone for each in self._workers.values()):
            told = error if self._closed else PipelineError(f"a preprocessing process does not start: {error}")
            while self._waiting:
                _end(self._waiting.popleft(), told)
        self._hand_out()
        if not self._closed:
            log.error("a preprocessing process does not start", reason=str(error))
            self._loop.call_later(RESTART_S, self._replace, worker)


def _kill(worker: _Worker) -> None:
    worker.slow = True
    worker.process.kill()


def _end(task: Task, error: BaseException) -> None:
    task.done(task, failed(error))


def _taken(task: Task, made: Made, process: Process) -> Item | None:
    """Out of the memory of both: into memory of its own, or to its place."""
    values = process.values(made, task.pipeline.steps.dtype)
    if task.places is None:
        return Item(values.copy(), made.length)
    pipeline = task.pipeline
    whole = array(task.places[pipeline.output], pipeline.steps.dtype, (task.items, *pipeline.steps.shape))
    whole[task.index] = values
    if pipeline.length is not None:
        array(task.places[pipeline.length], "INT64", (task.items,))[task.index] = made.length
    return None
