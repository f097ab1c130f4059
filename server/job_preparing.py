"""Items of a job into tensors. Encoded ones go through the pipeline a few at a time: who is online comes between."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import numpy as np
import structlog

from preprocess.errors import BadInputError
from preprocess.pipeline import PipelineError, PipelineFile
from preprocess.pool import PoolFullError, PreprocessPool
from scheduler.lengths import Lengths, stepped
from scheduler.tensors import DATATYPES, TensorSpec
from server.codec import Tensor
from server.errors import Fault, ServeError
from server.job_inputs import Item
from server.job_window import Window
from server.preparing import check_made
from server.repository import Model

log = structlog.get_logger(__name__)

# The elements that are handed to the pool together keep its threads busy for so long, about.
GROUP_S = 0.005
MOST = 64
AGAIN_S = 0.1
MODEL_AGAIN_S = 0.2
# Of what an element takes: so much of the last group.
WEIGHT = 0.2


class JobPreparer:
    """Through this pool."""

    def __init__(self, pool: PreprocessPool) -> None:
        self._pool = pool
        self._element_s = GROUP_S

    @property
    def group(self) -> int:
        """How many items to prepare together."""
        return max(self._pool.threads, min(MOST, int(self._pool.threads * GROUP_S / self._element_s)))

    async def prepare(self, model: Model, pipeline: PipelineFile, items: Sequence[Item]) -> None:
        """Each becomes its tensors, or has an error. Raises PipelineError where nobody can be started to do it."""
        begin_s = time.monotonic()
        while True:
            try:
                await self._made(model, pipeline, items)
            except PoolFullError:
                await asyncio.sleep(AGAIN_S)
                continue
            except PipelineError:
                raise
            except Exception as error:
                await self._one_by_one(model, pipeline, items, error)
            break
        took_s = (time.monotonic() - begin_s) * self._pool.threads / len(items)
        self._element_s += WEIGHT * (max(took_s, 1e-6) - self._element_s)

    async def _one_by_one(self, model: Model, pipeline: PipelineFile, items: Sequence[Item], error: Exception) -> None:
        if len(items) > 1:
            for item in items:
                await self.prepare(model, pipeline, [item])
        elif isinstance(error, BadInputError):
            items[0].error = str(error).replace(", element 0: ", ": ", 1)  # it was prepared alone, and has a number
        else:
            log.error("preprocessing failed", model=model.key, exc_info=error)
            items[0].error = "preprocessing failed; the server's log has the details"

    async def _made(self, model: Model, pipeline: PipelineFile, items: Sequence[Item]) -> None:
        elements = [item.parts[0] for item in items]
        if not pipeline.varies:
            slot = _Slot(model, pipeline, len(items), None)
            await self._pool.write(pipeline, elements, slot.places).future
            slot.fill(items)
            return
        by_length = defaultdict(list)
        for item, read in zip(items, await self._pool.read(pipeline, elements).future, strict=True):
            by_length[_padded(model, read.length)].append((item, read))
            item.length = read.length if model.lengths is not None else 0
        slots = []
        for length, pairs in by_length.items():
            slot = _Slot(model, pipeline, len(pairs), length)
            await self._pool.place(pipeline, [read for _, read in pairs], length, slot.places).future
            slots.append((slot, [item for item, _ in pairs]))
        for slot, filled in slots:  # all or none: what fails is prepared again, one by one
            slot.fill(filled)


class Encoded:
    """Items of one job that its model's pipeline has still to make tensors of.

    `on_ready` takes each group of them that are tensors or have an error, with the bytes that they were before.
    """

    def __init__(
        self,
        model: Callable[[], Model],
        preparer: JobPreparer,
        window: Window,
        on_ready: Callable[[list[Item], list[int]], None],
    ) -> None:
        self._model, self._preparer, self._window, self._on_ready = model, preparer, window, on_ready
        self._waiting: deque[Item] = deque()
        self._groups = 0  # that are being prepared
        self._changed = asyncio.Event()

    @property
    def is_empty(self) -> bool:
        return not self._waiting and not self._groups

    def add(self, item: Item) -> None:
        self._waiting.append(item)
        self._changed.set()

    def look_again(self) -> None:
        """The window may have room for tensors now."""
        self._changed.set()

    async def prepare(self) -> None:
        """Until cancelled, one group after the other. Raises PipelineError where nobody can be started to do it."""
        while True:
            while not self._waiting or self._window.is_ready_full:
                self._changed.clear()
                await self._changed.wait()
            group = [self._waiting.popleft() for _ in range(min(self._preparer.group, len(self._waiting)))]
            sizes = [item.nbytes for item in group]
            self._groups += 1
            try:
                model = self._model()
                pipeline = model.serving.preprocess
                if pipeline is None:
                    raise ServeError(Fault.UNAVAILABLE, f"model {model.name} has no pipeline any more")
                await self._preparer.prepare(model, pipeline, group)
            except ServeError:
                self._waiting.extendleft(reversed(group))
                await asyncio.sleep(MODEL_AGAIN_S)
                continue
            finally:
                self._groups -= 1
            self._on_ready(group, sizes)


def _padded(model: Model, length: int) -> int:
    """So that there are few different ones, where padding changes nothing."""
    return length if model.lengths is None else stepped(length, model.lengths.longest)


class _Slot:
    """Memory for the tensors of some items, laid out as in the arena."""

    def __init__(self, model: Model, pipeline: PipelineFile, items: int, length: int | None) -> None:
        """Raises ServeError where the pipeline makes what the model does not take."""
        self._inputs = model.signature.inputs
        self._dims = check_made(model, pipeline, 1, length).dims
        # One slot an item: a model that does not batch has no other, and items go into batches one by one.
        self._slot = model.layout.slot(1, self._dims)
        self._sizes = [place.nbytes for place in self._slot.places]
        self._memory = [bytearray(items * size) for size in self._sizes]
        self.places = {spec.name: memoryview(part) for spec, part in zip(self._inputs, self._memory, strict=True)}

    def fill(self, items: Sequence[Item]) -> None:
        for index, item in enumerate(items):
            pairs = zip(self._memory, self._sizes, strict=True)
            item.parts = tuple(bytes(part[index * size : (index + 1) * size]) for part, size in pairs)
            item.dims = self._dims


def grouped(item: Item, lengths: Lengths | None, edges: Sequence[int]) -> tuple[int, ...]:
    """The bucket of an item that is tensors now: of a model that pads the learned edge above its length."""
    length = item.length or next(iter(item.dims), 0)
    if lengths is None or not edges or not 0 < length <= edges[-1] or len(set(item.dims)) > 1:
        return item.dims  # it has to be of these sizes; or it is refused when it runs
    item.length = length
    return (edges[bisect_left(edges, length)],) * len(item.dims)


def tensors_of_batch(model: Model, items: Sequence[Item]) -> list[Tensor]:
    """The inputs of a batch of items of one bucket, padded to the longest of them."""
    dims = items[0].dims
    fits = not dims or dims[0] <= items[0].bucket[0]
    if not fits or any(item.dims != dims for item in items):
        dims = (max(item.length or item.dims[0] for item in items),) * len(dims)
    count = (len(items),)
    tensors, taken = [], 0
    for index, spec in enumerate(model.signature.inputs):
        varying = slice(taken, taken := taken + spec.dims.count(-1))
        shape = _shape(spec, dims[varying])
        if all(item.dims[varying] == dims[varying] for item in items):
            data = [memoryview(item.parts[index]) for item in items]
        else:
            data = [_resized([(item.parts[index], _shape(spec, item.dims[varying])) for item in items], spec, shape)]
        tensors.append(
            Tensor(spec.name, spec.datatype, (*count, *shape) if model.signature.max_batch > 0 else shape, data)
        )
    return tensors


def _shape(spec: TensorSpec, varying: Sequence[int]) -> tuple[int, ...]:
    sizes = iter(varying)
    return tuple(next(sizes) if dim == -1 else dim for dim in spec.dims)


def _resized(parts: Sequence[tuple[bytes, tuple[int, ...]]], spec: TensorSpec, shape: tuple[int, ...]) -> memoryview:
    """All of one shape: zeros behind the shorter ones, and off with what is behind the end of the longer ones."""
    dtype = np.dtype(DATATYPES[spec.datatype].numpy)
    array = np.zeros((len(parts), *shape), dtype)
    for row, (data, own) in zip(array, parts, strict=True):
        common = tuple(slice(min(sizes)) for sizes in zip(own, shape, strict=True))
        row[common] = np.frombuffer(data, dtype).reshape(own)[common]
    return array.data.cast("B")
