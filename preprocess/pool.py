"""Preprocessing off the event loop: a pool of threads, a bounded queue before it, a job a request.

The elements of one request are shared out over the threads that are free. Threads suffice: decoders release the GIL.
What each took is measured, and from that is told in advance how long another one will take.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from preprocess import glance, stages
from preprocess.cost import CostModel, Effort
from preprocess.devices import Target
from preprocess.errors import BadInputError, ClosedError
from preprocess.items import Item
from preprocess.pipeline import PipelineError, PipelineFile
from preprocess.places import Places, write_items

if TYPE_CHECKING:  # it takes torch with it
    from preprocess.isolated import Isolated
    from preprocess.work import Local

# Jobs that may wait, a thread. More would only wait longer than any client does.
QUEUE_PER_THREAD = 64

# Pipelines and formats of which costs are known at once.
MAX_COSTS = 256

Result = TypeVar("Result")


class PoolFullError(RuntimeError):
    """Too many requests wait for preprocessing."""


class StoppedError(RuntimeError):
    """A job was stopped before its end."""


class Job(Generic[Result]):
    """One request's preprocessing: a result for each element.

    When `future` is done no thread writes to the job's places any more. It raises BadInputError, naming the element, or
    StoppedError.
    """

    __slots__ = ("begun_ns", "estimate_ns", "future", "made_ns", "results", "stages_ns", "stopped", "took_ns")

    future: asyncio.Future[list[Result]]

    def __init__(self, estimate_ns: int) -> None:
        self.estimate_ns = estimate_ns  # of all its elements, on one thread
        self.stopped = False
        self.results: dict[int, Result] = {}
        self.took_ns: dict[int, int] = {}  # by element
        self.stages_ns: dict[int, dict[str, int]] = {}  # by element and stage
        self.made_ns = self.begun_ns = time.perf_counter_ns()  # begun: its first element

    def times_ns(self) -> dict[str, int]:
        """By stage, over all its elements; `queue`: until the first one was begun."""
        times = {"queue": self.begun_ns - self.made_ns}
        for stages_ns in self.stages_ns.values():
            for stage, ns in stages_ns.items():
                times[stage] = times.get(stage, 0) + ns
        return times

    def stop(self) -> None:
        """Nobody waits for it any more: no further element is begun."""
        self.stopped = True


class PreprocessPool:
    """`threads`: cores that preprocessing may use, by default all. `decoder`: of pictures, see cards.py. `isolated`:
    each thread has a process that does its work, so that what a native decoder dies of costs no more than that.
    `arena`: file descriptor and memory of where places mostly are: processes then write there themselves.
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
        self._runners: dict[Target, Local | Isolated] = {}
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
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._prepare, pipeline)
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
            for pid in getattr(runner, "pids", ())
        ]

    def _prepare(self, pipeline: PipelineFile) -> None:
        self._ready(pipeline)
        if pipeline.text is not None:  # also where processes have it: its file is looked at here
            from preprocess import text

            text.load(pipeline.text)

    def _ready(self, pipeline: PipelineFile) -> Local | Isolated:
        """In a thread: torch takes a second to import, a process as long to start."""
        with self._starting:
            target = self._targets.get(pipeline, self._own)
            if target not in self._runners:
                self._runners[target] = self._new_runner(target)
            return self._runners[target]

    def _new_runner(self, target: Target) -> Local | Isolated:
        if self._isolated:
            from preprocess import isolated

            seen = [{"CUDA_VISIBLE_DEVICES": uuid} for uuid in target.uuids]
            arena = None if self._arena is None else isolated.Arena(*self._arena)
            return isolated.Isolated(self._threads, target.decoder, seen, self._start or isolated.start, arena)
        from preprocess.work import Local

        return Local(target.decoder)

    def _do(self, pipeline: PipelineFile, element: Callable[[Local | Isolated], Result]) -> Result:
        """By whoever is to; by the CPU where that one has had to go meanwhile."""
        runner = self._ready(pipeline)
        try:
            return element(runner)
        except ClosedError:
            return element(self._ready(pipeline))

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

        def work(index: int) -> None:
            self._do(pipeline, lambda by: by.write_item(pipeline, elements[index], index, len(elements), places))

        return self._begin_all(pipeline, elements, work)

    def read(self, pipeline: PipelineFile, elements: Sequence[bytes]) -> Job[Item]:
        """For what varies in length: the elements in memory of their own. Raises PoolFullError."""

        def work(index: int) -> Item:
            return self._do(pipeline, lambda by: by.read_item(pipeline, elements[index]))

        return self._begin_all(pipeline, elements, work)

    def place(self, pipeline: PipelineFile, items: Sequence[Item], length: int, places: Places) -> Job[None]:
        """What `read` gave into `places`, each filled up to `length`. Never refused: its request was taken on."""

        def work(_: int) -> None:
            write_items(pipeline, items, length, places)

        return self._begin(pipeline, Job(0), 1, work)

    def _begin_all(
        self, pipeline: PipelineFile, elements: Sequence[bytes], work: Callable[[int], Result]
    ) -> Job[Result]:
        if len(self._jobs) >= self._limit:
            raise PoolFullError(f"{len(self._jobs)} requests wait for preprocessing")
        efforts = _efforts(pipeline, elements)
        costs = [self._cost(pipeline, effort) for effort in efforts]
        job: Job[Result] = Job(sum(cost.estimate_ns(effort) for cost, effort in zip(costs, efforts, strict=True)))
        self._begin(pipeline, job, len(elements), work)
        job.future.add_done_callback(partial(_learn, job, costs, efforts))
        return job

    def _begin(
        self, pipeline: PipelineFile, job: Job[Result], elements: int, work: Callable[[int], Result]
    ) -> Job[Result]:
        loop = asyncio.get_running_loop()
        part = partial(_work_off, job, pipeline.input, iter(range(elements)), work)
        parts = [loop.run_in_executor(self._executor, part) for _ in range(min(self._threads, elements))]
        job.future = loop.create_future()
        _when_all_are_done(parts, partial(_conclude, job))
        self._jobs.add(job)
        self._queued_ns += job.estimate_ns
        job.future.add_done_callback(partial(self._done, job))
        return job

    def _done(self, job: Job[Result], future: asyncio.Future[list[Result]]) -> None:
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
        for job in list(self._jobs):
            job.stop()
            job.future.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)
        for runner in list(self._runners.values()):
            runner.close()


