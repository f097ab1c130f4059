"""Whole latency tables, with their uncertainty, from a few measured points and from other models' tables. Pure.

Ours (ElasticBatch, TPDS 35(10), 2024, says only that a learned pipeline predicts from few points). Two layers:
 1 the formula of `performance.py`: a new model's nine numbers are like those of known models, as far as those agree;
 2 what the formula leaves over, by a Gaussian process in log GPCs, batch, processes and length: a part that all models
   share, and a part of the model's own, whose sizes are learned from the known models.
The measured points then bend both, the formula linearised around its best fit. What comes out is made monotone: more
items, length or processes are never faster, more GPCs or memory never slower.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from partitioner import performance
from partitioner.latency import LatencyTableError, Measurement
from partitioner.performance import Point, Vector, features, point_of

# Rows of known models that the Gaussian process keeps, and rows that its scales are learned from.
KEPT_ROWS, LEARNED_ROWS = 1500, 400
# What the formula leaves over is smooth over about two doublings of anything; a model's own part is at least so large.
DOUBLINGS, LEAST_OWN = 2.0, 0.05
# A measured point that lies further from what the others foretell, in standard deviations, is trusted less.
WILD = 3.0
# Libraries choose other kernels for other batch sizes: a part of the model's own that varies with the batch only.
BATCH_ONLY = (8.0, 1.0, 8.0, 8.0)
# A new model may differ from the usual by this share of `performance.SPREAD` at least, however alike known ones are.
LEAST_SPREAD = 0.25
# The scales of floor and work say nothing about a model that is not known: log ms.
UNKNOWN_SCALE = 3.0
# So many points' worth of trust in the spread that the known models promise.
TRUST = 5
# An observation moves the mean of its point by at least one part in so many: what is old fades.
MEMORY = 50
# A model's own part is independent of other models' parts, the shared one the same: length scales along their numbers.
_APART, _TOGETHER = 1e-3, 1e5


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What is known before anything is measured: of the formula's numbers, and of what it leaves over.

    `leftover`: a scikit-learn GaussianProcessRegressor, fitted; `noise`: variance of a single measurement.
    """

    usual: Vector
    variance: Vector
    leftover: Any
    noise: float


def learn(known: Iterable[Measurement], seed: int = 0) -> Knowledge:
    """Knowledge from other models' tables. Raises LatencyTableError with fewer than two models.

    `seed`: which rows are left out where there are too many.
    """
    tables = _tables(known)
    if len(tables) < 2:
        raise LatencyTableError("the predictor needs the latency tables of at least two other models to learn from")
    fitted = np.array([performance.fit(at, logs) for at, logs in tables])
    usual = np.median(fitted, axis=0)
    off = fitted - usual
    variance = (off**2).mean(axis=0) * (1 + 1 / len(tables)) + (LEAST_SPREAD * performance.SPREAD) ** 2
    variance[:2] += UNKNOWN_SCALE**2
    leftover = _learn_leftover(tables, fitted, np.random.default_rng(seed))
    return Knowledge(usual, variance, leftover, float(np.exp(leftover.kernel_.k2.theta[0])))


def _tables(known: Iterable[Measurement]) -> list[tuple[Vector, Vector]]:
    """Features and log ms of each model on each kind of GPU."""
    rows: dict[tuple[str, str, str], dict[Point, float]] = defaultdict(dict)
    for each in known:
        rows[each.model, each.gpu, each.source][point_of(each)] = each.latency_ms
    return [(features(list(table)), np.log(list(table.values()))) for table in rows.values()]


