"""Background work: batches that run on a slice of their own choice, when nobody else has anything for it. Pure.

Whoever sends such a request has made one batch of it, and picked its worker; batch jobs do. Rules:
1. It starts on its worker only when the policy has nothing to start there.
2. A worker has one such batch at a time: whoever else comes waits for one of them at most, however deep the worker is.
3. It is bound: where its worker goes, or dies with it, it is refused; whoever sent it may pick another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from scheduler.domain import Part, Pool, Worker
from scheduler.messages import Request
from scheduler.policies import Start

# In the simulator: ids of such requests, from here on.
FIRST_ID = 1 << 40


class Background:
    """What waits, by worker, in order of arrival. Parts of requests with a `worker_id`."""

    def __init__(self) -> None:
        self._waiting: dict[int, dict[Part, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def push(self, worker: Worker, part: Part) -> None:
        self._waiting.setdefault(worker.id, {})[part] = None

    def discard(self, part: Part) -> None:
        """Does nothing for one that does not wait."""
        worker_id = part.query.request.worker_id
        waiting = self._waiting.get(worker_id) if worker_id is not None else None
        if waiting is not None and part in waiting:
            del waiting[part]
            if not waiting and worker_id is not None:
                del self._waiting[worker_id]

    def evict(self, worker: Worker, model: str | None = None) -> list[Part]:
        """What waits for a worker, of one model or of all; taken out."""
        parts = [p for p in self._waiting.get(worker.id, ()) if model is None or p.kind[0] == model]
        for part in parts:
            self.discard(part)
        return parts

    def next(self, ready: dict[int, Worker]) -> Start | None:
        """Of the workers that may be given a batch and that the policy has left idle."""
        for worker_id, waiting in self._waiting.items():
            worker = ready.get(worker_id)
            if worker is None or any(is_background(batch.parts[0]) for batch in worker.in_flight.values()):
                continue
            part = next(iter(waiting))
            self.discard(part)
            return Start(worker, part.kind, [part])
        return None


def is_background(part: Part) -> bool:
    return part.query.request.worker_id is not None


class Source(Protocol):
    """Where it comes from in the simulator. Is asked to look every `every_ns`, until it is `done`."""

    every_ns: int

    @property
    def done(self) -> bool: ...

    def look(self, now_ns: int, pool: Pool, online_ns: Mapping[int, int]) -> None:
        """`online_ns`: how long each worker was busy with other work, ever."""

    def requests(self, now_ns: int) -> list[Request]:
        """To be handed in now; with ids from FIRST_ID on."""

    def length(self, request_id: int) -> int: ...

    def ended(self, now_ns: int, request_id: int, *, answered: bool) -> None: ...
