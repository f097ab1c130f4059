"""Who works on which slice: slices' time, as the programme gave it, becomes lists of classes for each slice. Pure.

Wrapping: the times of all classes on slices of one size are laid end to end, longest SLO first, and cut at every whole
number. So a slice serves few models, mostly one, and neighbours have similar SLOs. Then every class gets the best gang
that its slice allows: within a share of its own SLO, within a share of the shortest SLO beside it (so that nobody
blocks the slice for too long), and within the slice's memory: all processes' weights, and the working memory of one
gang. A last programme, over these slices alone, says who serves how much, and how much headroom there really is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from partitioner.capacity import Allotment, QueryClass, gangs_within
from partitioner.gangs import Gang, GangTable
from partitioner.geometry import PlacedProfile
from partitioner.programme import Programme

# A gang on a shared slice takes at most this share of the shortest SLO there.
BLOCKING_SHARE = 0.5
# Less than this portion of a class's queries is not worth its processes.
LEAST_PORTION = 1e-3
# A class that would have less than this share of a slice's time is left out there.
LEAST_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Rules:
    """What a batch may take: `slo_share` of the SLO, `max_processes` side by side."""

    tables: Mapping[str, GangTable]
    max_processes: int
    slo_share: float

    def limit_ms(self, query_class: QueryClass, beside: Sequence[QueryClass]) -> float:
        """The longest batch of this class on a slice with those."""
        others = [each.slo_ms for each in beside if each.model != query_class.model]
        blocking = BLOCKING_SHARE * min(others) if others else float("inf")
        return min(self.slo_share * query_class.slo_ms, blocking)

    def gangs(self, query_class: QueryClass, gpcs: int, limit_ms: float) -> list[Gang]:
        """Gangs within the limit, the fastest first, each following one with less memory than all before."""
        table = self.tables[query_class.model]
        fitting = gangs_within(table, query_class, gpcs, self.max_processes, limit_ms)
        lighter: list[Gang] = []
        for gang in fitting:
            if not lighter or self.memory_mib(query_class, gang) < self.memory_mib(query_class, lighter[-1]):
                lighter.append(gang)
        return lighter

    def memory_mib(self, query_class: QueryClass, gang: Gang) -> float:
        """Weights and working memory, while it runs."""
        return self.tables[query_class.model].memory_mib(gang.batch, gang.processes)

    def idle_mib(self, query_class: QueryClass, gang: Gang) -> float:
        """What its processes keep when they have nothing to do: no more than with the smallest batches."""
        return self.tables[query_class.model].memory_mib(1, gang.processes)


@dataclass(frozen=True, slots=True)
class StaffedSlice:
    """A slice and the gangs that work on it, by class.

    `meant`: the share of its time that was meant for each class, also for those that can do nothing here.
    """

    placed: PlacedProfile
    gangs: Mapping[QueryClass, Gang]
    meant: Mapping[QueryClass, float]


def staffed(allotment: Allotment, rules: Rules) -> list[list[StaffedSlice]]:
    """Every GPU's slices with their gangs, GPUs and slices in the order of the allotment's layouts."""
    layouts = [layout for layout, count in allotment.layouts for _ in range(round(count))]
    counts = Counter(placed.profile.gpcs for layout in layouts for placed in layout)
    waiting = {gpcs: iter(_classes(allotment, gpcs, count)) for gpcs, count in counts.items()}
    return [[_staffed(placed, next(waiting[placed.profile.gpcs]), rules) for placed in layout] for layout in layouts]


def _staffed(placed: PlacedProfile, meant: Mapping[QueryClass, float], rules: Rules) -> StaffedSlice:
    return StaffedSlice(placed, _gangs(list(meant), placed, rules), meant)


def _classes(allotment: Allotment, gpcs: int, count: int) -> list[dict[QueryClass, float]]:
    """Classes of each slice of a size: first the whole slices of models that are kept apart, then the shared ones."""
    found: list[dict[QueryClass, float]] = []
    for (model, size), slices in sorted(allotment.whole.items()):
        if size == gpcs:
            there = [(each, time) for (each, at), time in allotment.time.items() if at == gpcs and each.model == model]
            found += [{each: time / slices for each, time in there}] * slices
    apart = {model for model, _ in allotment.whole}
    times = [(each, time) for (each, size), time in allotment.time.items() if size == gpcs and each.model not in apart]
    return found + _wrapped(times, count - len(found))


def _wrapped(times: list[tuple[QueryClass, float]], count: int) -> list[dict[QueryClass, float]]:
    """Times end to end, stretched over `count` slices, cut at whole numbers."""
    found: list[dict[QueryClass, float]] = [{} for _ in range(count)]
    total = sum(time for _, time in times)
    at = 0.0
    for each, time in sorted(times, key=lambda pair: (-pair[0].slo_ms, pair[0].model, pair[0].items)):
        end = at + time * count / total
        for index in range(int(at), min(int(end) + 1, count)):
            share = min(end, index + 1) - max(at, index)
            if share >= LEAST_SHARE:
                found[index][each] = share
        at = end
    return found


def _gangs(classes: Sequence[QueryClass], placed: PlacedProfile, rules: Rules) -> dict[QueryClass, Gang]:
    """The best gang of each class on this slice; while they need too much memory, the cheapest step down is taken."""
    gpcs, memory_mib = placed.profile.gpcs, placed.profile.memory_mib
    choices = {each: rules.gangs(each, gpcs, rules.limit_ms(each, classes)) for each in classes}
    choices = {each: gangs for each, gangs in choices.items() if gangs}
    while len({each.model for each in choices}) > 1 and _memory_mib(choices, rules) > memory_mib:
        movable = [each for each, gangs in choices.items() if len(gangs) > 1]
        if movable:
            choices[min(movable, key=lambda each: _loss_per_mib(each, choices[each], rules))].pop(0)
        else:
            del choices[max(choices, key=lambda each: rules.memory_mib(each, choices[each][0]))]
    return {each: gangs[0] for each, gangs in choices.items()}


def _memory_mib(choices: Mapping[QueryClass, Sequence[Gang]], rules: Rules) -> float:
    """What the slice must hold: all models' idle processes, and the one gang that runs in the place of its own."""
    idle: dict[str, float] = {}
    working = 0.0
    for each, gangs in choices.items():
        idle[each.model] = max(idle.get(each.model, 0.0), rules.idle_mib(each, gangs[0]))
    for each, gangs in choices.items():
        working = max(working, rules.memory_mib(each, gangs[0]) - idle[each.model])
    return sum(idle.values()) + working


