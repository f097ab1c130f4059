"""What `migserve simulate` found of one policy, and its JSON."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler import search
from scheduler.report import ModelReport, Report
from server.simulate_setup import Setup


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy at one rate, or, with `goal` (p95 or p99), at the highest that it bears: the median of the seeds.

    `reports`: one a seed, each at `rates_per_s` of that seed.
    """

    policy: str
    rate_per_s: float
    seeds: Sequence[int]
    rates_per_s: Sequence[float]
    reports: Sequence[Report]
    goal: str | None = None

    def of_models(self, figure: Callable[[ModelReport], float]) -> dict[str, float]:
        """Medians over the seeds, by model."""
        found: dict[str, list[float]] = {}
        for report in self.reports:
            for model, each in report.models.items():
                found.setdefault(model, []).append(figure(each))
        return {model: statistics.median(values) for model, values in found.items()}

    def refused(self) -> dict[str, int]:
        """By reason, of all seeds."""
        found: Counter[str] = Counter()
        for report in self.reports:
            for each in report.models.values():
                found.update(each.refused)
        return dict(found)

    def utilisation(self) -> dict[str, float]:
        """By slice, the mean over the seeds."""
        names = self.reports[0].utilisation if self.reports else {}
        return {name: statistics.mean(report.utilisation[name] for report in self.reports) for name in names}

    def max_lateness(self, slo_ms: Mapping[str, float]) -> float:
        found = [search.max_lateness(report, slo_ms) for report in self.reports]
        return max(found, default=math.nan)


def above_bound(outcomes: Sequence[Outcome], bound_per_s: float) -> str:
    """How a rate that counts may be above the fluid bound; empty where none is."""
    goal = next((each.goal for each in outcomes if each.goal and each.rate_per_s > bound_per_s), None)
    if goal is None:
        return ""
    return (
        f"A rate above the fluid bound is no error: {goal} asks for {goal[1:]} % of the queries in time only. Those "
        "that are late are mostly large, and may run in batches that take longer than the SLO, which do more items a "
        "second."
    )


def to_json(outcome: Outcome, setup: Setup) -> dict[str, Any]:
    """Figures in ms are one number where one model is simulated, else an object by model; null: there is none."""
    slo_ms = setup.scene.slo_ms
    ratio = outcome.rate_per_s / setup.bound_per_s
    data = {
        "policy": outcome.policy,
        "layout": setup.layout,
        "slo_ms": _one_or_all(slo_ms),
        "max_rate_per_s" if outcome.goal else "rate_per_s": _rounded(outcome.rate_per_s, 2),
        "bound_per_s": _rounded(setup.bound_per_s, 2),
        "ratio_to_bound": _rounded(ratio, 4),
        "p50_ms": _one_or_all(outcome.of_models(lambda each: each.p50_ms)),
        "p95_ms": _one_or_all(outcome.of_models(lambda each: each.p95_ms)),
        "p99_ms": _one_or_all(outcome.of_models(lambda each: each.p99_ms)),
        "max_lateness_slo": _rounded(outcome.max_lateness(slo_ms), 3),
        "late_share_large": _rounded(search.late_share_large(outcome.reports), 4),
        "seeds": list(outcome.seeds),
        "within_slo": _one_or_all(outcome.of_models(lambda each: each.within_slo), 4),
        "refused": outcome.refused(),
        "utilisation": {name: _rounded(share, 4) for name, share in outcome.utilisation().items()},
    }
    if outcome.goal:
        data["goal"] = outcome.goal
        data["max_rates_per_s"] = [_rounded(rate, 2) for rate in outcome.rates_per_s]
    return data


def _one_or_all(by_model: Mapping[str, float], digits: int = 3) -> Any:
    values = {model: _rounded(value, digits) for model, value in by_model.items()}
    if not values:
        return None
    return next(iter(values.values())) if len(values) == 1 else values


def _rounded(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None
