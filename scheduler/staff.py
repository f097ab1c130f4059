"""A place for a worker process, as the fleet sees it, and who is told of what workers do."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from multiprocessing.context import ForkServerProcess
from typing import Protocol, TypeVar

from partitioner.geometry import Slice
from scheduler import channel
from scheduler.arena import SharedMemory
from scheduler.channel import Done, Failed, Loaded, LoadFailed

T = TypeVar("T")

# A worker that has died this often within the window stays out.
CRASHES = 5
CRASH_WINDOW_S = 120.0


class State(StrEnum):
    """`draining`: its slice is about to go. `out`: it died too often, or went with its slice."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    OUT = "out"
    STOPPED = "stopped"


class DiedError(Exception):
    """The worker died while something waited for it."""


class Listener(Protocol):
    """Told of what workers do; the driver."""

    def worker_up(self, worker_id: int, where: Slice, depth: int) -> None: ...
    def worker_lost(self, worker_id: int, detail: str, *, comes_back: bool, batch_ids: list[int]) -> None: ...
    def drains(self, worker_id: int) -> None: ...
    def serves(
        self, worker_id: int, key: str, latency_ns: tuple[int, ...], weight: float, lengths: tuple[int, ...] = ()
    ) -> None: ...
    def stops_serving(self, worker_id: int, key: str) -> None: ...
    def batch_done(self, worker_id: int, done: Done, outbox: memoryview) -> None: ...
    def batch_failed(self, worker_id: int, failed: Failed) -> None: ...


class Lodger(Protocol):
    """Somebody beside the workers who has processes on slices."""

    def pids(self, device_uuid: str | None = None) -> list[int]: ...
    async def leave(self, slices: Sequence[Slice]) -> None: ...
    async def settle(self) -> None: ...


@dataclass(eq=False)
class Worker:
    """One place for a worker process, over all its lives."""

    id: int
    where: Slice
    index: int  # among the workers of its slice
    outbox: SharedMemory
    state: State = State.STARTING
    reason: str = ""
    starts: int = 0
    crashes: deque[float] = field(default_factory=lambda: deque(maxlen=CRASHES))
    process: ForkServerProcess | None = None
    channel: channel.DaemonEnd | None = None
    ready: asyncio.Future[None] | None = None
    restart: asyncio.Task[None] | None = None
    retiring: bool = False
    quiet: asyncio.Future[None] | None = None  # while it drains: until nothing runs any more
    loading: dict[str, asyncio.Future[Loaded | LoadFailed]] = field(default_factory=dict)
    serving: set[str] = field(default_factory=set)
    running: dict[int, float] = field(default_factory=dict)  # batch id -> when it was sent

    @property
    def name(self) -> str:
        return self.where.name if self.index == 0 else f"{self.where.name}#{self.index}"

    @property
    def measured_as(self) -> str:
        """Workers of one kind share their measured latency tables."""
        return "cpu" if self.where.simulated else self.where.mig_profile or self.where.gpu_name

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    def batch_ended(self, batch_id: int) -> None:
        self.running.pop(batch_id, None)
        if not self.running:
            resolve(self.quiet, None)

    def let_go(self, detail: str) -> list[int]:
        """After its end: nobody waits for it any more. Returns the ids of the batches that it did not finish."""
        batch_ids = list(self.running)
        self.running.clear()
        self.serving.clear()
        for future in [self.ready, *self.loading.values()]:
            if future is not None and not future.done():
                future.set_exception(DiedError(detail))
                future.exception()  # seen: nobody need wait for it
        self.loading.clear()
        resolve(self.quiet, None)
        return batch_ids


def resolve(future: asyncio.Future[T] | None, value: T) -> None:
    """Sets a result that nobody may be waiting for any more."""
    if future is not None and not future.done():
        future.set_result(value)
