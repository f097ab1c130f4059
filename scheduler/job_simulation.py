"""Batch jobs in the simulator: `elastic.py` as the daemon asks it, with items that are only counted. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scheduler.background import FIRST_ID
from scheduler.domain import Pool, Worker
from scheduler.elastic import Elastic, IdleShares, Place, Work, batch_for, patience_ns
from scheduler.messages import Request

# Batches that a slice has: one that runs, one that is ready to.
AHEAD = 2


@dataclass(frozen=True, slots=True)
class SimJob:
    """`items`: by length, as the model's table has them (0 where it has none). Times from the start, in ns."""

    name: str
    model: str
    items: Mapping[int, int]
    arrives_ns: int
    deadline_ns: int


class Held(NamedTuple):
    """From then on a job held so many slices, with so many GPCs in all."""

    at_ns: int
    job: str
    slices: int
    gpcs: int


class _Sent(NamedTuple):
    job: str
    length: int
    items: int
    worker_id: int


class SimulatedJobs:
    """`slo_ms`: of the models that are served online. `only`: workers that jobs may use, by default all.

    `held`: who held what when. `ended_ns`: of the jobs that are done. `told_ns`: when a job was first known to be late.
    """

    def __init__(
        self,
        jobs: Sequence[SimJob],
        slo_ms: Mapping[str, float],
        every_ns: int = 1_000_000_000,
        only: Sequence[int] | None = None,
    ) -> None:
        self.every_ns = every_ns
        self.held: list[Held] = []
        self.ended_ns: dict[str, int] = {}
        self.told_ns: dict[str, int] = {}
        self.forecasts: list[tuple[int, str, float]] = []
        self._jobs = {job.name: job for job in jobs}
        self._slo_ms = slo_ms
        self._only = None if only is None else frozenset(only)
        self._ready = {job.name: Counter(job.items) for job in jobs}  # not sent
        self._left = {job.name: Counter(job.items) for job in jobs}  # not answered
        self._elastic = Elastic()
        self._idle = IdleShares()
        self._sent: dict[int, _Sent] = {}
        self._on: Counter[int] = Counter()
        self._pool: Pool | None = None
        self._next_id = FIRST_ID

    @property
    def done(self) -> bool:
        return len(self.ended_ns) == len(self._jobs)

    def look(self, now_ns: int, pool: Pool, online_ns: Mapping[int, int]) -> None:
        """Decides who holds what."""
        self._pool = pool
        for worker_id in pool.workers:
            self._idle.observe(now_ns, worker_id, online_ns.get(worker_id, 0))
        works, places = [], {}
        for job in self._jobs.values():
            if job.arrives_ns <= now_ns and job.name not in self.ended_ns:
                works.append(Work(job.name, dict(self._left[job.name]), float(job.deadline_ns - now_ns)))
                places[job.name] = self._places(job)
        self._elastic.decide(works, places)
        for name, holding in self._elastic.holdings.items():
            gpcs = sum(pool.workers[worker_id].gpcs for worker_id in holding.planned)
            self.held.append(Held(now_ns, name, len(holding.planned), gpcs))
            self.forecasts.append((now_ns, name, holding.ends_ns))
            if not holding.feasible:
                self.told_ns.setdefault(name, now_ns)

    def _places(self, job: SimJob) -> list[Place]:
        assert self._pool is not None
        workers = {w.id: w for serving in self._pool.serving.values() for w in serving}
        return [
            Place(w.id, w.gpcs, self._idle.idle(w.id), {length: self._batch(w, job, length) for length in job.items})
            for w in workers.values()
            if (self._only is None or w.id in self._only) and (job.model, 0) in w.tables
        ]

    def _batch(self, worker: Worker, job: SimJob, length: int) -> tuple[int, float]:
        assert self._pool is not None
        limits_ns = [
            patience_ns(self._slo_ms[kind[0]] * 1e6, len(self._pool.serving[kind]))
            for kind in worker.tables
            if kind[0] in self._slo_ms
        ]
        kind = self._pool.kind_of(Request(0, job.model, 1, length=length))
        return batch_for(worker.tables[kind], min(limits_ns, default=None))

    def requests(self, now_ns: int) -> list[Request]:
        """So that each slice that is held has its batches."""
        found: list[Request] = []
        for name in self._elastic.holdings:
            for worker_id in self._elastic.held(name):
                while self._on[worker_id] < AHEAD and (request := self._next(name, worker_id)) is not None:
                    found.append(request)
        return found

    def _next(self, name: str, worker_id: int) -> Request | None:
        job, ready = self._jobs[name], self._ready[name]
        worker = self._pool.workers.get(worker_id) if self._pool is not None else None
        length = self._elastic.pick(name, worker_id, [each for each, items in ready.items() if items])
        if length is None or worker is None or (job.model, 0) not in worker.tables:
            return None
        wanted, ns = self._batch(worker, job, length)
        items = min(wanted, ready[length])
        ready[length] -= items
        self._elastic.started(name, worker_id, length, ns * items / wanted)
        self._on[worker_id] += 1
        self._next_id += 1
        self._sent[self._next_id] = _Sent(name, length, items, worker_id)
        return Request(self._next_id, job.model, items, length=length, whole=True, worker_id=worker_id)

    def length(self, request_id: int) -> int:
        return self._sent[request_id].length

    def ended(self, now_ns: int, request_id: int, *, answered: bool) -> None:
        sent = self._sent.pop(request_id)
        self._on[sent.worker_id] -= 1
        if not answered:
            self._ready[sent.job][sent.length] += sent.items
            return
        self._left[sent.job][sent.length] -= sent.items
        if not any(self._left[sent.job].values()):
            self.ended_ns[sent.job] = now_ns
