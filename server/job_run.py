"""One batch job while it runs: inputs are read ahead, batches sent to the slices that it holds, results put down.

What is read and not yet in the ledger is bounded (`job_window.py`). Four things go on side by side: reading (in a
thread), preparing what is encoded (in the preprocessing pool), sending (on the loop), and committing what is finished
(in a thread, a few times a second).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import structlog

from preprocess.pipeline import PipelineError
from scheduler.answers import Answered
from scheduler.driver import now_ns
from scheduler.lengths import Lengths
from scheduler.messages import Reason
from server import job_results
from server.errors import Fault, ServeError
from server.job_inputs import ENCODED, Item, Reader
from server.job_pace import Factors, Pace
from server.job_preparing import Encoded, grouped, tensors_of_batch
from server.job_progress import INTERNAL_ERROR, now_s, too_many
from server.job_results import rows_of_all
from server.job_shared import Shared
from server.job_store import DiskFullError, ItemError, Job, JobState, Ledger, Position, errors_of
from server.job_window import Finished, Outcomes, Sent, Waiting, Window
from server.repository import Model

log = structlog.get_logger(__name__)

READ_ITEMS = 512
# Groups of items that are being prepared: one that keeps the pool busy, one that is ready to.
PREPARING = 2
# Batches that a slice has: one that runs, one that is ready to.
AHEAD = 2
COMMIT_EVERY_S = 0.2
AGAIN_S = 0.2  # what was refused

Bucket = tuple[int, ...]
_OURS = (Fault.REFUSED, Fault.UNAVAILABLE)  # nothing is wrong with the items


class JobRun:
    """`job` is kept up to date. `on_change`: told when it has ended or paused, or its slices refuse.

    An item is in one place at a time: `_encoded` until its pipeline has made tensors of it; in `_waiting`, by bucket,
    or in its `alone` once a batch with it failed; `_sent` with its batch, and from there back to `_waiting` (refused,
    failed) or on to `_finished`, where items with an error come at once; then in the ledger. `_window` has all from
    reading to the ledger: it bounds them, and says where to read on.
    """

    def __init__(
        self,
        job: Job,
        ledger: Ledger,
        reader: Reader,
        model: Callable[[], Model],
        shared: Shared,
        on_change: Callable[[], None],
    ) -> None:
        self.job = job
        self.ledger = ledger
        self._reader = reader
        self._model = model
        self._service, self._elastic, self._supply = shared.service, shared.elastic, shared.supply
        self._casualties, self._patience, self._tally = shared.casualties, shared.patience, shared.tally
        # Its own, and one: what it does with its files is done one after the other.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"job-{job.id}")
        self._on_change = on_change
        self.seen: Counter[Bucket] = Counter()  # items read, by bucket
        self.factors = Factors()
        self.pace = Pace()
        self._waiting = Waiting()
        self._sent = Sent()
        self._finished = Finished()
        self._window = Window()
        self._buckets: tuple[Lengths | None, tuple[int, ...]] = None, ()
        self._encoded = Encoded(model, shared.preparer, self._window, self._prepared)
        self._already: set[int] = set()  # finished before a restart
        self._read_all = False
        self._room = asyncio.Event()
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
        going_on = [self._read(), self._commit(), *(self._encoded.prepare() for _ in range(PREPARING))]
        self._tasks = [asyncio.create_task(each) for each in going_on]
        for task in self._tasks:
            task.add_done_callback(self._task_ended)
        self._to_commit.set()  # it may be complete already

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and self.job.state == JobState.RUNNING:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        """Nothing may fail unseen: the job would wait for ever. It can go on from its ledger."""
        # A quota shows as an OSError, or as whatever SQLite makes of it.
        if isinstance(error, DiskFullError | OSError | sqlite3.Error | PipelineError):
            self._patience.failed(self.job.id, self.job.done, now_s())
            what = "preprocessing" if isinstance(error, PipelineError) else "the disk"
            self.job.becomes(JobState.PAUSED, f"{what}: {error}")
        else:
            log.error("a job failed", job=self.job.id, exc_info=error)
            self.job.becomes(JobState.STOPPED, INTERNAL_ERROR)
        self._on_change()

    async def stop(self) -> None:
        """Takes back what waits, puts down what is finished, and lets go of its files."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._feeding is not None:
            self._feeding.cancel()
        self._sent.take_back()
        try:
            await self._put_down()
        except (DiskFullError, OSError, sqlite3.Error):
            log.warning("no room for results of a job; they will be computed again", job=self.job.id)
        await self.in_thread(self._reader.close)
        await self.in_thread(self.ledger.close)
        self._thread.shutdown(wait=False)

    def in_thread(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    @property
    def left(self) -> dict[Bucket, float]:
        """Items that are not finished, by bucket: what is not read yet is taken to be like what was."""
        left, seen = self.job.asked.items - self.job.done, self.seen.total()
        return {bucket: left * count / seen for bucket, count in self.seen.items()} if seen else {}

    @property
    def _is_starved(self) -> bool:
        """Whether slices that it holds have less than they could, since inputs are not ready."""
        held = self._elastic.held(self.job.id)
        return bool(held) and not self._all_prepared and all(self._sent.on[worker_id] < AHEAD for worker_id in held)

    @property
    def _all_prepared(self) -> bool:
        return self._read_all and self._encoded.is_empty

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
        if not items and (found := self._window.read_to.item) < (wanted := self.job.asked.items):
            self.job.becomes(JobState.STOPPED, f"the inputs have become shorter: {found} of {wanted} items are there")
            self._on_change()
        for item in items:
            if item.number in self._already:
                self._already.discard(item.number)
                continue
            self._window.add(item)
            if item.bucket == ENCODED and not item.error:
                self._encoded.add(item)
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

    def _prepared(self, items: list[Item], sizes: list[int]) -> None:
        """They are tensors now, or have an error; `sizes`: their bytes until then."""
        self.look_at_buckets()
        for item, before in zip(items, sizes, strict=True):
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
        try:
            for worker_id in self._elastic.held(self.job.id):
                if not self._casualties.spared_s(worker_id, now_s()):
                    self._feed(worker_id)
        except Exception as error:
            self._failed(error)

    def _feed(self, worker_id: int) -> None:
        while self.job.state == JobState.RUNNING and self._sent.on[worker_id] < AHEAD and self._feeding is None:
            items = [] if self._finished.is_full else self._next_batch(worker_id)
            if not items:
                break
            self._send(worker_id, items)

    def _next_batch(self, worker_id: int) -> list[Item]:
        """Takes it out of what is ready."""
        if self._waiting.alone:
            return [self._waiting.alone.popleft()]
        bucket = self._overtaken() or self._elastic.pick(self.job.id, worker_id, self._full_buckets(worker_id))
        if not isinstance(bucket, tuple):
            return []
        wanted, ns = self._size(worker_id, bucket)
        items = self._waiting.take(bucket, wanted)
        if items:
            self._elastic.started(self.job.id, worker_id, bucket, ns * len(items) / max(wanted, 1))
        return items

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

    def _send(self, worker_id: int, items: list[Item]) -> None:
        number = self._sent.add(worker_id, items)
        ended = partial(self._batch_ended, number)
        try:
            model = self._model()
            self._supply.saw(model, (item.length for item in items))
            tensors = tensors_of_batch(model, items)
            self._sent.sent(number, self._service.submit_background(model, tensors, worker_id, now_ns(), ended))
        except ServeError as error:
            ended(error)
        except Exception:  # its items are tried again, each by itself
            log.exception("a batch of a job cannot be sent", job=self.job.id)
            ended(ServeError(Fault.INTERNAL, INTERNAL_ERROR))

    def _batch_ended(self, number: int, outcome: Answered | ServeError) -> None:
        try:
            sent = self._sent.ended(number)
            if sent is not None:
                self._take_in(*sent, outcome)
        except Exception as error:
            self._failed(error)

    def _take_in(self, worker_id: int, items: list[Item], outcome: Answered | ServeError) -> None:
        if isinstance(outcome, Answered):
            self._items_end(items, outcome)
            self.feed_soon()
            self._learn(worker_id, items, outcome)
        elif outcome.fault in _OURS:
            self._waiting.put_back(items)
            self.feed_soon(AGAIN_S)
            self._on_change()
        else:
            if outcome.reason == Reason.CRASHED:
                self._casualties.died(worker_id, now_s())
            self._blame(items, outcome)
            self.feed_soon()

    def _blame(self, items: list[Item], error: ServeError) -> None:
        crashed = error.reason == Reason.CRASHED
        for item, said in self._waiting.tried(items, error.message, crashed=crashed):
            self._items_end([item], said)

    def _items_end(self, items: list[Item], outcome: Answered | str) -> None:
        self._window.ended(items, were_ready=True)
        self._encoded.look_again()
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
        self._finished.add(items, outcome)
        self._to_commit.set()

    async def _commit(self) -> None:
        while True:
            await self._to_commit.wait()
            await asyncio.sleep(COMMIT_EVERY_S)
            self._to_commit.clear()
            await self._put_down()
            self.feed_soon()  # there is room for what is made of more
            if self.job.errors > self.job.asked.max_errors:
                self.job.becomes(JobState.STOPPED, too_many(self.job))
            elif self.job.done >= self.job.asked.items:
                said = await self.in_thread(job_results.write_as_asked, self.ledger, self.job.asked)
                self.job.becomes(JobState.DONE, said)
            if self.job.state != JobState.RUNNING:
                self._on_change()
                return

    async def _put_down(self) -> None:
        """What is finished, into the ledger."""
        finished = self._finished.take()
        try:
            counts, wrong = await self.in_thread(self._kept, finished, self._window.position())
        except BaseException:
            self._finished.put_back(finished)
            raise
        self.pace.count(counts[0] - self.job.done, now_s(), starved=self._is_starved)
        failed = counts[1] - self.job.errors
        model = self.job.asked.model
        self._tally.update({(model, "ok"): counts[0] - self.job.done - failed, (model, "failed"): failed})
        self.job.done, self.job.errors = counts
        self.job.went_wrong(wrong)
        self._window.put_down(self._finished.put_down(finished))
        self._room.set()

    def _kept(self, finished: Outcomes, position: Position) -> tuple[tuple[int, int], list[ItemError]]:
        """In a thread. Returns the ledger's counts, and what is wrong with these items."""
        rows = rows_of_all(finished, self.job.asked)
        return self.ledger.add(rows, position), errors_of(rows)
