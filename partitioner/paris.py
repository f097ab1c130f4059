"""PARIS: slices sized by the batches that come (Kim, Choi, Rhu, DAC'22, arXiv 2202.13481), step by step. Pure.

    1  B[k]  the knee of size k, made monotone, B[largest] = Bmax
    2  S[k]  = (B[k-1], B[k]], the batches served best by size k
    3  R[k]  = sum over b in S[k] of p[b] * lat[k][b], busy time per query on size k
    4  N[k]  = R[k] * G / sum_j (j * R[j]), real-valued counts that use all GPCs
    5  rounded to a legal layout of every GPU, with one of the largest size used kept

The shape is the paper's and its authors' patent's, the constants (80 % for the knee, Bmax 32) are widely reported; the
rounding is ours, and so are several models: each gets GPCs by its share of the work, and the counts are added up.
PARIS looks at the sizes of queries, never at the SLO; that is left to ELSA, which picks the slice for each query.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from partitioner.cuts import cuts, layout_counts, slice_profiles
from partitioner.geometry import GpuModel, Layout
from partitioner.latency import LatencyTable, measured_knee, monotone_knees, per_batch
from partitioner.plans import ModelDemand, ModelShare, Plan, PlanError, PlannedSlice

MAX_BATCH = 32
KNEE_UTILISATION = 0.8
# Without a number of GPUs, so many that the slices are busy for at most this share of the time (ours).
PLANNED_UTILISATION = 0.8

Utilisation = Mapping[int, Mapping[int, float]]


@dataclass(frozen=True, slots=True)
class Work:
    """Steps 1 to 3 for one model; `busy_ms` is R[k], a query's mean busy time on each size."""

    demand: ModelDemand
    knees: dict[int, int]
    segments: dict[int, range]
    times_ms: dict[int, list[float]]
    busy_ms: dict[int, float]

    @property
    def busy_gpcs(self) -> float:
        """GPCs that this model keeps busy: the sum over k of k * R[k], times the rate."""
        return self.demand.rate_per_s * sum(gpcs * ms for gpcs, ms in self.busy_ms.items()) / 1e3


def knees(
    table: LatencyTable, sizes: Sequence[int], max_batch: int, utilisation: Utilisation | None = None
) -> dict[int, int]:
    """Step 1: the first measured batch with 80 % utilisation, where that was measured, else of the peak throughput."""
    measured = {}
    for gpcs in sizes:
        busy = sorted((utilisation or {}).get(gpcs, {}).items())
        at_knee = [batch for batch, share in busy if share >= KNEE_UTILISATION]
        measured[gpcs] = (at_knee or [max_batch])[0] if busy else measured_knee(table.points(gpcs))
    return monotone_knees(measured, max_batch)


def segments(knees: Mapping[int, int]) -> dict[int, range]:
    """Step 2: the batches of each size, above the knee of the next smaller one up to its own. Some may be empty."""
    sizes = sorted(knees)
    return {gpcs: range(1 + (knees[below] if below else 0), 1 + knees[gpcs]) for below, gpcs in pairwise([0, *sizes])}


def busy_ms(
    segments: Mapping[int, range], items: Mapping[int, float], times_ms: Mapping[int, Sequence[float]]
) -> dict[int, float]:
    """Step 3: R[k], from p[b] (`items`) and lat[k][b] (`times_ms[k][b - 1]`)."""
    return {
        gpcs: sum(items.get(batch, 0.0) * times_ms[gpcs][batch - 1] for batch in segment)
        for gpcs, segment in segments.items()
    }


def real_counts(busy_ms: Mapping[int, float], gpcs: float) -> dict[int, float]:
    """Step 4: N[k], slices of each size such that all are equally busy and all `gpcs` GPCs are in use."""
    unit = gpcs / sum(size * busy for size, busy in busy_ms.items())
    return {size: busy * unit for size, busy in busy_ms.items()}


def rounded(counts: Mapping[int, float], gpu: GpuModel, gpus: int) -> list[Layout]:
    """Step 5: a legal layout for each of `gpus` GPUs, near to `counts`.

    GPU by GPU, the layout that overshoots least what is still needed, in GPCs (so what is rounded up is what has the
    largest remainder), then the one with the fewest GPCs in sizes that nothing needs or left over, then the one with
    the largest slices. The largest size in use gets one slice before all.
    """
    needed = {size: count for size, count in counts.items() if count > 1e-9}
    used = set(needed)
    largest = max(needed)
    needed[largest] = max(needed[largest], 1.0)
    chosen: list[Layout] = []
    for _ in range(gpus):
        candidates = cuts(gpu)
        if not any(placed.profile.gpcs == largest for layout in chosen for placed in layout):
            candidates = tuple(layout for layout in candidates if largest in dict(layout_counts(layout)))
        layout = min(candidates, key=lambda each: _misfit(each, needed, used, gpu))
        chosen.append(layout)
        for size, count in layout_counts(layout):
            needed[size] = needed.get(size, 0.0) - count
    return chosen


def work(demand: ModelDemand, table: LatencyTable, sizes: Sequence[int], max_batch: int = MAX_BATCH) -> Work:
    """Steps 1 to 3 for one model. A query of more than `max_batch` items widens the last segment."""
    max_batch = max(max_batch, *demand.items)
    times = {gpcs: per_batch(table.points(gpcs), max_batch) for gpcs in sizes}
    found = knees(table, sizes, max_batch)
    parts = segments(found)
    return Work(demand, found, parts, times, busy_ms(parts, demand.items, times))


