"""Latency tables: time of (model, MIG profile, batch, processes); interpolation and knees. Pure but for reading.

File form: CSV with a header, one measurement a row, or JSON `{"measurements": [{...}]}` with the same names.

    model         name                                                    needed
    mig_profile   such as 2g.20gb                                         needed
    batch         items of one batch                                      needed
    latency_ms    of a batch                                              needed, unless items_per_s is there
    processes     of this model, side by side in the slice                1
    items_per_s   of the slice, all its processes: where given, latency is
                  batch * processes / items_per_s, the finer figure       -
    gpcs          compute slices; of cpu-N threads                        the first number in mig_profile
    memory_mib    of the slice's memory, taken by all its processes       unknown
    gpu, source, seq_len                                                  any
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

# What a row of threads of a CPU has for a MIG profile begins so.
CPU = "cpu-"
# In the column `source`: a share of a whole GPU's SMs stood for a slice.
SHARES = "sm-shares"
# There, too; of what was measured in another way than on slices: `predicted from sm-shares`.
PREDICTED = "predicted"
# PARIS reads its knee off utilisation; where none is measured, this share of peak throughput stands in.
KNEE_SHARE = 0.8
# A point is suspect when it holds at least so many items in flight, and so much more throughput than all below.
SUSPECT_ITEMS, SUSPECT_GAIN = 100, 1.15


class LatencyTableError(ValueError):
    """A latency table that cannot be read or has no rows for what was asked."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row: `processes` batches of `batch` items ran side by side in a slice and took `latency_ms`."""

    model: str
    mig_profile: str
    gpcs: int
    batch: int
    processes: int
    latency_ms: float
    memory_mib: float | None = None
    gpu: str = ""
    source: str = ""
    seq_len: int | None = None

    @property
    def items(self) -> int:
        """Items in flight."""
        return self.batch * self.processes

    @property
    def items_per_s(self) -> float:
        return 1e3 * self.items / self.latency_ms


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Milliseconds of a batch of one model that has the slice for itself: `by_gpcs[gpcs][batch]`."""

    by_gpcs: Mapping[int, Mapping[int, float]]

    def points(self, gpcs: int) -> list[tuple[int, float]]:
        """(batch, ms) on a slice of `gpcs` compute slices, by batch.

        A size that was not measured takes the nearest smaller one, else the smallest: never an optimist.
        """
        return sorted(self.by_gpcs[self.stand_in(gpcs)].items())

    def stand_in(self, gpcs: int) -> int:
        """Which measured size the figures of a slice of `gpcs` compute slices are taken from."""
        return stand_in(self.by_gpcs, gpcs)


def stand_in(sizes: Iterable[int], gpcs: int) -> int:
    """Of the measured sizes, the one whose figures are taken for a slice of `gpcs` compute slices."""
    known = sorted(sizes)
    return max((size for size in known if size <= gpcs), default=known[0])


def read_measurements(path: Path) -> list[Measurement]:
    """Every row of a latency table, CSV or (by its suffix) JSON. Raises LatencyTableError, naming the line."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise LatencyTableError(f"latency table {path}: {getattr(error, 'strerror', None) or error}") from error
    return _from_json(text, str(path)) if path.suffix == ".json" else _parse(_csv_rows(text), str(path))


def shipped_measurements(source: str = "parvagpu") -> list[Measurement]:
    """The measured A100 rows that come with migserve; `source` is parvagpu or migprofiler."""
    text = files("partitioner").joinpath("data/mig_latency_a100.csv").read_text()
    return _parse((row for row in _csv_rows(text) if row["source"] == source), "a100")


