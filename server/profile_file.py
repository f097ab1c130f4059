"""The file that `migserve profile` writes: a latency table that grows by a row a point, and survives any end."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from partitioner.latency import PREDICTED, LatencyTableError, Measurement, basis, is_predicted, read_measurements
from partitioner.performance import Point, point_of

# What `partitioner/latency.py` reads, and what says how a row came to be. `within`: share of the median that it is
# known to. `energy_j`: of a batch, by the counter of the whole GPU; `sm_activity`: share of SMs that were busy.
COLUMNS = (
    *Measurement.__dataclass_fields__, "items_per_s", "runs", "outliers", "within", "driver", "versions",
    "energy_j", "sm_activity",
)  # fmt: skip
NEW_COLUMNS = 2


class TableFile:
    """Rows of one model on one kind of device, in a file that may hold others too; `source`: how they are measured.

    Raises LatencyTableError.
    """

    def __init__(self, path: Path, model: str, gpu: str, source: str) -> None:
        self._path, self._model, self._gpu = path, model, gpu
        if path.exists():
            self._repair()
        mine = [each for each in self._rows() if (each.model, each.gpu) == (model, gpu)]
        others = {basis(each.source) for each in mine} - {source, PREDICTED}
        if others:
            raise LatencyTableError(
                f"{path} has rows of {model} on {gpu} that are {', '.join(sorted(others))}, not {source}: "
                f"name another --out"
            )

    def known(self) -> dict[Point, float]:
        """What was measured before."""
        return {point_of(each): each.latency_ms for each in self._rows() if self._is_ours(each)}

    def _rows(self) -> list[Measurement]:
        return read_measurements(self._path) if self._path.exists() else []

    def _is_ours(self, each: Measurement) -> bool:
        return (each.model, each.gpu) == (self._model, self._gpu) and not is_predicted(each.source)

    def add(self, row: Measurement, how: Mapping[str, object]) -> None:
        """Appends a row; it is on the disk when this returns."""
        new = not self._path.exists() or self._path.stat().st_size == 0
        with self._path.open("a", newline="") as file:
            file.write((_header() if new else "") + _line(row, how))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, predicted: Sequence[Measurement], how: Mapping[str, object]) -> None:
        """Puts predicted rows in the place of older ones, in one step."""
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else [_header()]
        old = [self._is_old_prediction(line) for line in lines]
        kept = [line for line, drop in zip(lines, old, strict=True) if not drop]
        self._replace("".join([*kept, *(_line(row, how) for row in predicted)]))

    def _replace(self, text: str) -> None:
        half = self._path.with_name(f".{self._path.name}.half")
        half.write_text(text)
        os.replace(half, self._path)

    def _is_old_prediction(self, line: str) -> bool:
        row = dict(zip(COLUMNS, next(csv.reader([line])), strict=False))
        return (row.get("model"), row.get("gpu")) == (self._model, self._gpu) and is_predicted(row.get("source") or "")

    def _repair(self) -> None:
        """Takes off a last line that was cut short. A file of another form is left alone."""
        text = self._path.read_text()
        first = text.partition("\n")[0]
        if first == ",".join(COLUMNS[:-NEW_COLUMNS]):  # of a release that had no others
            text = _header() + text[len(first) + 1 :]
            self._replace(text)
        elif text and first != _header().rstrip():
            raise LatencyTableError(
                f"{self._path} is there and was not written by migserve profile; name another --out"
            )
        if text and not text.endswith("\n"):
            with self._path.open("r+") as file:
                file.truncate(len(text[: text.rfind("\n") + 1].encode()))


def _header() -> str:
    return _csv(COLUMNS)


def _line(row: Measurement, how: Mapping[str, object]) -> str:
    values = {**asdict(row), "items_per_s": row.items_per_s, **how}
    return _csv([_shown(values.get(column)) for column in COLUMNS])


def _shown(value: object) -> object:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def _csv(values: Sequence[object]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(values)
    return out.getvalue()
