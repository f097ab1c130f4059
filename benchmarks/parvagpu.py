"""ParvaGPU's published rule (Lee and others, SC'24, arXiv 2409.14447, and its artifact): a baseline for planners.

What we took from them, in our own code:
1. Of every model the triplet (slice size, batch, processes) with the highest throughput per GPC among those whose
   latency is below 0.45 of the SLO; and the same for each slice size by itself.
2. As many such segments as the rate fills, and for the rest one segment of the smallest size that covers it.
3. Segments are placed from the largest to the smallest, on the GPU where the fewest GPCs stay free. A GPU takes one 3g.
4. GPUs that are used by four GPCs or less are emptied, the last first: each segment becomes 2g and 1g segments of the
   same throughput, which are placed as in 3.
The artifact's header says up to 3 processes, its published deployments use up to 5. Where its step 4 would lose a
segment (a model that can have neither 2g nor 1g), the segment stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from partitioner.gangs import GangTable
from partitioner.plans import ModelDemand

SLO_SHARE, SIZES, GPCS = 0.45, (1, 2, 3, 4, 7), 7
LIGHT_GPCS = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """A slice for one model, and what it serves in items per second."""

    model: str
    gpcs: int
    rate_per_s: float


@dataclass(slots=True)
class Gpu:
    segments: list[Segment] = field(default_factory=list)

    @property
    def used(self) -> int:
        return sum(segment.gpcs for segment in self.segments)

    def takes(self, gpcs: int) -> bool:
        return self.used + gpcs <= GPCS and not (gpcs == 3 and any(segment.gpcs == 3 for segment in self.segments))


def gpus_needed(demands: Sequence[ModelDemand], tables: Mapping[str, GangTable], max_processes: int) -> int:
    """GPUs that the rule takes. Raises ValueError where a model has no gang within its limit."""
    best = {demand.model: best_by_size(demand, tables[demand.model], max_processes) for demand in demands}
    segments = [segment for demand in demands for segment in matched(demand, best[demand.model])]
    gpus: list[Gpu] = []
    _place(segments, gpus)
    _optimise(gpus, best)
    return sum(bool(gpu.segments) for gpu in gpus)


def best_by_size(demand: ModelDemand, table: GangTable, max_processes: int) -> dict[int, float]:
    """Step 1: the highest throughput of each size that has any."""
    best = {}
    for gpcs in SIZES:
        limit_ms = SLO_SHARE * demand.slo_ms
        rates = [gang.items_per_s for gang in table.gangs(gpcs, max_processes) if gang.latency_ms < limit_ms]
        if rates:
            best[gpcs] = max(rates)
    if not best:
        raise ValueError(f"{demand.model} cannot meet its SLO")
    return best


def matched(demand: ModelDemand, best: Mapping[int, float]) -> list[Segment]:
    """Step 2."""
    optimal = max(best, key=lambda gpcs: best[gpcs] / gpcs)
    count = math.ceil(demand.rate_per_s / best[optimal]) - 1
    rest = demand.rate_per_s - count * best[optimal]
    last = next(gpcs for gpcs in SIZES if best.get(gpcs, 0.0) >= rest)
    return [Segment(demand.model, gpcs, best[gpcs]) for gpcs in [optimal] * count + [last]]


def _place(segments: Sequence[Segment], gpus: list[Gpu]) -> None:
    """Step 3."""
    for segment in sorted(segments, key=lambda each: -each.gpcs):
        fitting = [gpu for gpu in gpus if gpu.takes(segment.gpcs)]
        if not fitting:
            fitting = [Gpu()]
            gpus += fitting
        max(fitting, key=lambda gpu: gpu.used).segments.append(segment)


def _optimise(gpus: list[Gpu], best: Mapping[str, Mapping[int, float]]) -> None:
    """Step 4. What a model's segments serve above its need is carried to its next one."""
    owed: dict[str, float] = {}
    for gpu in reversed(gpus):
        if gpu.used > LIGHT_GPCS:
            continue
        for segment in list(gpu.segments):
            sizes = best[segment.model]
            if 1 not in sizes and 2 not in sizes:
                continue
            gpu.segments.remove(segment)
            need = owed.get(segment.model, 0.0) + segment.rate_per_s
            smaller = _split(segment.model, need, sizes)
            owed[segment.model] = need - sum(each.rate_per_s for each in smaller)
            _place(smaller, gpus)


def _split(model: str, rate_per_s: float, best: Mapping[int, float]) -> list[Segment]:
    """2g segments where two 1g would do less, and 1g segments for the rest; only 2g where it can have no 1g."""
    one, two = best.get(1, 0.0), best.get(2, 0.0)
    if not one:
        counts = {2: math.ceil(rate_per_s / two)}
    else:
        twos = math.floor(rate_per_s / two) if two / 2 > one else 0
        counts = {2: twos, 1: math.ceil((rate_per_s - twos * two) / one)}
    return [Segment(model, gpcs, best[gpcs]) for gpcs, count in counts.items() for _ in range(max(count, 0))]
