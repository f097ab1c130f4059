"""Models with an axis that varies: what is asked of their requests, and length buckets that follow the traffic."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import structlog

from scheduler import buckets
from scheduler.driver import Driver
from scheduler.fleet import Fleet
from scheduler.lengths import Lengths, stepped
from scheduler.tensors import Signature
from server.codec import Checked, Tensor
from server.errors import invalid

log = structlog.get_logger(__name__)

# How often new edges are looked for, and how long it takes until what was seen has lost half its weight.
INTERVAL_S = 5.0
HALF_LIFE_S = 300.0


def length_of(lengths: Lengths | None, checked: Checked) -> int:
    """Of a request that fits the signature; 0 for a model without lengths. Raises ServeError."""
    if lengths is None:
        return 0
    length = checked.dims[0]
    if any(dim != length for dim in checked.dims):
        shapes = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in checked.tensors)
        raise invalid(f"the inputs' lengths differ: {shapes}; expected one length for all")
    if length > lengths.longest:
        raise invalid(f"a length of {length}; at most {lengths.longest} is taken")
    return length


def completed(signature: Signature, lengths: Lengths, tensors: list[Tensor]) -> list[Tensor]:
    """With those inputs that tell which part of an item is none, where a client has left them out: all is there."""
    names = {tensor.name for tensor in tensors}
    missing = [spec for spec in signature.inputs if spec.name in {lengths.length, lengths.mask} - names]
    if not missing:
        return tensors
    varying = {spec.name: 1 + spec.dims.index(-1) for spec in signature.inputs if -1 in spec.dims}
    told = next((tensor for tensor in tensors if len(tensor.shape) > varying.get(tensor.name, len(tensor.shape))), None)
    if told is None:
        return tensors  # refused as they are
    items, length = told.shape[0], told.shape[varying[told.name]]
    for spec in missing:
        shape = (items, *(length if dim == -1 else dim for dim in spec.dims))
        if not 0 < items * length <= items * lengths.longest or items > signature.max_batch:
            return tensors
        value = length if spec.name == lengths.length else 1
        data = memoryview(np.full(shape, value, np.int64).tobytes())
        tensors = [*tensors, Tensor(spec.name, "INT64", shape, [data])]
    return tensors


class LengthWatch:
    """Moves the edges of length buckets to where traffic makes them save work."""

    def __init__(
        self,
        driver: Driver,
        fleet: Fleet,
        models: Callable[[], Iterable[tuple[str, Lengths, int]]],
        take_of_jobs: Callable[[], Mapping[str, Mapping[int, int]]] = dict,
    ) -> None:
        """`models`: of those whose edges are to be learned the key, the lengths, and the shortest that it takes.

        `take_of_jobs`: by model and length the items of batch jobs since it was last asked; they count where there
        have been no requests for a while, since these have less time.
        """
        self._driver = driver
        self._fleet = fleet
        self._models = models
        self._take_of_jobs = take_of_jobs
        self._asked_s: dict[str, float] = {}  # when requests last came
        self._seen: dict[str, buckets.SeenLengths] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.look()
            except Exception:
                log.exception("length buckets could not be learned; they stay as they are")

    async def look(self) -> None:
        """Takes in what has come since the last time."""
        counts, of_jobs, now_s = self._driver.take_lengths(), self._take_of_jobs(), time.monotonic()
        self._asked_s.update(dict.fromkeys(counts, now_s))
        models = {key: (lengths, shortest) for key, lengths, shortest in self._models()}
        self._seen = {key: seen for key, seen in self._seen.items() if key in models}
        for key, (lengths, shortest) in models.items():
            seen = self._seen.setdefault(key, buckets.SeenLengths(HALF_LIFE_S, now_s))
            rounded: dict[float, int] = {}
            alone = now_s - self._asked_s.get(key, -math.inf) > HALF_LIFE_S
            for length, count in (of_jobs if alone else counts).get(key, {}).items():
                step = stepped(max(length, shortest), lengths.longest)
                rounded[step] = rounded.get(step, 0) + count
            seen.observe(now_s, rounded)
            if rounded:
                await self._learn(key, lengths, seen.weights())

    async def _learn(self, key: str, lengths: Lengths, weights: dict[float, float]) -> None:
        edges = self._fleet.edges(key)
        if not edges:
            return  # it is being unloaded
        cost = self._fleet.item_costs(key)
        found = await asyncio.to_thread(buckets.relearned, edges, weights, cost, lengths.count, lengths.longest)
        learned = tuple(int(edge) for edge in found)
        if learned != edges:
            log.info("length buckets", model=key.partition("#")[0], edges=learned, before=edges)
            self._fleet.set_edges(key, learned)
