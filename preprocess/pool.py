"""Preprocessing off the event loop: processes or threads do it, a job a request, and not more jobs than may wait.

The elements of one request are shared out over those that are free (`isolated.py`, `threads.py`). What each took is
measured, and from that is told in advance how long another one will take.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from preprocess import glance
from preprocess.copying import by_size
from preprocess.cost import CostModel, Effort
from preprocess.devices import Target
from preprocess.errors import BadInputError, ClosedError
from preprocess.items import Item
from preprocess.pipeline import PipelineError, PipelineFile
from preprocess.places import Places, write_items
from preprocess.tasks import Outcome, Runner, StoppedError, Task, failed

# Jobs that may wait, a thread. More would only wait longer than any client does.
QUEUE_PER_THREAD = 64

# Pipelines and formats of which costs are known at once.
MAX_COSTS = 256

Result = TypeVar("Result")


class PoolFullError(RuntimeError):
    """Too many requests wait for preprocessing."""


class Job(Generic[Result]):
    """One request's preprocessing: a result for each element.

    When `future` is done nobody writes to the job's places any more. It raises BadInputError, naming the element, or
    StoppedError.
    """

    __slots__ = ("_error", "_left", "_made_ns", "estimate_ns", "future", "outcomes", "stopped")

    def __init__(self, future: asyncio.Future[list[Result]], elements: int, estimate_ns: int) -> None:
        self.future = future
        self.estimate_ns = estimate_ns  # of all its elements, on one thread
        self.stopped = False
        self.outcomes: dict[int, Outcome] = {}  # of elements without an error
        self._left = elements  # that have not ended
        self._error: BaseException | None = None  # the first one
        self._made_ns = time.perf_counter_ns()

    def times_ns(self) -> dict[str, int]:
        """Of one that is done. By stage, over all its elements; `queue`: until the first one was begun."""
        times = {"queue": self.outcomes[0].begun_ns - self._made_ns}
        for outcome in self.outcomes.values():
            for stage, ns in outcome.stages_ns.items():
                times[stage] = times.get(stage, 0) + ns
        return times

    def stop(self) -> None:
        """Nobody waits for it any more: no further element is begun."""
        self.stopped = True

    def is_wanted(self) -> bool:
        return not self.stopped

    def end(self, index: int, outcome: Outcome) -> None:
        """Of one element. The first error stops the others, and is told once all have ended."""
        if outcome.error is None:
            self.outcomes[index] = outcome
        else:
            self.stop()
            if self._error is None or isinstance(self._error, StoppedError):
                self._error = outcome.error
        self._left -= 1
        if self._left or self.future.done():  # done: cancelled, the pool is closed
            return
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            results: list[Any] = [self.outcomes[each].item for each in range(len(self.outcomes))]
            self.future.set_result(results)


class PreprocessPool:
    """`threads`: cores that preprocessing may use, by default all. `decoder`: of pictures, see cards.py. `isolated`: so
    many processes do the work, so that what a native decoder dies of costs no more than one of them. `arena`: file
    descriptor and memory of where places mostly are: processes then write there themselves.
    """

    def __init__(
        self,
        threads: int | None,
        decoder: str = "cpu",
        *,
        isolated: bool = False,
        start: Callable[..., BaseProcess] | None = None,
        arena: tuple[int, memoryview] | None = None,
    ) -> None:
        threads = threads or os.cpu_count() or 1
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="preprocess")
        self._threads = threads
        self._own = Target(decoder)
        self._isolated = isolated
        self._start = start  # of processes
        self._arena = arena
        self._closed = False
        self._runners: dict[Target, Runner] = {}
        self._targets: dict[PipelineFile, Target] = {}  # of pipelines whose target is not the pool's own
        self._starting = threading.Lock()
        self._limit = threads * (1 + QUEUE_PER_THREAD)
        self._jobs: set[Job[Any]] = set()
        self._queued_ns = 0  # estimate of what is not done yet
        self._costs: dict[tuple[PipelineFile, str], CostModel] = {}

    async def prepare(self, pipeline: PipelineFile, target: Target | None = None) -> None:
        """Gets ready what a pipeline needs, before its first request. Raises PipelineError if that cannot be had.

        `target`: who decodes its pictures from now on; None: the pool's own decoder.
        """
        self._targets[pipeline] = self._own if target is None else target
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._executor, self._prepare, pipeline, loop)
        except ImportError as error:
            raise PipelineError(
                f"preprocess needs a package that is not there: {error}; pip install 'migserve[torch,text]'"
            ) from error

    def leave(self, uuids: Collection[str]) -> None:
        """Ends all processes that hold one of these devices; what they did is done by the CPU from now on. Blocks."""
        with self._starting:  # what is being started is waited for
            for pipeline, target in list(self._targets.items()):
                if not set(uuids).isdisjoint(target.uuids):
                    self._targets[pipeline] = Target()
            gone = [each for each in self._runners if not set(uuids).isdisjoint(each.uuids)]
            runners = [self._runners.pop(target) for target in gone]
        for runner in runners:
            runner.close()

    def pids(self, device_uuid: str | None = None) -> list[int]:
        """Of its processes, all or those on one device."""
        return [
            pid
            for target, runner in list(self._runners.items())
            if device_uuid is None or device_uuid in target.uuids
            for pid in runner.pids
        ]

    def _prepare(self, pipeline: PipelineFile, loop: asyncio.AbstractEventLoop) -> None:
        self._start_runner(pipeline, loop)
        if pipeline.text is not None:  # also where processes have it: its file is looked at here
            from preprocess import text

            text.load(pipeline.text)

    def _start_runner(self, pipeline: PipelineFile, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: torch takes a second to import, a process as long to start."""
        with self._starting:
            target = self._target(pipeline)
            if target not in self._runners:
                runner = self._runners[target] = self._new_runner(target, loop)
                if self._closed:  # meanwhile, and close() may not have seen it
                    runner.close()

    def _new_runner(self, target: Target, loop: asyncio.AbstractEventLoop) -> Runner:
        if self._isolated:
            from preprocess import process
            from preprocess.isolated import Isolated

            seen = [{"CUDA_VISIBLE_DEVICES": uuid} for uuid in target.uuids]
            arena = None if self._arena is None else process.Arena(*self._arena)
            start = self._start or process.start
            return Isolated(self._threads, target.decoder, loop, self._executor, start, seen, arena)
        from preprocess.threads import Threads

        return Threads(target.decoder, loop, self._executor)

    def _target(self, pipeline: PipelineFile) -> Target:
        return self._targets.get(pipeline, self._own)

    @property
    def threads(self) -> int:
        return self._threads

    @property
    def waiting(self) -> int:
        """Jobs that are not done."""
        return len(self._jobs)

    def estimate_ns(self, pipeline: PipelineFile, elements: Sequence[bytes]) -> int:
        """How long until a request that is submitted now would be done: what waits before it, and itself."""
        own_ns = sum(self._cost(pipeline, effort).estimate_ns(effort) for effort in _efforts(pipeline, elements))
        return self._queued_ns // self._threads + own_ns // min(self._threads, len(elements))

    def write(self, pipeline: PipelineFile, elements: Sequence[bytes], places: Places) -> Job[None]:
        """For what does not vary in length: the elements, one item each, into `places`.

        These must stay valid until the job is done. Raises PoolFullError at once when too many wait.
        """
        return self._begin_all(pipeline, elements, places)

    def read(self, pipeline: PipelineFile, elements: Sequence[bytes]) -> Job[Item]:
        """For what varies in length: the elements in memory of their own. Raises PoolFullError."""
        return self._begin_all(pipeline, elements, None)

    def place(self, pipeline: PipelineFile, items: Sequence[Item], length: int, places: Places) -> Job[None]:
        """What `read` gave into `places`, each filled up to `length`. Never refused: its request was taken on."""
        job: Job[None] = self._new_job(1, 0)
        nbytes = sum(place.nbytes for place in places.values())
        write = partial(write_items, pipeline, items, length, places)
        by_size(asyncio.get_running_loop(), self._executor, nbytes, write, partial(_placed, job))
        return job

    def _begin_all(self, pipeline: PipelineFile, elements: Sequence[bytes], places: Places | None) -> Job[Any]:
        if len(self._jobs) >= self._limit:
            raise PoolFullError(f"{len(self._jobs)} requests wait for preprocessing")
        efforts = _efforts(pipeline, elements)
        costs = [self._cost(pipeline, effort) for effort in efforts]
        estimate_ns = sum(cost.estimate_ns(effort) for cost, effort in zip(costs, efforts, strict=True))
        job = self._new_job(len(elements), estimate_ns)
        job.future.add_done_callback(partial(_learn, job, costs, efforts))
        ended = partial(self._ended, job)
        for index, data in enumerate(elements):
            self._give(Task(pipeline, data, index, len(elements), places, job.is_wanted, ended))
        return job

    def _new_job(self, elements: int, estimate_ns: int) -> Job[Any]:
        job: Job[Any] = Job(asyncio.get_running_loop().create_future(), elements, estimate_ns)
        self._jobs.add(job)
        self._queued_ns += estimate_ns
        job.future.add_done_callback(partial(self._done, job))
        return job

    def _give(self, task: Task) -> None:
        runner = self._runners.get(self._target(task.pipeline))
        if runner is not None:
            runner.begin(task)
            return
        loop = asyncio.get_running_loop()
        starting = loop.run_in_executor(self._executor, self._start_runner, task.pipeline, loop)
        starting.add_done_callback(partial(self._give_when_started, task))

    def _give_when_started(self, task: Task, starting: asyncio.Future[None]) -> None:
        if starting.cancelled():
            return  # the pool is closed
        if error := starting.exception():
            task.done(task, failed(error))
        else:
            self._give(task)

    def _ended(self, job: Job[Any], task: Task, outcome: Outcome) -> None:
        error = outcome.error
        if isinstance(error, ClosedError) and not self._closed:
            self._give(task)  # to whoever does what those did that had to go
        elif isinstance(error, BadInputError):
            told = BadInputError(f"input {task.pipeline.input}, element {task.index}: {error}")
            job.end(task.index, outcome._replace(error=told))
        else:
            job.end(task.index, outcome)

    def _done(self, job: Job[Any], future: asyncio.Future[list[Any]]) -> None:
        job.stop()  # a future that its owner has cancelled: nobody waits any more
        self._jobs.discard(job)
        self._queued_ns -= job.estimate_ns

    def _cost(self, pipeline: PipelineFile, effort: Effort) -> CostModel:
        key = pipeline, effort.format
        cost = self._costs.get(key)
        if cost is None:
            if len(self._costs) >= MAX_COSTS:
                self._costs.clear()  # models come and go
            cost = self._costs[key] = CostModel()
        return cost

    def close(self) -> None:
        """Ends all jobs and waits for none: their futures are cancelled, though a thread may be at its last element."""
        self._closed = True
        for job in list(self._jobs):
            job.stop()
            job.future.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)
        for runner in list(self._runners.values()):
            runner.close()


def _efforts(pipeline: PipelineFile, elements: Sequence[bytes]) -> list[Effort]:
    if pipeline.image is not None:
        return [glance.picture(data, pipeline.image.max_pixels) for data in elements]
    if pipeline.audio is not None:
        return [glance.clip(data, pipeline.audio.seconds or pipeline.audio.max_seconds) for data in elements]
    return [Effort("text", len(data), 0) for data in elements]


def _placed(job: Job[None], _: None, error: BaseException | None) -> None:
    now_ns = time.perf_counter_ns()
    job.end(0, Outcome(now_ns, now_ns, error=error))


def _learn(job: Job[Result], costs: list[CostModel], efforts: list[Effort], future: asyncio.Future[object]) -> None:
    """Of elements that came to their end: what is refused early would teach that the rest is cheap."""
    for index, outcome in job.outcomes.items():
        costs[index].learn(efforts[index], outcome.ended_ns - outcome.begun_ns)
