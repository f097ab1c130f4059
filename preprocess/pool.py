"""Preprocessing off the event loop: a pool of threads, a bounded queue before it, a job a request.

The elements of one request are shared out over the threads that are free. Threads suffice: decoders release the GIL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from preprocess.errors import BadInputError
from preprocess.pipeline import PipelineError, PipelineFile

# Jobs that may wait, a thread. More would only wait longer than any client does.
QUEUE_PER_THREAD = 64


class PoolFullError(RuntimeError):
    """Too many requests wait for preprocessing."""


class StoppedError(RuntimeError):
    """A job was stopped before its end."""


class Job:
    """One request's preprocessing. When `future` has a result no thread writes to its target any more."""

    __slots__ = ("future", "stopped")

    future: asyncio.Future[None]

    def __init__(self) -> None:
        self.stopped = False

    def stop(self) -> None:
        """Nobody waits for it any more: no further element is begun."""
        self.stopped = True


class PreprocessPool:
    """`threads`: cores that preprocessing may use."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="preprocess")
        self._threads = threads
        self._limit = threads * (1 + QUEUE_PER_THREAD)
        self._jobs: set[Job] = set()

    async def prepare(self, pipeline: PipelineFile) -> None:
        """Imports what the pipeline needs, before its first request. Raises PipelineError if that is not installed."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, _import_work)
        except ImportError as error:
            raise PipelineError(
                f"preprocess needs a package that is not there: {error}; pip install 'migserve[torch]'"
            ) from error

    def submit(self, pipeline: PipelineFile, elements: Sequence[bytes], target: memoryview) -> Job:
        """Decodes the elements, one item each, into `target`, which is contiguous.

        `target` must stay valid until the job's future is done. That raises BadInputError, naming the element, or
        StoppedError. Raises PoolFullError at once when too many wait.
        """
        if len(self._jobs) >= self._limit:
            raise PoolFullError(f"{len(self._jobs)} requests wait for preprocessing")
        job = Job()
        loop = asyncio.get_running_loop()
        work = partial(_write_all, job, iter(range(len(elements))), pipeline, elements, target)
        workers = min(self._threads, len(elements))
        parts = [loop.run_in_executor(self._executor, work) for _ in range(workers)]
        job.future = parts[0] if workers == 1 else _all_of(job, parts, loop)
        self._jobs.add(job)
        job.future.add_done_callback(lambda done: self._jobs.discard(job))
        return job

    def close(self) -> None:
        """Ends all jobs and waits for none: their futures are cancelled, though a thread may be at its last element."""
        for job in list(self._jobs):
            job.stop()
            job.future.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)


def _import_work() -> None:
    import preprocess.work  # noqa: F401


def _write_all(
    job: Job, indexes: Iterator[int], pipeline: PipelineFile, elements: Sequence[bytes], target: memoryview
) -> None:
    """Takes elements until there are none; several threads may share `indexes`, whose `next` is one step."""
    from preprocess.work import write_item

    for index in indexes:
        if job.stopped:
            raise StoppedError("nobody waits for it any more")
        try:
            write_item(pipeline, elements[index], index, len(elements), target)
        except BadInputError as error:
            job.stop()
            raise BadInputError(f"input {pipeline.input}, element {index}: {error}") from None
        except BaseException:
            job.stop()
            raise


def _all_of(job: Job, parts: list[asyncio.Future[None]], loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
    """Done once every part is: with the error that stopped the others, if there is one."""
    whole: asyncio.Future[None] = loop.create_future()
    left = len(parts)

    def ended(part: asyncio.Future[None]) -> None:
        nonlocal left
        left -= 1
        if left or whole.done():
            return
        errors = [error for each in parts if not each.cancelled() and (error := each.exception())]
        told = [error for error in errors if not isinstance(error, StoppedError)] or errors
        if told:
            whole.set_exception(told[0])
        else:
            whole.set_result(None)

    for part in parts:
        part.add_done_callback(ended)
    return whole
