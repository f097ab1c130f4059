"""Which layout a table leads to, and what that layout is worth by another table. For `benchmarks.predictor`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from partitioner import capacity, gangs, latency
from partitioner.capacity import Capacities
from partitioner.catalog import GPU_MODELS
from partitioner.cuts import layout_counts, slice_profiles
from partitioner.geometry import GpuModel
from partitioner.latency import Measurement
from partitioner.performance import Point
from partitioner.plans import ModelDemand
from partitioner.programme import InfeasibleError, Programme

Times = dict[Point, float]


def gpu_of(name: str) -> GpuModel:
    return GPU_MODELS.get(name, GPU_MODELS["A100-80GB"])


def slo_ms(truth: Times, factor: float) -> float:
    """As W-paper has it: so many times the largest batch up to 32 on the largest slice, alone in it."""
    largest = max(point.gpcs for point in truth)
    alone = {point.batch: ms for point, ms in truth.items() if (point.gpcs, point.processes) == (largest, 1)}
    return factor * alone[max((batch for batch in alone if batch <= 32), default=min(alone))]


def can(
    tables: Mapping[str, Times], slos_ms: Mapping[str, float], rates: Mapping[str, float], gpu: GpuModel
) -> Capacities:
    """What slices can do by these tables, batches within the SLO."""
    rows = [_row(model, point, ms) for model, times in tables.items() for point, ms in times.items()]
    classes = capacity.query_classes([ModelDemand(model, rates[model], slos_ms[model]) for model in tables])
    sizes = [profile.gpcs for profile in slice_profiles(gpu)]
    return capacity.capacities(classes, gangs.gang_tables(rows), sizes, 99, 1.0)


def _row(model: str, point: Point, ms: float) -> Measurement:
    return Measurement(model, point.mig_profile, point.gpcs, point.batch, point.processes, ms, seq_len=point.seq_len)


def headroom(slices: Mapping[int, int], possible: Capacities) -> float:
    """The factor by which all rates could grow on this layout: `slices` by GPCs, their time divided at will."""
    programme = Programme()
    factor = programme.variable(cost=-1.0)
    times = {(each, gpcs): programme.variable() for each in possible.classes for gpcs in slices}
    for gpcs, count in slices.items():
        programme.constrain({times[each, gpcs]: 1.0 for each in possible.classes}, high=count)
    for each in possible.classes:
        served = {times[each, gpcs]: possible.rate_per_s(each, gpcs) for gpcs in slices}
        programme.constrain({**served, factor: -each.rate_per_s}, low=0.0)
    return programme.solve()[factor]


def best_layout(possible: Capacities, gpu: GpuModel, gpus: int) -> dict[int, int]:
    """Slices by GPCs of the layouts with the most headroom."""
    found: dict[int, int] = {}
    for layout, count in capacity.most_headroom(possible, gpu, gpus).layouts:
        for gpcs, slices in layout_counts(layout):
            found[gpcs] = found.get(gpcs, 0) + round(count) * slices
    return found


def lost(tables: Mapping[str, Times], truth: Mapping[str, Times], factor: float, gpu: GpuModel, gpus: int) -> float:
    """The share of throughput within the SLO that the layout chosen from `tables` loses to the one from `truth`.

    Several models have rates such that each alone would take as much of a GPU. 0 where no layout can serve them.
    """
    slos_ms = {model: slo_ms(times, factor) for model, times in truth.items()}
    rates = dict.fromkeys(truth, 1.0)
    for model in truth:
        alone = can({model: truth[model]}, slos_ms, rates, gpu)
        if not alone.gangs:
            return 0.0
        rates[model] = max(alone.rate_per_s(alone.classes[0], size) / size for _, size in alone.gangs)
    real = can(truth, slos_ms, rates, gpu)
    try:
        best = headroom(best_layout(real, gpu, gpus), real)
        return 1 - headroom(best_layout(can(tables, slos_ms, rates, gpu), gpu, gpus), real) / best
    except InfeasibleError:
        return 0.0


def trusted(truth: Times) -> Times:
    """Without what `latency.without_suspects` leaves out, and without times copied from fewer processes.

    Copied: to the last digit the time of the same batch in fewer processes, though it is the work that takes the time
    (it is twice that of the slice's quickest batch).
    """
    rows = {_row("model", point, ms): point for point, ms in truth.items()}
    kept, _ = latency.without_suspects(rows)
    quickest: dict[str, float] = {}
    for point, ms in truth.items():
        quickest[point.mig_profile] = min(ms, quickest.get(point.mig_profile, ms))

    def copied(point: Point) -> bool:
        ms = truth[point]
        fewer = [truth.get(point._replace(processes=count), 0.0) for count in range(1, point.processes)]
        return ms > 2 * quickest[point.mig_profile] and any(math.isclose(ms, other, rel_tol=1e-6) for other in fewer)

    return {rows[each]: truth[rows[each]] for each in kept if not copied(rows[each])}


def alone(times: Times) -> Times:
    """As the planner sees a table: of the length with the most points, one MIG profile a number of GPCs."""
    profiles: dict[int, str] = {}
    for point in sorted(times, key=lambda each: (each.gpcs, gangs.slice_memory_mib(each.mig_profile))):
        profiles.setdefault(point.gpcs, point.mig_profile)
    times = {point: ms for point, ms in times.items() if profiles[point.gpcs] == point.mig_profile}
    lengths = [point.seq_len for point in times]
    common = max(set(lengths), key=lambda length: (lengths.count(length), length or 0))
    return {point: ms for point, ms in times.items() if point.seq_len == common}
