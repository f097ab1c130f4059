"""Latency tables: time of (MIG profile, batch) for a model; interpolation and knees. Pure but for `read_csv`.

File form: CSV with at least the columns `model, mig_profile, batch, latency_ms`. Also read where present:
`gpcs` (else the leading number of `mig_profile`), `gpu`, `source`, `seq_len`, `processes` (rows of more than
one process are left out) and `items_per_s` (then batch / items_per_s is used: it is the finer figure).
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

# PARIS reads its knee off utilisation; where none is measured, this share of peak throughput stands in.
KNEE_SHARE = 0.8


class LatencyTableError(ValueError):
    """A latency table that cannot be read or has no rows for what was asked."""


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Milliseconds of a batch of one model: `by_gpcs[gpcs][batch]`."""

    by_gpcs: Mapping[int, Mapping[int, float]]

    def points(self, gpcs: int) -> list[tuple[int, float]]:
        """(batch, ms) on a slice of `gpcs` compute slices, by batch.

        A size that was not measured takes the nearest smaller one, else the smallest: never an optimist.
        """
        smaller = [size for size in self.by_gpcs if size <= gpcs]
        row = self.by_gpcs[max(smaller) if smaller else min(self.by_gpcs)]
        return sorted(row.items())


def read_csv(path: Path, model: str, gpu: str | None = None) -> LatencyTable:
    """Rows of `model` (and `gpu`, where given) as a LatencyTable. Raises LatencyTableError."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise LatencyTableError(f"latency table {path}: {error.strerror}") from error
    return from_rows(rows, model, gpu, str(path))


def shipped(model: str) -> LatencyTable:
    """The measured A100-80GB table of `model` that comes with migserve. Raises LatencyTableError."""
    text = files("partitioner").joinpath("data/mig_latency_a100.csv").read_text()
    rows = [row for row in csv.DictReader(text.splitlines()) if row["source"] == "parvagpu"]
    return from_rows(rows, model, "A100-80GB", "a100")


def from_rows(
    rows: Iterable[Mapping[str, str]], model: str, gpu: str | None = None, origin: str = "table"
) -> LatencyTable:
    """The rows of one model. Raises LatencyTableError, naming the models there are."""
    by_gpcs: dict[int, dict[int, float]] = defaultdict(dict)
    models = set()
    for line, row in enumerate(rows, start=2):
        try:
            models.add(row["model"])
            if row["model"] != model or (gpu and row.get("gpu", gpu) != gpu):
                continue
            if (row.get("processes") or "1") != "1":
                continue
            batch, gpcs = int(row["batch"]), int(row.get("gpcs") or row["mig_profile"].split("g")[0])
            rate = row.get("items_per_s")
            by_gpcs[gpcs][batch] = 1e3 * batch / float(rate) if rate else float(row["latency_ms"])
        except (KeyError, ValueError, TypeError) as error:
            raise LatencyTableError(f"{origin}, line {line}: {error!r} in {dict(row)}") from error
    if not by_gpcs:
        raise LatencyTableError(f"{origin} has no rows for model {model!r}; it has {', '.join(sorted(models))}")
    return LatencyTable(dict(by_gpcs))


def per_batch(points: Sequence[tuple[int, float]], max_batch: int) -> list[float]:
    """Time of each batch 1..max_batch: linear between the points, along the last segment beyond them.

    Made monotone: a larger batch is never faster. Units are those of the points.
    """
    points = sorted(points)
    if points[0][0] > 1:
        points = [(1, points[0][1]), *points]
    times = [_at(points, batch) for batch in range(1, max_batch + 1)]
    for index in range(1, len(times)):
        times[index] = max(times[index], times[index - 1])
    return times


def _at(points: Sequence[tuple[int, float]], batch: int) -> float:
    if len(points) == 1:
        return points[0][1]
    right = next((i for i, (b, _) in enumerate(points) if b >= batch), len(points) - 1)
    (b0, t0), (b1, t1) = points[max(right, 1) - 1], points[max(right, 1)]
    return t0 + (t1 - t0) * (batch - b0) / (b1 - b0)


def knee(times: Sequence[float]) -> int:
    """First batch with at least 80 % of the peak throughput; `times[b - 1]` is the time of batch b.

    PARIS (arXiv 2202.13481), step 1, in its form without measured utilisation.
    """
    rates = [batch / max(time, 1e-9) for batch, time in enumerate(times, start=1)]
    return next(batch for batch, rate in enumerate(rates, start=1) if rate >= KNEE_SHARE * max(rates))
