"""What physics says of a batch's time on a slice: nine numbers of a model, with names and a usual range. Pure.

Ours. A batch takes the longer of two times, with a soft corner between them:
    floor   launching kernels one after the other; hardly more of it for more items or processes
    work    what the items need, divided by what the slice has of compute and of memory
In logarithms, with b items in each of k processes, g GPCs, m the slice's share of the GPU's memory, and l the length of
an item by the shortest:
    floor = floor_ms + floor_items (log b + log k)
    work  = work_ms + items (log(b + overhead) + log k) + length log l - compute log g - memory log m
    log time = log(exp(s floor) + exp(s work)) / s                                        s = exp(sharpness)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from partitioner.latency import Measurement

Vector = np.ndarray[Any, np.dtype[np.float64]]

PARAMETERS = (
    "floor_ms", "work_ms", "overhead", "compute", "memory", "floor_items", "sharpness", "items", "length",
)  # fmt: skip
# Where models usually lie, and how far off they may be; the first two are in log ms, and anything.
USUAL = np.array([1.5, 0.0, -1.0, 0.6, 0.3, 0.02, 1.0, 1.0, 1.0])
SPREAD = np.array([3.0, 3.0, 1.5, 0.3, 0.2, 0.1, 0.5, 0.1, 0.2])
# Of what is measured, as a share of it: repeated measurements of one point differ by a few per cent.
NOISE = 0.05

LOG_GPCS, LOG_MEMORY, LOG_BATCH, LOG_PROCESSES, LOG_LENGTH = range(5)


class Point(NamedTuple):
    """What can be measured: `processes` batches of `batch` items side by side; `seq_len` where lengths vary."""

    mig_profile: str
    gpcs: int
    batch: int
    processes: int = 1
    seq_len: int | None = None


def point_of(measurement: Measurement) -> Point:
    """Which point a row is about."""
    each = measurement
    return Point(each.mig_profile, each.gpcs, each.batch, each.processes, each.seq_len)


def features(points: Sequence[Point]) -> Vector:
    """A row a point: the logarithms that the formula needs. `points`: all of one model on one kind of GPU."""
    most_gpcs = max(point.gpcs for point in points)
    memory_gib = [_memory_gib(point.mig_profile) for point in points]
    most_gib = max(memory_gib)
    shortest = min((point.seq_len for point in points if point.seq_len), default=1)
    return np.log(
        [
            (
                point.gpcs,
                gib / most_gib if all(memory_gib) else point.gpcs / most_gpcs,
                point.batch,
                point.processes,
                (point.seq_len or shortest) / shortest,
            )
            for point, gib in zip(points, memory_gib, strict=True)
        ]
    )


def _memory_gib(mig_profile: str) -> int:
    match = re.search(r"\.(\d+)gb", mig_profile)
    return int(match[1]) if match else 0


def log_ms(parameters: Vector, at: Vector) -> Vector:
    """The formula. `at`: rows of `features`."""
    floor_ms, work_ms, overhead, compute, memory, floor_items, sharpness, items, length = parameters
    gpcs, share, batch, processes, longer = at.T
    floor = floor_ms + floor_items * (batch + processes)
    work = work_ms + items * (np.logaddexp(batch, overhead) + processes) + length * longer
    work = work - compute * gpcs - memory * share
    soft = np.exp(sharpness)
    return np.asarray(np.logaddexp(soft * floor, soft * work) / soft)


def slopes(parameters: Vector, at: Vector) -> Vector:
    """Derivatives by each parameter, a column each."""
    step = 1e-4
    moved = [
        (log_ms(parameters + step * unit, at), log_ms(parameters - step * unit, at)) for unit in np.eye(len(PARAMETERS))
    ]
    return np.stack([(above - below) / (2 * step) for above, below in moved], axis=1)


def start(usual: Vector, at: Vector, logs: Vector) -> Vector:
    """Where to begin a fit: the usual, with the two scales taken from what was measured (log ms)."""
    begin = usual.copy()
    begin[0] = logs.min()
    begin[1] += np.median(logs - log_ms(np.array([-9.0, *usual[1:]]), at))
    return begin


def fit(at: Vector, logs: Vector) -> Vector:
    """The parameters of a model of which everything was measured; few wild points do no harm."""
    begin = start(USUAL, at, logs)

    def misfits(parameters: Vector) -> Vector:
        return np.concatenate([(log_ms(parameters, at) - logs) / NOISE, (parameters - USUAL) / SPREAD])

    return np.asarray(least_squares(misfits, begin, loss="soft_l1").x)
