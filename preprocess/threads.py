"""Elements done by threads of the daemon: decoders release the GIL."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from preprocess import stages
from preprocess.errors import ClosedError
from preprocess.tasks import Outcome, StoppedError, Task, failed
from preprocess.work import Local


class Threads:
    """A `tasks.Runner`."""

    def __init__(self, decoder: str, loop: asyncio.AbstractEventLoop, executor: ThreadPoolExecutor) -> None:
        """Raises PipelineError where the decoder cannot be had."""
        self._local = Local(decoder)
        self._loop = loop
        self._executor = executor

    def begin(self, task: Task) -> None:
        future = self._loop.run_in_executor(self._executor, self._outcome, task)
        future.add_done_callback(partial(_tell, task))

    @property
    def pids(self) -> list[int]:
        return []

    def close(self) -> None:
        """Nothing is left: the executor is its owner's."""

    def _outcome(self, task: Task) -> Outcome:
        begun_ns = time.perf_counter_ns()
        if not task.wanted():
            return failed(StoppedError())
        stages.take()
        item, error = None, None
        try:
            if task.places is None:
                item = self._local.read_item(task.pipeline, task.data)
            else:
                self._local.write_item(task.pipeline, task.data, task.index, task.items, task.places)
        except Exception as raised:
            error = raised
        return Outcome(begun_ns, time.perf_counter_ns(), item, error, stages.take())


def _tell(task: Task, future: asyncio.Future[Outcome]) -> None:
    ended = future.cancelled()  # the pool is closed
    task.done(task, failed(ClosedError("preprocessing was ended")) if ended else future.result())
