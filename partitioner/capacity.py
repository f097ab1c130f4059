"""What a slice can do for a class of queries, and the programme over layouts that all planning rests on. Pure.

A class is the queries of one model that carry the same number of items. Its capacity on a slice size is the rate of the
best gang that was measured there and ends within a share of the SLO; bursts take something off it.

The programme: y[l] GPUs are cut by layout l; x[c, s] slices of size s (fractions allowed) work for class c;
    sum over c of x[c, s] <= sum over l of y[l] * slices(l, s)          for each size s
    sum over s of x[c, s] * capacity(c, s) >= factor * rate(c)          for each class c
Models that are kept apart own n[m, s] whole slices, which bound their classes' x. Either the sum of y is the least
for factor 1, or the sum of y is given and the factor, the headroom, is the most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from partitioner.cuts import cuts, layout_counts
from partitioner.gangs import Gang, GangTable
from partitioner.geometry import GpuModel, Layout
from partitioner.plans import ModelDemand
from partitioner.programme import Programme

# One query in so many may wait longer than its SLO leaves time for. Spread over several slices, queries wait less than
# the formula for one says: simulations of random demands allow up to MOST_SLICES times as many in it (ours).
ONE_IN, MOST_SLICES = 125, 5
# A batch may take so much longer than its table says.
GUARD = 1.1


@dataclass(frozen=True, slots=True)
class QueryClass:
    """Queries of one model with so many items each.

    `burst_s`: how much they come in bursts, see `burst_s`; 0 plans for a steady stream.
    """

    model: str
    items: int
    rate_per_s: float
    slo_ms: float
    burst_s: float = 0.0

    def served_per_s(self, gang: Gang) -> float:
        """The rate that a slice's whole time with this gang is worth, with what bursts need taken off.

        Poisson queries that find work done at a steady rate c wait longer than w with a probability of about
        exp(-2 w c (c - rate) / (rate v)), the diffusion approximation of M/G/1. So the least c for a small one, p,
        is rate * (1 + sqrt(1 + 4 ln(1 / p) burst_s / w)) / 2. The w is what the SLO leaves beside the gang itself and
        the wait for a slice to be free: the gang's time again, divided by the slices that the class keeps busy.
        """
        steady_per_s = gang.queries_per_s(self.items)
        if not self.burst_s or not steady_per_s:
            return steady_per_s
        wait_s = (self.slo_ms - gang.latency_ms - self.until_free_ms(gang)) / 1e3
        if wait_s <= 0:
            return 0.0
        rarely = math.log(ONE_IN / min(self._slices(gang), MOST_SLICES))
        return 2 * steady_per_s / (1 + math.sqrt(1 + 4 * rarely * self.burst_s / wait_s))

    def _slices(self, gang: Gang) -> float:
        """How many the class keeps busy."""
        return max(1.0, self.rate_per_s / gang.queries_per_s(self.items))

    def until_free_ms(self, gang: Gang) -> float:
        """How long a query that comes in a burst waits at most for a slice of the class to be free."""
        return gang.latency_ms / self._slices(gang) if self.burst_s else 0.0

    def least_slo_ms(self, gang: Gang, slo_share: float) -> float:
        """The SLO above which the gang can serve the class, its batch taking at most `slo_share` of it."""
        queries = gang.processes * (gang.batch // self.items)
        fill_ms = 1e3 * queries / self.rate_per_s + GUARD * gang.latency_ms if self.burst_s and queries > 1 else 0.0
        return max(gang.latency_ms / slo_share, gang.latency_ms + self.until_free_ms(gang), fill_ms)

    def fills(self, gang: Gang) -> bool:
        """Whether so many queries come together within what the gang leaves of the SLO; always, without bursts."""
        queries = gang.processes * (gang.batch // self.items)
        left_s = (self.slo_ms - GUARD * gang.latency_ms) / 1e3
        return not self.burst_s or queries <= 1 or queries <= self.rate_per_s * left_s


def burst_s(demand: ModelDemand) -> float:
    """v / (2 rate), with v the mean square of items per query by the square of the mean."""
    square = sum(share * items**2 for items, share in demand.items.items())
    return square / demand.items_per_query**2 / (2 * demand.rate_per_s)


@dataclass(frozen=True, slots=True)
class Capacities:
    """Best gangs by (class, slice size); no entry: cannot serve."""

    classes: tuple[QueryClass, ...]
    gangs: Mapping[tuple[QueryClass, int], Gang]

    def rate_per_s(self, query_class: QueryClass, gpcs: int) -> float:
        """Queries per second that a slice's whole time is worth."""
        gang = self.gangs.get((query_class, gpcs))
        return query_class.served_per_s(gang) if gang else 0.0


@dataclass(frozen=True, slots=True)
class Allotment:
    """A solution: how many GPUs are cut by each layout, slices' time by (class, size), whole slices by (model, size).

    `headroom`: the factor by which every rate could grow.
    """

    layouts: tuple[tuple[Layout, float], ...]
    time: Mapping[tuple[QueryClass, int], float]
    whole: Mapping[tuple[str, int], int]
    headroom: float

    @property
    def gpus(self) -> float:
        return sum(count for _, count in self.layouts)


def query_classes(demands: Sequence[ModelDemand], *, bursts: bool = False) -> tuple[QueryClass, ...]:
    """The demand, by model and number of items; with `bursts` planned for, or as a steady stream."""
    return tuple(
        QueryClass(demand.model, items, demand.rate_per_s * share, demand.slo_ms, burst_s(demand) if bursts else 0.0)
        for demand in demands
        for items, share in sorted(demand.items.items())
        if share > 0
    )


