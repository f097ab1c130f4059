"""Which points of a model's latency table are measured, in which order, and what the rest is taken to be. Pure.

Without a budget every point is measured, small ones first on each slice, so that the first one that does not fit spares
the larger ones. With one, `sampling.py` picks the points that decisions turn on, and the rest is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from partitioner import sampling
from partitioner.gangs import slice_memory_mib
from partitioner.latency import Measurement
from partitioner.performance import Point
from partitioner.predictor import Estimate, Knowledge, Predictor
from partitioner.sampling import Budget


class Campaign:
    """One model on the slices of one machine. `known`: ms of points measured before.

    `budget`: how many points may be measured in all, None for all of them; `knowledge` is needed with one.
    `sure`: the share of throughput below which what decisions may lose is not worth another measurement.
    """

    def __init__(
        self,
        points: Sequence[Point],
        known: Mapping[Point, float],
        budget: int | None = None,
        knowledge: Knowledge | None = None,
        sure: float = 0.0,
    ) -> None:
        self._points = sorted(points, key=lambda p: (p.mig_profile, p.processes, p.seq_len or 0, p.batch))
        self.measured = {point: ms for point, ms in known.items() if point in set(points)}
        self._budget = len(points) if budget is None else min(budget, len(points))
        self._sure = sure
        self._predictor = Predictor(knowledge, self._points) if budget is not None and knowledge else None
        self._given_up: set[Point] = set()

    @property
    def left(self) -> int:
        """How many points will be measured at most."""
        possible = [point for point in self._points if point not in self.measured and point not in self._given_up]
        return max(0, min(self._budget - len(self.measured), len(possible)))

    def next(self) -> Point | None:
        """What to measure now; None when that was all."""
        if not self.left:
            return None
        if self._predictor is None:
            return next(point for point in self._points if point not in self.measured and point not in self._given_up)
        if not self.measured:  # nothing tells yet how long anything takes: the smallest on the largest slice
            return min(
                (point for point in self._points if point not in self._given_up),
                key=lambda p: (-p.gpcs, p.batch * p.processes, p.seq_len or 0),
            )
        estimate = self._predictor.given(self.measured)
        doubt = sampling.doubt(estimate)
        if doubt.lost < self._sure:
            return None
        return sampling.next_point(estimate, Budget(self.left), doubt.weights, self._given_up)

    def took(self, point: Point, ms: float) -> None:
        self.measured[point] = ms

    def failed(self, point: Point) -> None:
        """This point cannot be measured; of others nothing is known."""
        self._given_up.add(point)

    def does_not_fit(self, point: Point) -> None:
        """Nor does anything with as much or more to hold, on a slice with no more memory."""
        self._given_up.update(
            each
            for each in self._points
            if slice_memory_mib(each.mig_profile) <= slice_memory_mib(point.mig_profile)
            and each.batch >= point.batch
            and each.processes >= point.processes
            and (each.seq_len or 0) >= (point.seq_len or 0)
        )

    def predicted(self) -> Estimate | None:
        """The whole table, where there is a predictor and something was measured."""
        return self._predictor.given(self.measured) if self._predictor and self.measured else None

    def rest(self, model: str, gpu: str, quantile: float = 0.5) -> list[Measurement]:
        """Predicted rows, of what was neither measured nor given up; see `Estimate.ms` for the quantile."""
        estimate = self.predicted()
        if estimate is None:
            return []
        skip = self.measured.keys() | self._given_up
        rows = zip(estimate.points, estimate.rows(model, gpu, self.measured, quantile), strict=True)
        return [row for point, row in rows if point not in skip]