def plan(
    demands: Sequence[ModelDemand],
    tables: Mapping[str, LatencyTable],
    gpu: GpuModel,
    gpus: int | None = None,
    max_batch: int = MAX_BATCH,
) -> Plan:
    """The layout that PARIS proposes for `gpus` GPUs, or for as few as keep its slices 80 % busy.

    Raises PlanError without a demand or without a latency table for a model.
    """
    if not demands:
        raise PlanError("there is no demand to plan for")
    missing = [demand.model for demand in demands if demand.model not in tables]
    if missing:
        raise PlanError(f"no latency table for {', '.join(missing)}; there are {', '.join(sorted(tables))}")
    sizes = [profile.gpcs for profile in slice_profiles(gpu)]
    works = [work(demand, tables[demand.model], sizes, max_batch) for demand in demands]
    busy_gpcs = sum(each.busy_gpcs for each in works)
    count = gpus or max(1, math.ceil(busy_gpcs / PLANNED_UTILISATION / gpu.compute_slices))
    counts = _total_counts(works, count * gpu.compute_slices)
    layouts = sorted(rounded(counts, gpu, count), key=layout_counts, reverse=True)
    served = _Served(works, layouts)
    return Plan(
        gpus=tuple(
            tuple(served.planned(placed.profile.name, placed.placement.start, placed.profile.gpcs) for placed in layout)
            for layout in layouts
        ),
        explanation=_explain(works, counts, served, count * gpu.compute_slices, gpus is None),
    )


def _misfit(layout: Layout, needed: Mapping[int, float], used: set[int], gpu: GpuModel) -> tuple[float, ...]:
    have = layout_counts(layout)
    overshoot = sum(size * max(0.0, count - max(needed.get(size, 0.0), 0.0)) for size, count in have)
    useful = sum(size * count for size, count in have if size in used)
    return (
        round(overshoot, 9),
        gpu.compute_slices - useful,
        *(-size for size, count in reversed(have) for _ in range(count)),
    )


def _total_counts(works: Sequence[Work], gpcs: int) -> dict[int, float]:
    """Step 4 for each model with its budget of GPCs, added up."""
    total: Counter[int] = Counter()
    all_work = sum(each.busy_gpcs for each in works)
    for each in works:
        total.update(real_counts(each.busy_ms, gpcs * each.busy_gpcs / all_work))
    return dict(total)


class _Served:
    """Who serves what, once the slices are whole: a segment whose size got no slice goes to the next larger one."""

    def __init__(self, works: Sequence[Work], layouts: Sequence[Layout]) -> None:
        self._works = works
        self.slices = Counter(placed.profile.gpcs for layout in layouts for placed in layout)
        self.queries = [{size: self._queries(each, size) for size in self.slices} for each in works]
        self.busy = [{size: self._busy(each, size) for size in self.slices} for each in works]

    def planned(self, mig_profile: str, start: int, gpcs: int) -> PlannedSlice:
        """Every slice may serve every model, since ELSA looks at all of them; shares say who is meant to come."""
        shares = []
        for each, queries, busy in zip(self._works, self.queries, self.busy, strict=True):
            count = self.slices[gpcs]
            shares.append(ModelShare(each.demand.model, each.knees[gpcs], 1, queries[gpcs] / count, busy[gpcs] / count))
        return PlannedSlice(mig_profile, start, gpcs, tuple(shares))

    def _goes_to(self, size: int) -> int:
        return min((there for there in self.slices if there >= size), default=max(self.slices))

    def _parts(self, each: Work, size: int) -> list[tuple[int, float]]:
        """(items, share of queries) that slices of this size are meant for."""
        return [
            (items, share)
            for items, share in each.demand.items.items()
            for home, segment in each.segments.items()
            if items in segment and self._goes_to(home) == size
        ]

    def _queries(self, each: Work, size: int) -> float:
        return each.demand.rate_per_s * sum(share for _, share in self._parts(each, size))

    def _busy(self, each: Work, size: int) -> float:
        """Slices of this size kept busy by the model."""
        times = each.times_ms[size]
        return each.demand.rate_per_s * sum(share * times[items - 1] for items, share in self._parts(each, size)) / 1e3


def _explain(
    works: Sequence[Work], counts: Mapping[int, float], served: _Served, gpcs: int, chosen: bool
) -> tuple[str, ...]:
    lines = [
        f"PARIS asks for {_sizes(counts)} on {gpcs} GPCs"
        + (f", the fewest GPUs on which its work takes at most {PLANNED_UTILISATION:.0%} of them" if chosen else "")
        + f"; rounded to whole slices on whole GPUs: {_sizes(served.slices)}."
    ]
    for size in sorted(served.slices):
        load = sum(busy[size] for busy in served.busy) / served.slices[size]
        lines.append(f"Slices of {size} GPCs are {load:.0%} busy{' - more than they can do' if load >= 1 else ''}.")
    for each in works:
        knees = "/".join(str(each.knees[size]) for size in sorted(each.knees))
        sizes = "/".join(str(size) for size in sorted(each.knees))
        lines.append(
            f"{each.demand.model}: knees {knees} on {sizes} GPCs, {each.demand.items_per_query:.3g} items per query, "
            f"{each.busy_gpcs:.3g} GPCs of work."
        )
    return tuple(lines)


def _sizes(counts: Mapping[int, float]) -> str:
    return " + ".join(f"{count:.3g} x {size}g" for size, count in sorted(counts.items(), reverse=True) if count > 1e-9)
