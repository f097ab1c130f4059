"""Models with an axis that varies: what is asked of their requests, and length buckets that follow the traffic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

import msgspec
import numpy as np
import structlog

from scheduler import buckets
from scheduler.driver import Driver
from scheduler.fleet import Fleet
from scheduler.lengths import Lengths, stepped
from scheduler.tensors import Signature, TensorSpec
from server import codec
from server.codec import Checked, Tensor
from server.errors import invalid

log = structlog.get_logger(__name__)

# How often new edges are looked for, and how long it takes until what was seen has lost half its weight.
INTERVAL_S = 5.0
HALF_LIFE_S = 300.0
# Lengths of jobs are forgotten where no item of one has come for so long, and requests have.
JOBS_OVER_S = 60.0


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


def check_told(spec: TensorSpec, memory: memoryview, length: int) -> None:
    """The values of the INT64 input that tells how much of each item is there. Raises ServeError.

    With others a model would take padding for content, or give an answer that no item has.
    """
    for item, value in enumerate(memory.cast("q").tolist()):
        if not 1 <= value <= length:
            what = f"input {spec.name} is {value} for item {item}, which has a length of {length}"
            raise invalid(f"{what}; expected 1 to {length}")


def completed(signature: Signature, lengths: Lengths, tensors: list[Tensor]) -> list[Tensor]:
    """With those inputs that tell which part of an item is none, where a client has left them out: all is there.

    Raises ServeError for what is wrong with the others: it must not be said that these are missing, which may be.
    """
    names = {tensor.name for tensor in tensors}
    missing = [spec for spec in signature.inputs if spec.name in {lengths.length, lengths.mask} - names]
    given = tuple(spec for spec in signature.inputs if spec not in missing)
    if not missing or not any(-1 in spec.dims for spec in given):
        return tensors
    checked = codec.check_inputs(msgspec.structs.replace(signature, inputs=given), tensors)
    length = length_of(lengths, checked)
    for spec in missing:
        shape = (checked.items, *(length if dim == -1 else dim for dim in spec.dims))
        value = length if spec.name == lengths.length else 1
        data = memoryview(np.full(shape, value, np.int64).tobytes())
        tensors = [*tensors, Tensor(spec.name, "INT64", shape, [data])]
    return tensors


class _Seen:
    """What came for a model lately."""

    def __init__(self, start_s: float) -> None:
        self._of_requests = buckets.SeenLengths(HALF_LIFE_S, start_s)
        self._of_jobs = buckets.SeenLengths(HALF_LIFE_S, start_s)
        self._job_s = start_s  # when items of a job last came

    def observe(self, now_s: float, of_requests: Mapping[float, int], of_jobs: Mapping[float, int]) -> None:
        self._of_requests.observe(now_s, of_requests)
        if of_jobs:
            self._job_s = now_s
        elif of_requests and now_s - self._job_s > JOBS_OVER_S:
            self._of_jobs = buckets.SeenLengths(HALF_LIFE_S, now_s)
        self._of_jobs.observe(now_s, of_jobs)

    def weights(self) -> dict[float, float]:
        return buckets.together(self._of_requests.weights(), self._of_jobs.weights())


def _rounded(counts: Mapping[int, int], lengths: Lengths, shortest: int) -> dict[float, int]:
    found: dict[float, int] = {}
    for length, count in counts.items():
        step = stepped(max(length, shortest), lengths.longest)
        found[step] = found.get(step, 0) + count
    return found


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

        `take_of_jobs`: by model and length the items of batch jobs since it was last asked; they count as
        `buckets.together` says.
        """
        self._driver = driver
        self._fleet = fleet
        self._models = models
        self._take_of_jobs = take_of_jobs
        self._seen: dict[str, _Seen] = {}

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
        models = {key: (lengths, shortest) for key, lengths, shortest in self._models()}
        self._seen = {key: seen for key, seen in self._seen.items() if key in models}
        for key, (lengths, shortest) in models.items():
            seen = self._seen.setdefault(key, _Seen(now_s))
            asked, jobs = (_rounded(each.get(key, {}), lengths, shortest) for each in (counts, of_jobs))
            seen.observe(now_s, asked, jobs)
            if asked or jobs:
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
