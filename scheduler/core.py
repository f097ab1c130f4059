"""The scheduler's core: `handle(now, event) -> commands`. Pure: no clock, no I/O, waiting is a command.

Rules:
1. Every Arrived ends in exactly one Answer or Refuse, or in the client's own Cancelled.
2. A worker gets a batch when it has room, at once: a lone request on an idle slice waits for nobody.
3. When a worker dies, what waited for it is placed anew; what ran on it runs again, alone. A request whose
   worker dies a second time is refused by itself.
4. When the model raises on a batch of several, each of them runs again alone, so that only the culprit fails.
5. While every worker that has a model is being restarted or replaced, its requests are parked, not refused.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable

from scheduler.domain import Batch, BatchTable, Pool, Query, Worker
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
    Run,
    Serves,
    StopsServing,
    Tick,
    Wake,
    WorkerLost,
    WorkerUp,
)
from scheduler.policies import Policy, Waiting
from scheduler.policies.elsa import Elsa

CRASHES_PER_REQUEST = 2
# How many SLOs after its due time the policy may expect a request to end, or else it is refused.
LATEST_SLOS = 9
# How long before the end of the running batch the next one is staged: time to gather it and copy it in.
STAGE_AHEAD_NS = 2_000_000


class SchedulerCore:
    """One instance a daemon, and one a simulation.

    `max_queued`: waiting requests a model. `policy`: makes the policy for a pool. `refuse_late`: whether a new
    request that the policy expects to end after its due time is refused, or served late.
    """

    def __init__(
        self, max_queued: int = 4096, policy: Callable[[Pool], Policy] = Elsa, *, refuse_late: bool = True
    ) -> None:
        self._pool = Pool()
        self._policy = policy(self._pool)
        self._max_queued = max_queued
        self._refuse_late = refuse_late
        self._queries: dict[int, Query] = {}
        self._waiting: Counter[str] = Counter()  # queued or parked, by model
        self._queued = 0  # in the policy's queues
        self._parked: dict[str, dict[int, Query]] = {}
        self._coming_back: dict[int, set[str]] = {}  # models of workers that are being restarted or replaced
        self._draining: set[int] = set()
        self._expiries: list[tuple[int, int]] = []
        self._wake_ns: int | None = None
        self._roomy: dict[int, Worker] = {}
        self._next_batch_id = 1
        self._commands: list[AnyCommand] = []

    def handle(self, now_ns: int, event: AnyEvent) -> list[AnyCommand]:
        """What to do about `event`, which happens at `now_ns`. Times must not run backwards."""
        commands: list[AnyCommand] = []
        self._commands = commands
        if self._expiries and self._expiries[0][0] <= now_ns:
            self._expire(now_ns)
        match event:
            case Arrived():
                self._arrived(now_ns, event)
            case BatchDone():
                self._batch_done(now_ns, event)
            case Cancelled():
                self._cancelled(event)
            case BatchFailed():
                self._batch_failed(now_ns, event)
            case WorkerUp():
                self._draining.discard(event.worker_id)
                if event.worker_id not in self._pool.workers:
                    worker = Worker(event.worker_id, event.gpcs, event.depth)
                    self._pool.add(worker)
                    self._roomy[worker.id] = worker
            case Serves():
                self._serves(now_ns, event)
            case StopsServing():
                self._stops_serving(now_ns, event)
            case Drains():
                self._drains(now_ns, event)
            case WorkerLost():
                self._worker_lost(now_ns, event)
            case Tick():
                self._wake_ns = None
        if self._queued and self._roomy:
            self._dispatch(now_ns)
        if self._expiries:
            self._arm()
        return commands

    # ---- events ----

    def _arrived(self, now_ns: int, event: Arrived) -> None:
        request = event.request
        model = request.model
        if self._waiting[model] >= self._max_queued:
            retry_ns = self._policy.backlog_ns(now_ns, model)
            self._commands.append(Refuse(request.id, Reason.QUEUE_FULL, retry_ns))
            return
        if request.expires_ns is not None:
            if request.expires_ns <= now_ns:
                self._commands.append(Refuse(request.id, Reason.EXPIRED))
                return
            heapq.heappush(self._expiries, (request.expires_ns, request.id))
        query = self._queries[request.id] = Query(request, now_ns)
        self._place(now_ns, query)

    def _cancelled(self, event: Cancelled) -> None:
        query = self._queries.pop(event.request_id, None)
        if query is not None:
            self._withdraw(query)

    def _batch_done(self, now_ns: int, event: BatchDone) -> None:
        batch = self._finish(now_ns, event.worker_id, event.batch_id)
        answered = tuple(query.request.id for query in batch.queries if not query.gone)
        for request_id in answered:
            del self._queries[request_id]
        self._commands.append(Answer(answered))

    def _batch_failed(self, now_ns: int, event: BatchFailed) -> None:
        batch = self._finish(now_ns, event.worker_id, event.batch_id)
        alone = len(batch.queries) == 1
        for query in batch.queries:
            query.batch_id = None
            if query.gone:
                continue
            if alone:
                self._refuse(query, Reason.MODEL_FAILED, detail=event.detail)
            else:
                query.isolate()
                self._place(now_ns, query, again=True)

    def _serves(self, now_ns: int, event: Serves) -> None:
        if event.worker_id in self._draining:
            return  # it was loading while it was told to go: the model is expected elsewhere
        worker = self._pool.workers[event.worker_id]
        self._pool.serve(worker, event.model, BatchTable(event.latency_ns))
        self._forget_return(event.worker_id, event.model)
        for query in _by_class(self._parked.pop(event.model, {}).values()):
            self._waiting[event.model] -= 1
            self._place(now_ns, query, again=True)

    def _stops_serving(self, now_ns: int, event: StopsServing) -> None:
        self._forget_return(event.worker_id, event.model)
        worker = self._pool.workers.get(event.worker_id)
        if worker is not None and event.model in worker.tables:
            evicted = self._policy.evict(worker, event.model)
            self._pool.withdraw(worker, event.model)
            self._place_again(now_ns, evicted)
        self._give_up_parked(now_ns, event.model)

    def _drains(self, now_ns: int, event: Drains) -> None:
        worker = self._pool.workers[event.worker_id]
        self._draining.add(worker.id)
        # Beside what it serves, what it was still to load again after a restart.
        self._coming_back.setdefault(worker.id, set()).update(worker.tables)
        evicted = self._policy.evict(worker)
        for model in list(worker.tables):
            self._pool.withdraw(worker, model)
        self._place_again(now_ns, evicted)

    def _worker_lost(self, now_ns: int, event: WorkerLost) -> None:
        self._draining.discard(event.worker_id)
        models = self._coming_back.pop(event.worker_id, set())
        worker = self._pool.workers.get(event.worker_id)
        ran: list[Query] = []
        evicted: list[Query] = []
        if worker is not None:
            models |= set(worker.tables)
            ran = [query for batch in worker.in_flight.values() for query in batch.queries if not query.gone]
            evicted = self._policy.evict(worker)
            self._pool.remove(worker)
            self._roomy.pop(worker.id, None)
        if event.comes_back:
            self._coming_back[event.worker_id] = models
        for query in ran:
            query.batch_id = None
            query.crashes += 1
            if query.crashes >= CRASHES_PER_REQUEST:
                self._refuse(query, Reason.CRASHED, detail=event.detail)
            else:
                query.isolate()
                self._place(now_ns, query, again=True)
        self._place_again(now_ns, evicted)
        for model in models:
            self._give_up_parked(now_ns, model)

    # ---- placing and starting ----

    def _place(self, now_ns: int, query: Query, *, again: bool = False) -> None:
        """Into the policy's queues, or parked, or refused. `again`: it was accepted before."""
        model = query.request.model
        query.worker_id = None
        expires_ns = query.request.expires_ns
        if again and expires_ns is not None and expires_ns <= now_ns:
            self._refuse(query, Reason.EXPIRED)  # its time passed while it ran, and nobody was to look again
            return
        if model in self._pool.serving:
            worker, late_ns = self._policy.choose(now_ns, query)
            if late_ns > 0 and not again:
                due_ns = query.request.due_ns
                if self._refuse_late or query.request.strict:
                    self._refuse(query, Reason.SLO_UNREACHABLE, retry_after_ns=late_ns)
                    return
                if due_ns is not None and late_ns > LATEST_SLOS * (due_ns - now_ns):
                    self._refuse(query, Reason.OVERLOADED, retry_after_ns=late_ns)
                    return
            if worker is not None:
                self._start(now_ns, worker, [query])
                return
            self._policy.add(now_ns, query)
            self._queued += 1
        elif any(model in models for models in self._coming_back.values()):
            self._parked.setdefault(model, {})[query.request.id] = query
        else:
            self._refuse(query, Reason.UNAVAILABLE)
            return
        self._waiting[model] += 1

    def _place_again(self, now_ns: int, evicted: list[Query]) -> None:
        self._queued -= len(evicted)
        for query in _by_class(evicted):
            self._waiting[query.request.model] -= 1
            self._place(now_ns, query, again=True)

    def _dispatch(self, now_ns: int) -> None:
        """Gives every worker that has room its next batch, until nothing waits."""
        for worker in list(self._roomy.values()):
            while self._queued and worker.id in self._roomy and self._may_start(now_ns, worker):
                queries = self._policy.take(now_ns, worker)
                if not queries:
                    break
                self._queued -= len(queries)
                self._waiting[queries[0].request.model] -= len(queries)
                self._start(now_ns, worker, queries)

    def _may_start(self, now_ns: int, worker: Worker) -> bool:
        """An idle worker may at once. One that is busy stages a batch that is full, or soon to be run.

        Staged earlier, a batch would close with whatever few had come, and the next ones would wait behind it.
        """
        if not worker.in_flight:
            return True
        waiting = self._policy.waiting(worker)
        stage_ns = worker.free_at_ns - STAGE_AHEAD_NS
        if waiting is Waiting.SOME and now_ns < stage_ns:
            self._wake_at(stage_ns)
            return False
        return waiting is not Waiting.NOTHING

    def _start(self, now_ns: int, worker: Worker, queries: list[Query]) -> None:
        batch_id = self._next_batch_id
        self._next_batch_id += 1
        model = queries[0].request.model
        table = worker.tables[model]
        items = 0
        pieces = []
        for query in queries:
            query.batch_id = batch_id
            query.worker_id = worker.id
            items += query.request.items
            pieces.append(Piece(query.request.id, 0, query.request.items))
        self._pool.start(now_ns, worker, batch_id, Batch(queries, table.time_ns(items)))
        if len(worker.in_flight) >= worker.depth:
            del self._roomy[worker.id]
        self._commands.append(Run(worker.id, batch_id, model, tuple(pieces)))

    def _finish(self, now_ns: int, worker_id: int, batch_id: int) -> Batch:
        worker = self._pool.workers[worker_id]
        self._roomy[worker_id] = worker
        return self._pool.finish(now_ns, worker, batch_id)

    # ---- ending ----

    def _arm(self) -> None:
        """Asks to be woken for the earliest expiry of what is still unfinished."""
        while self._expiries and self._expiries[0][1] not in self._queries:
            heapq.heappop(self._expiries)
        if self._expiries:
            self._wake_at(self._expiries[0][0])

    def _wake_at(self, at_ns: int) -> None:
        if self._wake_ns is None or at_ns < self._wake_ns:
            self._wake_ns = at_ns
            self._commands.append(Wake(at_ns))

    def _expire(self, now_ns: int) -> None:
        """Drops what has passed its time in a queue; what runs is let finish."""
        while self._expiries and self._expiries[0][0] <= now_ns:
            _, request_id = heapq.heappop(self._expiries)
            query = self._queries.get(request_id)
            if query is not None and query.batch_id is None:
                self._withdraw(query)
                self._refuse(query, Reason.EXPIRED)

    def _withdraw(self, query: Query) -> None:
        """Out of the queues, or, where it runs already, marked so that nobody answers it."""
        if query.batch_id is not None:
            query.gone = True
            return
        model = query.request.model
        self._waiting[model] -= 1
        if query.queued:
            self._queued -= 1
            self._policy.discard(query)
        else:
            del self._parked[model][query.request.id]

    def _refuse(self, query: Query, reason: Reason, retry_after_ns: int = 0, detail: str = "") -> None:
        self._queries.pop(query.request.id, None)
        self._commands.append(Refuse(query.request.id, reason, retry_after_ns, detail))

    def _forget_return(self, worker_id: int, model: str) -> None:
        if worker_id in self._coming_back:
            self._coming_back[worker_id].discard(model)

    def _give_up_parked(self, now_ns: int, model: str) -> None:
        """Refuses parked queries that nobody will come back for."""
        for query in list(self._parked.pop(model, {}).values()):
            self._waiting[model] -= 1
            self._place(now_ns, query, again=True)


def _by_class(queries: Iterable[Query]) -> list[Query]:
    """In the order in which they are placed: the first one may start at once."""
    return sorted(queries, key=lambda query: (query.request.priority, query.request.id))