def to_csv(measurements: Iterable[Measurement]) -> str:
    """The documented CSV form; unknown values are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(Measurement.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(each) for each in measurements)
    return out.getvalue()


def to_json(measurements: Iterable[Measurement]) -> str:
    """The documented JSON form."""
    return json.dumps({"measurements": [asdict(each) for each in measurements]}, indent=1)


def read_csv(path: Path, model: str, gpu: str | None = None) -> LatencyTable:
    """Rows of `model` (and `gpu`, where given) as a LatencyTable. Raises LatencyTableError."""
    return single_process(read_measurements(path), model, gpu, str(path))


def shipped(model: str) -> LatencyTable:
    """The measured A100-80GB table of `model` that comes with migserve. Raises LatencyTableError."""
    return single_process(shipped_measurements(), model, "A100-80GB", "a100")


def from_rows(
    rows: Iterable[Mapping[str, str]], model: str, gpu: str | None = None, origin: str = "table"
) -> LatencyTable:
    """Rows of the CSV form as the LatencyTable of one model. Raises LatencyTableError, naming the models there are."""
    return single_process(_parse(rows, origin), model, gpu, origin)


def single_process(
    measurements: Iterable[Measurement], model: str, gpu: str | None = None, origin: str = "table"
) -> LatencyTable:
    """What one process of `model` needs, alone in a slice. Raises LatencyTableError, naming the models there are."""
    by_gpcs: dict[int, dict[int, float]] = defaultdict(dict)
    models = set()
    for each in measurements:
        models.add(each.model)
        if each.model == model and each.processes == 1 and (not gpu or not each.gpu or each.gpu == gpu):
            by_gpcs[each.gpcs][each.batch] = each.latency_ms
    if not by_gpcs:
        raise LatencyTableError(f"{origin} has no rows for model {model!r}; it has {', '.join(sorted(models))}")
    return LatencyTable(dict(by_gpcs))


def is_predicted(source: str) -> bool:
    return source.startswith(PREDICTED)


def predicted_from(source: str) -> str:
    """What predictions from rows of this source have for theirs."""
    return PREDICTED if source == "measured" else f"{PREDICTED} from {source}"


def basis(source: str) -> str:
    """How a row was measured, or those that it was predicted from."""
    return source.removeprefix(f"{PREDICTED} from ")


def measured_elsewhere(measurements: Sequence[Measurement], gpu: str) -> str:
    """A warning of latencies that no slice of `gpu` was measured for; empty where all are its own, by what they say.

    Rows that name no GPU are taken for its own, unless they are of threads of a CPU.
    """
    places = [_elsewhere(each, gpu) for each in measurements]
    others = sorted({place for place in places if place})
    if not others:
        return ""
    return (
        f"{sum(map(bool, places))} of {len(places)} latencies were not measured on slices of {gpu}, but on "
        f"{' and '.join(others)}: on {gpu} they will be others. Measure them there, by migserve profile MODEL "
        f"--device cuda, and pass what it writes as --latency-table."
    )


def _elsewhere(measurement: Measurement, gpu: str) -> str:
    """Where a row was measured, if that is no slice of `gpu`."""
    how = basis(measurement.source)
    if how == "emulated":
        return f"an emulated {measurement.gpu}".rstrip()
    if how == SHARES:
        return f"shares of the SMs of a whole {measurement.gpu}"
    if measurement.mig_profile.startswith(CPU):
        return measurement.gpu or "a CPU"
    return measurement.gpu if measurement.gpu != gpu else ""


def without_suspects(measurements: Iterable[Measurement]) -> tuple[list[Measurement], list[Measurement]]:
    """(what is left, what is suspect): a large point with far more throughput than all smaller ones of its slice.

    Suspect: at least 100 items in flight, and more than 15 % above every point of the same model and slice that
    has fewer items in flight and is not suspect itself. Such points are likely to be errors of measurement.
    """
    best: dict[tuple[str, str, int, int | None], float] = {}
    kept, suspect = [], []
    for each in sorted(measurements, key=lambda m: (m.model, m.gpu, m.gpcs, m.seq_len or 0, m.items, m.items_per_s)):
        key = (each.model, each.gpu, each.gpcs, each.seq_len)
        if each.items >= SUSPECT_ITEMS and key in best and each.items_per_s > SUSPECT_GAIN * best[key]:
            suspect.append(each)
        else:
            kept.append(each)
            best[key] = max(best.get(key, 0.0), each.items_per_s)
    return kept, suspect


def per_batch(points: Sequence[tuple[int, float]], max_batch: int) -> list[float]:
    """Time of each batch 1..max_batch: linear between the points, along the last segment beyond them.

    Made monotone: a larger batch is never faster. Units are those of the points.
    """
    times = interpolated(points, max_batch)
    for index in range(1, len(times)):
        times[index] = max(times[index], times[index - 1])
    return times


def interpolated(points: Sequence[tuple[int, float]], max_batch: int) -> list[float]:
    """The same as it was measured: where a larger batch was faster, it stays so."""
    points = sorted(points)
    if points[0][0] > 1:
        points = [(1, points[0][1]), *points]
    return [_at(points, batch) for batch in range(1, max_batch + 1)]


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
    return measured_knee(list(enumerate(times, start=1)))


def measured_knee(points: Sequence[tuple[int, float]]) -> int:
    """The same among measured (batch, time) points only, such as powers of two."""
    rates = [(batch, batch / max(time, 1e-9)) for batch, time in sorted(points)]
    peak = max(rate for _, rate in rates)
    return next(batch for batch, rate in rates if rate >= KNEE_SHARE * peak)


def monotone_knees(knees: Mapping[int, int], max_batch: int) -> dict[int, int]:
    """Knees by slice size such that a larger slice never has a smaller one; the largest size takes all that is left.

    PARIS, step 1: B[k] = max(B[k], B[k-1]), B[largest] = Bmax; none lies beyond Bmax.
    """
    result: dict[int, int] = {}
    below = 0
    for gpcs in sorted(knees):
        below = result[gpcs] = min(max(knees[gpcs], below), max_batch)
    result[max(knees)] = max_batch
    return result


def _csv_rows(text: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def _from_json(text: str, origin: str) -> list[Measurement]:
    try:
        rows = json.loads(text)["measurements"]
        return _parse([{key: value for key, value in row.items() if value is not None} for row in rows], origin, 1)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise LatencyTableError(f'{origin}: expected JSON of the form {{"measurements": [...]}}: {error}') from error


def _parse(rows: Iterable[Mapping[str, Any]], origin: str, first: int = 2) -> list[Measurement]:
    """`first`: what the first row is called in an error, the line of a CSV file or the number of a JSON row."""
    found = []
    for line, row in enumerate(rows, start=first):
        try:
            found.append(_measurement(row))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            where = "line" if first == 2 else "measurement"
            if isinstance(error, KeyError):
                raise LatencyTableError(f"{origin}, {where} {line}: {_missing(row)}") from error
            raise LatencyTableError(f"{origin}, {where} {line}: {error!r} in {dict(row)}") from error
    return found


def _missing(row: Mapping[str, Any]) -> str:
    """What to say of a row without what is needed."""
    missing = [name for name in ("model", "mig_profile", "batch") if row.get(name) is None]
    if not row.get("latency_ms") and not row.get("items_per_s"):
        missing.append("latency_ms (or items_per_s)")
    there = ", ".join(map(str, row))[:200]
    return f"{', '.join(missing)} missing; needed are model, mig_profile, batch and latency_ms, there are {there}"


def _measurement(row: Mapping[str, Any]) -> Measurement:
    batch, processes = int(row["batch"]), int(row.get("processes") or 1)
    rate, memory, seq_len = row.get("items_per_s"), row.get("memory_mib"), row.get("seq_len")
    latency_ms = 1e3 * batch * processes / float(rate) if rate else float(row["latency_ms"])
    if batch < 1 or processes < 1 or not 0 < latency_ms < float("inf"):
        raise ValueError("batch, processes and latency must be positive")
    return Measurement(
        model=row["model"],
        mig_profile=row["mig_profile"],
        gpcs=int(row.get("gpcs") or row["mig_profile"].removeprefix(CPU).split("g")[0]),
        batch=batch,
        processes=processes,
        latency_ms=latency_ms,
        memory_mib=float(memory) if memory else None,
        gpu=row.get("gpu") or "",
        source=row.get("source") or "",
        seq_len=int(seq_len) if seq_len else None,
    )
