"""One request's story, whatever protocol it came by: check, place, preprocess, schedule, answer."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from typing import Any, NamedTuple

from preprocess.cpu import BadInputError
from preprocess.pool import PoolFullError, PreprocessPool
from scheduler.arena import Arena, ArenaFullError
from scheduler.driver import Answered, Driver, RefusedError
from scheduler.messages import DEFAULT_PRIORITY, Request
from scheduler.tensors import DATATYPES
from server import codec
from server.codec import Checked, OutputData, Tensor
from server.errors import Fault, ServeError, from_refusal, invalid
from server.metrics import Metrics
from server.repository import Model

# Where a slot, a place in the pool, or the daemon itself is only briefly not to be had.
BRIEFLY_S = 1.0


class Terms(NamedTuple):
    """What a request asks of the scheduler; points in time in ns of the monotonic clock."""

    due_ns: int | None = None
    expires_ns: int | None = None
    priority: int = DEFAULT_PRIORITY


class InferenceService:
    """The way from decoded inputs to outputs."""

    def __init__(self, driver: Driver, arena: Arena, pool: PreprocessPool, metrics: Metrics) -> None:
        self._driver = driver
        self._arena = arena
        self._pool = pool
        self._metrics = metrics
        self._ids = itertools.count(1)

    async def infer(
        self, model: Model, tensors: list[Tensor], parameters: dict[str, Any] | None, arrival_ns: int
    ) -> Answered:
        """Runs one request. Raises ServeError. If cancelled, the request is dropped wherever it is.

        `parameters` may hold timeout (us in the queue), priority (1 is highest), slo_ms and deadline_ms.
        """
        try:
            terms = read_terms(parameters, arrival_ns, model.serving.slo_ms)
            checked, offset = await self._place(model, tensors)
        except ServeError as error:
            self._metrics.rejected(model.key, error.reason)
            raise
        request = Request(
            next(self._ids),
            model.key,
            checked.items,
            checked.dims,
            terms.due_ns,
            terms.expires_ns,
            terms.priority,
            alone=model.signature.max_batch == 0,
        )
        pending = self._driver.submit(request, offset, arrival_ns)
        try:
            return await pending.future
        except RefusedError as error:
            raise from_refusal(error.reason, error.retry_after_s, error.detail, model.name) from None
        except asyncio.CancelledError:
            self._driver.cancel(pending)
            raise

    async def _place(self, model: Model, tensors: list[Tensor]) -> tuple[Checked, int]:
        """Inputs into the arena. Returns what they are, and the offset of their slot."""
        pipeline = model.serving.preprocess
        if pipeline is not None and len(tensors) == 1 and tensors[0].name == pipeline.input:
            return await self._preprocess(model, tensors[0])
        checked = codec.check_inputs(model.signature, tensors)
        offset = self._allocate(model, checked)
        try:
            places = model.layout.places(checked.items, checked.dims)
            for tensor, spec, place in zip(checked.tensors, model.signature.inputs, places, strict=True):
                begin = offset + place.offset
                codec.write_tensor(tensor, spec, place.shape, self._arena.memory[begin : begin + place.nbytes])
        except BaseException:
            self._arena.free(offset)
            raise
        return checked, offset

    async def _preprocess(self, model: Model, tensor: Tensor) -> tuple[Checked, int]:
        """A BYTES input through the model's pipeline, straight into the arena."""
        pipeline = model.serving.preprocess
        assert pipeline is not None  # the caller has looked
        if tensor.datatype != "BYTES":
            raise invalid(f"input {tensor.name} has datatype {tensor.datatype}, expected BYTES")
        if tensor.shape[1:] not in ((), (1,)):
            raise invalid(f"input {tensor.name} has shape {list(tensor.shape)}, expected [batch] or [batch, 1]")
        elements = codec.byte_elements(tensor)
        made = Tensor(pipeline.output, "FP32", (len(elements), *pipeline.image.shape), [])
        checked = codec.check_inputs(model.signature, [made])
        offset = self._allocate(model, checked)
        nbytes = model.layout.places(checked.items, checked.dims)[0].nbytes
        try:
            job = self._pool.submit(pipeline, elements, self._arena.memory[offset : offset + nbytes])
        except PoolFullError as error:
            self._arena.free(offset)
            raise ServeError(Fault.REFUSED, str(error), reason="pool_full", retry_after_s=BRIEFLY_S) from None
        try:
            await asyncio.shield(job)
        except asyncio.CancelledError:
            # The thread may be writing: the slot is free once it is through.
            job.add_done_callback(lambda done: (done.exception(), self._arena.free(offset)))
            raise
        except BadInputError as error:
            self._arena.free(offset)
            raise invalid(f"{error}; expected a PNG or JPEG image") from None
        except BaseException:
            self._arena.free(offset)
            raise
        return checked, offset

    def _allocate(self, model: Model, checked: Checked) -> int:
        try:
            return self._arena.allocate(model.layout.slot_bytes(checked.items, checked.dims))
        except ArenaFullError as error:
            raise ServeError(
                Fault.REFUSED, f"the arena is full: {error}", reason="arena_full", retry_after_s=BRIEFLY_S
            ) from None


