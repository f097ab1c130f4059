"""One request's story, whatever protocol it came by: check, place, preprocess, schedule, answer."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from preprocess.pool import PreprocessPool
from scheduler.answers import Answered, Share
from scheduler.arena import Arena
from scheduler.driver import Driver, Pending, RefusedError
from scheduler.messages import Request
from scheduler.staff import resolve
from scheduler.tensors import DATATYPES, TensorSpec
from server import codec
from server.codec import Checked, OutputChoice, OutputData, Tensor
from server.errors import Fault, ServeError, both_given, from_refusal, invalid
from server.lengths import check_told, completed, length_of
from server.preparing import Preparer, allocate, holds_something
from server.preprocess_stats import PreprocessStats
from server.repository import Model
from server.terms import Terms, read_terms

Outcome = Answered | ServeError
OnOutcome = Callable[[Outcome], None]
Cancel = Callable[[], object]


class InferenceService:
    """The way from decoded inputs to outputs."""

    def __init__(self, driver: Driver, arena: Arena, pool: PreprocessPool) -> None:
        self._driver = driver
        self._arena = arena
        self.preprocess_stats = PreprocessStats(lambda: pool.waiting, pool.threads)
        self._preparer = Preparer(driver, arena, pool, self.preprocess_stats)
        self._ids = itertools.count(1)

    def submit(
        self,
        model: Model,
        tensors: list[Tensor],
        parameters: dict[str, Any] | None,
        arrival_ns: int,
        on_outcome: OnOutcome,
        call_ms: float | None = None,
    ) -> Cancel:
        """Runs one request; `on_outcome` gets the answer or the error. Raises ServeError for what is wrong at once.

        `parameters` may hold timeout (us in the queue), priority (1 is highest), slo_ms, deadline_ms and strict;
        `call_ms` is how long the client waits, if it says so. Call what is returned if the client has gone: then the
        request is dropped wherever it is, and `on_outcome` is not called.
        """
        terms = read_terms(parameters, arrival_ns, model.serving.slo_ms, call_ms, model_strict=model.serving.strict)
        return self._submit(model, tensors, terms, on_outcome)

    def submit_background(
        self, model: Model, tensors: list[Tensor], worker_id: int, arrival_ns: int, on_outcome: OnOutcome
    ) -> Cancel:
        """The same for a batch that runs on this worker when nobody else has anything for it."""
        return self._submit(model, tensors, Terms(arrival_ns), on_outcome, worker_id)

    def _submit(
        self, model: Model, tensors: list[Tensor], terms: Terms, on_outcome: OnOutcome, worker_id: int | None = None
    ) -> Cancel:
        pipeline = model.serving.preprocess
        if pipeline is not None:
            tensors, encoded = _split(tensors, pipeline.input)
            if not tensors and encoded is not None:
                accept = partial(self._accept, model, terms, on_outcome, worker_id)
                return self._preparer.begin(model, pipeline, encoded, terms, accept, on_outcome)
            if not {tensor.name for tensor in tensors} & {spec.name for spec in model.signature.inputs}:
                raise _neither(model, pipeline.input, tensors)
            if encoded is not None and holds_something(encoded, pipeline):
                raise invalid(both_given(encoded.name, [each.name for each in tensors]))
        if model.lengths is not None:
            tensors = completed(model.signature, model.lengths, tensors)
        checked = codec.check_inputs(model.signature, tensors)
        length = length_of(model.lengths, checked)
        offset = self._place(model, checked, length)
        pending = self._accept(model, terms, on_outcome, worker_id, checked, length)
        self._driver.start(pending, offset)
        return partial(self._driver.cancel, pending)

    async def infer(
        self,
        model: Model,
        tensors: list[Tensor],
        parameters: dict[str, Any] | None,
        arrival_ns: int,
        call_ms: float | None = None,
    ) -> Outcome:
        """`submit` for those who can wait. Raises ServeError for what is wrong at once."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        # The future may be cancelled already, with its task not told yet, when the outcome comes.
        cancel = self.submit(model, tensors, parameters, arrival_ns, partial(resolve, future), call_ms)
        try:
            return await future
        except asyncio.CancelledError:
            cancel()
            raise

    def _accept(
        self,
        model: Model,
        terms: Terms,
        on_outcome: OnOutcome,
        worker_id: int | None,
        checked: Checked,
        length: int = 0,
    ) -> Pending:
        """From here on the request is counted as unfinished."""
        request = Request(
            next(self._ids),
            model.key,
            checked.items,
            () if length else checked.dims,
            terms.due_ns,
            terms.expires_ns,
            terms.priority,
            model.signature.max_batch == 0,
            terms.strict,
            model.signature.max_batch == 0 or not model.serving.split or worker_id is not None,
            length,
            worker_id,
            terms.arrival_ns,
        )

        def on_end(end: Answered | RefusedError) -> None:
            if isinstance(end, RefusedError):
                error = from_refusal(end.reason, end.retry_after_s, end.detail, model.name, terms.limit, terms.limit_ms)
                on_outcome(error)
            else:
                on_outcome(end)

        return self._driver.accept(request, terms.arrival_ns, on_end)

    def _place(self, model: Model, checked: Checked, length: int) -> int:
        """Inputs into the arena. Returns the offset of their slot. Raises ServeError."""
        slot = model.layout.slot(checked.items, checked.dims)
        offset = allocate(self._arena, slot.nbytes)
        try:
            for tensor, spec, place in zip(checked.tensors, model.signature.inputs, slot.places, strict=True):
                memory = self._arena.memory[offset + place.offset :][: place.nbytes]
                codec.write_tensor(tensor, spec, place.shape, memory)
                if model.lengths is not None and spec.name == model.lengths.length:
                    check_told(spec, memory, length)
        except BaseException:
            self._arena.free(offset)
            raise
        return offset


