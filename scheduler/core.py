"""The scheduler's core: `handle(now, event) -> commands`. Pure: no clock, no I/O, waiting is a command.

Rules:
1. Every Arrived ends in exactly one Answer or Refuse, or in the client's own Cancelled.
2. A worker gets a batch when it has room, at once: a lone request on an idle slice waits for nobody.
3. When a worker dies, what waited for it is placed anew; what ran on it runs again, alone. A request of which a
   part's worker dies a second time is refused by itself.
4. When the model raises on a batch of several, each of them runs again alone, so that only the culprit fails.
5. While every worker that has a model is being restarted or replaced, its requests are parked, not refused.
6. A policy may cut a request: its parts run apart, it is answered when all are done, and ends as a whole if one fails.
7. A request that would be served late is refused if it is strict, and where it would end later than ten times
   the time that it gives. What has been accepted is not refused for lateness any more.
8. Background work never keeps a slice from what the policy would start there (`background.py`).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable

from scheduler.background import Background, is_background
from scheduler.domain import LATEST, Batch, Kind, Part, Pool, Query, Worker, models_of
from scheduler.messages import (
    Answer,
    AnyCommand,
    AnyEvent,
    Arrived,
    BatchDone,
    BatchFailed,
    Cancelled,
    Drains,
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
from scheduler.policies import Policy
from scheduler.policies.pool import OnePool

CRASHES_PER_REQUEST = 2
# How long before the end of the running batch the next one is staged: time to gather it and copy it in.
STAGE_AHEAD_NS = 2_000_000


class SchedulerCore:
    """One instance a daemon, and one a simulation.

    `max_queued`: waiting requests a model. `policy`: makes the policy for a pool. `bounded`: whether rule 7 refuses
    what would end later than ten times the time that it gives; without, that is served however late.
    """

    def __init__(
        self, max_queued: int = 4096, policy: Callable[[Pool], Policy] = OnePool, *, bounded: bool = True
    ) -> None:
        self._pool = Pool()
        self._policy = policy(self._pool)
        self._background = Background()
        self._max_queued = max_queued
        self._bounded = bounded
        self._queries: dict[int, Query] = {}
        self._waiting: Counter[str] = Counter()  # requests with unstarted items, by model
        self._parked: dict[str, dict[Part, None]] = {}
        self._coming_back: dict[int, set[str]] = {}  # models of workers that are being restarted or replaced
        self._draining: set[int] = set()
        self._expiries: list[tuple[int, int]] = []
        self._wake_ns: int | None = None
        self._staging: dict[int, Worker] = {}  # busy, with room for one more
        self._next_batch_id = 1
        self._commands: list[AnyCommand] = []

    @property
    def pool(self) -> Pool:
        """Who serves what, and how fast; to be read only."""
        return self._pool

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
                    self._pool.add(Worker(event.worker_id, event.gpcs, event.depth))
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
        arrived_ns = now_ns if request.arrived_ns is None else request.arrived_ns
        query = self._queries[request.id] = Query(request, arrived_ns)
        self._waiting[model] += 1
        self._place(now_ns, query.parts[0], self._bound_ns(arrived_ns, request))

    def _bound_ns(self, arrived_ns: int, request: Request) -> int | None:
        """How long after its due time a new request may end."""
        if request.due_ns is None:
            return None
        if request.strict:
            return 0
        return (LATEST - 1) * max(request.due_ns - arrived_ns, 0) if self._bounded else None

    def _cancelled(self, event: Cancelled) -> None:
        query = self._queries.get(event.request_id)
        if query is not None:
            self._end(query)

    def _batch_done(self, now_ns: int, event: BatchDone) -> None:
        batch = self._finish(now_ns, event.worker_id, event.batch_id)
        if self._pool.workers[event.worker_id].learn(now_ns, batch):
            self._pool.corrections += 1
        answered = []
        for part in batch.parts:
            query = part.query
            if query.gone:
                continue
            query.unfinished -= part.items
            query.parts.remove(part)
            if not query.unfinished:
                del self._queries[query.request.id]
                answered.append(query.request.id)
        self._commands.append(Answer(tuple(answered)))

    def _batch_failed(self, now_ns: int, event: BatchFailed) -> None:
        batch = self._finish(now_ns, event.worker_id, event.batch_id)
        alone = len(batch.parts) == 1
        for part in batch.parts:
            if part.query.gone:
                continue
            if alone:
                self._refuse(part.query, Reason.MODEL_FAILED, detail=event.detail)
            else:
                self._run_again(now_ns, part)

    def _serves(self, now_ns: int, event: Serves) -> None:
        if event.worker_id in self._draining:
            return  # it was loading while it was told to go: the model is expected elsewhere
        worker = self._pool.workers[event.worker_id]
        evicted = self._evict(worker, event.model) if event.model in models_of(worker) else []
        self._pool.serve(worker, event.model, event.latency_ns, event.lengths)
        self._pool.weights[event.model] = event.weight
        self._forget_return(event.worker_id, event.model)
        self._place_again(now_ns, [*evicted, *self._parked.pop(event.model, ())])

    def _stops_serving(self, now_ns: int, event: StopsServing) -> None:
        self._forget_return(event.worker_id, event.model)
        worker = self._pool.workers.get(event.worker_id)
        if worker is not None and event.model in models_of(worker):
            evicted = self._evict(worker, event.model)
            self._pool.withdraw(worker, event.model)
            self._place_again(now_ns, evicted)
        self._give_up_parked(now_ns, event.model)

    def _drains(self, now_ns: int, event: Drains) -> None:
        worker = self._pool.workers[event.worker_id]
        self._draining.add(worker.id)
        models = models_of(worker)
        # Beside what it serves, what it was still to load again after a restart.
        self._coming_back.setdefault(worker.id, set()).update(models)
        evicted = self._evict(worker)
        for model in models:
            self._pool.withdraw(worker, model)
        self._place_again(now_ns, evicted)

    def _worker_lost(self, now_ns: int, event: WorkerLost) -> None:
        self._draining.discard(event.worker_id)
        models = self._coming_back.pop(event.worker_id, set())
        worker = self._pool.workers.get(event.worker_id)
        ran: list[Part] = []
        evicted: list[Part] = []
        if worker is not None:
            models |= set(models_of(worker))
            ran = [part for batch in worker.in_flight.values() for part in batch.parts]
            evicted = self._evict(worker)
            self._pool.remove(worker)
            self._staging.pop(worker.id, None)
        if event.comes_back:
            self._coming_back[event.worker_id] = models
        for part in ran:
            part.crashes += 1
            if part.query.gone:
                continue
            if part.crashes >= CRASHES_PER_REQUEST or is_background(part):
                self._refuse(part.query, Reason.CRASHED, detail=event.detail)
            else:
                self._run_again(now_ns, part)
        self._place_again(now_ns, evicted)
        for model in models:
            self._give_up_parked(now_ns, model)

    # ---- placing and starting ----

    def _evict(self, worker: Worker, model: str | None = None) -> list[Part]:
        """What waits for this worker only."""
        return self._policy.evict(worker, model) + self._background.evict(worker, model)

    def _place(self, now_ns: int, part: Part, bound_ns: int | None) -> None:
        """Into the policy's queues, or parked, or refused."""
        part.worker_id = None
        request = part.query.request
        if request.worker_id is not None:
            self._place_background(part, request.worker_id)
        elif request.model in self._pool.lengths:
            part.kind = self._pool.kind_of(request)
            retry_ns = self._policy.offer(now_ns, part, bound_ns)
            if retry_ns and self._pool.forget_old(now_ns, part.kind):
                retry_ns = self._policy.offer(now_ns, part, bound_ns)
            if retry_ns:
                reason = Reason.SLO_UNREACHABLE if request.strict else Reason.OVERLOADED
                self._refuse(part.query, reason, retry_ns)
        elif any(request.model in models for models in self._coming_back.values()):
            self._parked.setdefault(request.model, {})[part] = None
        else:
            self._refuse(part.query, Reason.UNAVAILABLE)

    def _place_background(self, part: Part, worker_id: int) -> None:
        worker, request = self._pool.workers.get(worker_id), part.query.request
        if worker is not None and request.model in models_of(worker):
            part.kind = self._pool.kind_of(request)
            self._background.push(worker, part)
        else:
            self._refuse(part.query, Reason.UNAVAILABLE)

    def _place_again(self, now_ns: int, parts: Iterable[Part]) -> None:
        """What had been accepted, in the order in which it came, higher classes first."""
        for part in sorted(parts, key=lambda p: (p.query.request.priority, p.query.request.id, p.first)):
            if not part.query.gone:  # as it is when another part of it has been refused on the way
                self._place(now_ns, part, None)

    def _run_again(self, now_ns: int, part: Part) -> None:
        """A part whose batch has failed, by itself."""
        query = part.query
        part.batch_id = None
        part.isolate()
        if not query.unstarted:
            self._waiting[query.request.model] += 1
        query.unstarted += part.items
        expires_ns = query.request.expires_ns
        if expires_ns is not None and expires_ns <= now_ns:
            self._refuse(query, Reason.EXPIRED)  # its time passed while it ran, and nobody was to look again
        else:
            self._place(now_ns, part, None)

    def _dispatch(self, now_ns: int) -> None:
        """Starts what the policy wants started."""
        pool, policy = self._pool, self._policy
        if self._staging:
            self._stage(now_ns)
        while pool.ready:
            start = policy.next(now_ns)
            if start is None:
                break
            self._start(now_ns, *start)
        while self._background and (start := self._background.next(pool.ready)) is not None:
            self._start(now_ns, *start)
        wake_ns = policy.wake_ns(now_ns)
        if wake_ns is not None:
            self._wake_at(wake_ns)

    def _stage(self, now_ns: int) -> None:
        """A busy worker with room is ready shortly before it is free.

        Staged earlier, a batch would close with whatever few had come, and the next ones would wait behind it.
        """
        for worker in self._staging.values():
            stage_ns = worker.free_at_ns - STAGE_AHEAD_NS
            if stage_ns <= now_ns:
                self._pool.ready[worker.id] = worker
            elif any(self._waiting[model] for model in models_of(worker)):
                self._wake_at(stage_ns)

    def _start(self, now_ns: int, worker: Worker, kind: Kind, parts: list[Part]) -> None:
        batch_id = self._next_batch_id
        self._next_batch_id += 1
        items = length = 0
        pieces = []
        for part in parts:
            part.batch_id = batch_id
            part.worker_id = worker.id
            items += part.items
            query = part.query
            query.unstarted -= part.items
            if not query.unstarted:
                self._waiting[kind[0]] -= 1
            pieces.append(part.piece())
            length = max(length, query.request.length)
        worker.start(now_ns, batch_id, Batch(parts, kind, worker.tables[kind].time_ns(items), now_ns))
        del self._pool.ready[worker.id]
        self._staging.pop(worker.id, None)
        if worker.has_room():
            self._staging[worker.id] = worker
        padded = self._pool.padded(kind[0], length) if length else 0
        self._commands.append(Run(worker.id, batch_id, kind[0], tuple(pieces), padded))

    def _finish(self, now_ns: int, worker_id: int, batch_id: int) -> Batch:
        worker = self._pool.workers[worker_id]
        batch = worker.finish(now_ns, batch_id)
        if worker.in_flight:
            self._staging[worker_id] = worker
        else:
            self._staging.pop(worker_id, None)
            self._pool.ready[worker_id] = worker
        return batch

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
        """Drops what has passed its time before any of it was started; what has been started is let finish."""
        while self._expiries and self._expiries[0][0] <= now_ns:
            _, request_id = heapq.heappop(self._expiries)
            query = self._queries.get(request_id)
            if query is not None and query.unstarted == query.request.items:
                self._refuse(query, Reason.EXPIRED)

    def _refuse(self, query: Query, reason: Reason, retry_after_ns: int = 0, detail: str = "") -> None:
        self._end(query)
        self._commands.append(Refuse(query.request.id, reason, retry_after_ns, detail))

    def _end(self, query: Query) -> None:
        """Out of the queues; what of it runs already is marked so that nobody answers it."""
        model = query.request.model
        del self._queries[query.request.id]
        query.gone = True
        if query.unstarted:
            self._waiting[model] -= 1
        for part in query.parts:
            if part.queued:
                self._policy.discard(part)
            elif part.batch_id is None:
                self._background.discard(part)
                self._parked.get(model, {}).pop(part, None)
        query.parts.clear()

    def _forget_return(self, worker_id: int, model: str) -> None:
        if worker_id in self._coming_back:
            self._coming_back[worker_id].discard(model)

    def _give_up_parked(self, now_ns: int, model: str) -> None:
        """Refuses parked queries that nobody will come back for."""
        self._place_again(now_ns, self._parked.pop(model, ()))