def _learn_leftover(tables: Sequence[tuple[Vector, Vector]], fitted: Vector, generator: np.random.Generator) -> Any:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise LatencyTableError(
            "the predictor needs scikit-learn; install it with: pip install 'migserve[predictor]'"
        ) from error

    rows = [_rows(at, number) for number, (at, _) in enumerate(tables)]
    left = [logs - performance.log_ms(each, at) for each, (at, logs) in zip(fitted, tables, strict=True)]

    def some(most: int) -> tuple[Vector, Vector]:
        chosen = [generator.permutation(len(each))[: max(most // len(rows), 8)] for each in rows]
        return (
            np.concatenate([each[few] for each, few in zip(rows, chosen, strict=True)]),
            np.concatenate([each[few] for each, few in zip(left, chosen, strict=True)]),
        )

    def part(least: float, *scales: float) -> Any:
        return ConstantKernel(0.003, (least**2, 0.1)) * RBF(scales, "fixed")

    along = [DOUBLINGS] * 4
    kernel = part(0.003, *along, _TOGETHER) + part(LEAST_OWN, *along, _APART)
    kernel = kernel + part(LEAST_OWN, *BATCH_ONLY, _APART) + WhiteKernel(0.001, (1e-4, 0.1))
    # So small a matrix gains nothing from threads, and loses much where cores are shared.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # a size at its bound is meant
        learned = GaussianProcessRegressor(kernel, alpha=1e-8).fit(*some(LEARNED_ROWS)).kernel_
    return GaussianProcessRegressor(learned, optimizer=None, alpha=1e-8).fit(*some(KEPT_ROWS))


def _rows(at: Vector, model: int) -> Vector:
    """What the Gaussian process sees of points: doublings of GPCs, batch, processes and length; the model's number."""
    doublings = at[:, [0, 2, 3, 4]] / np.log(2)
    return np.column_stack([doublings, np.full(len(at), float(model))])


@dataclass(frozen=True, slots=True)
class Estimate:
    """A model's times at `points`: log ms, their covariance; what of it is noise of a single measurement.

    `mean` is not yet monotone; `ms` and `rows` are, in the `order` of `never_slower`. `measured`: which points were.
    """

    points: tuple[Point, ...]
    mean: Vector
    covariance: Vector
    noise: float
    order: Vector
    measured: frozenset[Point]

    @property
    def spread(self) -> Vector:
        """Standard deviation of log ms: what a measurement would differ by."""
        return np.asarray(np.sqrt(np.maximum(np.diag(self.covariance), 0.0) + self.noise))

    def ms(self, quantile: float = 0.5) -> dict[Point, float]:
        """Monotone times, such that so large a share of measurements should lie below."""
        level = NormalDist().inv_cdf(quantile)
        logs = monotone(self.mean + level * self.spread, self.order)
        return dict(zip(self.points, map(float, np.exp(logs)), strict=True))

    def rows(self, model: str, gpu: str, measured: Mapping[Point, float], quantile: float = 0.5) -> list[Measurement]:
        """The whole table: what was measured as it was, with the source `measured`; the rest with `predicted`."""
        return [
            Measurement(
                model=model,
                mig_profile=point.mig_profile,
                gpcs=point.gpcs,
                batch=point.batch,
                processes=point.processes,
                latency_ms=measured.get(point, ms),
                gpu=gpu,
                source="measured" if point in measured else "predicted",
                seq_len=point.seq_len,
            )
            for point, ms in self.ms(quantile).items()
        ]


class Predictor:
    """Predicts one model at `points` (all on one kind of GPU, each once), from what is known of others."""

    def __init__(self, knowledge: Knowledge, points: Sequence[Point]) -> None:
        self.points = tuple(dict.fromkeys(points))
        self._knowledge = knowledge
        self._index = {point: number for number, point in enumerate(self.points)}
        self._at = features(self.points)
        self._order = never_slower(self._at)
        mean, covariance = knowledge.leftover.predict(_rows(self._at, -1), return_cov=True)
        self._left_mean = np.asarray(mean)
        self._left_covariance = np.asarray(covariance) - knowledge.noise * np.eye(len(self.points))

    def given(self, measured: Mapping[Point, float]) -> Estimate:
        """The estimate from ms measured at some of the points, or at none. Raises KeyError for a point not known."""
        chosen = np.array([self._index[point] for point in measured], dtype=int)
        logs = np.log(np.array(list(measured.values()), dtype=float))
        known = self._knowledge
        best = self._best_fit(chosen, logs) if len(chosen) else known.usual
        slopes = performance.slopes(best, self._at)
        before = performance.log_ms(best, self._at) + slopes @ (known.usual - best) + self._left_mean
        covariance = self._left_covariance + (slopes * known.variance) @ slopes.T
        if len(chosen) == 0:
            return Estimate(self.points, before, covariance, known.noise, self._order, frozenset())
        among = covariance[np.ix_(chosen, chosen)] + known.noise * np.eye(len(chosen))
        among += np.diag(_distrust(among, logs - before[chosen]))
        gain = np.linalg.solve(among, covariance[chosen]).T
        off = logs - before[chosen]
        surprise = _surprise(among, off)
        return Estimate(
            self.points,
            before + gain @ off,
            surprise * (covariance - gain @ covariance[chosen]),
            surprise * known.noise,
            self._order,
            frozenset(measured),
        )

    def _best_fit(self, chosen: Vector, logs: Vector) -> Vector:
        """The formula's most likely parameters, given what was measured."""
        known, at = self._knowledge, self._at[chosen]
        covariance = self._left_covariance[np.ix_(chosen, chosen)] + known.noise * np.eye(len(chosen))
        whiten = np.linalg.inv(np.linalg.cholesky(covariance))

        def misfits(parameters: Vector) -> Vector:
            off = logs - performance.log_ms(parameters, at) - self._left_mean[chosen]
            return np.concatenate([whiten @ off, (parameters - known.usual) / np.sqrt(known.variance)])

        return np.asarray(least_squares(misfits, performance.start(known.usual, at, logs)).x)


def _distrust(among: Vector, off: Vector) -> Vector:
    """Variance to add to each measured point, so that none lies wildly off what the others foretell.

    Where most of them do, it is the model that is unlike the known ones, and no point is to blame.
    """
    inverse = np.linalg.inv(among)
    variance = 1 / np.diag(inverse)
    away = np.abs(inverse @ off) * np.sqrt(variance)
    usually = max(1.0, float(np.median(away)) / NormalDist().inv_cdf(0.75))
    return np.asarray(np.maximum((away / (WILD * usually)) ** 2 - 1, 0.0) * variance)


def _surprise(among: Vector, off: Vector) -> float:
    """How much larger the variance is than promised: each measured point, as foretold by the other ones."""
    inverse = np.linalg.inv(among)
    foretold = (inverse @ off) ** 2 / np.diag(inverse)
    return float((TRUST + foretold.sum()) / (TRUST + len(off)))


def never_slower(at: Vector) -> Vector:
    """[i, j]: point i has no more items, length and processes than j, and no less of GPCs and memory."""
    more = at * np.array([-1, -1, 1, 1, 1])
    return np.asarray((more[:, None, :] <= more[None, :, :] + 1e-9).all(axis=2))


def monotone(logs: Vector, order: Vector) -> Vector:
    """The mean of the least monotone function above and the greatest below."""
    above = np.where(order, logs[:, None], -np.inf).max(axis=0)
    below = np.where(order, logs[None, :], np.inf).min(axis=1)
    return np.asarray((above + below) / 2)


class Observations:
    """What was measured of a model, corrected by what is observed while it serves."""

    def __init__(self, measured: Mapping[Point, float] = {}) -> None:
        self._logs = {point: float(np.log(ms)) for point, ms in measured.items()}
        self._counts = dict.fromkeys(measured, 1)

    def add(self, point: Point, ms: float) -> None:
        """One more time of this point: the mean of the logarithms moves, the older they are the less they weigh."""
        count = min(self._counts.get(point, 0) + 1, MEMORY)
        before = self._logs.get(point, 0.0)
        self._logs[point] = before + (float(np.log(ms)) - before) / count
        self._counts[point] = count

    def ms(self) -> dict[Point, float]:
        """For `Predictor.given`."""
        return {point: float(np.exp(log)) for point, log in self._logs.items()}
