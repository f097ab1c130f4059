"""A request's way through preprocessing: encoded bytes in, its inputs in the arena out, then the driver's."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from preprocess import glance
from preprocess.errors import BadInputError
from preprocess.items import Item
from preprocess.pipeline import PipelineError, PipelineFile
from preprocess.pool import Job, PoolFullError, PreprocessPool
from scheduler.arena import Arena, ArenaFullError
from scheduler.domain import LATEST
from scheduler.driver import Driver, Pending, now_ns
from scheduler.messages import Reason, Request
from server import codec
from server.codec import Checked, Tensor
from server.errors import Fault, ServeError, from_refusal, internal, invalid
from server.lengths import length_of
from server.preprocess_stats import PreprocessStats
from server.repository import Model
from server.terms import Terms

log = structlog.get_logger(__name__)

# Where a slot or a place in the pool is only briefly not to be had.
BRIEFLY_S = 1.0

OnError = Callable[[ServeError], None]


def sized(request: Request, model: Model, checked: Checked) -> Request:
    """With its dims, or its length, which decide with what it may share a batch. Raises ServeError."""
    length = length_of(model.lengths, checked)
    return msgspec.structs.replace(request, dims=() if length else checked.dims, length=length)


def allocate(arena: Arena, nbytes: int) -> int:
    """Offset of a slot. Raises ServeError."""
    if nbytes > arena.size:
        message = f"the inputs take {nbytes} bytes, the arena has {arena.size}; send fewer items at once"
        raise ServeError(Fault.TOO_LARGE, message)
    try:
        return arena.allocate(nbytes)
    except ArenaFullError as error:
        raise ServeError(
            Fault.REFUSED, f"the arena is full: {error}", reason="arena_full", retry_after_s=BRIEFLY_S
        ) from None


def check_made(model: Model, pipeline: PipelineFile, items: int, length: int | None) -> Checked:
    """What the pipeline makes of so many items, padded to a length, against the model's inputs. Raises ServeError."""
    dims = {spec.name: spec.dims for spec in model.signature.inputs}
    batch = () if model.signature.max_batch == 0 else (items,)
    made = []
    for name, (datatype, of_item) in pipeline.makes.items():
        shape = dims[name] if not of_item else tuple(length or dim if dim == -1 else dim for dim in of_item)
        made.append(Tensor(name, datatype, (*batch, *shape), []))
    return codec.check_inputs(model.signature, made)


class Preparer:
    """Begins them."""

    def __init__(self, driver: Driver, arena: Arena, pool: PreprocessPool, stats: PreprocessStats) -> None:
        self._shared = driver, arena, pool, stats

    def begin(
        self,
        model: Model,
        pipeline: PipelineFile,
        tensor: Tensor,
        terms: Terms,
        accept: Callable[[Checked], Pending],
        on_error: OnError,
    ) -> Callable[[], None]:
        """Takes on a request that came as the BYTES input of a pipeline.

        Raises ServeError for what is wrong at once; `on_error` is told what is found later. Call what is returned if
        the client has gone.
        """
        _check_shape(tensor)
        preparation = _Preparation(*self._shared, model, pipeline, math.prod(tensor.shape), on_error)
        begin = preparation.begin_reading if pipeline.varies else preparation.begin_writing
        begin(tensor, terms, accept)
        return preparation.cancel


