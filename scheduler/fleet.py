"""The worker processes: started, watched, restarted, stopped; moved when slices go and others come.

One worker process a slice, or several. A worker that dies is started again with a growing pause; one that
dies too often stays out, with the reason.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import structlog

from partitioner.geometry import Slice
from partitioner.tenants import TenantsError
from scheduler import channel, spawn
from scheduler.arena import Arena, Descriptor, SharedMemory
from scheduler.buckets import Costs
from scheduler.channel import Done, Failed, Loaded, LoadFailed, ModelSource, Ready, RunBatch
from scheduler.failures import Failures
from scheduler.lengths import Points
from scheduler.loading import LOAD_TIMEOUT_S, LoadedModel, Loader
from scheduler.staff import CRASH_WINDOW_S, CRASHES, DiedError, Listener, Lodger, State, Worker, resolve
from scheduler.worker import WorkerStart

log = structlog.get_logger(__name__)

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0
START_TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 1.0
# For a worker without work to end by itself.
END_TIMEOUT_S = 5.0
RECUT = "its slice was re-cut"


class Fleet:
    """All workers. Every method runs on the event loop's thread. For the partitioner it is the tenant of the slices."""

    def __init__(
        self,
        arena: Arena,
        *,
        workers_per_slice: int = 1,
        threads_per_worker: int | None = None,
        outbox_bytes: int = 256 * 1024 * 1024,
        batch_timeout_s: float = 60.0,
        load_timeout_s: float = LOAD_TIMEOUT_S,
        kept_slice: str = "",
    ) -> None:
        """`kept_slice`: the name of one that gets no worker."""
        self._arena = arena
        self._kept_slice = kept_slice
        self.lodger: Lodger | None = None
        self._workers_per_slice = workers_per_slice
        self._threads = threads_per_worker
        self._outbox_bytes = outbox_bytes
        self._batch_timeout_s = batch_timeout_s
        self._load_timeout_s = load_timeout_s
        self.places: list[tuple[Slice, int]] = []  # by worker id: slice and index on it, of all that ever were
        self._workers: dict[int, Worker] = {}
        self._retired: list[int] = []  # during a re-cut: workers whose models are expected elsewhere
        self._failures = Failures()
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    @property
    def workers(self) -> list[Worker]:
        """Those that there are now."""
        return list(self._workers.values())

    def name_of(self, worker_id: int) -> str:
        """Of a worker that there is or was."""
        where, index = self.places[worker_id]
        return where.name if index == 0 else f"{where.name}#{index}"

    def pids(self, device_uuid: str | None = None) -> list[int]:
        """Worker processes that are alive now, all or those that hold one device."""
        places = [each for each in self.workers if device_uuid in (None, each.where.device_uuid)]
        lodging = self.lodger.pids(device_uuid) if self.lodger is not None else []
        return [pid for pid in [*(each.pid for each in places), *lodging] if pid is not None and _alive(pid)]

    # ---- life ----

    async def start(self, listener: Listener, slices: Sequence[Slice]) -> None:
        """Starts every worker process; returns when all are up or have failed to be."""
        self._told = listener
        self._loader = Loader(self._send, self._lose, listener, self._load_timeout_s)
        async with self._changing:
            await asyncio.gather(*(self._bring_up(each) for each in self._add(slices)))
        self._spawn(self._watch())

    async def stop(self, timeout_s: float) -> None:
        """Closes the channels, so that workers end, and kills what has not ended in time."""
        self._stopping = True
        for task in list(self._tasks):
            task.cancel()
        for each in self.workers:
            each.state = State.STOPPED
            self._close_channel(each)
        deadline = time.monotonic() + timeout_s
        for each in self.workers:
            await self._end(each, max(0.0, deadline - time.monotonic()))
            each.outbox.close()

    def send(self, worker_id: int, batch: RunBatch) -> None:
        """Hands a batch to a worker. If it is gone, its end is noticed and told by itself."""
        target = self._workers[worker_id]
        target.running[batch.batch_id] = time.monotonic()
        self._send(target, batch)

    # ---- models ----

    async def load(self, source: ModelSource) -> LoadedModel:
        """Loads a model on all its workers. Raises ModelUnservableError if none can."""
        async with self._changing:  # not while slices come and go
            return await self._loader.load(source, self.workers)

    def unload(self, key: str) -> None:
        """Takes a model off every worker. Its requests must have ended."""
        self._loader.unload(key, self.workers)

    def measured_ms(self, key: str) -> dict[str, Points]:
        """What was measured of a model, by kind of worker."""
        return self._loader.measured_ms(key)

    def is_mixed(self, key: str) -> bool:
        """Whether some workers serve another file of it than others do."""
        return self._loader.is_mixed(key)

    def edges(self, key: str) -> tuple[int, ...]:
        """What batches of a model are padded to; empty where it has no lengths, or is not loaded."""
        return self._loader.edges(key)

    def item_costs(self, key: str) -> Costs:
        """What an item of a model with lengths costs, by its length."""
        return self._loader.item_costs(key)

    def set_edges(self, key: str, edges: tuple[int, ...]) -> None:
        """From now on its batches are padded to these."""
        self._loader.set_edges(key, edges, self.workers)

    def serving(self, key: str) -> list[Worker]:
        return [each for each in self.workers if key in each.serving and each.state == State.READY]

    # ---- slices come and go: partitioner.tenants.Tenants ----

    @asynccontextmanager
    async def recut(self) -> AsyncIterator[None]:
        """While slices change. Models that nobody serves meanwhile are expected back: their requests wait."""
        async with self._changing:
            try:
                yield
            finally:
                for worker_id in self._retired:
                    self._told.worker_lost(worker_id, RECUT, comes_back=False, batch_ids=[])
                self._retired.clear()
                if self.lodger is not None:
                    await self.lodger.settle()

    async def drain(self, slices: Sequence[Slice]) -> None:
        """Lets their workers finish what they run and end. What waited for them goes elsewhere."""
        going = [each for each in self.workers if each.where in slices]
        if self.lodger is not None:
            await self.lodger.leave(slices)
        await asyncio.gather(*(self._retire(each) for each in going))

    async def admit(self, slices: Sequence[Slice]) -> None:
        """Starts workers on new slices and gives them their models. Raises TenantsError if one does not come up."""
        new = self._add(slices)
        await asyncio.gather(*(self._bring_up(each) for each in new))
        await self._loader.introduce([each for each in new if each.state == State.READY])
        down = [f"{each.name}: {each.reason}" for each in new if each.state != State.READY]
        if down:
            raise TenantsError(f"no worker came up on {'; '.join(down)}")

    def homes(self) -> list[Slice]:
        """Slices that have workers now."""
        return list(dict.fromkeys(each.where for each in self.workers))

    def unserved(self) -> list[str]:
        """Names of models that should be served, and are not served by anybody now."""
        return self._loader.unserved(self.workers)

    def _add(self, slices: Sequence[Slice]) -> list[Worker]:
        new = []
        for where in slices:
            if where.name == self._kept_slice:
                continue
            for index in range(self._workers_per_slice):
                worker = Worker(len(self.places), where, index, SharedMemory("migserve-outbox", self._outbox_bytes))
                self.places.append((where, index))
                self._workers[worker.id] = worker
                new.append(worker)
        return new

    async def _retire(self, each: Worker) -> None:
        each.retiring = True
        if each.restart is not None:
            await asyncio.wait({each.restart})  # a process that is being started cannot be stopped midway
        if each.state == State.READY:
            each.state = State.DRAINING
            self._told.drains(each.id)
            if each.running:
                each.quiet = asyncio.get_running_loop().create_future()
                await each.quiet
        each.state, each.reason = State.OUT, RECUT
        self._close_channel(each)
        await self._end(each, END_TIMEOUT_S)
        self._told.worker_lost(each.id, RECUT, comes_back=True, batch_ids=each.let_go(RECUT))
        self._retired.append(each.id)
        del self._workers[each.id]
        each.outbox.close()
        log.info("worker gone", worker=each.name, pid=each.pid, reason=RECUT)

    # ---- processes ----

    async def _bring_up(self, each: Worker) -> None:
        """Starts the process of a worker and waits until it says that it is ready."""
        ours, theirs = channel.pair()
        start = WorkerStart(
            name=each.where.mig_profile or f"gpu{each.where.gpu_index}",
            device_uuid=None if each.where.simulated else each.where.device_uuid,
            threads=self._threads or _threads(len(self._workers)),
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
        except DiedError:
            pass  # dealt with where it was noticed
        finally:
            theirs.close()

    async def _restart(self, each: Worker) -> None:
        """Brings a dead worker back; when it is up it loads its models."""
        recent = [at for at in each.crashes if at > time.monotonic() - CRASH_WINDOW_S]
        await asyncio.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** max(len(recent) - 1, 0)))
        await self._bring_up(each)

    async def _watch(self) -> None:
        """Kills workers whose batch takes far too long."""
        while True:
            await asyncio.sleep(1.0)
            limit = time.monotonic() - self._batch_timeout_s
            for each in self.workers:
                if any(sent < limit for sent in each.running.values()):
                    self._lose(each, f"a batch took more than {self._batch_timeout_s:.0f} s")

    async def _end(self, each: Worker, timeout_s: float) -> None:
        """Waits for the end of a process whose channel is closed, and then kills it."""
        if each.process is None:
            return
        await asyncio.to_thread(each.process.join, timeout_s)
        if each.process.is_alive():
            each.process.kill()
            await asyncio.to_thread(each.process.join)

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
                each.batch_ended(message.batch_id)
                self._told.batch_done(each.id, message, each.outbox.memory)
            case Failed():
                each.batch_ended(message.batch_id)
                log.warning("model failed", worker=each.name, **self._failures.fields(message))
                self._told.batch_failed(each.id, message)
            case Loaded() | LoadFailed():
                resolve(each.loading.pop(message.key, None), message)
            case Ready():
                each.state, each.reason = State.READY, ""
                log.info("worker up", worker=each.name, pid=each.pid, starts=each.starts)
                self._told.worker_up(each.id, each.where, message.depth)
                if each.starts > 1:
                    self._spawn(self._loader.restore(each))
                resolve(each.ready, None)
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
        stays_out = out or each.retiring
        each.state = State.OUT if stays_out else State.RESTARTING
        each.reason = f"died {CRASHES} times within {CRASH_WINDOW_S:.0f} s, last: {detail}" if out else detail
        log.warning("worker lost", worker=each.name, pid=each.pid, reason=each.reason, stays_out=stays_out)
        comes_back = each.retiring or not out  # what a retiring one served comes back elsewhere
        self._told.worker_lost(each.id, detail, comes_back=comes_back, batch_ids=each.let_go(detail))
        if not stays_out:
            each.restart = self._spawn(self._restart(each))

    # ---- small things ----

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

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _threads(workers: int) -> int:
    """Of one operation in a CPU worker: the cores, shared out, but for one that the daemon itself needs."""
    return max(1, ((os.cpu_count() or 1) - 1) // workers)


def _alive(pid: int) -> bool:
    """Of a child that may not have been waited for yet: a zombie holds nothing. May be asked from any thread."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
