"""The exact planner: an integer programme over GPU layouts, then slices shared by wrapping. Pure.

Ours, after an exploration on ParvaGPU's scenarios (SC'24). For each number of GPUs, from the fluid bound upwards, and
for each share of the SLO that a batch may take:
 1 a slice is worth less to a model by what keeps its bursts short (`capacity.QueryClass.served_per_s`);
 2 the programme of `capacity.py` finds the layouts with the most headroom;
 3 `sharing.py` says who works on which slice, and how much headroom is left under the rules of sharing;
 4 where that is not enough, the model that its neighbours slow down most gets slices of its own: again from 2;
 5 where that is not enough either, and slices of one model each are known to be, every model gets its own.
The first number of GPUs with a headroom of at least 1 is the plan, with the share that gives the most.

A plan holds if requests are bound late: a queue for each model, and a free slice takes what is most urgent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from partitioner import capacity, explain, sharing
from partitioner.capacity import Allotment, Capacities
from partitioner.cuts import slice_profiles
from partitioner.gangs import GangTable
from partitioner.geometry import GpuModel
from partitioner.plans import ModelDemand, ModelShare, Plan, PlanError, PlannedSlice
from partitioner.programme import InfeasibleError
from partitioner.sharing import Balance, Rules, StaffedSlice

# Shares of the SLO that a batch may take; half of it is the rest of the batch before, waited for in the worst case.
# Slices of one model take longer to plan and gain less from the choice, so they are tried with some of them.
SLO_SHARES = (0.5, 0.45, 0.55, 0.4, 0.35, 0.3)
EXCLUSIVE_SHARES = (0.5, 0.45)
# How often a share of the SLO is tried, each time with one more model on slices of its own.
ATTEMPTS = 12


@dataclass(frozen=True, slots=True)
class Choices:
    """How to plan. `slo_share` None: the planner chooses; `gpus` None: as few as possible.

    `overload`: with GPUs given that are too few, plan for all that they can do instead of refusing.
    """

    max_processes: int = 1
    exclusive: bool = False
    slo_share: float | None = None
    gpus: int | None = None
    overload: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout with its gangs, for one number of GPUs and one share of the SLO."""

    slo_share: float
    gpus: list[list[StaffedSlice]]
    balance: Balance

    @property
    def headroom(self) -> float:
        return self.balance.headroom


