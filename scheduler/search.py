"""Latency-bounded throughput: the highest rate at which latencies stay in bounds, by bisection. Pure, seeded.

A rate counts if, of every model, the wanted share of all queries is answered within the SLO, and every query within
ten of them: a percentile alone is met best by queries that never end.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from scheduler.domain import LATEST, Pool
from scheduler.mix import Load
from scheduler.policies import Policy
from scheduler.report import Report
from scheduler.simulator import GiveUp, Noise, SimSlice, simulate
from scheduler.workload import Arrival

# Queries with so many items are large.
LARGE_ITEMS = 20
# The search goes up to this share of the fluid bound, and halves its interval so often: to 0.5 % of the bound.
HIGHEST, STEPS = 1.2, 8


@dataclass(frozen=True, slots=True)
class Scene:
    """What is simulated, but for policy, rate and seed. `queries`: of one run, about. `slo_ms`: by model."""

    slices: Sequence[SimSlice]
    load: Load
    slo_ms: Mapping[str, float]
    queries: int = 10_000
    noise: Noise = field(default_factory=Noise)
    strict: bool = False

    def run(self, policy: Callable[[Pool], Policy], rate_per_s: float, seed: int, *, timeline: bool = False) -> Report:
        """To the end, whatever comes of it."""
        return self._simulate(policy, self.load.draw(rate_per_s, self.queries, seed), seed, timeline, None)

    def probe(self, policy: Callable[[Pool], Policy], rate_per_s: float, seed: int, share: float) -> Report:
        """Nothing is refused; given up as soon as it is certain that this share is not in time, or a query too late."""
        arrivals = self.load.draw(rate_per_s, self.queries, seed)
        sent = Counter(arrival.model for arrival in arrivals)
        late = {model: math.floor((1 - share) * count + 1e-9) for model, count in sent.items()}
        return self._simulate(policy, arrivals, seed, False, GiveUp(late, LATEST))

    def _simulate(
        self,
        policy: Callable[[Pool], Policy],
        arrivals: Sequence[Arrival],
        seed: int,
        timeline: bool,
        give_up: GiveUp | None,
    ) -> Report:
        return simulate(
            self.slices,
            arrivals,
            policy,
            slo_ms=self.slo_ms,
            seed=seed,
            noise=self.noise,
            max_queued=max(len(arrivals), 1),
            strict=self.strict,
            bounded=give_up is None,
            timeline=timeline,
            give_up=give_up,
        )


@dataclass(frozen=True, slots=True)
class Throughput:
    """What the search found with one seed. `report` is of that rate; None where no rate counts, which is then 0."""

    seed: int
    rate_per_s: float
    report: Report | None


def holds(report: Report, slo_ms: Mapping[str, float], share: float) -> bool:
    """Whether a rate counts, that gave this report."""
    return report.complete and all(
        each.answered == each.sent and each.within_slo >= share and each.max_ms <= LATEST * slo_ms[model]
        for model, each in report.models.items()
    )


def highest_rate(
    scene: Scene,
    policy: Callable[[Pool], Policy],
    share: float,
    bound_per_s: float,
    seed: int,
    probed: Callable[[], None] = lambda: None,
) -> Throughput:
    """`share`: of the queries, to be in time: 0.95 for p95. `probed` is called after each of the STEPS probes."""
    low, high = 0.0, HIGHEST
    best: Report | None = None
    for _ in range(STEPS):
        middle = (low + high) / 2
        report = scene.probe(policy, middle * bound_per_s, seed, share)
        if holds(report, scene.slo_ms, share):
            low, best = middle, report
        else:
            high = middle
        probed()
    return Throughput(seed, low * bound_per_s, best)


def median_rate(found: Sequence[Throughput]) -> float:
    """Of several seeds."""
    return statistics.median(each.rate_per_s for each in found)


def max_lateness(report: Report, slo_ms: Mapping[str, float]) -> float:
    """The longest time of any query, in SLOs of its model; NaN if none was answered."""
    found = [each.max_ms / slo_ms[model] for model, each in report.models.items() if each.answered]
    return max(found, default=math.nan)


def late_share_large(reports: Sequence[Report]) -> float:
    """Of the queries with LARGE_ITEMS or more, the share that was late or refused; NaN if there was none."""
    classes = [
        size
        for report in reports
        for model in report.models.values()
        for size in model.late_by_items
        if size.from_items >= LARGE_ITEMS
    ]
    sent = sum(size.sent for size in classes)
    return sum(size.late for size in classes) / sent if sent else math.nan


# ---- the fluid bound ----


def fluid_bound_per_s(slices: Sequence[SimSlice], load: Load, slo_ms: Mapping[str, float]) -> float:
    """Queries a second, if every slice always ran its best batch within the SLO; 0 where a model fits nowhere.

    With several models, or lengths, the highest total rate at which some division of every slice's time serves each
    its share.
    """
    rates, demands = [], []
    for model, share in load.shares.items():
        for length, of_items in _by_bucket(slices, model, load.lengths[model]).items():
            rates.append([_best_items_per_s(each, model, length, slo_ms[model]) for each in slices])
            demands.append(share * load.items[model] * of_items)
    return sum(rates[0]) / demands[0] if len(rates) == 1 else _divided(rates, demands)


def _by_bucket(slices: Sequence[SimSlice], model: str, lengths: Mapping[int, float]) -> dict[int, float]:
    """Shares of the items, by the length that they are padded to."""
    edges = next((each.lengths[model] for each in slices if model in each.lengths), ())
    found: dict[int, float] = {}
    for length, share in lengths.items():
        padded = edges[min(bisect.bisect_left(edges, length), len(edges) - 1)] if edges else 0
        found[padded] = found.get(padded, 0.0) + share
    return found


def _best_items_per_s(where: SimSlice, model: str, length: int, slo_ms: float) -> float:
    if model not in where.tables:
        return 0.0
    rows = len(where.tables[model]) // len(where.lengths.get(model, (0,)))
    times = ((batch, where.batch_ms(model, batch, length)) for batch in range(1, rows + 1))
    return max((1e3 * batch / ms for batch, ms in times if ms <= slo_ms), default=0.0)


def _divided(rates: Sequence[Sequence[float]], demands: Sequence[float]) -> float:
    """The largest t such that slices, each divided among the kinds of work, serve t * demands[k] of every kind k."""
    from scipy.optimize import linprog

    kinds, slices = len(rates), len(rates[0])
    # The variables: shares of time by kind and slice, then t.
    served = np.zeros((kinds, kinds * slices + 1))
    time = np.zeros((slices, kinds * slices + 1))
    for kind in range(kinds):
        served[kind, kind * slices : (kind + 1) * slices] = -np.asarray(rates[kind])
        served[kind, -1] = demands[kind]
        time[range(slices), range(kind * slices, (kind + 1) * slices)] = 1.0
    objective = np.zeros(kinds * slices + 1)
    objective[-1] = -1.0
    limits = np.concatenate([np.zeros(kinds), np.ones(slices)])
    return -float(linprog(objective, np.concatenate([served, time]), limits).fun)
