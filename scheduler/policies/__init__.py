"""Policies: which worker a query goes to, and which parts of queries make the next batch. Pure, one signature."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from scheduler.domain import Kind, Part, Worker


class Start(NamedTuple):
    """A batch to start now: parts of one model and company on a worker that is ready; `kind` is the longest's."""

    worker: Worker
    kind: Kind
    parts: list[Part]


class Policy(Protocol):
    """Owns the queues. The core tells it what came and went, and asks it for batches.

    It is made with the pool, and reads it. Every method is deterministic, given the calls before it.
    """

    def offer(self, now_ns: int, part: Part, bound_ns: int | None) -> int:
        """Queues a part whose kind somebody serves, and returns 0.

        Where it would end more than `bound_ns` after its due time, as far as the policy can tell, it is not
        queued; returned is in how many ns a new try has a chance. `bound_ns` None: it is queued in any case.
        """

    def next(self, now_ns: int) -> Start | None:
        """Takes the next batch out of the queues, for one of the pool's ready workers; asked until there is none."""

    def wake_ns(self, now_ns: int) -> int | None:
        """When `next` is to be asked again though nothing has happened; None: it need not be."""

    def discard(self, part: Part) -> None:
        """Takes a waiting part out."""

    def evict(self, worker: Worker, model: str | None = None) -> list[Part]:
        """Takes out what can wait for nobody else (of one model, or all), to be offered again.

        Called before the worker is taken out of the pool, or the model off the worker.
        """

    def backlog_ns(self, now_ns: int, model: str) -> int:
        """Estimated time until a worker of this model is through with what it has now."""