def _loss_per_mib(query_class: QueryClass, gangs: Sequence[Gang], rules: Rules) -> float:
    """Share of the rate lost with the next lighter gang, for each MiB it saves."""
    now, then = gangs[0], gangs[1]
    lost = 1 - query_class.served_per_s(then) / query_class.served_per_s(now)
    return lost / (rules.memory_mib(query_class, now) - rules.memory_mib(query_class, then))


@dataclass(frozen=True, slots=True)
class Balance:
    """The portion of each class's queries by (index of the slice, class), and the factor all rates could grow by."""

    portions: Mapping[tuple[int, QueryClass], float]
    headroom: float


def balance(slices: Sequence[StaffedSlice], classes: Sequence[QueryClass]) -> Balance:
    """Who serves how much, so that all could grow the most. Raises InfeasibleError."""
    programme = Programme()
    factor = programme.variable(cost=-1.0)
    served: dict[QueryClass, dict[int, float]] = {each: {} for each in classes}
    where: dict[int, tuple[int, QueryClass]] = {}
    for index, each in enumerate(slices):
        times = {programme.variable(): query_class for query_class in each.gangs}
        for time, query_class in times.items():
            served[query_class][time] = query_class.served_per_s(each.gangs[query_class])
            where[time] = index, query_class
        programme.constrain(dict.fromkeys(times, 1.0), high=1.0)
    for query_class, terms in served.items():
        programme.constrain({**terms, factor: -query_class.rate_per_s}, low=0.0)
    values = programme.solve()
    portions = {}
    for terms in served.values():
        total = sum(values[time] * rate for time, rate in terms.items())
        portions.update({where[time]: values[time] * rate / total for time, rate in terms.items() if total > 0})
    return Balance({key: portion for key, portion in portions.items() if portion > LEAST_PORTION}, values[factor])
