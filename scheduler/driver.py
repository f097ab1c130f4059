"""The asyncio driver: stamps the time, hands events to the core, and carries its commands out.

Everything here runs on the event loop's thread. What is done per request is kept to a few microseconds: one
callback a request, all those of a batch in turn; one message a batch.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple, Protocol

import structlog

from partitioner.geometry import Slice
from scheduler.answers import Answered, BatchOutputs, Share
from scheduler.arena import Arena
from scheduler.channel import Done, Failed, RunBatch
from scheduler.core import SchedulerCore
from scheduler.fleet import Fleet
from scheduler.journal import JournalWriter
from scheduler.messages import (
    Answer,
    AnyCommand,
    AnyEvent,
    Arrived,
    BatchDone,
    BatchFailed,
    Cancelled,
    Drains,
    Piece,
    Reason,
    Refuse,
    Request,
    Run,
    Serves,
    StopsServing,
    Tick,
    Wake,
    WorkerLost,
    WorkerUp,
)

log = structlog.get_logger(__name__)

# The clock of all deadlines.
now_ns = time.monotonic_ns
NO_SLOT = -1


class RefusedError(Exception):
    """The scheduler ended a request without an answer."""

    def __init__(self, reason: Reason, retry_after_s: float, detail: str) -> None:
        super().__init__(detail or reason)
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.detail = detail


OnEnd = Callable[[Answered | RefusedError], None]


class Pending:
    """One request between its arrival and its end. `running`: how many of its pieces workers have."""

    __slots__ = ("arrival_ns", "ended", "offset", "on_end", "request", "running", "shares", "started_ns")

    def __init__(self, request: Request, arrival_ns: int, on_end: OnEnd) -> None:
        self.request = request
        self.offset = NO_SLOT  # in the arena, once that is the driver's
        self.arrival_ns = arrival_ns
        self.on_end = on_end
        self.started_ns = 0  # when its first piece was sent, 0 before
        self.running = 0
        self.ended = False
        self.shares: tuple[Share, ...] = ()  # of the pieces that are done


class BatchRecord(NamedTuple):
    """What is measured of one batch, in ns of the monotonic clock, and of the requests that it made complete."""

    model: str
    worker_id: int
    items: int
    request_ns: list[int]  # arrival to end, of each such request
    queue_ns: list[int]  # arrival to the start of its first piece
    late: int  # how many of them ended after their due time
    ended_ns: int
    input_ns: int
    infer_ns: int
    output_ns: int


class Observer(Protocol):
    """Told what happened, a batch at a time; the metrics. Errors are counted by those who tell the client."""

    def batch_done(self, record: BatchRecord) -> None: ...
    def cancelled(self, model: str, *, before_compute: bool) -> None: ...


class _Running(NamedTuple):
    """A batch under way: its pieces, and the request of each. One request may have several."""

    pieces: Sequence[Piece]
    requests: list[Pending]


class Driver:
    """Connects arrivals, the core, and the fleet."""

    def __init__(
        self,
        core: SchedulerCore,
        fleet: Fleet,
        arena: Arena,
        observer: Observer,
        journal: JournalWriter | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()  # asking for it each time is a system call each time
        self._core = core
        self._fleet = fleet
        self._arena = arena
        self._observer = observer
        self._journal = journal
        self._pending: dict[int, Pending] = {}
        self._unfinished: Counter[str] = Counter()  # by model
        self._idle: dict[str, asyncio.Future[None]] = {}  # by model; "" for all
        self._running: dict[int, _Running] = {}
        self._complete: list[Pending] = []  # by the batch that was last done
        self._timer: asyncio.TimerHandle | None = None
        self._given_up = ""  # why, once no request is taken any more
        self.counts_arrivals = False  # for somebody who takes them
        self._arrivals: Counter[tuple[str, int, int]] = Counter()
        self._lengths: dict[str, Counter[int]] = {}  # items by length, of models that have one
        self.busy_ns: Counter[int] = Counter()  # by worker, of what is not background work

    # ---- requests ----

    def accept(self, request: Request, arrival_ns: int, on_end: OnEnd) -> Pending:
        """Takes on a request whose inputs may still be on their way to the arena. It is unfinished from now on.

        `on_end` is called exactly once, unless `cancel` or `withdraw` is called first. It is called for all
        requests of a batch in turn, so it must be quick.
        """
        pending = self._pending[request.id] = Pending(request, arrival_ns, on_end)
        self._unfinished[request.model] += 1
        return pending

    def start(self, pending: Pending, offset: int) -> None:
        """Queues an accepted request. Its inputs are in the arena at `offset`; that slot is the driver's from now on.

        May end the request before it returns; one that has ended before gives only its slot back.
        """
        if pending.ended:
            self._arena.free(offset)
            return
        pending.offset = offset
        request = pending.request
        if request.length and request.worker_id is None:
            self._lengths.setdefault(request.model, Counter())[request.length] += request.items
        if self.counts_arrivals and request.worker_id is None:
            length = request.length or next(iter(request.dims), 0)
            self._arrivals[request.model, request.items, length] += 1
        if self._given_up:
            self._tell(pending, RefusedError(Reason.UNAVAILABLE, 0.0, self._given_up))
        else:
            self._feed(Arrived(request))

    def withdraw(self, pending: Pending) -> bool:
        """Ends an accepted request that will not be started. False if it had ended before."""
        if pending.ended:
            return False
        self._end(pending)
        return True

    def cancel(self, pending: Pending) -> None:
        """The client has gone. Does nothing for a request that has ended."""
        if pending.ended:
            return
        self._observer.cancelled(pending.request.model, before_compute=not pending.started_ns)
        self._end(pending)
        self._feed(Cancelled(pending.request.id))

    def give_up(self, why: str) -> None:
        """Ends every request, now and from now on, as unavailable."""
        self._given_up = why
        for pending in list(self._pending.values()):
            if pending.ended:
                continue  # by what the core did when it was told of another
            self._tell(pending, RefusedError(Reason.UNAVAILABLE, 0.0, why))
            self._feed(Cancelled(pending.request.id))

    def take_arrivals(self) -> Counter[tuple[str, int, int]]:
        """How many requests came since the last call, by model, items and length, 0 where there is none."""
        arrivals, self._arrivals = self._arrivals, Counter()
        return arrivals

    def take_lengths(self) -> dict[str, Counter[int]]:
        """How many items of each length came since the last call, by model."""
        lengths, self._lengths = self._lengths, {}
        return lengths

    def unfinished(self, model: str = "") -> int:
        """Requests that have not ended, of one model or in all."""
        return self._unfinished[model] if model else len(self._pending)

    async def idle(self, model: str = "") -> None:
        """Returns when no request is unfinished, of one model or at all."""
        while self.unfinished(model):
            if model not in self._idle:
                self._idle[model] = self._loop.create_future()
            await asyncio.shield(self._idle[model])

    # ---- what the fleet tells ----

    def worker_up(self, worker_id: int, where: Slice, depth: int) -> None:
        self._feed(WorkerUp(worker_id, where.gpcs, depth))

    def worker_lost(self, worker_id: int, detail: str, *, comes_back: bool, batch_ids: list[int]) -> None:
        for batch_id in batch_ids:
            self._put_back(self._running.pop(batch_id))
        self._feed(WorkerLost(worker_id, comes_back, detail))

    def drains(self, worker_id: int) -> None:
        self._feed(Drains(worker_id))

    def serves(
        self, worker_id: int, key: str, latency_ns: tuple[int, ...], weight: float, lengths: tuple[int, ...] = ()
    ) -> None:
        self._feed(Serves(worker_id, key, latency_ns, lengths, weight))

    def stops_serving(self, worker_id: int, key: str) -> None:
        self._feed(StopsServing(worker_id, key))

    def batch_done(self, worker_id: int, done: Done, outbox: memoryview) -> None:
        # Copied out before the core can send the worker its next batch, which may reuse the memory.
        outputs = BatchOutputs(done, outbox)
        running = self._running.pop(done.batch_id)
        if running.requests[0].request.worker_id is None:
            self.busy_ns[worker_id] += sum((done.input_ns, done.infer_ns, done.output_ns))
        row = 0
        for pending, (_, first, items) in zip(running.requests, running.pieces, strict=True):
            if not pending.ended:
                pending.shares += (Share(outputs, row, items, first),)
            row += items
        self._put_back(running)
        complete = self._complete = []
        ended_ns = self._feed(BatchDone(worker_id, done.batch_id))
        # After the tasks that were just woken: counting must not delay their answers.
        model = running.requests[0].request.model
        self._loop.call_soon(self._record, model, worker_id, row, complete, ended_ns, done)

    def _record(
        self, model: str, worker_id: int, items: int, complete: list[Pending], ended_ns: int, done: Done
    ) -> None:
        request_ns, queue_ns, late = [], [], 0
        for pending in complete:
            if pending.request.worker_id is not None:
                continue  # how long it has waited says nothing of anybody's latency
            request_ns.append(ended_ns - pending.arrival_ns)
            queue_ns.append(pending.started_ns - pending.arrival_ns)
            late += _late_ns(pending.request, ended_ns) > 0
        times = (ended_ns, done.input_ns, done.infer_ns, done.output_ns)
        self._observer.batch_done(BatchRecord(model, worker_id, items, request_ns, queue_ns, late, *times))

    def batch_failed(self, worker_id: int, failed: Failed) -> None:
        self._put_back(self._running.pop(failed.batch_id))
        self._feed(BatchFailed(worker_id, failed.batch_id, failed.detail))

    # ---- events in, commands out ----

    def _feed(self, event: AnyEvent) -> int:
        """Returns the time it stamped the event with."""
        at_ns = now_ns()
        commands = self._core.handle(at_ns, event)
        if self._journal is not None:
            self._journal.write(at_ns, event, commands)
        # Workers first: they compute while the answers are being written.
        for command in commands:
            if type(command) is Run:
                self._run(command, at_ns)
        for command in commands:
            if type(command) is not Run:
                self._carry_out(command, at_ns)
        return at_ns

    def _run(self, command: Run, at_ns: int) -> None:
        requests = []
        cut = {}
        for index, (request_id, first, items) in enumerate(command.pieces):
            pending = self._pending[request_id]
            requests.append(pending)
            pending.running += 1
            if not pending.started_ns:
                pending.started_ns = at_ns
            if items != pending.request.items:
                cut[index] = first, pending.request.items
        self._running[command.batch_id] = _Running(command.pieces, requests)
        self._fleet.send(
            command.worker_id,
            RunBatch(
                command.batch_id,
                command.model,
                requests[0].request.dims,
                [pending.offset for pending in requests],
                [piece.items for piece in command.pieces],
                cut,
                command.length,
                [pending.request.length for pending in requests] if command.length else (),
            ),
        )

    def _carry_out(self, command: AnyCommand, at_ns: int) -> None:
        match command:
            case Answer():
                for request_id in command.request_ids:
                    pending = self._pending[request_id]
                    shares = pending.shares
                    if len(shares) > 1:
                        shares = tuple(sorted(shares, key=attrgetter("first")))
                    self._complete.append(pending)
                    request = pending.request
                    self._tell(pending, Answered(shares, _late_ns(request, at_ns), request.length, pending.started_ns))
            case Refuse():
                error = RefusedError(command.reason, command.retry_after_ns / 1e9, command.detail)
                self._tell(self._pending[command.request_id], error)
            case Wake():
                if self._timer is not None:
                    self._timer.cancel()
                delay_s = max(0, command.at_ns - at_ns) / 1e9
                self._timer = self._loop.call_later(delay_s, self._feed, Tick())

    def _tell(self, pending: Pending, end: Answered | RefusedError) -> None:
        self._end(pending)
        try:
            pending.on_end(end)
        except Exception:  # those behind it in the batch must get their answers
            log.exception("a request's end could not be told", model=pending.request.model)

    def _put_back(self, running: _Running) -> None:
        """After a batch: its worker does not read the requests' slots any more."""
        for pending in running.requests:
            pending.running -= 1
            if pending.ended and not pending.running:
                self._arena.free(pending.offset)

    def _end(self, pending: Pending) -> None:
        """The request has ended. A slot that workers may be reading is freed when their batches end."""
        pending.ended = True
        pending.shares = ()  # its client may keep the request for longer than the outputs are worth
        del self._pending[pending.request.id]
        if not pending.running and pending.offset != NO_SLOT:
            self._arena.free(pending.offset)
        model = pending.request.model
        self._unfinished[model] -= 1
        if self._idle:
            self._tell_idle(model)

    def _tell_idle(self, model: str) -> None:
        if not self._unfinished[model] and model in self._idle:
            self._idle.pop(model).set_result(None)
        if not self._pending and "" in self._idle:
            self._idle.pop("").set_result(None)


def _late_ns(request: Request, ended_ns: int) -> int:
    """How long after its due time a request has ended, 0 if in time."""
    due_ns = request.due_ns
    return 0 if due_ns is None or due_ns >= ended_ns else ended_ns - due_ns
