"""Copying of what may be large: in between where it is quick, by a thread where it would hold up the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

# Takes a tenth of a millisecond, about.
QUICK_BYTES = 1 << 20

Result = TypeVar("Result")


def by_size(
    loop: asyncio.AbstractEventLoop,
    executor: Executor,
    nbytes: int,
    copy: Callable[[], Result],
    then: Callable[[Result | None, BaseException | None], None],
) -> None:
    """Calls `copy`, and `then`, on the loop's thread, with its result or its error; never if the executor is shut down
    meanwhile.
    """
    if nbytes > QUICK_BYTES:
        copying = loop.run_in_executor(executor, copy)
        copying.add_done_callback(lambda done: None if done.cancelled() else then(*_told(done.result)))
    else:
        then(*_told(copy))


def _told(result: Callable[[], Result]) -> tuple[Result | None, BaseException | None]:
    try:
        return result(), None
    except Exception as error:
        return None, error
