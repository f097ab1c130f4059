"""Which point of a latency table to measure next, and when the rest is known well enough. Pure.

Ours. A planner or dispatcher decides, on each slice and for each limit of time, which gang (batch and processes) has
the highest throughput. Tables drawn from the estimate decide differently where it is unsure: a point matters by the
share of such decisions that it wins. The next measurement is the one that takes most off the variance of all points,
where those that matter count more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from partitioner.performance import Point, Vector
from partitioner.predictor import Estimate, monotone

DRAWS = 32
# Decisions are tried at so many limits, from the quickest point to the slowest, where none is given.
LIMITS = 12
# What decisions count for beside the whole table's exactness, which counts 1.
DECISIVE = 0.5


@dataclass(frozen=True, slots=True)
class Budget:
    """What measuring may still cost: points, and ms of running batches (None: no limit)."""

    points: int
    ms: float | None = None


@dataclass(frozen=True, slots=True)
class Doubt:
    """How unsure decisions are. `lost`: the share of throughput that deciding on the mean is expected to lose.

    `weights`: by point, the share of decisions it wins in drawn tables; they add up to 1.
    """

    lost: float
    weights: Vector


def doubt(estimate: Estimate, limits_ms: Collection[float] = (), seed: int = 0) -> Doubt:
    """How the best gang of each slice and limit varies between tables drawn from the estimate."""
    rates, logs = _drawn(estimate, np.random.default_rng(seed))
    limits = np.log(sorted(limits_ms)) if limits_ms else np.linspace(logs[0].min(), logs[0].max(), LIMITS + 1)[1:]
    slices: dict[tuple[str, int | None], list[int]] = {}
    for number, point in enumerate(estimate.points):
        slices.setdefault((point.mig_profile, point.seq_len), []).append(number)
    weights = np.zeros(len(estimate.points))
    lost = []
    for among in map(np.array, slices.values()):
        for limit in limits:
            won, share = _decide(rates[:, among], logs[:, among] <= limit)
            np.add.at(weights, among[won], 1.0)
            lost += share
    return Doubt(float(np.mean(lost)) if lost else 0.0, weights / max(weights.sum(), 1.0))


def _drawn(estimate: Estimate, generator: np.random.Generator) -> tuple[Vector, Vector]:
    """(log items per ms, log ms): the mean table first, then drawn ones."""
    drawn = generator.multivariate_normal(
        np.zeros(len(estimate.points)), estimate.covariance, DRAWS, check_valid="ignore", method="eigh"
    )
    logs = np.array([monotone(estimate.mean + each, estimate.order) for each in (0.0 * drawn[0], *drawn)])
    items = np.log([point.batch * point.processes for point in estimate.points])
    return items - logs, logs


def _decide(rates: Vector, within: Vector) -> tuple[Vector, list[float]]:
    """Who wins in each drawn table, and what it loses to decide as the mean table does. The first row is the mean."""
    if not within[0].any():
        return np.zeros(0, dtype=int), []
    allowed = np.where(within, rates, -np.inf)
    decided = int(allowed[0].argmax())
    possible = within[1:].any(axis=1)
    won = allowed[1:].argmax(axis=1)[possible]
    best = allowed[1:].max(axis=1)[possible]
    # A decision that turns out too slow is not worth nothing: the next batch is smaller. It counts as it is.
    return won, list(np.maximum(0.0, 1 - np.exp(rates[1:, decided][possible] - best)))


def next_point(
    estimate: Estimate,
    left: Budget,
    weights: Vector | None = None,
    impossible: Collection[Point] = (),
    runs: Mapping[Point, float] | None = None,
) -> Point | None:
    """What to measure next within the budget that is left; None where nothing fits.

    `weights`: of `doubt`; `impossible`: what is known not to fit into memory; `runs`: batches that measuring a point
    takes, by default one.
    """
    if left.points < 1:
        return None
    size = len(estimate.points)
    counts = np.full(size, 1 / size) + (0.0 if weights is None else DECISIVE * weights)
    gained = (counts[:, None] * estimate.covariance**2).sum(axis=0) / (np.diag(estimate.covariance) + estimate.noise)
    costs = np.exp(estimate.mean) * np.array([1.0 if runs is None else runs[point] for point in estimate.points])
    for number, point in enumerate(estimate.points):
        if point in estimate.measured or point in impossible or (left.ms is not None and costs[number] > left.ms):
            gained[number] = -1.0
    best = int(gained.argmax())
    return estimate.points[best] if gained[best] >= 0 else None
