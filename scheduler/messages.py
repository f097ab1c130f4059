"""What the scheduler's core is told (events) and what it asks for (commands). Pure values.

Times are integer nanoseconds of one monotonic clock. All of it can be journalled as JSON and replayed.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import msgspec

# Requests without a priority of their own. 1 is the highest; larger numbers wait longer.
DEFAULT_PRIORITY = 100


class Reason(StrEnum):
    """Why a request was refused or given up."""

    QUEUE_FULL = "queue_full"
    SLO_UNREACHABLE = "slo_unreachable"
    OVERLOADED = "overloaded"
    EXPIRED = "expired"
    UNAVAILABLE = "unavailable"
    MODEL_FAILED = "model_failed"
    CRASHED = "crashed"


class Request(msgspec.Struct, frozen=True, gc=False):
    """A query of `items` >= 1 items for one model.

    `dims` are the values of the model's varying axes: only equal ones share a batch. `due_ns`: the target; what
    cannot meet it is served late, or refused if it is `strict`. `expires_ns`: dropped if not started by then.
    `alone`: never batched with others. `whole`: never cut. `length`: of its padded axis, 0 where there is none.
    `worker_id`: background work, one batch as it is, for this worker only (`background.py`).
    `arrived_ns`: at the daemon, from when on its due time counts; None: when the core is told of it.
    """

    id: int
    model: str
    items: int
    dims: tuple[int, ...] = ()
    due_ns: int | None = None
    expires_ns: int | None = None
    priority: int = DEFAULT_PRIORITY
    alone: bool = False
    strict: bool = False
    whole: bool = False
    length: int = 0
    worker_id: int | None = None
    arrived_ns: int | None = None


class Piece(NamedTuple):
    """Items `first` .. `first + items - 1` of a request, as one batch runs them."""

    request_id: int
    first: int
    items: int


class Event(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Something that happened."""


class Arrived(Event, frozen=True):
    request: Request


class Cancelled(Event, frozen=True):
    """The client has gone."""

    request_id: int


class WorkerUp(Event, frozen=True):
    """A worker of a slice with `gpcs` compute slices takes up to `depth` batches at once."""

    worker_id: int
    gpcs: int
    depth: int


class Serves(Event, frozen=True):
    """A worker has loaded a model; `latency_ns[b - 1]` is the estimated time of a batch of b items.

    With `lengths` (ascending), `latency_ns` holds such a row for each: of batches padded to that length. `weight`:
    the model's part of slices that it shares, beside those of the others.
    """

    worker_id: int
    model: str
    latency_ns: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    weight: float = 1.0


class StopsServing(Event, frozen=True):
    """A worker has, or will have, the model no more."""

    worker_id: int
    model: str


class Drains(Event, frozen=True):
    """A worker takes no more work: its slice is about to go, and others will come that serve what it served.

    What waited for it goes elsewhere, or is parked. It is lost when what it runs has ended; `WorkerLost` with
    `comes_back` keeps its models expected, a second one without it, once the others are up, ends that.
    """

    worker_id: int


class WorkerLost(Event, frozen=True):
    """A worker process is dead. `comes_back`: it is being started again and will serve what it served."""

    worker_id: int
    comes_back: bool
    detail: str


class BatchDone(Event, frozen=True):
    worker_id: int
    batch_id: int


class BatchFailed(Event, frozen=True):
    """The model raised an exception on this batch; the worker lives."""

    worker_id: int
    batch_id: int
    detail: str


class Tick(Event, frozen=True):
    """The time of an earlier Wake has come."""


class Command(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Something to be done."""


class Run(Command, frozen=True):
    """Send these pieces, as one batch, to this worker. `length`: what they are padded to, 0 where there is none."""

    worker_id: int
    batch_id: int
    model: str
    pieces: tuple[Piece, ...]
    length: int = 0


class Answer(Command, frozen=True):
    """These requests are complete: all their pieces have been in batches that are done."""

    request_ids: tuple[int, ...]


class Refuse(Command, frozen=True):
    """End this request with an error. `retry_after_ns`: when a new try has a chance, 0 if unknown."""

    request_id: int
    reason: Reason
    retry_after_ns: int = 0
    detail: str = ""


class Wake(Command, frozen=True):
    """Hand in a Tick at this time; replaces the one asked for before."""

    at_ns: int


AnyEvent = Arrived | Cancelled | WorkerUp | Serves | StopsServing | Drains | WorkerLost | BatchDone | BatchFailed | Tick
AnyCommand = Run | Answer | Refuse | Wake