def _efforts(pipeline: PipelineFile, elements: Sequence[bytes]) -> list[Effort]:
    if pipeline.text is not None:
        return [Effort("text", len(data), 0) for data in elements]
    look = glance.picture if pipeline.image is not None else glance.clip
    return [look(data) for data in elements]


def _learn(job: Job[Result], costs: list[CostModel], efforts: list[Effort], future: asyncio.Future[object]) -> None:
    """Of elements that came to their end: what is refused early would teach that the rest is cheap."""
    for index in job.results:
        costs[index].learn(efforts[index], job.took_ns[index])


def _work_off(job: Job[Result], name: str, indexes: Iterator[int], work: Callable[[int], Result]) -> None:
    """Takes elements until there are none; several threads may share `indexes`, whose `next` is one step."""
    for index in indexes:
        if job.stopped:
            raise StoppedError("nobody waits for it any more")
        begin_ns = time.perf_counter_ns()
        if not index:
            job.begun_ns = begin_ns
        stages.take()
        try:
            result = work(index)
        except BadInputError as error:
            job.stop()
            raise BadInputError(f"input {name}, element {index}: {error}") from None
        except BaseException:
            job.stop()
            raise
        job.took_ns[index] = time.perf_counter_ns() - begin_ns
        job.stages_ns[index] = stages.take()
        job.results[index] = result


def _when_all_are_done(
    parts: list[asyncio.Future[None]], conclude: Callable[[list[asyncio.Future[None]]], None]
) -> None:
    left = len(parts)

    def ended(part: asyncio.Future[None]) -> None:
        nonlocal left
        left -= 1
        if not left:
            conclude(parts)

    for part in parts:
        part.add_done_callback(ended)


def _conclude(job: Job[Result], parts: list[asyncio.Future[None]]) -> None:
    """With the error that stopped the others, if there is one."""
    errors = [error for part in parts if not part.cancelled() and (error := part.exception())]
    if job.future.done():
        return  # the pool is closed
    told = [error for error in errors if not isinstance(error, StoppedError)] or errors
    if told:
        job.future.set_exception(told[0])
    else:
        job.future.set_result([job.results[index] for index in sorted(job.results)])
