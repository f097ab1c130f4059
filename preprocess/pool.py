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


class PreprocessPool:
    """Threads suffice: the decoders release the GIL."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="preprocess")
        self._limit = threads * (1 + QUEUE_PER_THREAD)
        self._jobs = 0

    def submit(self, pipeline: PipelineFile, elements: Sequence[bytes], target: memoryview) -> asyncio.Future[None]:
        """Decodes the elements, one item each, into `target`, FP32 and contiguous.

        `target` must stay valid until the future is done. It raises BadInputError, naming the element.
        Raises PoolFullError at once when too many wait.
        """
        if self._jobs >= self._limit:
            raise PoolFullError(f"{self._jobs} requests wait for preprocessing")
        self._jobs += 1
        future = asyncio.get_running_loop().run_in_executor(self._executor, _decode_all, pipeline, elements, target)
        future.add_done_callback(self._finished)
        return future

    def _finished(self, future: asyncio.Future[None]) -> None:
        self._jobs -= 1

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def _decode_all(pipeline: PipelineFile, elements: Sequence[bytes], target: memoryview) -> None:
    items = np.frombuffer(target, np.float32).reshape(len(elements), *pipeline.image.shape)
    for index, data in enumerate(elements):
        try:
            decode_image(data, pipeline.image, items[index])
        except BadInputError as error:
            raise BadInputError(f"input {pipeline.input}, element {index}: {error}") from None
