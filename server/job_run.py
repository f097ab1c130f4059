"""One batch job while it runs: inputs are read ahead, batches sent to the slices that it holds, results put down.

What is read and not yet in the ledger is bounded (`job_window.py`). Four things go on side by side: reading (in a
thread), preparing what is encoded (in the preprocessing pool), sending (on the loop), and committing what is finished
(in a thread, a few times a second).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import structlog

from scheduler.answers import Answered
from scheduler.driver import now_ns
from scheduler.elastic import Elastic
from scheduler.lengths import Lengths
from scheduler.messages import Reason
from server import job_results
from server.errors import Fault, ServeError
from server.job_inputs import ENCODED, Item, Reader
from server.job_pace import Casualties, Factors, Pace
from server.job_preparing import JobPreparer, grouped, tensors_of_batch
from server.job_progress import INTERNAL_ERROR, now_s, too_many
from server.job_results import rows_of_all
from server.job_store import DiskFullError, ItemError, Job, JobState, Ledger
from server.job_supply import Supply
from server.job_window import Waiting, Window
from server.repository import Model
from server.service import InferenceService

log = structlog.get_logger(__name__)

READ_ITEMS = 512
# Groups of items that are being prepared: one that keeps the pool busy, one that is ready to.
PREPARING = 2
# Batches that a slice has: one that runs, one that is ready to.
AHEAD = 2
COMMIT_EVERY_S = 0.2
# A worker that dies of a batch may have died of anything; an item is given up after so many, the last ones alone.
MOST_CRASHES = 3
GIVEN_UP = "{} workers died of batches with it, the last ones of it alone; it was not tried again"
AGAIN_S = 0.2

Bucket = tuple[int, ...]
_OURS = (Fault.REFUSED, Fault.UNAVAILABLE)  # nothing is wrong with the items


class Shared(NamedTuple):
    """What all jobs have together. `tally`: finished items, by model and outcome."""

    service: InferenceService
    elastic: Elastic
    supply: Supply
    preparer: JobPreparer
    casualties: Casualties
    tally: Counter[tuple[str, str]]


class JobRun:
    """`job` is kept up to date. `on_change`: told when it has ended or paused, or its slices refuse."""

    def __init__(
        self,
        job: Job,
        ledger: Ledger,
        reader: Reader,
        model: Callable[[], Model],
        shared: Shared,
        on_change: Callable[[JobRun], None],
    ) -> None:
        self.job = job
        self.ledger = ledger
        self._reader = reader
        self._model = model
        self._service, self._elastic, self._supply, self._preparer, self._casualties, self._tally = shared
        # Its own, and one: what it does with its files is done one after the other.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"job-{job.id}")
        self._on_change = on_change
        self.seen: Counter[Bucket] = Counter()  # items read, by bucket
        self.factors = Factors()
        self.pace = Pace()
        self._waiting = Waiting()
        self._sent: dict[int, tuple[int, list[Item], Callable[[], object]]] = {}  # by number: worker, items, cancel
        self._numbers = 0
        self._on: Counter[int] = Counter()  # batches that are sent, by worker
        self._finished: list[tuple[list[Item], Answered | str]] = []
        self._window = Window()
        self._buckets: tuple[Lengths | None, tuple[int, ...]] = None, ()
        self._encoded: deque[Item] = deque()
        self._preparing = 0
        self._already: set[int] = set()  # finished before a restart
        self._read_all = False
        self._room = asyncio.Event()
        self._to_prepare = asyncio.Event()
        self._to_commit = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._feeding: asyncio.TimerHandle | asyncio.Handle | None = None

    # ---- life ----

    async def start(self) -> None:
        """Reads the first items, and goes on from there."""
        self.job.done, self.job.errors = self.ledger.counts
        self._window.read_to = self.ledger.position
        self._already = await self.in_thread(self.ledger.finished_from, self._window.read_to.item)
        await self._read_some()
        self.pace.start(now_s())
        going_on = [self._read(), self._commit(), *(self._prepare() for _ in range(PREPARING))]
        self._tasks = [asyncio.create_task(each) for each in going_on]
        for task in self._tasks:
            task.add_done_callback(self._task_ended)
        self._to_commit.set()  # it may be complete already

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """None of them may fail unseen: the job would wait for ever."""
        if task.cancelled() or (error := task.exception()) is None or self.job.state != JobState.RUNNING:
            return
        if isinstance(error, DiskFullError | OSError | sqlite3.Error):
            self._ends(JobState.PAUSED, f"the disk: {error}")
        else:
            log.error("a job failed", job=self.job.id, exc_info=error)
            self._ends(JobState.STOPPED, INTERNAL_ERROR)
        self._on_change(self)

    def _ends(self, state: JobState, reason: str) -> None:
        """Unless it has been cancelled meanwhile."""
        if self.job.state == JobState.RUNNING:
            self.job.state, self.job.reason = state, reason

    async def stop(self) -> None:
        """Takes back what waits, puts down what is finished, and lets go of its files."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._feeding is not None:
            self._feeding.cancel()
        for _, _, cancel in list(self._sent.values()):
            cancel()
        self._sent.clear()
        try:
            await self._put_down()
        except (DiskFullError, OSError, sqlite3.Error):
            log.warning("no room for results of a job; they will be computed again", job=self.job.id)
        await self.in_thread(self._reader.close)
        await self.in_thread(self.ledger.close)
        self._thread.shutdown(wait=False)

    def in_thread(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def first_errors(self, most: int) -> list[ItemError]:
        rows = await self.in_thread(lambda: list(self.ledger.rows(errors_only=True, limit=most)))
        return [ItemError(row.item, row.error or "", row.name) for row in rows]

    @property
    def left(self) -> dict[Bucket, float]:
        """Items that are not finished, by bucket: what is not read yet is taken to be like what was."""
        left, seen = self.job.asked.items - self.job.done, self.seen.total()
        return {bucket: left * count / seen for bucket, count in self.seen.items()} if seen else {}

    @property
    def _is_starved(self) -> bool:
        """Whether slices that it holds have less than they could, since inputs are not ready."""
        held = self._elastic.held(self.job.id)
        return bool(held) and not self._all_prepared and all(self._on[worker_id] < AHEAD for worker_id in held)

    @property
    def _all_prepared(self) -> bool:
        return self._read_all and not self._encoded and not self._preparing

    # ---- reading ----

    async def _read(self) -> None:
        while not self._read_all:
            while self._window.is_full:
                self._room.clear()
                await self._room.wait()
            await self._read_some()
            self.feed_soon()

    async def _read_some(self) -> None:
        items, self._window.read_to = await self.in_thread(
            lambda: (self._reader.read(READ_ITEMS), self._reader.position)
        )
        self.look_at_buckets()
        self._read_all = not items
        for item in items:
            if item.number in self._already:
                self._already.discard(item.number)
                continue
            self._window.add(item)
            if item.bucket == ENCODED and not item.error:
                self._encoded.append(item)
                self._to_prepare.set()
            else:
                self._is_ready(item, item.nbytes)

    def look_at_buckets(self) -> None:
        """What waits goes into those that there are now; without its model they stay as they were."""
        with suppress(ServeError):
            model = self._model()
            before, self._buckets = self._buckets, (model.lengths, self._supply.edges(model))
            if self._buckets != before and self._waiting.counts():
                self._waiting.regroup(lambda item: grouped(item, *self._buckets))
                self.seen = Counter(self._waiting.counts())

    def _is_ready(self, item: Item, before: int) -> None:
        """It is tensors, or has an error; `before`: its bytes until now."""
        if item.error:
            self._window.ended([item], were_ready=False)
            self._finish([item], item.error)
            return
        item.bucket = grouped(item, *self._buckets)
        self._window.ready(item, before)
        self.seen[item.bucket] += 1
        self._waiting.add(item)

    async def _prepare(self) -> None:
        while True:
            while not self._encoded or self._window.is_ready_full:
                self._to_prepare.clear()
                await self._to_prepare.wait()
            group = [self._encoded.popleft() for _ in range(min(self._preparer.group, len(self._encoded)))]
            sizes = [item.nbytes for item in group]
            self._preparing += 1
            try:
                model = self._model()
                pipeline = model.serving.preprocess
                if pipeline is None:
                    raise ServeError(Fault.UNAVAILABLE, f"model {model.name} has no pipeline any more")
                await self._preparer.prepare(model, pipeline, group)
            except ServeError:
                self._encoded.extendleft(reversed(group))
                await asyncio.sleep(AGAIN_S)
                continue
            finally:
                self._preparing -= 1
            self.look_at_buckets()
            for item, before in zip(group, sizes, strict=True):
                self._is_ready(item, before)
            self.feed_soon()

    # ---- sending ----

    def feed_soon(self, after_s: float = 0.0) -> None:
        """Never at once: this is called by the driver, which is not to be called back."""
        if self._feeding is None:
            self._feeding = asyncio.get_running_loop().call_later(after_s, self._fed)

    def _fed(self) -> None:
        self._feeding = None
        self.feed()

    def feed(self) -> None:
        """Gives each slice that the job holds its next batches."""
        if self.job.state != JobState.RUNNING:
            return
        for worker_id in self._elastic.held(self.job.id):
            if self._casualties.spared_s(worker_id, now_s()):
                continue
            while self._on[worker_id] < AHEAD and self._feeding is None:
                items, ns = self._next_batch(worker_id)
                if not items:
                    break
                self._send(worker_id, items, ns)

    def _next_batch(self, worker_id: int) -> tuple[list[Item], float]:
        """Takes it out of what is ready."""
        if self._waiting.alone:
            item = self._waiting.alone.popleft()
            return [item], self._size(worker_id, item.bucket)[1]
        bucket = self._overtaken() or self._elastic.pick(self.job.id, worker_id, self._full_buckets(worker_id))
        if not isinstance(bucket, tuple):
            return [], 0.0
        wanted, ns = self._size(worker_id, bucket)
        items = self._waiting.take(bucket, wanted)
        if items:
            self._elastic.started(self.job.id, worker_id, bucket, ns * len(items) / max(wanted, 1))
        return items, ns

    def _size(self, worker_id: int, bucket: Bucket) -> tuple[int, float]:
        """Items of a batch, and its ns; none where the model is not served."""
        try:
            found = self._supply.batch(self._model(), worker_id, bucket, self.factors.get(bucket, 1.0))
        except ServeError:
            return 0, 0.0
        return found or (0, 0.0)

    def _full_buckets(self, worker_id: int) -> list[Bucket]:
        """Those that have a whole batch; all, where no more is to come before one has ended."""
        counts = self._waiting.counts()
        if self._all_prepared or self._window.is_full or self._window.is_ready_full:
            return list(counts)
        return [bucket for bucket, count in counts.items() if count >= self._size(worker_id, bucket)[0]]

    def _overtaken(self) -> Bucket | None:
        item = self._window.overtaken()
        return item.bucket if item is not None and self._waiting.is_next(item) else None

    def _send(self, worker_id: int, items: list[Item], ns: float) -> None:
        self._numbers += 1
        number = self._numbers
        self._on[worker_id] += 1
        self._sent[number] = worker_id, items, lambda: None
        ended = partial(self._batch_ended, number, ns)
        try:
            model = self._model()
            self._supply.saw(model, (item.length for item in items))
            cancel = self._service.submit_background(model, tensors_of_batch(model, items), worker_id, now_ns(), ended)
        except ServeError as error:
            ended(error)
            return
        if number in self._sent:  # it may have been refused meanwhile
            self._sent[number] = worker_id, items, cancel

    def _batch_ended(self, number: int, ns: float, outcome: Answered | ServeError) -> None:
        worker_id, items, _ = self._sent.pop(number)
        self._on[worker_id] -= 1
        if isinstance(outcome, Answered):
            self._learn(worker_id, items, outcome)
            self._let_go(items, outcome)
            self.feed_soon()
        elif outcome.fault in _OURS:
            self._waiting.put_back(items)
            self.feed_soon(AGAIN_S)
            self._on_change(self)
        else:
            if outcome.reason == Reason.CRASHED:
                self._casualties.died(worker_id, now_s())
            self._blame(items, outcome)
            self.feed_soon()

    def _blame(self, items: list[Item], error: ServeError) -> None:
        """One of them may be at fault: each has to show by itself."""
        crashed = error.reason == Reason.CRASHED
        for item in items:
            item.crashes += crashed
            if len(items) > 1 or (crashed and item.crashes < MOST_CRASHES):
                self._waiting.alone.append(item)
            else:
                self._let_go([item], GIVEN_UP.format(item.crashes) if crashed else error.message)

    def _let_go(self, items: list[Item], outcome: Answered | str) -> None:
        self._window.ended(items, were_ready=True)
        self._to_prepare.set()
        self._room.set()
        self._finish(items, outcome)

    def _learn(self, worker_id: int, items: list[Item], answered: Answered) -> None:
        """How a bucket's batches differ from what the table says."""
        bucket = items[0].bucket
        wanted, ns = self._size(worker_id, bucket)
        if len(items) == wanted and ns > 0 and answered.started_ns:
            self.factors.learn(bucket, (now_ns() - answered.started_ns) / ns)

    # ---- finishing ----

    def _finish(self, items: list[Item], outcome: Answered | str) -> None:
        self._finished.append((items, outcome))
        self._to_commit.set()

    async def _commit(self) -> None:
        while True:
            await self._to_commit.wait()
            await asyncio.sleep(COMMIT_EVERY_S)
            self._to_commit.clear()
            await self._put_down()
            if self.job.errors > self.job.asked.max_errors:
                self._ends(JobState.STOPPED, too_many(self.job, await self.first_errors(3)))
            elif self.job.done >= self.job.asked.items:
                said = await self.in_thread(job_results.write_as_asked, self.ledger, self.job.asked)
                self._ends(JobState.DONE, said)
            if self.job.state != JobState.RUNNING:
                self._on_change(self)
                return

    async def _put_down(self) -> None:
        """What is finished, into the ledger."""
        finished, self._finished = self._finished, []
        position = self._window.position()
        try:
            counts = await self.in_thread(lambda: self.ledger.add(rows_of_all(finished, self.job.asked), position))
        except BaseException:
            self._finished = finished + self._finished
            raise
        self.pace.count(counts[0] - self.job.done, now_s(), starved=self._is_starved)
        failed = counts[1] - self.job.errors
        model = self.job.asked.model
        self._tally.update({(model, "ok"): counts[0] - self.job.done - failed, (model, "failed"): failed})
        self.job.done, self.job.errors = counts
        self._window.put_down(sum(len(items) for items, _ in finished))
        self._room.set()
