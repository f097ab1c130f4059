"""Which models the workers have: loaded where they should be, measured once a kind of worker, back after a crash."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import structlog

from partitioner import latency
from scheduler.buckets import Costs
from scheduler.channel import Load, Loaded, LoadFailed, ModelSource, ToWorker, Unload
from scheduler.lengths import ByLength, Points, first_edges, item_costs, latency_ns, shortest
from scheduler.staff import DiedError, Listener, State, Worker
from scheduler.tensors import Signature

log = structlog.get_logger(__name__)

# A model whose loading has killed this many workers is given up.
CRASHES_PER_LOAD = 2
# Reading tens of gigabytes and compiling may take minutes; what takes longer hangs, and everything with it.
LOAD_TIMEOUT_S = 300.0


class ModelUnservableError(RuntimeError):
    """No worker could load the model. The message says why."""


class LoadedModel(NamedTuple):
    """A model that at least one worker serves."""

    signature: Signature
    measured_ms: dict[str, Points]  # by kind of worker; empty where the latencies were given


class _OfLengths(NamedTuple):
    """What a model's batches are padded to, and what they take by length, by kind of worker."""

    edges: tuple[int, ...]
    tables: dict[str, ByLength]


class Loader:
    """Loads and unloads. `send` hands a message to a worker; `listener` is told who serves what.

    `lose` ends a worker that does not come to an end of loading within `timeout_s`, for the reason it is given.
    """

    def __init__(
        self,
        send: Callable[[Worker, ToWorker], None],
        lose: Callable[[Worker, str], None],
        listener: Listener,
        timeout_s: float,
    ) -> None:
        self._send = send
        self._lose = lose
        self._told = listener
        self._timeout_s = timeout_s
        self._models: dict[str, ModelSource] = {}  # wanted
        self._proven: set[str] = set()  # of these, what some worker has loaded without dying of it
        self._measured: dict[tuple[str, str], Points] = {}  # (model key, kind of worker)
        self._padded: dict[str, _OfLengths] = {}  # models with lengths
        self._max_batch: dict[str, int] = {}
        self._mixed: set[str] = set()  # whose file was replaced between one worker's load and another's

    async def load(self, source: ModelSource, workers: Sequence[Worker]) -> LoadedModel:
        """Loads a model on all its workers. Raises ModelUnservableError if none can.

        Of each kind of worker one goes first and measures; the others take over its latency table.
        """
        groups = _by_kind(source, workers)
        if not groups:
            there = ", ".join(sorted({each.where.mig_profile or "whole GPUs" for each in workers}))
            asked = ", ".join(source.mig_profiles)
            raise ModelUnservableError(
                f"no slice has one of the MIG profiles {asked}; there are {there or 'no slices'}"
            )
        self._models[source.key] = source
        _warn_of_sizes(source, [each for group in groups.values() for each in group])
        results = await asyncio.gather(*(self._load_group(source, group) for group in groups.values()))
        loaded = [result for result in results if isinstance(result, Loaded)]
        if not loaded:
            self._forget(source.key)
            raise ModelUnservableError("; ".join(sorted({str(result) for result in results})))
        tables = {kind: self._measured[source.key, kind] for kind in groups if (source.key, kind) in self._measured}
        return LoadedModel(loaded[0].signature, tables)

    def unload(self, key: str, workers: Sequence[Worker]) -> None:
        """Takes a model off every worker. Its requests must have ended."""
        self._forget(key)
        for each in workers:
            self._told.stops_serving(each.id, key)  # also of one that is being restarted: it is expected no more
            if key in each.serving:
                each.serving.discard(key)
                self._send(each, Unload(key))

    async def introduce(self, workers: Sequence[Worker]) -> None:
        """Gives new workers every model that they should have."""
        for source in self._proven_models():
            groups = _by_kind(source, workers)
            results = await asyncio.gather(*(self._load_group(source, group) for group in groups.values()))
            for group, result in zip(groups.values(), results, strict=True):
                if isinstance(result, str):
                    log.warning("model not loaded here", model=source.name, worker=group[0].name, reason=result)

    async def restore(self, each: Worker) -> None:
        """Gives a restarted worker its models back."""
        for source in self._proven_models():
            if source.key in self._models and _wanted(source, each):
                await self._load_again(source, each)

    def measured_ms(self, key: str) -> dict[str, Points]:
        """What was measured of a model, by kind of worker; also on slices that came later."""
        return {kind: points for (of, kind), points in self._measured.items() if of == key}

    def is_mixed(self, key: str) -> bool:
        """Whether its file was replaced since it was loaded, and some worker has loaded the new one."""
        return key in self._mixed

    def unserved(self, workers: Sequence[Worker]) -> list[str]:
        """Names of models that some worker could load, and that none has now."""
        serving = {key for each in workers for key in each.serving}
        return [source.name for source in self._proven_models() if source.key not in serving]

    def _proven_models(self) -> list[ModelSource]:
        """Only these are loaded unasked: a model that kills workers must not do so over and over."""
        return [source for key, source in self._models.items() if key in self._proven]

    def _forget(self, key: str) -> None:
        self._models.pop(key, None)
        self._proven.discard(key)
        self._padded.pop(key, None)
        self._max_batch.pop(key, None)
        self._mixed.discard(key)
        for measured in [measured for measured in self._measured if measured[0] == key]:
            del self._measured[measured]

    async def _load_group(self, source: ModelSource, group: list[Worker]) -> Loaded | str:
        """Loads on workers of one kind. Returns one result, or why there is none."""
        reason = "no worker is up"
        up = [each for each in group if each.state == State.READY]
        for first in up[:CRASHES_PER_LOAD]:
            try:
                result = await self._load_on(source, first)
            except DiedError as died:
                reason = f"loading it killed the worker on {first.name}: {died}"
                continue
            if isinstance(result, LoadFailed):
                return result.detail
            self._proven.add(source.key)
            await asyncio.gather(*(self._load_again(source, each) for each in group if each is not first))
            return result
        return reason

    async def _load_again(self, source: ModelSource, each: Worker) -> None:
        """Loads what another worker has loaded before; a failure costs this worker only."""
        if source.key in each.serving:
            return  # it has been restarted, and was quicker
        try:
            result = await self._load_on(source, each)
        except DiedError:
            return  # restarting: it will load everything by itself
        if isinstance(result, LoadFailed):
            log.warning("model not loaded here", model=source.name, worker=each.name, reason=result.detail)
            self._told.stops_serving(each.id, source.key)

    async def _load_on(self, source: ModelSource, each: Worker) -> Loaded | LoadFailed:
        """Raises DiedError when the worker does, or is not up."""
        if each.state != State.READY:
            raise DiedError(each.reason or each.state)
        under_way = each.loading.get(source.key)
        if under_way is not None:
            return await asyncio.shield(under_way)
        future: asyncio.Future[Loaded | LoadFailed] = asyncio.get_running_loop().create_future()
        each.loading[source.key] = future
        self._send(each, Load(source, self._known_latency(source, each), self._known_by_length(source, each)))
        await asyncio.wait({future}, timeout=self._timeout_s)
        if not future.done():
            self._lose(each, f"loading {source.name} took more than {self._timeout_s:g} s")
        result = await future
        if source.key not in self._models:
            self._send(each, Unload(source.key))  # unloaded while a restarted worker was loading it
        elif isinstance(result, Loaded):
            if source.latency_ms is None:
                self._measured.setdefault((source.key, each.measured_as), result.latency_ms)
            if result.is_another:
                log.warning("the model's file was replaced and not loaded anew", model=source.name, worker=each.name)
                self._mixed.add(source.key)
            each.serving.add(source.key)
            self._max_batch[source.key] = max(result.signature.max_batch, 1)
            self._learn_lengths(source, each, result)
            self._tell_of(source, each, result.latency_ms)
        return result

    def _known_latency(self, source: ModelSource, each: Worker) -> Points | None:
        if source.latency_ms is not None:
            return tuple(_table(source.latency_ms).points(each.where.gpcs))
        return self._measured.get((source.key, each.measured_as))

    def _known_by_length(self, source: ModelSource, each: Worker) -> ByLength:
        if source.lengths is None:
            return ()
        if source.lengths_ms is not None:
            return source.lengths_ms[latency.stand_in(source.lengths_ms, each.where.gpcs)]
        if source.latency_ms is not None:
            return ((source.lengths.longest, tuple(_table(source.latency_ms).points(each.where.gpcs))),)
        known = self._padded.get(source.key)
        return known.tables.get(_timed_as(source, each), ()) if known is not None else ()

    # ---- lengths ----

    def edges(self, key: str) -> tuple[int, ...]:
        """What batches of a model are padded to; empty where it has no lengths, or is not loaded."""
        return self._padded[key].edges if key in self._padded else ()

    def item_costs(self, key: str) -> Costs:
        """What an item of a model with lengths costs, over all kinds of workers."""
        return item_costs(self._padded[key].tables.values(), self._max_batch[key])

    def set_edges(self, key: str, edges: tuple[int, ...], workers: Sequence[Worker]) -> None:
        """From now on its batches are padded to these. Does nothing if it has been unloaded."""
        if key in self._padded:
            self._padded[key] = self._padded[key]._replace(edges=edges)
            for each in workers:
                if key in each.serving and each.state == State.READY:
                    self._tell_of(self._models[key], each, ())

    def _tell_of(self, source: ModelSource, each: Worker, points: Points) -> None:
        """The worker serves it, at the latencies of these points, or of its lengths."""
        max_batch = self._max_batch[source.key]
        if source.lengths is None:
            times = latency.per_batch(points, max_batch)
            self._told.serves(each.id, source.key, tuple(int(ms * 1e6) for ms in times), source.weight)
        else:
            edges, tables = self._padded[source.key]
            rows = latency_ns(tables[_timed_as(source, each)], edges, max_batch)
            self._told.serves(each.id, source.key, rows, source.weight, edges)

    def _learn_lengths(self, source: ModelSource, each: Worker, result: Loaded) -> None:
        if source.lengths is None:
            return
        if source.key not in self._padded:
            costs = item_costs([result.by_length], max(result.signature.max_batch, 1))
            edges = first_edges(source.lengths, shortest(result.signature), costs)
            self._padded[source.key] = _OfLengths(edges, {})
        self._padded[source.key].tables.setdefault(_timed_as(source, each), result.by_length)


