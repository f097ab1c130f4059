"""Batch jobs: made, run, paused, gone on with. Which slices they hold is for `scheduler/elastic.py` to say."""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog

from scheduler.driver import now_ns
from scheduler.elastic import Elastic, Holding, Place, Work, decide
from scheduler.staff import CRASH_WINDOW_S, CRASHES
from server.errors import Fault, ServeError
from server.job_foresight import likely_left, open_reader, opened
from server.job_pace import Casualties, Patience
from server.job_preparing import JobPreparer
from server.job_progress import INTERNAL_ERROR, demands, no_results, not_resumed, now_s, progress, within_ns
from server.job_run import JobRun
from server.job_shared import Shared
from server.job_store import DiskFullError, Job, JobState, JobStore, Position, kept_or_refused
from server.job_supply import Supply, usable_model
from server.repository import Repository
from server.service import InferenceService
from server.settings import MIB, Settings

log = structlog.get_logger(__name__)

THREADS = 4
DECIDE_EVERY_S = 1.0
BEGINS_WITHIN_S = 1.0  # else nobody waits for it
ID_BYTES = 5


class Jobs:
    """All of them. Every method runs on the event loop's thread."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        supply: Supply,
        repository: Repository,
        service: InferenceService,
        preparer: JobPreparer,
        slice_name: Callable[[int], str],
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._supply = supply
        self._repository = repository
        self._usable_model = partial(usable_model, repository)
        self._slice_name = slice_name
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="jobs")
        # For inputs that lie elsewhere: a file server may be dead, which holds up nothing else.
        self._looks = ThreadPoolExecutor(THREADS, thread_name_prefix="jobs-look")
        self._elastic = Elastic()
        self._casualties = Casualties(CRASHES - 1, CRASH_WINDOW_S)  # the death that is one too many is others'
        self._jobs: dict[str, Job] = {}
        self._runs: dict[str, JobRun] = {}
        self._changing: dict[str, asyncio.Lock] = {}
        self._begins: dict[str, asyncio.Task[None]] = {}  # of runs that are being begun
        self._again = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._store: JobStore | None = None
        self._unusable = "the server is starting"
        self._stopping = False
        self._infeasible: set[str] = set()  # that were told so
        self._foreseen: dict[str, Holding] = {}  # of those that nothing was decided on yet
        self.finished: Counter[tuple[str, str]] = Counter()  # items, by model and outcome, since the start
        self._shared = Shared(service, self._elastic, supply, preparer, self._casualties, Patience(), self.finished)

    # ---- life ----

    async def start(self) -> None:
        """Opens what is on disk, and goes on with what had not ended."""
        try:
            store = await self._in_thread(JobStore, self._folder)
            await self._in_thread(store.sweep)
            found: list[Job] = await self._in_thread(store.all)
        except (OSError, sqlite3.Error, msgspec.MsgspecError) as error:
            self._unusable = f"jobs cannot be kept in {self._folder}: {error}"
            log.warning("no batch jobs", reason=self._unusable)
            return
        self._store = store
        self._jobs = {job.id: job for job in found}
        for job in found:
            if not job.state.is_end:
                self._begin(job)
        if self._begins:  # so that what they had done is seen at once
            await asyncio.wait(self._begins.values(), timeout=BEGINS_WITHIN_S)
        self._task = asyncio.create_task(self._decide_for_ever())

    async def stop(self) -> None:
        """What is finished is put down; what runs is let go."""
        if self._stopping:
            return
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        # Side by side: one that is long at it, for it writes its results, keeps no other from putting down what it has.
        await asyncio.gather(*map(self._drop_run, self._jobs.values()))
        await asyncio.to_thread(self._threads.shutdown)
        self._looks.shutdown(wait=False, cancel_futures=True)
        if self._store is not None:
            self._store.close()

    def _has_room(self) -> bool:
        return self.store.free_bytes() >= self._settings.jobs_min_free_mib * MIB

    def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    @property
    def store(self) -> JobStore:
        """Raises ServeError."""
        if self._store is None or self._stopping:
            raise ServeError(Fault.UNAVAILABLE, self._unusable if self._store is None else "the server is stopping")
        return self._store

    # ---- what users do ----

    def all(self) -> list[Job]:
        """None before start() has read what is on disk."""
        return list(self._jobs.values())

    def known(self) -> list[Job]:
        """As all(), for who would take none for a loss. Raises ServeError."""
        if self._store is None:
            raise ServeError(Fault.UNAVAILABLE, self._unusable)
        return self.all()

    def get(self, job_id: str) -> Job:
        """Raises ServeError."""
        self.known()
        job = self._jobs.get(job_id)
        if job is None:
            raise ServeError(Fault.NOT_FOUND, f"unknown job {job_id[:40]!r}; GET /v2/jobs lists those there are")
        return job

    def new_folder(self) -> tuple[str, Path]:
        """For the inputs of a job that is being sent. Raises ServeError, OSError."""
        store = self.store
        if not self._has_room():
            raise ServeError(Fault.UNAVAILABLE, "there is no room on the disk of the state folder", reason="disk_full")
        job_id = secrets.token_hex(ID_BYTES)
        folder = store.folder(job_id)
        with kept_or_refused():
            folder.mkdir(mode=0o700)
        return job_id, folder

    async def forecast(self, job: Job) -> Holding:
        """What would become of a job that is not there yet, beside those that are. Raises ServeError."""
        model = self._repository.get(job.asked.model, job.asked.version)
        at = self.store.folder(job.id), Position(), model, self._settings.jobs_input_dir
        reader = partial(open_reader, *at)
        edges = self._supply.edges(model)
        left = await likely_left(reader, job.asked.items, model, edges, self._shared.preparer, self._looks)
        works, places = self._works()
        alike = (run.factors for run in self._runs.values() if run.job.asked.model == job.asked.model)
        known = {bucket: factor for factors in alike for bucket, factor in factors.items()}
        works = [*works, Work(job.id, left, within_ns(job))]
        places = {**places, job.id: self._supply.places(model, left, known)}
        if self._stopping:  # as it was looked at
            raise ServeError(Fault.UNAVAILABLE, "the server is stopping")
        holdings: dict[str, Holding] = await self._in_thread(decide, works, places, {})
        return holdings[job.id]

    async def add(self, job: Job, foreseen: Holding | None = None) -> None:
        """Takes on a job whose inputs are in its folder; `foreseen` until it is decided on. Raises ServeError."""
        with kept_or_refused():
            await self._in_thread(self.store.save, job)
        self._jobs[job.id] = job
        if foreseen is not None:
            self._foreseen[job.id] = foreseen
        log.info("job", job=job.id, model=job.asked.model, items=job.asked.items)
        self._begin(job)
        await self._until_begun(job, BEGINS_WITHIN_S)

    async def cancel(self, job_id: str) -> Job:
        """What is finished stays, for `resume`. Raises ServeError."""
        async with self._lock(job_id):
            job = self.get(job_id)
            if job.state.is_end:
                raise ServeError(Fault.CONFLICT, f"job {job_id} is {job.state} already")
            _ = self.store  # without it this could not be kept
            job.state, job.reason = JobState.CANCELLED, ""
            with kept_or_refused(f"; job {job_id} is cancelled all the same"):  # to keep it is tried again
                await self._settle(job)
            return job

    async def resume(self, job_id: str, max_errors: int | None = None) -> Job:
        """Goes on with one that was cancelled, or stopped by its errors. Raises ServeError."""
        async with self._lock(job_id):
            job = self.get(job_id)
            most = job.asked.max_errors if max_errors is None else max_errors
            if refusal := not_resumed(job, most):
                raise ServeError(Fault.CONFLICT, refusal)
            asked = msgspec.structs.replace(job.asked, max_errors=most)
            with kept_or_refused():  # then it stays as it was
                await self._settle(job)
                again = msgspec.structs.replace(job, asked=asked, state=JobState.RUNNING, reason="", ended_s=None)
                await self._in_thread(self.store.save, again)
            job.asked, job.state, job.reason, job.ended_s = asked, JobState.RUNNING, "", None
            self._begin(job)
        await self._until_begun(job, BEGINS_WITHIN_S)
        return job

    async def remove(self, job_id: str) -> None:
        """With all its files. Raises ServeError."""
        async with self._lock(job_id):
            job = self.get(job_id)
            if not job.state.is_end:
                raise ServeError(Fault.CONFLICT, f"job {job_id} is {job.state}; cancel it first")
            await self._drop_run(job)
            with kept_or_refused():
                await self._in_thread(self.store.remove, job_id)
            del self._jobs[job_id], self._changing[job_id]
            self._infeasible.discard(job_id)

    def results(self, job_id: str) -> Path:
        """The file of a job that is done. Raises ServeError."""
        job = self.get(job_id)
        if job.state != JobState.DONE:
            raise ServeError(Fault.CONFLICT, no_results(job))
        for path in (self.store.results_path(job), self.store.folder(job.id) / "results.jsonl"):
            if path.exists():
                return path
        raise ServeError(Fault.NOT_FOUND, f"the results of job {job_id} are not there any more")

    def progress(self, job: Job) -> dict[str, Any]:
        """What changes while it runs: rate, slices, forecast."""
        run = self._runs.get(job.id)
        if run is None:
            return {}
        holding = self._elastic.holdings.get(job.id) or self._foreseen.get(job.id)
        held = {worker_id: self._slice_name(worker_id) for worker_id in self._elastic.held(job.id)}
        return {**progress(job, run.pace, holding, held, self._casualties), "gpcs": self._supply.gpcs(held)}

    def demands(self) -> list[tuple[str, float, float]]:
        """Of each model with jobs that have a deadline: items that are left, and seconds to the first deadline."""
        return demands(run.job for run in self._runs.values())

    # ---- running ----

    def _lock(self, job_id: str) -> asyncio.Lock:
        self.get(job_id)
        return self._changing.setdefault(job_id, asyncio.Lock())

    def _begin(self, job: Job) -> None:
        """In a task of its own: one whose inputs hang holds up nobody. Where it cannot be now, the job pauses."""
        if not self._stopping:  # else after the next start
            self._begins[job.id] = task = asyncio.create_task(self._start_run(job))
            task.add_done_callback(lambda _: self._begins.pop(job.id))

    async def _until_begun(self, job: Job, within_s: float | None = None) -> None:
        if job.id in self._begins:
            await asyncio.wait([self._begins[job.id]], timeout=within_s)

    async def _start_run(self, job: Job) -> None:
        """What nobody has thought of stops this job and no other."""
        was_paused = job.state == JobState.PAUSED
        try:
            if before := self._runs.pop(job.id, None):
                await before.stop()
            model = partial(self._usable_model, job)
            at = self.store.folder(job.id), model, self._settings.jobs_input_dir
            ledger, reader = await opened(job, *at, self._in_thread)
            job.becomes(JobState.RUNNING)
            self._runs[job.id] = run = JobRun(job, ledger, reader, model, self._shared, self._again.set)
            await run.start()
            self._again.set()
            if was_paused:
                log.info("job goes on", job=job.id)
        except ServeError as error:
            job.becomes(JobState.PAUSED, error.message)
        except (OSError, DiskFullError, sqlite3.Error) as error:
            job.becomes(JobState.PAUSED, f"the disk: {error}")
        except Exception:
            log.exception("a job cannot begin", job=job.id)
            job.becomes(JobState.STOPPED, INTERNAL_ERROR)

    async def _decide_for_ever(self) -> None:
        while True:
            self._again.clear()
            try:
                await self._look()
            except Exception:
                log.exception("jobs: deciding failed; it is tried again")
            try:
                async with asyncio.timeout(DECIDE_EVERY_S):
                    await self._again.wait()
                await asyncio.sleep(DECIDE_EVERY_S / 10)  # what comes together is decided together
            except TimeoutError:
                pass

    async def _look(self) -> None:
        self._supply.observe(now_ns())
        for job_id in list(self._jobs):
            with suppress(ServeError):  # it has been removed meanwhile
                lock = self._lock(job_id)
                if not lock.locked():  # else a user is changing it, which may take long
                    async with lock:
                        await self._look_at(self.get(job_id))
        for run in self._runs.values():
            run.look_at_buckets()
        works, places = self._works()
        # In a thread: with a job that is late, and has several length buckets, it takes a tenth of a second.
        self._elastic.hold(await self._in_thread(decide, works, places, self._elastic.held_now()))
        for job_id in self._elastic.holdings.keys() & self._runs.keys():  # others have gone meanwhile
            self._foreseen.pop(job_id, None)
            self._tell_infeasible(job_id)
        for run in self._runs.values():
            run.feed()

    async def _look_at(self, job: Job) -> None:
        try:
            if job.state.is_end:
                await self._settle(job)
            elif job.id in self._begins:
                return
            elif job.state == JobState.RUNNING:
                self._pause_if_needed(job)
            else:
                await self._go_on(job)
        except Exception:  # the others do not wait for it
            log.exception("a job cannot go on now; it is tried again", job=job.id)

    def _obstacle(self, job: Job) -> str:
        """Why it cannot run now; nothing where it can."""
        try:
            if not job.is_complete:
                self._usable_model(job)
        except ServeError as error:
            return error.message
        return "" if self._has_room() else "the disk: there is too little room, see --jobs-min-free-mib"

    def _pause_if_needed(self, job: Job) -> None:
        if not job.is_complete and (obstacle := self._obstacle(job)):
            job.state, job.reason = JobState.PAUSED, obstacle
            log.warning("job paused", job=job.id, reason=job.reason)

    async def _go_on(self, job: Job) -> None:
        """If what paused it is over. It begins anew from what is on disk."""
        if self._shared.patience.left_s(job.id, now_s()):
            return  # for the reason that it has
        if obstacle := self._obstacle(job):
            job.reason = obstacle
            return
        self._begin(job)

    async def _settle(self, job: Job) -> None:
        """Of a job that has ended: its state goes to disk before what is not needed any more goes from there."""
        if job.ended_s is not None:
            return
        await self._drop_run(job)
        ended_s = time.time()
        await self._in_thread(self.store.save, msgspec.structs.replace(job, ended_s=ended_s))
        job.ended_s = ended_s  # not before: it is tried again where there was no room
        if job.state == JobState.DONE:
            await self._in_thread(self.store.tidy, job)
        log.info("job ended", job=job.id, state=job.state, done=job.done, errors=job.errors, reason=job.reason)

    async def _drop_run(self, job: Job) -> None:
        self._foreseen.pop(job.id, None)
        self._shared.patience.forget(job.id)
        await self._until_begun(job)  # what was just at it is stopped with it
        run = self._runs.pop(job.id, None)
        if run is not None:
            await run.stop()

    def _tell_infeasible(self, job_id: str) -> None:
        found = self.progress(self._jobs[job_id])
        if "in_time" not in found:
            return  # without slices nobody knows
        if found["in_time"]:
            self._infeasible.discard(job_id)
        elif job_id not in self._infeasible:
            self._infeasible.add(job_id)
            log.warning("job will be late", job=job_id, ends_in_s=found["ends_in_s"])

    def _works(self) -> tuple[list[Work], dict[str, list[Place]]]:
        works, places = [], {}
        for job_id, run in self._runs.items():
            if run.job.state != JobState.RUNNING or not run.left:
                continue
            with suppress(ServeError):  # its model has gone: it is about to be paused
                places[job_id] = self._supply.places(self._usable_model(run.job), run.left, run.factors)
                works.append(Work(job_id, run.left, within_ns(run.job)))
        return works, places
