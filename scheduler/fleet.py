"""The worker processes: started, given models, watched, restarted, stopped.

One worker process a slice, or several. A worker that dies is started again with a growing pause; one that
dies too often stays out, with the reason.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from multiprocessing.context import ForkServerProcess
from typing import Any, NamedTuple, Protocol

import structlog

from partitioner import latency
from partitioner.geometry import Slice
from scheduler import channel, spawn
from scheduler.arena import Arena, Descriptor, SharedMemory
from scheduler.channel import Done, Failed, Load, Loaded, LoadFailed, ModelSource, Ready, RunBatch, Unload
from scheduler.tensors import Signature
from scheduler.worker import WorkerStart

log = structlog.get_logger(__name__)

Points = tuple[tuple[int, float], ...]

# A worker that has died this often within the window stays out.
CRASHES = 5
CRASH_WINDOW_S = 120.0
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0
# A model whose loading has killed this many workers is given up.
CRASHES_PER_LOAD = 2
START_TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 1.0


class ModelUnservableError(RuntimeError):
    """No worker could load the model. The message says why."""


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    OUT = "out"
    STOPPED = "stopped"


class LoadedModel(NamedTuple):
    """A model that at least one worker serves."""

    signature: Signature
    measured_ms: dict[str, Points]  # by kind of worker; empty where the latencies were given


class Listener(Protocol):
    """Told of what workers do; the driver."""

    def worker_up(self, worker_id: int, where: Slice, depth: int) -> None: ...
    def worker_lost(self, worker_id: int, detail: str, *, comes_back: bool, batch_ids: list[int]) -> None: ...
    def serves(self, worker_id: int, key: str, latency_ns: tuple[int, ...]) -> None: ...
    def stops_serving(self, worker_id: int, key: str) -> None: ...
    def batch_done(self, worker_id: int, done: Done, outbox: memoryview) -> None: ...
    def batch_failed(self, worker_id: int, failed: Failed) -> None: ...


@dataclass
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


class _DiedError(Exception):
    """The worker died while something waited for it."""


class Fleet:
    """All workers. Every method runs on the event loop's thread."""

    def __init__(
        self,
        slices: Sequence[Slice],
        arena: Arena,
        *,
        workers_per_slice: int = 1,
        threads_per_worker: int = 1,
        outbox_bytes: int = 256 * 1024 * 1024,
        batch_timeout_s: float = 60.0,
    ) -> None:
        self._arena = arena
        self._threads = threads_per_worker
        self._batch_timeout_s = batch_timeout_s
        places = [(where, index) for where in slices for index in range(workers_per_slice)]
        self.workers = [
            Worker(worker_id, where, index, SharedMemory("migserve-outbox", outbox_bytes))
            for worker_id, (where, index) in enumerate(places)
        ]
        self._models: dict[str, ModelSource] = {}  # wanted
        self._proven: set[str] = set()  # of these, what some worker has loaded without dying of it
        self._measured: dict[tuple[str, str], Points] = {}  # (model key, kind of worker)
        self._listener: Listener | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    # ---- life ----

    async def start(self, listener: Listener) -> None:
        """Starts every worker process; returns when all are up or have failed to be."""
        self._listener = listener
        await asyncio.gather(*(self._bring_up(each) for each in self.workers))
        self._spawn(self._watch())

    async def stop(self, timeout_s: float) -> None:
        """Closes the channels, so that workers end, and kills what has not ended in time."""
        self._stopping = True
        for task in list(self._tasks):
            task.cancel()
        for each in self.workers:
            each.state = State.STOPPED
            self._close_channel(each)
        processes = [each.process for each in self.workers if each.process is not None]
        deadline = time.monotonic() + timeout_s
        for process in processes:
            await asyncio.to_thread(process.join, max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                await asyncio.to_thread(process.join)
        for each in self.workers:
            each.outbox.close()

    def send(self, worker_id: int, batch: RunBatch) -> None:
        """Hands a batch to a worker. If it is gone, its end is noticed and told by itself."""
        target = self.workers[worker_id]
        target.running[batch.batch_id] = time.monotonic()
        self._send(target, batch)

    # ---- models ----

    async def load(self, source: ModelSource) -> LoadedModel:
        """Loads a model on all its workers. Raises ModelUnservableError if none can.

        Of each kind of worker one goes first and measures; the others take over its latency table.
        """
        groups: dict[str, list[Worker]] = {}
        for each in self.workers:
            if not source.mig_profiles or each.where.mig_profile in source.mig_profiles:
                groups.setdefault(each.measured_as, []).append(each)
        if not groups:
            raise ModelUnservableError(f"no slice has one of the MIG profiles {', '.join(source.mig_profiles)}")
        self._models[source.key] = source
        results = await asyncio.gather(*(self._load_group(source, group) for group in groups.values()))
        loaded = [result for result in results if isinstance(result, Loaded)]
        if not loaded:
            self._forget(source.key)
            raise ModelUnservableError("; ".join(sorted({str(result) for result in results})))
        tables = {kind: self._measured[source.key, kind] for kind in groups if (source.key, kind) in self._measured}
        return LoadedModel(loaded[0].signature, tables)

    def unload(self, key: str) -> None:
        """Takes a model off every worker. Its requests must have ended."""
        self._forget(key)
        for each in self.workers:
            if key in each.serving:
                each.serving.discard(key)
                self._told.stops_serving(each.id, key)
                self._send(each, Unload(key))

    def serving(self, key: str) -> list[Worker]:
        return [each for each in self.workers if key in each.serving and each.state == State.READY]

    def _forget(self, key: str) -> None:
        self._models.pop(key, None)
        self._proven.discard(key)
        for measured in [measured for measured in self._measured if measured[0] == key]:
            del self._measured[measured]

    async def _load_group(self, source: ModelSource, group: list[Worker]) -> Loaded | str:
        """Loads on workers of one kind. Returns one result, or why there is none."""
        reason = "no worker is up"
        up = [each for each in group if each.state == State.READY]
        for first in up[:CRASHES_PER_LOAD]:
            try:
                result = await self._load_on(source, first)
            except _DiedError as died:
                reason = f"loading it killed the worker on {first.name}: {died}"
                continue
            if isinstance(result, LoadFailed):
                return result.detail
            self._proven.add(source.key)
            await asyncio.gather(*(self._load_on_again(source, each) for each in group if each is not first))
            return result
        return reason

    async def _load_on_again(self, source: ModelSource, each: Worker) -> None:
        """Loads what another worker has loaded before; a failure costs this worker only."""
        try:
            result = await self._load_on(source, each)
        except _DiedError:
            return  # restarting: it will load everything by itself
        if isinstance(result, LoadFailed):
            log.warning("model not loaded here", model=source.name, worker=each.name, reason=result.detail)
            self._told.stops_serving(each.id, source.key)

    async def _load_on(self, source: ModelSource, each: Worker) -> Loaded | LoadFailed:
        """Raises _DiedError when the worker does, or is not up."""
        if each.state != State.READY:
            raise _DiedError(each.reason or each.state)
        future = asyncio.get_running_loop().create_future()
        each.loading[source.key] = future
        self._send(each, Load(source, self._known_latency(source, each)))
        result: Loaded | LoadFailed = await future
        if source.key not in self._models:
            self._send(each, Unload(source.key))  # unloaded while a restarted worker was loading it
        elif isinstance(result, Loaded):
            if source.latency_ms is None:
                self._measured.setdefault((source.key, each.measured_as), result.latency_ms)
            each.serving.add(source.key)
            times = latency.per_batch(result.latency_ms, max(result.signature.max_batch, 1))
            self._told.serves(each.id, source.key, tuple(int(ms * 1e6) for ms in times))
        return result

    def _known_latency(self, source: ModelSource, each: Worker) -> Points | None:
        if source.latency_ms is not None:
            return tuple(latency.LatencyTable(_by_gpcs(source.latency_ms)).points(each.where.gpcs))
        return self._measured.get((source.key, each.measured_as))

    # ---- processes ----

    async def _bring_up(self, each: Worker) -> None:
        """Starts the process of a worker and waits until it says that it is ready."""
        ours, theirs = channel.pair()
        start = WorkerStart(
            name=each.where.mig_profile or f"gpu{each.where.gpu_index}",
            device_uuid=None if each.where.simulated else each.where.device_uuid,
            threads=self._threads,
        )
        memory = Descriptor(self._arena.fd), Descriptor(each.outbox.fd)
        loop = asyncio.get_running_loop()
        each.state, each.process, each.channel, each.ready = State.STARTING, None, ours, loop.create_future()
        each.starts += 1
        try:
            each.process = await asyncio.to_thread(spawn.start, start, theirs, *memory)
            loop.add_reader(ours.fileno(), self._on_readable, each)
            await asyncio.wait_for(asyncio.shield(each.ready), START_TIMEOUT_S)
        except TimeoutError:
            self._lose(each, f"not up within {START_TIMEOUT_S:.0f} s")
        except OSError as error:
            self._lose(each, f"cannot be started: {error}")
        except _DiedError:
            pass  # dealt with where it was noticed
        finally:
            theirs.close()

    async def _restart(self, each: Worker) -> None:
        """Brings a dead worker back; when it is up it loads its models."""
        recent = [at for at in each.crashes if at > time.monotonic() - CRASH_WINDOW_S]
        await asyncio.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** max(len(recent) - 1, 0)))
        await self._bring_up(each)

    async def _reload_models(self, each: Worker) -> None:
        for source in list(self._models.values()):
            # Only what is proven: a model that kills workers must not do so over and over.
            wanted = source.key in self._proven and source.key in self._models
            if wanted and (not source.mig_profiles or each.where.mig_profile in source.mig_profiles):
                await self._load_on_again(source, each)

    async def _watch(self) -> None:
        """Kills workers whose batch takes far too long."""
        while True:
            await asyncio.sleep(1.0)
            limit = time.monotonic() - self._batch_timeout_s
            for each in self.workers:
                if any(sent < limit for sent in each.running.values()):
                    self._lose(each, f"a batch took more than {self._batch_timeout_s:.0f} s")

    # ---- what workers say ----

    def _on_readable(self, each: Worker) -> None:
        """One message: where there are more, the loop calls again."""
        assert each.channel is not None  # closing it ends the calls
        try:
            message = each.channel.receive()
        except BlockingIOError:
            return
        except ConnectionResetError:
            message = None  # it died with something unread
        self._on_message(each, message)

    def _on_message(self, each: Worker, message: Ready | Loaded | LoadFailed | Done | Failed | None) -> None:
        match message:
            case Done():
                each.running.pop(message.batch_id, None)
                self._told.batch_done(each.id, message, each.outbox.memory)
            case Failed():
                each.running.pop(message.batch_id, None)
                log.warning("model failed", worker=each.name, detail=message.detail, full=message.full)
                self._told.batch_failed(each.id, message)
            case Loaded() | LoadFailed():
                self._resolve(each.loading.pop(message.key, None), message)
            case Ready():
                each.state, each.reason = State.READY, ""
                log.info("worker up", worker=each.name, pid=each.pid, starts=each.starts)
                self._told.worker_up(each.id, each.where, message.depth)
                if each.starts > 1:
                    self._spawn(self._reload_models(each))
                self._resolve(each.ready, None)
            case None:
                self._lose(each, "")

    def _lose(self, each: Worker, detail: str) -> None:
        """A worker is dead or to be. Its process is surely dead before its requests go elsewhere."""
        if self._stopping or each.state in (State.RESTARTING, State.OUT):
            return
        self._close_channel(each)
        if each.process is not None:
            how = spawn.end(each.process, KILL_TIMEOUT_S)
            detail = detail or how
        each.crashes.append(time.monotonic())
        out = len(each.crashes) == CRASHES and each.crashes[0] > time.monotonic() - CRASH_WINDOW_S
        each.state = State.OUT if out else State.RESTARTING
        each.reason = f"died {CRASHES} times within {CRASH_WINDOW_S:.0f} s, last: {detail}" if out else detail
        log.warning("worker lost", worker=each.name, pid=each.pid, reason=each.reason, stays_out=out)
        batch_ids = list(each.running)
        each.running.clear()
        each.serving.clear()
        for future in [each.ready, *each.loading.values()]:
            if future is not None and not future.done():
                future.set_exception(_DiedError(detail))
                future.exception()  # seen: nobody need wait for it
        each.loading.clear()
        self._told.worker_lost(each.id, detail, comes_back=not out, batch_ids=batch_ids)
        if not out:
            self._spawn(self._restart(each))

    # ---- small things ----

    @property
    def _told(self) -> Listener:
        assert self._listener is not None  # set by start, before any worker can speak
        return self._listener

    def _send(self, each: Worker, message: channel.ToWorker) -> None:
        if each.channel is None:
            return
        with suppress(BrokenPipeError, ConnectionResetError):
            each.channel.send(message)  # if it is gone, that shows as EOF on its channel, and is handled there

    def _close_channel(self, each: Worker) -> None:
        if each.channel is not None:
            asyncio.get_running_loop().remove_reader(each.channel.fileno())
            each.channel.close()
            each.channel = None

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    def _resolve(future: asyncio.Future[Any] | None, value: Any) -> None:
        if future is not None and not future.done():
            future.set_result(value)


def _by_gpcs(latency_ms: dict[int, Points]) -> dict[int, dict[int, float]]:
    return {gpcs: dict(points) for gpcs, points in latency_ms.items()}
