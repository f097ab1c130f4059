"""What the slices have to offer to batch jobs: which batches of a model, and what online work leaves of their time."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from scheduler.domain import Kind, Pool, Worker
from scheduler.driver import Driver
from scheduler.elastic import IdleShares, Place, batch_for, patience_ns
from server.errors import Fault, ServeError
from server.job_store import Job
from server.repository import Model, ModelState, Repository

# A batch of a job takes no more of the arena than that.
ARENA_SHARE = 1 / 16

Bucket = tuple[int, ...]


def usable_model(repository: Repository, job: Job) -> Model:
    """Raises ServeError: unavailable, until there is one that the job is for."""
    try:
        model = repository.get(job.asked.model, job.asked.version)
    except ServeError as error:
        raise ServeError(Fault.UNAVAILABLE, error.message) from error
    had, has = job.asked.signature, model.signature
    if (had.inputs, had.outputs, had.max_batch > 0) != (has.inputs, has.outputs, has.max_batch > 0):
        raise ServeError(Fault.UNAVAILABLE, f"model {model.name} has other inputs or outputs than it had")
    if repository.is_mixed(model):
        raise ServeError(
            Fault.UNAVAILABLE,
            f"the file of model {model.name} was replaced, and slices that came later serve the new one; load it",
        )
    if job.asked.identity not in ("", model.identity):
        raise ServeError(
            Fault.UNAVAILABLE,
            f"version {model.version} of model {model.name} is another one than when the job was made: its file or its "
            f"preprocessing has changed; load the former one again, or cancel the job and submit it anew",
        )
    return model


class Supply:
    """Reads the scheduler's pool; `observe` is to be called every second or so."""

    def __init__(self, pool: Pool, driver: Driver, repository: Repository, arena_bytes: int) -> None:
        self._pool = pool
        self._driver = driver
        self._repository = repository
        self._batch_bytes = int(arena_bytes * ARENA_SHARE)
        self._idle = IdleShares()
        self._lengths: dict[str, Counter[int]] = {}

    def observe(self, at_ns: int) -> None:
        for worker_id in self._pool.workers:
            self._idle.observe(at_ns, worker_id, self._driver.busy_ns[worker_id])

    def edges(self, model: Model) -> tuple[int, ...]:
        """Upper ends of its length buckets, as they are now; empty where it is not served."""
        return self._pool.lengths.get(model.key, ())

    def saw(self, model: Model, lengths: Iterable[int]) -> None:
        """Of items of a job that are about to be run; 0 where they have none."""
        if model.lengths is not None:
            self._lengths.setdefault(model.key, Counter()).update(length for length in lengths if length)

    def take_lengths(self) -> dict[str, Counter[int]]:
        """Of what was seen since the last time, by model."""
        lengths, self._lengths = self._lengths, {}
        return lengths

    def gpcs(self, worker_ids: Iterable[int]) -> int:
        """Of those that are still there."""
        workers = self._pool.workers
        return sum(workers[worker_id].gpcs for worker_id in worker_ids if worker_id in workers)

    def places(self, model: Model, buckets: Collection[Bucket], factors: Mapping[Bucket, float]) -> list[Place]:
        """Slices that serve the model now. `factors`: of a bucket's times over the table's, where that is known."""
        usual = sum(factors.values()) / len(factors) if factors else 1.0
        return [
            Place(
                worker.id,
                worker.gpcs,
                self._idle.idle(worker.id),
                {bucket: self._batch(worker, model, bucket, factors.get(bucket, usual)) for bucket in buckets},
            )
            for worker in self._pool.serving.get((model.key, 0), ())
        ]

    def batch(self, model: Model, worker_id: int, bucket: Bucket, factor: float) -> tuple[int, float] | None:
        """Items of a job's batch on this slice, and its ns; None if it does not serve the model."""
        worker = self._pool.workers.get(worker_id)
        if worker is None or (model.key, 0) not in worker.tables:
            return None
        return self._batch(worker, model, bucket, factor)

    def _batch(self, worker: Worker, model: Model, bucket: Bucket, factor: float) -> tuple[int, float]:
        kind = self._kind(model, bucket)
        table = worker.tables[kind]
        if table.factor == 1:
            factor *= self._usual_correction(kind)
        items, ns = batch_for(table, self._limit_ns(worker), factor)
        most = self._most_items(model, bucket)
        return (items, ns) if items <= most else (most, table.time_ns(most) * factor)

    def _kind(self, model: Model, bucket: Bucket) -> Kind:
        """The length bucket, of a model that has them, that holds such items."""
        lengths = self._pool.lengths[model.key]
        length = bucket[0] if model.lengths is not None and bucket else 0
        return model.key, min(bisect_left(lengths, length), len(lengths) - 1)

    def _usual_correction(self, kind: Kind) -> float:
        """For a slice that nothing is known of but its table: it is likely to err there as elsewhere."""
        factors = [worker.tables[kind].factor for worker in self._pool.serving[kind]]
        known = [math.log(factor) for factor in factors if factor != 1]
        return math.exp(sum(known) / len(known)) if known else 1.0

    def _most_items(self, model: Model, bucket: Bucket) -> int:
        """As the model takes, and the arena."""
        if model.signature.max_batch == 0:
            return 1
        of_item = model.layout.slot(1, bucket or model.signature.sample_dims).nbytes
        return max(min(model.signature.max_batch, self._batch_bytes // max(of_item, 1)), 1)

    def _limit_ns(self, worker: Worker) -> float | None:
        """How long a batch may be, for the sake of what it serves online; None if nothing of that has an SLO."""
        limits_ns = [
            patience_ns(model.serving.slo_ms * 1e6, len(self._pool.serving[model.key, 0]))
            for model in self._repository.models()
            if model.state == ModelState.READY and (model.key, 0) in worker.tables and model.serving.slo_ms is not None
        ]
        return min(limits_ns, default=None)
