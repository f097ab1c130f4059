"""Gangs: k batches of b items of one model, side by side in a slice. Pure.

Processes of a model that share a slice (by MPS) are planned and simulated as a gang: the slice runs k batches of b
in lat(b, k), so k * b items end together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from partitioner.latency import Measurement, interpolated, per_batch


@dataclass(frozen=True, slots=True)
class Gang:
    """`processes` batches of `batch` items each, side by side, done in `latency_ms`."""

    batch: int
    processes: int
    latency_ms: float

    @property
    def items(self) -> int:
        return self.batch * self.processes

    @property
    def items_per_s(self) -> float:
        return 1e3 * self.items / self.latency_ms

    def queries_per_s(self, items_per_query: int) -> float:
        """Highest rate of queries of so many items, each whole in one process; 0 where one does not fit."""
        return 1e3 * self.processes * (self.batch // items_per_query) / self.latency_ms


@dataclass(frozen=True, slots=True)
class GangTable:
    """What was measured of one model, by slice size in GPCs.

    `footprints`: (batch, processes, MiB) of what is known to have fitted: the memory that was measured, or else all
    the memory of the slice that a measurement was made in.
    """

    by_gpcs: Mapping[int, tuple[Gang, ...]]
    footprints: tuple[tuple[int, int, float], ...] = ()

    def memory_mib(self, batch: int, processes: int) -> float:
        """An upper bound of what so many processes with such batches take; 0 where nothing at all is known.

        k' processes with batches of b' have fitted into some memory; k <= k' of them with b <= b' take at most k / k'.
        """
        fitted = [
            mib * processes / others
            for largest, others, mib in self.footprints
            if largest >= batch and others >= processes
        ]
        return min(fitted, default=0.0)

    def gangs(self, gpcs: int, max_processes: int) -> list[Gang]:
        """Measured gangs of a slice; a size that was not measured takes the nearest smaller one, or has none."""
        measured = max((size for size in self.by_gpcs if size <= gpcs), default=None)
        if measured is None:
            return []
        return [gang for gang in self.by_gpcs[measured] if gang.processes <= max_processes]

    def fitting(self, gpcs: int, max_processes: int, items_per_query: int) -> list[Gang]:
        """Gangs for queries of so many items: the measured ones, and between them batches of whole queries."""
        gangs = self.gangs(gpcs, max_processes)
        if items_per_query == 1:
            return gangs
        found = []
        for processes in sorted({gang.processes for gang in gangs}):
            points = [(gang.batch, gang.latency_ms) for gang in gangs if gang.processes == processes]
            times = per_batch(points, max(batch for batch, _ in points))
            batches = range(items_per_query, len(times) + 1, items_per_query)
            found += [Gang(batch, processes, times[batch - 1]) for batch in batches]
        return found

    def times_ms(self, gpcs: int, batch: int, processes: int) -> list[float]:
        """Time of 1, 2, ... batch * processes items in a slice that runs up to `processes` batches up to `batch`.

        Fewer items take the quickest way to run at least so many; between measured batches it is linear.
        """
        gangs = self.gangs(gpcs, processes)
        times = [float("inf")] * (batch * processes)
        for side_by_side in range(1, processes + 1):
            points = [(gang.batch, gang.latency_ms) for gang in gangs if gang.processes == side_by_side]
            if points:
                largest = min(batch, max(size for size, _ in points))
                for size, ms in enumerate(interpolated(points, largest), start=1):
                    times[size * side_by_side - 1] = min(times[size * side_by_side - 1], ms)
        for index in range(len(times) - 2, -1, -1):
            times[index] = min(times[index], times[index + 1])
        return times


def gang_tables(measurements: Iterable[Measurement], gpu: str = "") -> dict[str, GangTable]:
    """Tables by model, of the rows measured on `gpu` (rows that name no GPU count for every one)."""
    found: dict[str, dict[int, dict[tuple[int, int], Gang]]] = defaultdict(lambda: defaultdict(dict))
    footprints: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
    for each in measurements:
        if not gpu or not each.gpu or each.gpu == gpu:
            gang = Gang(each.batch, each.processes, each.latency_ms)
            found[each.model][each.gpcs][each.batch, each.processes] = gang
            memory_mib = each.memory_mib or slice_memory_mib(each.mig_profile)
            if memory_mib:
                footprints[each.model].append((each.batch, each.processes, memory_mib))
    return {
        model: GangTable(
            {gpcs: tuple(gangs[key] for key in sorted(gangs)) for gpcs, gangs in sorted(sizes.items())},
            tuple(footprints[model]),
        )
        for model, sizes in found.items()
    }


def slice_memory_mib(mig_profile: str) -> float:
    """What the name says: 2g.20gb has 20 GiB. 0 where it says nothing."""
    match = re.search(r"\.(\d+)gb", mig_profile)
    return 1024.0 * int(match[1]) if match else 0.0