def capacities(
    classes: Sequence[QueryClass],
    tables: Mapping[str, GangTable],
    sizes: Sequence[int],
    max_processes: int,
    slo_share: float,
) -> Capacities:
    """The best gang of each class on each size whose batch takes at most `slo_share` of the SLO."""
    gangs = {}
    for each in classes:
        for gpcs in sizes:
            fitting = gangs_within(tables[each.model], each, gpcs, max_processes, slo_share * each.slo_ms)
            if fitting:
                gangs[each, gpcs] = fitting[0]
    return Capacities(tuple(classes), gangs)


def gangs_within(
    table: GangTable, query_class: QueryClass, gpcs: int, max_processes: int, limit_ms: float
) -> list[Gang]:
    """Gangs that fill and take at most `limit_ms`: the highest rate first, then fewer processes, smaller batches."""
    fitting = [
        gang
        for gang in table.fitting(gpcs, max_processes, query_class.items)
        if gang.latency_ms <= limit_ms and query_class.served_per_s(gang) > 0 and query_class.fills(gang)
    ]
    return sorted(fitting, key=lambda gang: (-query_class.served_per_s(gang), gang.processes, gang.batch))


def fluid_bound(capacities: Capacities, gpu: GpuModel) -> float:
    """GPUs needed where GPUs, slices and their time may be divided at will. Raises InfeasibleError."""
    return _Builder(capacities, gpu, apart=(), fluid=True).fewest().gpus


def fewest_gpus(capacities: Capacities, gpu: GpuModel, apart: Collection[str] = ()) -> Allotment:
    """The least whole GPUs that serve every class; models `apart` get whole slices. Raises InfeasibleError."""
    return _Builder(capacities, gpu, apart=apart, fluid=False).fewest()


def most_headroom(capacities: Capacities, gpu: GpuModel, gpus: int, apart: Collection[str] = ()) -> Allotment:
    """The layouts of `gpus` GPUs under which all rates can grow the most; models `apart` get whole slices.

    Raises InfeasibleError.
    """
    return _Builder(capacities, gpu, apart=apart, fluid=False).headroom(gpus)


class _Builder:
    """The programme; models `apart` get whole slices, `fluid` divides GPUs."""

    def __init__(self, capacities: Capacities, gpu: GpuModel, *, apart: Collection[str], fluid: bool) -> None:
        self._capacities = capacities
        self._cuts = cuts(gpu)
        self._sizes = sorted({gpcs for layout in self._cuts for gpcs, _ in layout_counts(layout)})
        self._apart = apart
        self._fluid = fluid
        self._programme = Programme()

    def fewest(self) -> Allotment:
        self._variables(gpu_cost=1.0)
        for each in self._capacities.classes:
            self._programme.constrain(self._served(each), low=each.rate_per_s)
        return self._solve(None)

    def headroom(self, gpus: int) -> Allotment:
        self._variables(gpu_cost=0.0)
        factor = self._programme.variable(cost=-1.0)
        self._programme.constrain(dict.fromkeys(self._gpus, 1.0), low=gpus, high=gpus)
        for each in self._capacities.classes:
            self._programme.constrain({**self._served(each), factor: -each.rate_per_s}, low=0.0)
        return self._solve(factor)

    def _variables(self, gpu_cost: float) -> None:
        programme = self._programme
        self._gpus = [programme.variable(gpu_cost, integer=not self._fluid) for _ in self._cuts]
        # A class that is its model's only one uses all that the model has: one variable is enough.
        models = Counter(each.model for each in self._capacities.classes)
        alone = {model for model in self._apart if models[model] == 1}
        self._time = {
            (each, gpcs): programme.variable(integer=each.model in alone) for each, gpcs in self._capacities.gangs
        }
        self._whole = {(each.model, gpcs): time for (each, gpcs), time in self._time.items() if each.model in alone}
        several = {(each.model, gpcs) for each, gpcs in self._time if each.model in self._apart} - self._whole.keys()
        for model, gpcs in sorted(several):
            whole = self._whole[model, gpcs] = programme.variable(integer=True)
            used = {time: 1.0 for (each, size), time in self._time.items() if (each.model, size) == (model, gpcs)}
            programme.constrain({**used, whole: -1.0}, high=0.0)
        for gpcs in self._sizes:
            self._fit(gpcs)

    def _fit(self, gpcs: int) -> None:
        """What is taken of a slice size is there."""
        taken = [variable for (_, size), variable in self._whole.items() if size == gpcs]
        taken += [time for (each, size), time in self._time.items() if size == gpcs and each.model not in self._apart]
        there = [dict(layout_counts(layout)).get(gpcs, 0) for layout in self._cuts]
        terms = dict.fromkeys(taken, 1.0)
        terms |= {gpus: -float(count) for gpus, count in zip(self._gpus, there, strict=True) if count}
        self._programme.constrain(terms, high=0.0)

    def _served(self, query_class: QueryClass) -> dict[int, float]:
        return {
            variable: self._capacities.rate_per_s(each, gpcs)
            for (each, gpcs), variable in self._time.items()
            if each == query_class
        }

    def _solve(self, factor: int | None) -> Allotment:
        values = self._programme.solve()
        layouts = [(layout, values[gpus]) for layout, gpus in zip(self._cuts, self._gpus, strict=True)]
        return Allotment(
            layouts=tuple((layout, count) for layout, count in layouts if count > 1e-9),
            time={key: values[variable] for key, variable in self._time.items() if values[variable] > 1e-9},
            whole={key: round(values[variable]) for key, variable in self._whole.items() if values[variable] > 0.5},
            headroom=values[factor] if factor is not None else 1.0,
        )
