"""Observed traffic: per model its rate, items per query, and lengths, in histograms that forget. Pure.

A count loses half its weight every half-life, so that the sum follows the traffic without a window to slide.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from partitioner.plans import ModelDemand

# What weighs less than this is forgotten, so that histograms stay small.
NEGLIGIBLE = 1e-3


class Kind(NamedTuple):
    """Queries of one model that are alike. `length`: of the first varying axis, 0 where there is none."""

    model: str
    items: int
    length: int = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """One model's traffic: queries per second, and the shares of its queries by items and by length."""

    rate_per_s: float
    items: Mapping[int, float]
    lengths: Mapping[int, float]


class Demand:
    """Counts queries by kind. Times are seconds of any clock that does not run backwards."""

    def __init__(self, half_life_s: float, start_s: float) -> None:
        self._half_life_s = half_life_s
        self._start_s = self._now_s = start_s
        self._weights: dict[Kind, float] = {}

    def observe(self, now_s: float, counts: Mapping[Kind, int]) -> None:
        """Adds queries that arrived since the last call."""
        decay = 0.5 ** ((now_s - self._now_s) / self._half_life_s)
        self._now_s = now_s
        weights = {kind: weight * decay for kind, weight in self._weights.items() if weight * decay > NEGLIGIBLE}
        for kind, count in counts.items():
            weights[kind] = weights.get(kind, 0.0) + count
        self._weights = weights

    def traffic(self) -> dict[str, Traffic]:
        """What is asked for now, by model. Unbiased from the beginning on: a short time counts as short."""
        age_s = self._now_s - self._start_s
        window_s = self._half_life_s / math.log(2) * (1 - 0.5 ** (age_s / self._half_life_s))
        by_model: dict[str, dict[Kind, float]] = defaultdict(dict)
        for kind, weight in self._weights.items():
            by_model[kind.model][kind] = weight
        return {model: _traffic(weights, window_s) for model, weights in by_model.items()} if window_s else {}


# A job is planned for as queries of so many items, each within so long: batches of a good size, and no hurry.
JOB_ITEMS, JOB_SLO_MS = 16, 10_000.0
# What is due sooner, or late already, is planned for as if it had so long.
LEAST_JOB_S = 60.0


def job_name(model: str) -> str:
    """A model's name where it is asked for by jobs: its online queries have demands of their own."""
    return f"{model} (job)"


def job_demand(model: str, items: float, within_s: float, largest_batch: int) -> ModelDemand:
    """What a batch job asks for, so many items by its deadline, at an even rate. Raises DemandError."""
    each = min(JOB_ITEMS, largest_batch)
    rate_per_s = items / each / max(within_s, LEAST_JOB_S)
    return ModelDemand(job_name(model), rate_per_s, JOB_SLO_MS, {each: 1.0})


def _traffic(weights: Mapping[Kind, float], window_s: float) -> Traffic:
    total = sum(weights.values())
    items: dict[int, float] = defaultdict(float)
    lengths: dict[int, float] = defaultdict(float)
    for kind, weight in weights.items():
        items[kind.items] += weight / total
        lengths[kind.length] += weight / total
    return Traffic(total / window_s, dict(sorted(items.items())), dict(sorted(lengths.items())))
