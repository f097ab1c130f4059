"""Simulated GPUs that are lived on: workers, the scheduler's core over them, and requests that must not be lost."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from partitioner.geometry import Slice, parse_layout
from partitioner.intent import IntentFile
from partitioner.nvml import NvmlDoor
from partitioner.reconfigure import Outcome, Reconfigurer
from partitioner.simulated_nvml import SimulatedNvml, parse_gpus
from partitioner.tenants import TenantsError
from scheduler.core import SchedulerCore
from scheduler.messages import (
    Answer,
    AnyEvent,
    Arrived,
    BatchDone,
    Drains,
    Refuse,
    Request,
    Run,
    Serves,
    WorkerLost,
    WorkerUp,
)

MS = 1_000_000
TABLE = tuple(MS * items for items in range(1, 9))


class Lodgers:
    """One worker on each slice, which holds its device until it is drained, and the scheduler's core over them.

    Requests come at every step. `rejects`: names of slices that no worker comes up on.
    """

    def __init__(self) -> None:
        self.rejects: set[str] = set()
        self.open: set[int] = set()  # neither answered nor refused
        self.refused: list[Refuse] = []
        self._core = SchedulerCore()
        self._now_ns = 0
        self._sent = 0
        self._workers: dict[Slice, int] = {}
        self._running: dict[int, int] = {}  # batch -> worker
        self._retired: list[int] = []
        self._next_worker = 0

    def move_in(self, each: Slice) -> None:
        self._workers[each] = self._next_worker
        self._next_worker += 1
        self._tell(WorkerUp(self._workers[each], each.gpcs, 1))
        self._tell(Serves(self._workers[each], "m", TABLE))

    def ask(self, count: int = 3) -> None:
        """Requests come."""
        for _ in range(count):
            self._sent += 1
            self.open.add(self._sent)
            self._tell(Arrived(Request(self._sent, "m", 1)))

    def finish(self) -> None:
        """Everything that runs, or comes to run, ends."""
        while self._running:
            self._end(next(iter(self._running)))

    def on(self, device_uuid: str) -> Sequence[int]:
        return [os.getpid()] if any(each.device_uuid == device_uuid for each in self._workers) else []

    @asynccontextmanager
    async def recut(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            for worker in self._retired:
                self._tell(WorkerLost(worker, False, "re-cut"))
            self._retired.clear()

    async def drain(self, slices: Sequence[Slice]) -> None:
        self.ask()
        for each in [each for each in slices if each in self._workers]:
            worker = self._workers.pop(each)
            self._tell(Drains(worker))
            for batch in [batch for batch, on in self._running.items() if on == worker]:
                self._end(batch)
            self._tell(WorkerLost(worker, True, "re-cut"))
            self._retired.append(worker)

    async def admit(self, slices: Sequence[Slice]) -> None:
        for each in slices:
            assert each not in self._workers, "admitted twice"
            if each.name in self.rejects:
                raise TenantsError(f"no worker came up on {each.name}")
            self.ask()
            self.move_in(each)

    def homes(self) -> list[Slice]:
        return list(self._workers)

    def pids(self) -> list[int]:
        return [os.getpid()]

    def unserved(self) -> list[str]:
        return [] if self._workers else ["everything"]

    def _end(self, batch: int) -> None:
        self._tell(BatchDone(self._running.pop(batch), batch))

    def _tell(self, event: AnyEvent) -> None:
        self._now_ns += MS
        for command in self._core.handle(self._now_ns, event):
            match command:
                case Run():
                    assert command.worker_id in self._workers.values(), "sent to a worker that is gone"
                    self._running[command.batch_id] = command.worker_id
                case Answer():
                    self.open.difference_update(command.request_ids)
                case Refuse():
                    self.open.remove(command.request_id)
                    self.refused.append(command)


class Machine:
    """Simulated GPUs with lodgers on every slice, unless they are to be `empty`."""

    def __init__(
        self, gpus: str = "A100-80GB", layout: str | None = None, folder: Path | None = None, *, empty: bool = False
    ) -> None:
        self.lodgers = Lodgers()
        state = folder / "gpus.json" if folder is not None else None
        self.nvml = SimulatedNvml(parse_gpus(gpus, layout), clients=self.lodgers.on, state_file=state)
        self.door = NvmlDoor(self.nvml, simulated=True, sleep=lambda seconds: None, root=Path("/nonexistent"))
        self.intents = IntentFile(folder / "recut.json") if folder is not None else None
        self.reconfigurer = Reconfigurer(self.door, self.lodgers, self.intents)
        if not empty:
            for each in self.slices():
                self.lodgers.move_in(each)
            self.lodgers.ask(20)
        self.gpus = self.door.gpus()
        self.uuids = [gpu.uuid for gpu in self.gpus]

    def slices(self) -> list[Slice]:
        return [each for gpu in self.door.gpus() for each in gpu.slices]

    def layout(self) -> list[str]:
        return [each.name for each in self.slices()]

    def apply(self, *layouts: str) -> Outcome:
        wanted = {}
        for gpu, layout in zip(self.gpus, layouts, strict=True):
            assert gpu.model is not None
            wanted[gpu.uuid] = [placed.profile for placed in parse_layout(layout, gpu.model)]
        return asyncio.run(self.reconfigurer.apply(wanted))

    def check(self) -> None:
        """No GPU instance without compute instance; lodgers on exactly the slices that there are; no request lost."""
        assert all(each.ci_ids for uuid in self.uuids for each in self.door.instances(uuid))
        assert sorted(each.name for each in self.lodgers.homes()) == sorted(self.layout())
        self.lodgers.ask()
        self.lodgers.finish()
        assert not self.lodgers.open, "requests that never end"
        assert not self.lodgers.refused, "requests refused, though somebody served all the time or came back"
