"""Policies: which worker a query goes to, and which queries make the next batch. Pure, one signature."""

from __future__ import annotations

from typing import Protocol

from scheduler.domain import Pool, Query, Worker


class Policy(Protocol):
    """Owns the queues. The core tells it what came and went, and asks it for batches.

    Every method is deterministic, given the calls before it.
    """

    def __init__(self, pool: Pool) -> None: ...

    def choose(self, now_ns: int, query: Query) -> tuple[Worker, int]:
        """The worker for a query whose model somebody serves, and by how many ns it would be late there.

        0: it meets its due time, or has none.
        """

    def add(self, query: Query, worker: Worker) -> None:
        """Queues a query for the worker that was chosen."""

    def waiting_items(self, worker: Worker) -> int:
        """Items that wait for this worker, whatever their model."""

    def discard(self, query: Query) -> None:
        """Takes a waiting query out."""

    def take(self, now_ns: int, worker: Worker) -> list[Query]:
        """Queries for a batch on a worker that has room, out of the queues; empty if it has nothing to do."""

    def evict(self, worker: Worker, model: str | None = None) -> list[Query]:
        """Takes out what waits for this worker alone (of one model, or all), to be added again."""

    def backlog_ns(self, now_ns: int, model: str) -> int:
        """Estimated time until a worker of this model is through with what it has now."""
