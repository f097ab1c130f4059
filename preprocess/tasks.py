"""One element of a request, on its way through whoever does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from preprocess.items import Item
from preprocess.pipeline import PipelineFile
from preprocess.places import Places


class Outcome(NamedTuple):
    """What became of an element. `item`: None where it was written to its place, or where there is an `error`.

    Times of time.perf_counter_ns; `stages_ns`: how long each stage took.
    """

    begun_ns: int
    ended_ns: int
    item: Item | None = None
    error: BaseException | None = None
    stages_ns: Mapping[str, int] = {}


def failed(error: BaseException) -> Outcome:
    """Of an element that nobody has begun, or is at any more."""
    now_ns = time.perf_counter_ns()
    return Outcome(now_ns, now_ns, error=error)


@dataclass(slots=True, eq=False)
class Task:
    """Element `index` of `items`. `places`: where it goes; None where it is read, into memory of its own.

    `wanted`: whether somebody still waits for it, asked before it is begun. `done`: told once, on the loop's thread;
    nothing is written to its places after that. `deaths`: of processes that were at it.
    """

    pipeline: PipelineFile
    data: bytes
    index: int
    items: int
    places: Places | None
    wanted: Callable[[], bool]
    done: Callable[[Task, Outcome], Any]
    deaths: int = 0


class StoppedError(RuntimeError):
    """Nobody waits for it any more."""


class Runner(Protocol):
    """Who does the elements of pipelines."""

    def begin(self, task: Task) -> None:
        """On the loop's thread."""

    @property
    def pids(self) -> list[int]:
        """Of its processes."""

    def close(self) -> None:
        """Ends it; what it has not done ends with ClosedError. Blocks; from any thread."""
