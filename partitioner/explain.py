"""The sentences of a plan: why this layout, what binds, what was rejected; and of a demand nothing can meet. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from partitioner import capacity
from partitioner.capacity import Capacities, QueryClass
from partitioner.cuts import slice_profiles
from partitioner.gangs import Gang, GangTable
from partitioner.geometry import GpuModel
from partitioner.plans import ModelDemand
from partitioner.programme import InfeasibleError
from partitioner.sharing import Balance, StaffedSlice


@dataclass(frozen=True, slots=True)
class Setting:
    """What was planned for."""

    demands: Sequence[ModelDemand]
    tables: Mapping[str, GangTable]
    gpu: GpuModel
    max_processes: int
    exclusive: bool

    @property
    def sizes(self) -> list[int]:
        return [profile.gpcs for profile in slice_profiles(self.gpu)]

    def capacities(self, slo_share: float) -> Capacities:
        classes = capacity.query_classes(self.demands)
        return capacity.capacities(classes, self.tables, self.sizes, self.max_processes, slo_share)


class Found(Protocol):
    """A candidate of the search."""

    @property
    def slo_share(self) -> float: ...
    @property
    def gpus(self) -> list[list[StaffedSlice]]: ...
    @property
    def balance(self) -> Balance: ...
    @property
    def headroom(self) -> float: ...


def optimal(setting: Setting, found: Found, before: Found | None) -> tuple[str, ...]:
    """Why the layout of `found`; `before` is the best with one GPU less."""
    lines = [
        f"{_gpus(len(found.gpus))} of {setting.gpu.name}: {_cut(found)}.",
        f"A batch takes at most {found.slo_share:.0%} of its SLO; with what bursts need, every rate could be "
        f"{found.headroom:.3f} times as high.",
    ]
    if before is not None:
        lines.append(
            f"{_gpus(len(found.gpus) - 1)} would not do: only {before.headroom:.1%} of the rates, at best, "
            f"with batches within {before.slo_share:.0%} of the SLO."
        )
    lines += [_binding(setting, found), *_shared(setting, found), *_compared(setting, found)]
    return tuple(lines)


def unreachable(setting: Setting, possible: Capacities, slo_share: float) -> str:
    """The queries whose SLO is furthest out of reach, and the one that is not. `possible`: what was found possible."""
    out = [each for each in possible.classes if not any((each, gpcs) in possible.gangs for gpcs in setting.sizes)]
    quickest = {each: _least_slo(setting, each, slo_share) for each in out}
    binding = max(out, key=lambda each: quickest[each][0] / each.slo_ms)
    least_slo_ms, gpcs, gang = quickest[binding]
    items = f"{binding.items} item{'s' if binding.items > 1 else ''}"
    never = f"no number of {setting.gpu.name} meets this demand: {binding.model}"
    if gang is None:
        return f"{never} was never measured with {items} in a batch; give a latency table that has such rows"
    until_free_ms = binding.until_free_ms(gang)
    wait = f" and up to {until_free_ms:.3g} ms until a slice is free for it," if until_free_ms else ""
    return (
        f"{never} needs at least {gang.latency_ms:.3g} ms for a query of {items} (on {gpcs} GPCs),{wait} and a batch "
        f"may take {slo_share:.0%} of its SLO of {binding.slo_ms:g} ms; an SLO of {math.floor(least_slo_ms) + 1} ms is "
        f"within reach"
    )


def _least_slo(setting: Setting, each: QueryClass, slo_share: float) -> tuple[float, int, Gang | None]:
    """The SLO above which queries can be served, and the size and the gang that can; infinite where none could."""
    found = [
        (each.least_slo_ms(gang, slo_share), gpcs, gang)
        for gpcs in setting.sizes
        for gang in setting.tables[each.model].fitting(gpcs, setting.max_processes, each.items)
        if gang.batch >= each.items
    ]
    return min(found, key=lambda one: one[:2], default=(math.inf, 0, None))


def too_few(setting: Setting, found: Found, enough: int) -> str:
    """The GPUs that were given do not do."""
    count = len(found.gpus)
    model, share = _largest(setting, found.slo_share)
    serves = f"serve {found.headroom:.0%} of this demand at most" if found.headroom else "cannot serve all these models"
    return (
        f"{_gpus(count) if count else 'these GPUs'} of {setting.gpu.name} {serves}; {_gpus(enough)} would do. "
        f"What binds is {model}, which needs {share:.0%} of the GPCs"
    )


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def _cut(found: Found) -> str:
    counts = Counter("+".join(f"{each.placed.profile.gpcs}g" for each in gpu) for gpu in found.gpus)
    return ", ".join(f"{count} x {cut}" for cut, count in counts.most_common())


def _needs(setting: Setting, slo_share: float) -> dict[str, float]:
    """GPCs each model needs where it is cheapest."""
    found = setting.capacities(slo_share)
    needs: dict[str, float] = {}
    for each in found.classes:
        costs = [gpcs / found.rate_per_s(each, gpcs) for gpcs in setting.sizes if (each, gpcs) in found.gangs]
        needs[each.model] = needs.get(each.model, 0.0) + each.rate_per_s * min(costs, default=0.0)
    return needs


def _largest(setting: Setting, slo_share: float) -> tuple[str, float]:
    needs = _needs(setting, slo_share)
    model = max(needs, key=lambda name: needs[name])
    return model, needs[model] / max(sum(needs.values()), 1e-12)


def _binding(setting: Setting, found: Found) -> str:
    needs = _needs(setting, found.slo_share)
    largest = sorted(needs, key=lambda name: -needs[name])[:3]
    parts = ", ".join(f"{name} {needs[name]:.3g}" for name in largest)
    return (
        f"What binds: of {sum(needs.values()):.3g} GPCs of work, each where it is cheapest, the most are for {parts}."
    )


def _shared(setting: Setting, found: Found) -> list[str]:
    slices = [each for gpu in found.gpus for each in gpu]
    models = [len({query_class.model for query_class in each.gangs}) for each in slices]
    shared = [count for count in models if count > 1]
    idle = sum(count == 0 for count in models)
    lines = [f"{idle} of {len(slices)} slices have nothing to do."] if idle else []
    if shared:
        lines.append(
            f"{len(shared)} of {len(slices)} slices serve up to {max(shared)} models in turn. All their processes stay "
            f"in the slice, and one gang at a time has working memory. Where memory was not measured, a process is "
            f"taken to need its part of the smallest slice that so many of them were measured in."
        )
    return lines


def _compared(setting: Setting, found: Found) -> list[str]:
    """What simpler layouts would take, with batches within the same share of the SLO."""
    possible = setting.capacities(found.slo_share)
    models = {each.model for each in possible.classes}
    options = {}
    if not setting.exclusive:
        try:
            options["a slice for one model only"] = capacity.fewest_gpus(possible, setting.gpu, models).gpus
        except InfeasibleError:
            options["a slice for one model only"] = math.inf
    smallest, largest = min(setting.sizes), max(setting.sizes)
    for gpcs, name in ((smallest, f"{smallest}g slices only"), (largest, "whole GPUs, one model each")):
        whole = [_slices_needed(possible, model, gpcs) for model in sorted(models)]
        per_gpu = setting.gpu.compute_slices // gpcs
        options[name] = math.ceil(sum(whole) / per_gpu) if math.inf not in whole else math.inf
    parts = [f"{name} {_gpus(round(count)) if count < math.inf else 'never'}" for name, count in options.items()]
    return [f"For comparison, without any allowance for bursts: {', '.join(parts)}."]


def _slices_needed(possible: Capacities, model: str, gpcs: int) -> float:
    busy = 0.0
    for each in possible.classes:
        if each.model == model:
            rate = possible.rate_per_s(each, gpcs)
            busy += each.rate_per_s / rate if rate else math.inf
    return math.ceil(busy) if busy < math.inf else math.inf
