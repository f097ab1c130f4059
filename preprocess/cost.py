"""How long an element will take, learned from those before it. Pure.

Cost is taken to be linear in 1, encoded bytes (entropy decoding), and what comes out of it, pixels or seconds of sound
(transforms, resizing), each with a weight of its own a pipeline and format. A Kalman filter follows the weights (Kalman
1960), which are taken to drift; each error is relative to the cost, since large pictures must not teach small ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Of what is not known yet: ns for an element, for a byte, for a pixel or a millisecond of sound.
PRIOR_NS = (300_000.0, 5.0, 5.0)
# How far off the prior may be, relatively.
DOUBT = 4.0
# How far a weight drifts between two elements, relatively, and how far off one measurement is.
DRIFT = 0.03
NOISE = 0.2
# Of the first so many elements each teaches, then one in eight: to learn takes some 10 us.
EACH_OF = 64
ONE_IN = 8
# One measurement counts as at most so many times what was expected: the thread may have waited for a core.
MOST_SURPRISE = 4.0

Row = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Effort:
    """What can be told of an element at a glance. `extent`: pixels, or milliseconds of sound; 0 if it does not say."""

    format: str
    nbytes: int
    extent: int

    @property
    def _factors(self) -> Row:
        return (1.0, float(self.nbytes), float(self.extent))


@dataclass(slots=True)
class CostModel:
    """Of one pipeline and format."""

    seen: int = 0
    weights: list[float] = field(default_factory=lambda: list(PRIOR_NS))
    covariance: list[list[float]] = field(
        default_factory=lambda: [
            [(DOUBT * PRIOR_NS[row]) ** 2 * (row == column) for column in range(3)] for row in range(3)
        ]
    )

    def estimate_ns(self, effort: Effort) -> int:
        """At least 1 us."""
        return max(1000, int(_dot(self.weights, effort._factors)))

    def learn(self, effort: Effort, took_ns: int) -> None:
        """One measurement."""
        self.seen += 1
        if self.seen <= EACH_OF or self.seen % ONE_IN == 0:
            self._follow(effort, took_ns)

    def _follow(self, effort: Effort, took_ns: int) -> None:
        expected_ns = self.estimate_ns(effort)
        # Relative to the larger of both: so that neither a slip of the estimate nor one slow element blows up.
        scale = max(expected_ns, min(took_ns, MOST_SURPRISE * expected_ns))
        inputs = [factor / scale for factor in effort._factors]
        surprise = (min(took_ns, MOST_SURPRISE * expected_ns) - _dot(self.weights, effort._factors)) / scale
        spread = [_dot(row, inputs) for row in self.covariance]
        gain = [value / (NOISE**2 + _dot(spread, inputs)) for value in spread]
        self.weights = [weight + each * surprise for weight, each in zip(self.weights, gain, strict=True)]
        self.covariance = [
            [self.covariance[row][column] - gain[row] * spread[column] for column in range(3)] for row in range(3)
        ]
        self._drift()

    def _drift(self) -> None:
        """What is known becomes less certain, up to what was known at first."""
        for axis in range(3):
            size = max(self.weights[axis], PRIOR_NS[axis])
            if self.covariance[axis][axis] < (DOUBT * size) ** 2:
                self.covariance[axis][axis] += (DRIFT * size) ** 2


def _dot(left: list[float], right: list[float] | Row) -> float:
    return left[0] * right[0] + left[1] * right[1] + left[2] * right[2]