def plan(
    demands: Sequence[ModelDemand],
    tables: Mapping[str, GangTable],
    gpu: GpuModel,
    choices: Choices = Choices(),
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """The fewest GPUs that serve `demands`, or the best use of the GPUs given; then the most headroom.

    `tables`: by model. `progress` is told what is being tried. Raises PlanError where nothing can meet the demand.
    """
    _check(demands, tables, gpu, choices)
    search = _Search(demands, tables, gpu, choices, progress)
    found, before = search.fewest() if choices.gpus is None else (search.best(choices.gpus), None)
    if found.headroom < 1 and not choices.overload:
        raise PlanError(search.too_few(found))
    return replace(
        search.as_plan(found),
        bound_gpus=search.bound_gpus(),
        explanation=explain.optimal(search.setting(), found, before),
    )


class _Search:
    """Tries numbers of GPUs and shares of the SLO."""

    def __init__(
        self,
        demands: Sequence[ModelDemand],
        tables: Mapping[str, GangTable],
        gpu: GpuModel,
        choices: Choices,
        progress: Callable[[str], None],
    ) -> None:
        self._demands, self._tables, self._gpu, self._choices = demands, tables, gpu, choices
        self._progress = progress
        self._sizes = [profile.gpcs for profile in slice_profiles(gpu)]
        chosen = EXCLUSIVE_SHARES if choices.exclusive else SLO_SHARES
        self._shares = (choices.slo_share,) if choices.slo_share else chosen
        self._models = frozenset(demand.model for demand in demands)
        self._found_least: dict[float, Allotment] = {}
        possible = {share: self._capacities(share) for share in self._shares}
        # A share under which some class cannot be served at all is no choice.
        self._capacities_of = {
            share: found
            for share, found in possible.items()
            if all(any((each, gpcs) in found.gangs for gpcs in self._sizes) for each in found.classes)
        }
        if not self._capacities_of:
            largest = max(self._shares)
            raise PlanError(explain.unreachable(self.setting(), possible[largest], largest))

    def setting(self) -> explain.Setting:
        return explain.Setting(
            self._demands, self._tables, self._gpu, self._choices.max_processes, self._choices.exclusive
        )

    def bound_gpus(self) -> float:
        """The fluid bound, with the whole SLO for a batch unless its share is fixed."""
        classes = capacity.query_classes(self._demands)
        share = self._choices.slo_share or 1.0
        found = capacity.capacities(classes, self._tables, self._sizes, self._choices.max_processes, share)
        return capacity.fluid_bound(found, self._gpu)

    def fewest(self) -> tuple[Candidate, Candidate | None]:
        """The least number of GPUs with enough headroom; and the best there is with one GPU less."""
        gpus = max(1, math.ceil(min(self._least_gpus(share) for share in self._capacities_of) - 1e-6))
        before = None
        while True:
            found = self.best(gpus)
            if found.headroom >= 1:
                return found, before
            before, gpus = found, gpus + 1

    def best(self, gpus: int) -> Candidate:
        """The candidate with the most headroom on so many GPUs."""
        found = []
        for share in self._capacities_of:
            self._progress(f"{gpus} GPU{'s' if gpus > 1 else ''}, batches within {share:.0%} of the SLO")
            found.append(self._candidate(gpus, share))
        return max(found, key=lambda each: each.headroom)

    def as_plan(self, found: Candidate) -> Plan:
        indices = itertools.count()
        return Plan(tuple(tuple(_planned(each, next(indices), found.balance) for each in gpu) for gpu in found.gpus))

    def too_few(self, found: Candidate) -> str:
        enough, _ = self.fewest()
        return explain.too_few(self.setting(), found, len(enough.gpus))

    def _least_gpus(self, share: float) -> float:
        if self._choices.exclusive:
            return self._least(share).gpus
        return capacity.fluid_bound(self._capacities_of[share], self._gpu)

    def _least(self, share: float) -> Allotment:
        """The fewest GPUs with exclusive slices."""
        if share not in self._found_least:
            self._found_least[share] = capacity.fewest_gpus(self._capacities_of[share], self._gpu, self._models)
        return self._found_least[share]

    def _candidate(self, gpus: int, share: float) -> Candidate:
        apart = self._models if self._choices.exclusive else frozenset()
        best, suffers = self._attempt(gpus, share, apart)
        for _ in range(ATTEMPTS - 1):
            if best.headroom >= 1 or suffers is None:
                break
            apart |= {suffers}
            found, suffers = self._attempt(gpus, share, apart)
            best = max(best, found, key=lambda each: each.headroom)
        # An exclusive plan keeps every rule of sharing, so sharing never takes more GPUs than it.
        if best.headroom < 1 and apart != self._models and self._least(share).gpus <= gpus + 1e-6:
            found, _ = self._attempt(gpus, share, self._models)
            best = max(best, found, key=lambda each: each.headroom)
        return best

    def _attempt(self, gpus: int, share: float, apart: frozenset[str]) -> tuple[Candidate, str | None]:
        """A candidate, and the model that suffers most from its neighbours, if any does."""
        possible = self._capacities_of[share]
        try:
            allotment = capacity.most_headroom(possible, self._gpu, gpus, apart)
        except InfeasibleError:
            return Candidate(share, [], Balance({}, 0.0)), None
        if allotment.headroom < 1 and apart == self._models:
            # The search for the most headroom may give up early; what is known to be enough is not given away.
            least = self._least(share)
            allotment = least if round(least.gpus) == gpus else allotment
        staffed = sharing.staffed(allotment, Rules(self._tables, self._choices.max_processes, share))
        slices = [each for gpu in staffed for each in gpu]
        found = Candidate(share, staffed, sharing.balance(slices, possible.classes))
        model, lost = _suffers(slices, possible)
        # Where even undisturbed slices would not do, neighbours are to blame only for a model that is left with none.
        blamed = lost > 1e-9 and (allotment.headroom >= 1 or lost > 1 - 1e-9) and model not in apart
        return found, model if blamed else None

    def _capacities(self, share: float) -> Capacities:
        # As published, an exclusive plan with a fixed share of the SLO leaves bursts to the rest of it.
        bursts = not (self._choices.exclusive and self._choices.slo_share)
        classes = capacity.query_classes(self._demands, bursts=bursts)
        return capacity.capacities(classes, self._tables, self._sizes, self._choices.max_processes, share)


def _suffers(slices: Sequence[StaffedSlice], possible: Capacities) -> tuple[str, float]:
    """The model that its neighbours slow down most, and the share of its work that they cost it."""
    lost: dict[str, float] = {}
    for each in possible.classes:
        meant = done = 0.0
        for one in slices:
            work = one.meant.get(each, 0.0) * possible.rate_per_s(each, one.placed.profile.gpcs)
            meant += work
            if each in one.gangs:
                done += one.meant[each] * each.served_per_s(one.gangs[each])
        lost[each.model] = max(lost.get(each.model, 0.0), 1 - done / meant if meant else 0.0)
    return max(lost.items(), key=lambda pair: pair[1])


def _planned(staffed: StaffedSlice, index: int, balance: Balance) -> PlannedSlice:
    """Classes of one model become one share, with the largest batch that any of them needs."""
    shares: dict[str, ModelShare] = {}
    for each, gang in sorted(staffed.gangs.items(), key=lambda pair: (pair[0].model, pair[0].items)):
        rate = balance.portions.get((index, each), 0.0) * each.rate_per_s
        if not rate:
            continue
        before = shares.get(each.model, ModelShare(each.model, 0, 0, 0.0, 0.0))
        shares[each.model] = ModelShare(
            each.model,
            max(before.batch, gang.batch),
            max(before.processes, gang.processes),
            before.rate_per_s + rate,
            before.share + rate / gang.queries_per_s(each.items),
        )
    profile = staffed.placed.profile
    return PlannedSlice(profile.name, staffed.placed.placement.start, profile.gpcs, tuple(shares.values()))


def _check(demands: Sequence[ModelDemand], tables: Mapping[str, GangTable], gpu: GpuModel, choices: Choices) -> None:
    if not demands:
        raise PlanError("there is no demand to plan for")
    missing = [demand.model for demand in demands if demand.model not in tables]
    if missing:
        raise PlanError(f"no latency table for {', '.join(missing)}; there are {', '.join(sorted(tables))}")
    if choices.gpus is not None and choices.gpus < 1:
        raise PlanError(f"a plan needs at least one GPU, not {choices.gpus}")
    if choices.max_processes < 1:
        raise PlanError(f"a model needs at least one process, not {choices.max_processes}")
    if choices.slo_share is not None and not 0 < choices.slo_share < 1:
        raise PlanError(f"a batch may take a share of the SLO between 0 and 1, not {choices.slo_share:g}")