def outputs_of(model: Model, answered: Answered, choice: list[codec.OutputChoice] | None, binary: bool) -> list[OutputData]:
    """A request's share of its batch's outputs, those that were asked for. Raises ServeError."""
    specs = model.signature.outputs
    if choice is None:
        return [_output(model, answered, index, binary) for index in range(len(specs))]
    indexes = {spec.name: index for index, spec in enumerate(specs)}
    for each in choice:
        if each.name not in indexes:
            raise invalid(f"unknown output {each.name}; model {model.name} has {', '.join(indexes)}")
    return [_output(model, answered, indexes[each.name], each.binary) for each in choice]


def _output(model: Model, answered: Answered, index: int, binary: bool) -> OutputData:
    outputs, row, items = answered
    spec = model.signature.outputs[index]
    shape = outputs.shapes[index]
    begin, end = 0, math.prod(shape)
    if model.signature.max_batch > 0:
        of_item = math.prod(shape[1:])
        begin, end = row * of_item, (row + items) * of_item
        shape = (items, *shape[1:])
    datatype = DATATYPES[spec.datatype]
    if binary:
        data = memoryview(outputs.data[index])[begin * datatype.itemsize : end * datatype.itemsize]
        return OutputData(spec, shape, data, None)
    if spec.datatype in ("FP16", "BF16"):
        raise invalid(f"output {spec.name} is {spec.datatype}, which JSON cannot carry; ask for it as binary data")
    return OutputData(spec, shape, memoryview(b""), outputs.values(index, datatype.numpy)[begin:end])


# ---- request parameters ----


def read_terms(parameters: dict[str, Any] | None, arrival_ns: int, model_slo_ms: float | None) -> Terms:
    """Deadlines and priority of a request. Raises ServeError for values that make no sense."""
    if not parameters:
        return Terms() if model_slo_ms is None else Terms(arrival_ns + int(model_slo_ms * 1e6))
    _check_reserved(parameters)
    slo_ms = _positive(parameters, "slo_ms")
    deadline_ms = _positive(parameters, "deadline_ms")
    timeout_us = _whole(parameters, "timeout")
    target_ms = model_slo_ms if slo_ms is None else slo_ms
    due = [arrival_ns + int(ms * 1e6) for ms in (target_ms, deadline_ms) if ms is not None]
    expires = [] if deadline_ms is None else [arrival_ns + int(deadline_ms * 1e6)]
    if timeout_us:
        expires.append(arrival_ns + timeout_us * 1000)
    priority = _whole(parameters, "priority") or DEFAULT_PRIORITY
    return Terms(min(due, default=None), min(expires, default=None), priority)


def _check_reserved(parameters: dict[str, Any]) -> None:
    if parameters.get("sequence_id"):
        raise ServeError(Fault.UNSUPPORTED, "sequences are not supported; leave out sequence_id")
    for name in parameters:
        if name.startswith("triton_") and name != "triton_enable_empty_final_response":
            raise invalid(f"parameter {name} is reserved")


def _positive(parameters: dict[str, Any], name: str) -> float | None:
    value = parameters.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise invalid(f"parameter {name} must be a positive number of milliseconds, not {value!r}")
    return float(value)


def _whole(parameters: dict[str, Any], name: str) -> int:
    value = parameters.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise invalid(f"parameter {name} must be a whole number of at least 0, not {value!r}")
    return value


def now_ns() -> int:
    """The clock of all deadlines."""
    return time.monotonic_ns()