def _split(tensors: list[Tensor], encoded_name: str) -> tuple[list[Tensor], Tensor | None]:
    """The ready tensors, and the one for the pipeline."""
    ready = [tensor for tensor in tensors if tensor.name != encoded_name]
    return ready, next((tensor for tensor in tensors if tensor.name == encoded_name), None)


def _neither(model: Model, encoded_name: str, tensors: list[Tensor]) -> ServeError:
    ready, got = (", ".join(each.name for each in some) for some in (model.signature.inputs, tensors))
    return invalid(f"expected input {encoded_name}, encoded, or the ready tensors [{ready}], got [{got}]")


def check_outputs(model: Model, choice: list[OutputChoice] | None, binary: bool) -> None:
    """Can the model give what is asked for? Told before anything is computed. Raises ServeError."""
    specs = model.signature.outputs
    if choice is None:
        if not binary:
            for spec in specs:
                if spec.datatype in _NOT_IN_JSON:
                    raise _not_in_json(spec)
        return
    by_name = {spec.name: spec for spec in specs}
    for each in choice:
        if each.name not in by_name:
            raise invalid(f"unknown output {each.name[:100]}; model {model.name} has {', '.join(by_name)}")
        if not each.binary and by_name[each.name].datatype in _NOT_IN_JSON:
            raise _not_in_json(by_name[each.name])


_NOT_IN_JSON = ("FP16", "BF16")


def _not_in_json(spec: TensorSpec) -> ServeError:
    return invalid(f"output {spec.name} is {spec.datatype}, which JSON cannot carry; ask for it as binary data")


def outputs_of(model: Model, answered: Answered, choice: list[OutputChoice] | None, binary: bool) -> list[OutputData]:
    """A request's share of its batches' outputs, those that were asked for, which `check_outputs` has seen.

    Raises ServeError where they cannot be joined.
    """
    specs = model.signature.outputs
    if choice is None:
        return [_output(model, answered, index, binary) for index in range(len(specs))]
    indexes = {spec.name: index for index, spec in enumerate(specs)}
    return [_output(model, answered, indexes[each.name], each.binary) for each in choice]


def _output(model: Model, answered: Answered, index: int, binary: bool) -> OutputData:
    shares = answered.shares
    part = _cut if answered.length and -1 in model.signature.outputs[index].dims else _part
    parts = [part(model, share, index, binary, answered.length) for share in shares]
    return parts[0] if len(parts) == 1 else _joined(parts)


def _cut(model: Model, share: Share, index: int, binary: bool, length: int) -> OutputData:
    """Of an output that varies: its batch was padded, and the request gets back what is of its own length."""
    spec = model.signature.outputs[index]
    whole = np.frombuffer(share.outputs.data[index], DATATYPES[spec.datatype].numpy).reshape(
        share.outputs.shapes[index]
    )
    rows = slice(share.row, share.row + share.items)
    own = whole[(rows, *(slice(length if dim == -1 else None) for dim in spec.dims))]
    if binary:
        return OutputData(spec, own.shape, [memoryview(own.tobytes())], None)
    return OutputData(spec, own.shape, None, own.ravel().tolist())


def _part(model: Model, share: Share, index: int, binary: bool, length: int) -> OutputData:
    outputs, row, items = share.outputs, share.row, share.items
    spec = model.signature.outputs[index]
    datatype = DATATYPES[spec.datatype]
    shape = outputs.shapes[index]
    if model.signature.max_batch > 0:
        of_item = math.prod(shape[1:])
        begin, end = row * of_item, (row + items) * of_item
        shape = (items, *shape[1:])
    else:
        begin, end = 0, math.prod(shape)
    if binary:
        data = memoryview(outputs.data[index])[begin * datatype.itemsize : end * datatype.itemsize]
        return OutputData(spec, shape, [data], None)
    return OutputData(spec, shape, None, outputs.values(index, datatype.numpy)[begin:end])


def _joined(parts: list[OutputData]) -> OutputData:
    """One below the other. Raises ServeError where they do not fit."""
    spec, (_, *of_item) = parts[0].spec, parts[0].shape
    if any(list(part.shape[1:]) != of_item for part in parts):
        message = f"output {spec.name} has another shape in each batch; the model needs `split: false` in serving.yaml"
        raise ServeError(Fault.INTERNAL, message)
    shape = (sum(part.shape[0] for part in parts), *of_item)
    if parts[0].data is not None:
        return OutputData(spec, shape, [view for part in parts for view in part.data or ()], None)
    return OutputData(spec, shape, None, [value for part in parts for value in part.values or ()])


def late_ms(answered: Answered) -> float:
    """How long after its due time it was answered, as clients are told it; 0 if in time."""
    return -(-answered.late_ns // 1000) / 1000 if answered.late_ns else 0.0