class _Preparation:
    """One request. What does not vary in length is written straight into its slot; what does is read first, since the
    slot's size is known only then.
    """

    _job: Job[Any]
    _pending: Pending
    _offset: int

    def __init__(
        self,
        driver: Driver,
        arena: Arena,
        pool: PreprocessPool,
        stats: PreprocessStats,
        model: Model,
        pipeline: PipelineFile,
        items: int,
        on_error: OnError,
    ) -> None:
        self._driver = driver
        self._arena = arena
        self._pool = pool
        self._stats = stats
        self._model = model
        self._pipeline = pipeline
        self._items = items
        self._on_error = on_error
        self._times_ns: dict[str, int] = {}  # of what was read, before it is placed

    def cancel(self) -> None:
        if not self._job.future.done():
            self._stats.failed(self._model.id, "cancelled")
        self._job.stop()
        self._driver.cancel(self._pending)

    def begin_writing(self, tensor: Tensor, terms: Terms, accept: Callable[[Checked], Pending]) -> None:
        """Into the slot. Raises ServeError."""
        checked = self._checked(None)
        elements = self._elements(tensor, terms)
        places = self._take_slot(checked)
        try:
            self._job = self._pool.write(self._pipeline, elements, places)
        except PoolFullError as error:
            self._arena.free(self._offset)
            raise self._pool_full(error) from None
        self._pending = accept(checked)
        self._job.future.add_done_callback(self._written)

    def begin_reading(self, tensor: Tensor, terms: Terms, accept: Callable[[Checked], Pending]) -> None:
        """Into memory of its own. Raises ServeError."""
        checked = self._checked(1)  # any length: how many items it has is what is looked at
        elements = self._elements(tensor, terms)
        try:
            self._job = self._pool.read(self._pipeline, elements)
        except PoolFullError as error:
            raise self._pool_full(error) from None
        self._pending = accept(checked)
        self._job.future.add_done_callback(self._read)

    def _elements(self, tensor: Tensor, terms: Terms) -> list[bytes]:
        """Raises ServeError; also where their preprocessing alone would make the request later than it may be."""
        elements = codec.byte_elements(tensor, text=self._pipeline.text is not None)
        if terms.due_ns is not None:
            latest_ns = terms.due_ns if terms.strict else terms.arrival_ns + LATEST * (terms.due_ns - terms.arrival_ns)
            over_ns = now_ns() + self._pool.estimate_ns(self._pipeline, elements) - latest_ns
            if over_ns > 0:
                self._stats.failed(self._model.id, "unreachable" if terms.strict else "overloaded")
                reason = Reason.SLO_UNREACHABLE if terms.strict else Reason.OVERLOADED
                of = " of its preprocessing alone"
                raise from_refusal(reason, over_ns / 1e9, of, self._model.name, terms.limit, terms.limit_ms)
        return elements

    def _read(self, job: asyncio.Future[list[Item]]) -> None:
        if job.cancelled():
            return
        job.exception()  # asyncio logs one that nobody has looked at
        if self._pending.ended:
            return
        try:
            items = job.result()
            self._times_ns = self._job.times_ns()
            length = max(item.length for item in items)
            self._check_mixed(items)
            checked = self._checked(length)
            places = self._take_slot(checked)
        except Exception as error:
            self._fail(error)
            return
        self._pending.request = sized(self._pending.request, self._model, checked)
        self._job = self._pool.place(self._pipeline, items, length, places)
        self._job.future.add_done_callback(self._written)

    def _check_mixed(self, items: list[Item]) -> None:
        """Whether the model can tell what is padding, where some is needed. Raises ServeError."""
        lengths = sorted({item.values.shape[-1] for item in items})
        told = self._model.lengths is not None or self._pipeline.length is not None or self._pipeline.mask is not None
        if len(lengths) > 1 and not told:
            raise invalid(
                f"input {self._pipeline.input} has items of {len(lengths)} lengths, {lengths[0]} to {lengths[-1]}, and "
                f"model {self._model.name} would take padding for content: send each in a request of its own, or "
                f"declare `lengths` in its serving.yaml, see docs/preprocessing.md"
            )

    def _written(self, job: asyncio.Future[list[None]]) -> None:
        # Until now a thread may have been writing to the slot, even if the request has ended before.
        if job.cancelled():
            return  # the pool is closed, and one may be writing still
        error = job.exception()
        if error is None:
            self._stats.done(self._model.id, self._items, self._times_ns or self._job.times_ns())
            self._driver.start(self._pending, self._offset)
            return
        self._arena.free(self._offset)
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._driver.withdraw(self._pending):
            return
        if isinstance(error, ServeError):
            self._on_error(error)
            return
        bad = isinstance(error, BadInputError)
        self._stats.failed(self._model.id, "bad_input" if bad else "internal")
        if not bad:
            log.error("preprocessing failed", model=self._model.key, exc_info=error)
        if isinstance(error, PipelineError):
            self._on_error(ServeError(Fault.UNAVAILABLE, str(error), reason="unavailable"))
        else:
            self._on_error(invalid(str(error)) if bad else internal())

    def _pool_full(self, error: PoolFullError) -> ServeError:
        self._stats.failed(self._model.id, "pool_full")
        return ServeError(Fault.REFUSED, str(error), reason="pool_full", retry_after_s=BRIEFLY_S)

    def _checked(self, length: int | None) -> Checked:
        """What the pipeline makes of it, against the model's signature. Raises ServeError."""
        signature = self._model.signature
        if signature.max_batch == 0 and self._items != 1:
            raise invalid(f"{self._items} elements for model {self._model.name}, which does not batch; expected 1")
        if signature.max_batch and not 1 <= self._items <= signature.max_batch:
            asked = f"input {self._pipeline.input} has {self._items} elements, a batch of {self._items} items"
            raise invalid(f"{asked}; expected 1 to {signature.max_batch}")
        return check_made(self._model, self._pipeline, self._items, length)

    def _take_slot(self, checked: Checked) -> dict[str, memoryview]:
        """The place of each input. Raises ServeError."""
        slot = self._model.layout.slot(checked.items, checked.dims)
        self._offset = allocate(self._arena, slot.nbytes)
        places = {}
        for spec, place in zip(self._model.signature.inputs, slot.places, strict=True):
            begin = self._offset + place.offset
            places[spec.name] = self._arena.memory[begin : begin + place.nbytes]
        return places


def _check_shape(tensor: Tensor) -> None:
    if tensor.datatype != "BYTES":
        raise invalid(f"input {tensor.name} has datatype {tensor.datatype}, expected BYTES")
    if tensor.shape[1:] not in ((), (1,)):
        raise invalid(f"input {tensor.name} has shape {list(tensor.shape)}, expected [batch] or [batch, 1]")


def holds_something(tensor: Tensor, pipeline: PipelineFile) -> bool:
    """Is it more than what clients fill in that send every input of the metadata, as perf_analyzer does?

    That is made of nothing or of random letters, which may be a text, but no picture and no sound.
    """
    try:
        elements = codec.byte_elements(tensor, text=pipeline.text is not None)
    except ServeError:
        return False
    return any(elements if pipeline.text is not None else map(glance.is_encoded, elements))
