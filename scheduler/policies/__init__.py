"""Policies: which worker a query goes to, and which queries make the next batch. Pure, one signature."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from scheduler.domain import Query, Worker


class Waiting(Enum):
    """What waits for a worker that is busy and could stage a batch."""

    NOTHING = 0
    SOME = 1  # to be staged shortly before the worker is free
    FULL = 2  # to be staged at once: waiting would not make it a better batch


class Policy(Protocol):
    """Owns the queues. The core tells it what came and went, and asks it for batches.

    It is made with the pool, and reads it. Every method is deterministic, given the calls before it.
    """

    def choose(self, now_ns: int, query: Query) -> tuple[Worker | None, int]:
        """For a query whose model somebody serves: the idle worker to start it on at once, else None.

        Also by how many ns it would be late, as far as the policy can tell; 0: it meets its due time, or has none.
        """

    def add(self, now_ns: int, query: Query) -> None:
        """Queues the query that was last chosen for and not started."""

    def waiting(self, worker: Worker) -> Waiting:
        """Whether `take` may have something for this busy worker."""

    def discard(self, query: Query) -> None:
        """Takes a waiting query out."""

    def take(self, now_ns: int, worker: Worker) -> list[Query]:
        """Queries for a batch on a worker that has room, out of the queues; empty if it has nothing to do."""

    def evict(self, worker: Worker, model: str | None = None) -> list[Query]:
        """Takes out what can wait for nobody else (of one model, or all), to be placed again.

        Called before the worker is taken out of the pool, or the model off the worker.
        """

    def backlog_ns(self, now_ns: int, model: str) -> int:
        """Estimated time until a worker of this model is through with what it has now."""
