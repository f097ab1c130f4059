"""The daemon: the one file that knows all rooms. Puts them together, starts them, drains and stops them."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc
import structlog
import uvicorn

from partitioner.geometry import Slice
from partitioner.intent import IntentFile
from partitioner.nvml_errors import NvmlError
from partitioner.reconfigure import RefusedChangeError
from preprocess.pool import PreprocessPool
from scheduler import spawn
from scheduler.arena import Arena
from scheduler.core import SchedulerCore
from scheduler.driver import Driver
from scheduler.fleet import Fleet
from scheduler.journal import Header, JournalWriter
from scheduler.policies.named import POLICIES
from scheduler.staff import State
from server import admin, grpc_api, jobs_api, rest
from server.app import create_app
from server.autopilot import Autopilot
from server.gpu_watch import GpuWatch
from server.gpus import StartError, open_gpus
from server.http_protocol import HttpProtocol
from server.infer import InferRoute
from server.job_intake import Intake
from server.job_metrics import JobMetrics
from server.job_preparing import JobPreparer
from server.job_supply import Supply
from server.jobs import Jobs
from server.layouts import Layouts
from server.lengths import LengthWatch
from server.listening import HttpServer, listen
from server.metrics import Metrics
from server.preprocess_places import PreprocessPlaces
from server.repository import ModelState, Repository
from server.service import InferenceService
from server.settings import MIB, Settings

log = structlog.get_logger(__name__)

NAME = "migserve"
# For idle workers to end by themselves.
STOP_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 75
GC_THRESHOLDS = (20_000, 20, 50)
# While jobs are read and the autopilot thinks, in threads, requests wait for Python's lock so long each time.
SWITCH_INTERVAL_S = 1e-4


class Progress:
    """What the command line shows while the daemon starts; does nothing by default."""

    def workers(self, count: int) -> None:
        """`count` worker processes are being started."""

    def model(self, name: str, trouble: str) -> None:
        """A model was loaded, or, with `trouble`, was not."""

    def ready(self, daemon: Daemon) -> None:
        """Requests are served."""

    def draining(self, unfinished: int) -> None:
        """Told to stop, with so many requests under way."""


class Daemon:
    """One life: `run` returns the exit code."""

    def __init__(self, settings: Settings, progress: Progress | None = None) -> None:
        self.settings = settings
        self._progress = progress or Progress()
        self._draining = False
        self._tidy = True  # no worker has anything left to do
        self._started = False
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self.version = _version()
        for path in settings.model_repository:
            if not path.is_dir():
                raise StartError(
                    f"--model-repository {path} is not a folder; `make models` makes demo models in models/"
                )
        self.arena = Arena(settings.arena_mib * MIB)
        self.fleet = Fleet(
            self.arena,
            workers_per_slice=settings.workers_per_slice,
            threads_per_worker=settings.threads_per_worker,
            batch_timeout_s=settings.batch_timeout_secs,
            load_timeout_s=settings.load_timeout_secs,
            kept_slice=settings.preprocess_slice,
        )
        self._door = open_gpus(settings.gpu, settings.layout, settings.simulation_state, self.fleet.pids)
        self.metrics = Metrics()
        self._journal = None
        if settings.journal is not None:
            try:
                self._journal = JournalWriter(settings.journal, Header(settings.max_queue_size, settings.policy))
            except OSError as error:
                raise StartError(f"--journal {settings.journal} cannot be written: {error.strerror}") from error
        core = SchedulerCore(settings.max_queue_size, POLICIES[settings.policy])
        self.driver = Driver(core, self.fleet, self.arena, self.metrics, self._journal)
        isolated, decoder = settings.isolate_decoders, settings.preprocess_decoder
        memory = self.arena.fd, self.arena.memory
        self._pool = PreprocessPool(
            settings.preprocess_threads, decoder, isolated=isolated, start=spawn.start_other, arena=memory
        )
        places = PreprocessPlaces(settings, self._pool, self.fleet.serving)
        self.fleet.lodger = places
        roots = settings.model_repository
        self.repository = Repository(roots, self.fleet, self.driver, self.arena.size, places.prepare)
        self._state_dir = settings.state_folder
        self.layouts = Layouts(self._door, self.fleet, IntentFile(self._state_dir / "recut.json"), self.metrics.recut)
        places.watch(lambda: self.layouts.gpus, self.repository.models)
        self.service = InferenceService(self.driver, self.arena, self._pool)
        self.metrics.add(self.service.preprocess_stats)
        self._supply = supply = Supply(core.pool, self.driver, self.repository, self.arena.size)
        keep, prepare = self._state_dir / "jobs", JobPreparer(self._pool)
        self._jobs = Jobs(settings, keep, supply, self.repository, self.service, prepare, self.fleet.name_of)
        self._autopilot = Autopilot(settings, self.layouts, self.repository, self.driver, self._jobs.demands)
        self.metrics.register(JobMetrics(self._jobs))
        self.metrics.watch(
            self.fleet, lambda: self.layouts.gpus, self._models_now, lambda: (self.arena.used, self.arena.size)
        )
        self.ports: dict[str, int] = {}  # by protocol, once it listens
        self._http: list[HttpServer] = []
        self._serving: list[asyncio.Task[None]] = []
        self._grpc: grpc.aio.Server | None = None
        self._background: list[asyncio.Task[None]] = []

    # ---- what others ask ----

    def not_ready(self) -> list[str]:
        """Why no requests should come now."""
        if self._draining:
            return ["the server is shutting down"]
        if not self._started:
            return ["the server is starting"]
        if all(worker.state == State.OUT for worker in self.fleet.workers):
            return ["every slice is out", *self.slices_out()]
        if self.settings.strict_readiness:
            return self.repository.not_ready()
        return []

    def slices_out(self) -> list[str]:
        """Slices that stay out, with their reasons."""
        return [f"{each.name}: {each.reason}" for each in self.fleet.workers if each.state == State.OUT]

    def serves(self, where: Slice) -> list[str]:
        """What a slice serves, for the picture."""
        serving = {
            model.name + (" (emulated)" if model.emulated else "")
            for model in self.repository.models()
            for worker in self.repository.servers(model)
            if model.state == ModelState.READY and worker.where == where
        }
        return sorted(serving)

    # ---- life ----

    async def run(self) -> int:
        """Serves until told to stop. 0: every request was ended properly. Raises StartError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            # Clients and probes are answered from the beginning on: alive, but not ready yet.
            await self._open_servers()
            await self._start()
            await self._stop.wait()
            return await self._drain()
        finally:
            await self._shut_down()

    def _on_signal(self) -> None:
        """The first one drains, the second one hurries."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _start(self) -> None:
        """Workers and models, unless told to stop first."""
        await self._find_slices()
        log.info("driver", version=self._door.driver_version())
        for gpu in self.layouts.gpus:
            layout = [each.name for each in gpu.slices]
            log.info("gpu", index=gpu.index, name=gpu.name, uuid=gpu.uuid, simulated=gpu.simulated, slices=layout)
        self._progress.workers(len(self._slices()) * self.settings.workers_per_slice)
        loading = asyncio.create_task(self._load())
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not loading.done():
            loading.cancel()
            return
        await loading
        # What there is now lives on. Requests make many objects and almost no cycles: collect seldom.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self._started = True
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        if self.settings.allow_jobs:
            await self._jobs.start()
        self._background.append(asyncio.create_task(GpuWatch(self._door, self.layouts, self.metrics).run()))
        watch = LengthWatch(self.driver, self.fleet, self.repository.lengths, self._supply.take_lengths)
        self._background.append(asyncio.create_task(watch.run()))
        if self.settings.replan != "off":
            self.driver.counts_arrivals = True
            self._background.append(asyncio.create_task(self._autopilot.run()))
        ports = {f"{name}_port": port for name, port in self.ports.items()}
        log.info("serving", not_ready=self.not_ready(), **ports)
        self._progress.ready(self)

    async def _find_slices(self) -> None:
        """The GPUs as they are cut, after what a crash in the middle of a re-cut has left is put right."""
        try:
            await self.layouts.recover()
        except (NvmlError, RefusedChangeError, ValueError, OSError) as error:
            raise StartError(f"a re-cut was cut off, and cannot be put right: {error}") from error
        kept, names = self.settings.preprocess_slice, [each.name for each in self._slices()]
        if kept and (kept not in names or len(names) == 1):
            others = ", ".join(names) or "none"
            raise StartError(f"--preprocess-slice {kept} must be one of several slices; there are {others}")
        if not names:
            raise StartError("no slice to serve on: MIG is on, but there are no instances; see migserve layout apply")

    def _slices(self) -> list[Slice]:
        return [each for gpu in self.layouts.gpus for each in gpu.slices]

    async def _load(self) -> None:
        if not self.repository.needs_torch():
            spawn.leave_torch_out()
        await self.fleet.start(self.driver, self._slices())
        await self.repository.load_all(self._progress.model)

    async def _drain(self) -> int:
        """Unready; serves on briefly, so that load balancers notice; then finishes what is under way."""
        self._draining = True
        log.info("draining", unfinished=self.driver.unfinished())
        self._progress.draining(self.driver.unfinished())
        deadline = asyncio.get_running_loop().time() + self.settings.exit_timeout_secs
        with suppress(TimeoutError):  # what is not on disk by then is done again after the next start
            async with asyncio.timeout(min(STOP_SECONDS, self.settings.exit_timeout_secs)):
                await self._jobs.stop()
        delay_s = min(self.settings.drain_delay_secs, self.settings.exit_timeout_secs)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), delay_s)
        closing = asyncio.create_task(self._close_servers())
        hurried = asyncio.create_task(self._hurry.wait())
        left_s = max(0.0, deadline - asyncio.get_running_loop().time())
        await asyncio.wait({closing, hurried}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        cut_off = self.driver.unfinished()
        if not closing.done():
            log.warning("stopping now", unfinished=cut_off)
            await self._cut_off(closing)
        self._tidy = cut_off == 0
        return 0 if cut_off == 0 else 1

    async def _shut_down(self) -> None:
        for task in self._background:
            task.cancel()
        await self._jobs.stop()
        await self._close_servers()
        await self.layouts.finished()
        await self.fleet.stop(STOP_SECONDS if self._tidy else 0.0)
        self._pool.close()
        if self._journal is not None:
            self._journal.close()
        self._door.close()
        if self._stop.is_set():
            log.info("stopped")

    # ---- servers ----

    async def _open_servers(self) -> None:
        """Listens on every port. Raises StartError, naming the one that cannot be had."""
        settings = self.settings
        health = (self.repository, self.metrics, self, NAME, self.version)
        routes = rest.router(*health, read_timeout_s=settings.http_read_timeout_secs)
        if settings.allow_jobs:
            routes.include_router(jobs_api.router(self._jobs, Intake(settings, self._jobs, self.repository)))
        app = create_app(routes)
        if settings.allow_http:
            infer = InferRoute(
                app,
                self.repository,
                self.service,
                self.metrics,
                max_body_bytes=settings.http_max_input_size,
                read_timeout_s=settings.http_read_timeout_secs,
                log_requests=settings.log_verbose > 0,
            )
            await self._open_http("http", settings.http_address, settings.http_port, infer)
        if settings.allow_metrics:
            await self._open_http(
                "metrics",
                settings.metrics_address,
                settings.metrics_port,
                create_app(rest.metrics_router(self.metrics), docs=False),
            )
        if settings.allow_admin:
            await self._open_admin()
        if settings.allow_grpc:
            servicer = grpc_api.InferenceServicer(
                self.repository,
                self.service,
                self.metrics,
                self,
                NAME,
                self.version,
                log_requests=settings.log_verbose > 0,
            )
            self._grpc = grpc_api.create_server(servicer, self, settings.http_max_input_size)
            # Tried before, since gRPC complains in lines of its own.
            listen("grpc", settings.grpc_address, settings.grpc_port).close()
            host = f"[{settings.grpc_address}]" if ":" in settings.grpc_address else settings.grpc_address
            self.ports["grpc"] = self._grpc.add_insecure_port(f"{host}:{settings.grpc_port}")
            await self._grpc.start()

    async def _open_admin(self) -> None:
        settings = self.settings
        try:
            token = admin.token(settings.admin_token, self._state_dir)
        except OSError as error:
            log.warning(
                "no admin endpoints: give an --admin-token or a --state-dir that can be written", reason=str(error)
            )
            return
        guarded = admin.Guard(create_app(admin.router(self.layouts, self._autopilot, self), docs=False), token)
        await self._open_http("admin", settings.admin_address, settings.admin_port, guarded)

    async def _open_http(self, name: str, address: str, port: int, app: Any) -> None:
        sock = listen(name, address, port)
        self.ports[name] = sock.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=int(self.settings.exit_timeout_secs) + 1,
        )
        server = HttpServer(config)
        self._http.append(server)
        self._serving.append(asyncio.create_task(server.serve(sockets=[sock])))
        await server.listening.wait()

    async def _close_servers(self) -> None:
        """Takes no more connections; returns when every request under way has its answer."""
        for server in self._http:
            server.should_exit = True
        if self._grpc is not None:
            await self._grpc.stop(self.settings.exit_timeout_secs)
        await asyncio.gather(*self._serving)
        await self.driver.idle()

    async def _cut_off(self, closing: asyncio.Task[None]) -> None:
        """Ends what is under way with an error, so that its client knows."""
        self.driver.give_up("the server is shutting down")
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(closing), 1.0)
        for server in self._http:
            server.force_exit = True  # clients that do not read their answers
        if self._grpc is not None:
            await self._grpc.stop(None)
        await closing

    def _models_now(self) -> Iterator[tuple[tuple[str, str], bool, bool, int]]:
        for model in self.repository.models():
            if model.unloaded:
                continue  # on purpose: it is not missing
            ready = model.state == ModelState.READY and bool(self.repository.servers(model))
            unfinished = self.driver.unfinished(model.key) if model.key else 0
            yield model.id, ready, model.emulated, unfinished


def _version() -> str:
    try:
        return version(NAME)
    except PackageNotFoundError:
        return "unknown"  # run from a checkout that is not installed
