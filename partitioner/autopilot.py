"""Whether a new layout is worth its change: what it would serve, what the change costs. Pure.

A layout's worth is the share of the queries asked for that its slices can serve within their SLO, if every slice's time
is divided among the models at will (a linear programme; ours). A change pays when what it would serve more, over the
time that it is expected to last, exceeds what is not served while slices are drained and warmed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from partitioner.capacity import Capacities, capacities, most_headroom, query_classes
from partitioner.gangs import Gang, GangTable
from partitioner.geometry import GpuModel, Layout, MigProfile
from partitioner.latency import LatencyTable
from partitioner.paris import plan as paris_plan
from partitioner.plans import ModelDemand
from partitioner.programme import Programme
from partitioner.transition import Transition, arrange, cheapest_assignment, transition

# A batch may take so much of the SLO: the rest is for waiting.
SLO_SHARE = 0.85
# Slices are planned to be busy for at most this share of their time: arrivals come in bursts.
BUSY_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Rules:
    """How eager it is. `min_gain`: share of the queries; `payback`: by how much the gain must exceed the cost.

    `dwell_s`: no change sooner after another; `horizon_s`: how long the traffic is expected to stay as it is;
    `change_s`: what one round of a change takes, as measured so far.
    """

    dwell_s: float = 60.0
    horizon_s: float = 300.0
    min_gain: float = 0.03
    payback: float = 2.0
    change_s: float = 3.0


@dataclass(frozen=True, slots=True)
class Proposal:
    """A layout for every GPU, by its UUID. `served_*`: share of the queries in time; `reason`: why, or why not."""

    layouts: Mapping[str, Layout]
    served_now: float
    served_then: float
    worthwhile: bool
    reason: str


def _tables(models: Mapping[str, LatencyTable]) -> dict[str, GangTable]:
    """What the daemon knows of its models, as the planner reads it: one process a slice."""
    return {
        name: GangTable(
            {
                gpcs: tuple(Gang(batch, 1, ms) for batch, ms in sorted(points.items()))
                for gpcs, points in sorted(table.by_gpcs.items())
            }
        )
        for name, table in models.items()
    }


def propose(
    demands: Sequence[ModelDemand],
    models: Mapping[str, LatencyTable],
    gpu: GpuModel,
    current: Mapping[str, Layout],
    planner: str,
    rules: Rules,
    since_change_s: float,
) -> Proposal:
    """The best layout for this demand, and whether to change to it now. Raises PlanError, InfeasibleError.

    `current`: the GPUs, by UUID, all of one kind; `planner`: `optimal` or `paris`.
    """
    can = slice_capacities(demands, models, gpu)
    targets = _targets(demands, models, gpu, len(current), planner, can)
    layouts, changes = _arranged(current, targets, gpu)
    now, then = served(can, current.values()), served(can, layouts.values())
    worthwhile, reason = _decide(now, then, changes, gpu, rules, since_change_s)
    return Proposal(layouts, now, then, worthwhile, reason)


def served(can: Capacities, layouts: Iterable[Layout]) -> float:
    """The largest share of all queries that these slices can serve in time, 0 to 1."""
    slices = Counter(placed.profile.gpcs for layout in layouts for placed in layout)
    programme = Programme()
    time = {(each, gpcs): programme.variable(-can.rate_per_s(each, gpcs)) for each, gpcs in can.gangs if slices[gpcs]}
    for gpcs, count in slices.items():
        terms = {variable: 1.0 for (_, size), variable in time.items() if size == gpcs}
        programme.constrain(terms, high=BUSY_SHARE * count)
    for each in can.classes:
        terms = {variable: can.rate_per_s(each, gpcs) for (of, gpcs), variable in time.items() if of == each}
        programme.constrain(terms, high=each.rate_per_s)
    values = programme.solve() if time else []
    done = sum(values[variable] * can.rate_per_s(each, gpcs) for (each, gpcs), variable in time.items())
    return min(1.0, done / sum(each.rate_per_s for each in can.classes))


def slice_capacities(demands: Sequence[ModelDemand], models: Mapping[str, LatencyTable], gpu: GpuModel) -> Capacities:
    """What each size of slice can do for each kind of query."""
    sizes = sorted({profile.gpcs for profile in gpu.profiles})
    return capacities(query_classes(demands), _tables(models), sizes, 1, SLO_SHARE)


def _targets(
    demands: Sequence[ModelDemand],
    models: Mapping[str, LatencyTable],
    gpu: GpuModel,
    gpus: int,
    planner: str,
    can: Capacities,
) -> list[list[MigProfile]]:
    if planner == "paris":
        plan = paris_plan(demands, models, gpu, gpus)
        return [[gpu.profile(each.mig_profile) for each in layout] for layout in plan.gpus]
    possible = tuple(each for each in can.classes if any(each == of for of, _ in can.gangs))
    if not possible:
        return []
    allotment = most_headroom(Capacities(possible, can.gangs), gpu, gpus)
    return [[placed.profile for placed in layout] for layout, count in allotment.layouts for _ in range(round(count))]


def _arranged(
    current: Mapping[str, Layout], targets: Sequence[Sequence[MigProfile]], gpu: GpuModel
) -> tuple[dict[str, Layout], dict[str, Transition]]:
    """Which GPU gets which target, and where its slices stand, with the fewest slices touched in all."""
    if len(targets) < len(current):
        return dict(current), {}
    uuids = list(current)
    options = [[arrange(current[uuid], target, gpu) for target in targets] for uuid in uuids]
    costs = [
        [transition(current[uuid], layout, gpu).touched for layout in row]
        for uuid, row in zip(uuids, options, strict=True)
    ]
    chosen = cheapest_assignment(costs)
    layouts = {uuid: row[target] for uuid, row, target in zip(uuids, options, chosen, strict=True)}
    return layouts, {uuid: transition(current[uuid], layout, gpu) for uuid, layout in layouts.items()}


def _decide(
    now: float, then: float, changes: Mapping[str, Transition], gpu: GpuModel, rules: Rules, since_change_s: float
) -> tuple[bool, str]:
    gain = then - now
    if not any(each.rounds for each in changes.values()):
        return False, "the layout is the best one already"
    if gain < rules.min_gain:
        return False, f"it would serve {then:.0%} of the queries in time, the present one {now:.0%}: not worth a change"
    cost_s = now * _lost_share_s(changes, gpu, rules.change_s)
    if gain * rules.horizon_s < rules.payback * cost_s:
        return False, f"it would serve {gain:.0%} more, which does not pay for {cost_s:.1f} s of service lost meanwhile"
    if since_change_s < rules.dwell_s:
        wait_s = rules.dwell_s - since_change_s
        return False, f"it would serve {gain:.0%} more, but the last change was just now; in {wait_s:.0f} s"
    return True, f"it serves {then:.0%} of the queries in time, the present one {now:.0%}"


def _lost_share_s(changes: Mapping[str, Transition], gpu: GpuModel, change_s: float) -> float:
    """Seconds of the whole machine's service that the change takes away."""
    all_gpcs = gpu.compute_slices * len(changes)
    kept_gpcs = [gpcs for each in changes.values() for gpcs in each.serving_gpcs()]
    return sum(change_s * (gpu.compute_slices - gpcs) / all_gpcs for gpcs in kept_gpcs)
