"""Preprocessing off the event loop: a pool of threads, one job a request, a bounded queue before it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from preprocess.cpu import BadInputError, decode_image
from preprocess.pipeline import PipelineFile

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
    """Threads suffice: the decoders release the GIL."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="preprocess")
        self._limit = threads * (1 + QUEUE_PER_THREAD)
        self._jobs: set[Job] = set()

    def submit(self, pipeline: PipelineFile, elements: Sequence[bytes], target: memoryview) -> Job:
        """Decodes the elements, one item each, into `target`, FP32 and contiguous.

        `target` must stay valid until the job's future is done. That raises BadInputError, naming the element, or
        StoppedError. Raises PoolFullError at once when too many wait.
        """
        if len(self._jobs) >= self._limit:
            raise PoolFullError(f"{len(self._jobs)} requests wait for preprocessing")
        job = Job()
        loop = asyncio.get_running_loop()
        job.future = loop.run_in_executor(self._executor, _decode_all, job, pipeline, elements, target)
        self._jobs.add(job)
        job.future.add_done_callback(lambda done: self._jobs.discard(job))
        return job

    def close(self) -> None:
        """Ends all jobs and waits for none: their futures are cancelled, though a thread may be at its last element."""
        for job in self._jobs:
            job.stop()
            job.future.cancel()
        self._executor.shutdown(wait=False)


def _decode_all(job: Job, pipeline: PipelineFile, elements: Sequence[bytes], target: memoryview) -> None:
    items = np.frombuffer(target, np.float32).reshape(len(elements), *pipeline.image.shape)
    for index, data in enumerate(elements):
        if job.stopped:
            raise StoppedError("nobody waits for it any more")
        try:
            decode_image(data, pipeline.image, items[index])
        except BadInputError as error:
            raise BadInputError(f"input {pipeline.input}, element {index}: {error}") from None