def _timed_as(source: ModelSource, each: Worker) -> str:
    """Workers for which it has the same latencies."""
    return each.measured_as if source.latency_ms is None else f"{each.where.gpcs} GPCs"


def _table(points_by_gpcs: Mapping[int, Points]) -> latency.LatencyTable:
    return latency.LatencyTable({gpcs: dict(points) for gpcs, points in points_by_gpcs.items()})


def _warn_of_sizes(source: ModelSource, workers: Sequence[Worker]) -> None:
    """Says which figures stand in for those of sizes that a given latency table does not have."""
    if source.latency_ms is None:
        return
    table = _table(source.latency_ms)
    missing = sorted({each.where.gpcs for each in workers} - set(table.by_gpcs))
    if missing:
        taken = {_size(gpcs): _size(table.stand_in(gpcs)) for gpcs in missing}
        log.warning(
            "the latency table lacks sizes of slices; those of others are taken", model=source.name, taken=taken
        )


def _size(gpcs: int) -> str:
    return "1 GPC" if gpcs == 1 else f"{gpcs} GPCs"


def _by_kind(source: ModelSource, workers: Sequence[Worker]) -> dict[str, list[Worker]]:
    groups: dict[str, list[Worker]] = {}
    for each in workers:
        if _wanted(source, each):
            groups.setdefault(each.measured_as, []).append(each)
    return groups


def _wanted(source: ModelSource, each: Worker) -> bool:
    return not source.mig_profiles or each.where.mig_profile in source.mig_profiles
