"""The file that `migserve profile` writes: a latency table that grows by a row a point, and survives any end."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from partitioner.latency import PREDICTED, LatencyTableError, Measurement, basis, is_predicted, read_measurements
from partitioner.performance import Point, point_of

# What `partitioner/latency.py` reads, and what says how a row came to be. `within`: share of the median that it is
# known to. `energy_j`: of a batch, by the counter of the whole GPU; `sm_activity`: share of SMs that were busy.
# `model_file`: its digest, see model_identity.py.
COLUMNS = (
    *Measurement.__dataclass_fields__, "items_per_s", "runs", "outliers", "within", "driver", "versions",
    "energy_j", "sm_activity", "model_file",
)  # fmt: skip
OLDER_FORMS = (COLUMNS[:-1], COLUMNS[:-3])


def half_of(path: Path) -> Path:
    """A file beside it, which takes its place once it is whole."""
    return path.with_name(f".{path.name}.half")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LatencyTableError(f"cannot write {path}: {error.strerror}") from error


class TableFile:
    """Rows of one model on one kind of device, in a file that may hold others too; `source`: how they are measured.

    `model_file`: digest of the model's file, empty where it has none. `anew`: what is there of this model on this
    device does not count; it is dropped by `forget`. Raises LatencyTableError, also where it cannot be written.
    """

    def __init__(
        self, path: Path, model: str, gpu: str, source: str, model_file: str = "", *, anew: bool = False
    ) -> None:
        self._path, self._model, self._gpu, self._model_file, self._anew = path, model, gpu, model_file, anew
        if path.exists():
            if not path.is_file():  # such as a device, which reading may never come to the end of
                raise self._foreign()
            self._repair()
        if not anew:
            self._check(source)

    def _check(self, source: str) -> None:
        """What was measured in another way, or of another file of that name, is not gone on with."""
        mine = [each for each in self._rows() if (each.model, each.gpu) == (self._model, self._gpu)]
        others = {basis(each.source) for each in mine} - {source, PREDICTED}
        what = f"{self._path} has rows of {self._model} on {self._gpu} that are"
        instead = "name another --out, or give --anew, which drops them"
        if others:
            raise LatencyTableError(f"{what} {', '.join(sorted(others))}, not {source}: {instead}")
        # Rows of a release that noted no digest may be of any file.
        files = {row["model_file"] for row in self._lines_of_this() if row.get("model_file")}
        if self._model_file and files - {self._model_file}:
            raise LatencyTableError(f"{what} of another model file than the one that is there now: {instead}")

    def _lines_of_this(self) -> Iterator[dict[str, str]]:
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            row = _by_column(line)
            if self._is_of_this(row):
                yield row

    def _is_of_this(self, row: Mapping[str, str]) -> bool:
        return (row.get("model"), row.get("gpu")) == (self._model, self._gpu)

    def known(self) -> dict[Point, float]:
        """What was measured before, and counts."""
        if self._anew:
            return {}
        return {point_of(each): each.latency_ms for each in self._rows() if self._is_ours(each)}

    def _rows(self) -> list[Measurement]:
        return read_measurements(self._path) if self._path.exists() else []

    def _is_ours(self, each: Measurement) -> bool:
        return (each.model, each.gpu) == (self._model, self._gpu) and not is_predicted(each.source)

    def forget(self) -> None:
        """Drops what is there of this model on this device, in one step."""
        if self._path.exists():
            self._replace_without(lambda row: True, [])

    def add(self, row: Measurement, how: Mapping[str, object]) -> None:
        """Appends a row; it is on the disk when this returns."""
        with _told(self._path):
            new = not self._path.exists() or self._path.stat().st_size == 0
            with self._path.open("a", newline="") as file:
                file.write((_header() if new else "") + self._line(row, how))
                file.flush()
                os.fsync(file.fileno())

    def finish(self, predicted: Sequence[Measurement], how: Mapping[str, object]) -> None:
        """Puts predicted rows in the place of older ones, in one step."""
        self._replace_without(
            lambda row: is_predicted(row.get("source") or ""), [self._line(row, how) for row in predicted]
        )

    def _line(self, row: Measurement, how: Mapping[str, object]) -> str:
        values = {**asdict(row), "items_per_s": row.items_per_s, **how, "model_file": self._model_file}
        return _csv([_shown(values.get(column)) for column in COLUMNS])

    def _replace_without(self, drop: Callable[[Mapping[str, str]], bool], new: Sequence[str]) -> None:
        """Of the rows of this model on this device, those that are not dropped stay."""
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else [_header()]
        rows = map(_by_column, lines)
        kept = [line for line, row in zip(lines, rows, strict=True) if not (self._is_of_this(row) and drop(row))]
        self._replace("".join([*kept, *new]))

    def _replace(self, text: str) -> None:
        with _told(self._path):
            half = half_of(self._path)
            half.write_text(text)
            os.replace(half, self._path)

    def _repair(self) -> None:
        """Takes off a last line that was cut short. A file of another form is left alone."""
        text = self._text()
        first = text.partition("\n")[0]
        if first in map(",".join, OLDER_FORMS):
            text = _header() + text[len(first) + 1 :]
            self._replace(text)
        elif text and first != _header().rstrip():
            raise self._foreign()
        if text and not text.endswith("\n"):
            with self._path.open("r+") as file:
                file.truncate(len(text[: text.rfind("\n") + 1].encode()))

    def _text(self) -> str:
        try:
            return self._path.read_text()
        except OSError as error:
            raise LatencyTableError(f"cannot read {self._path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise self._foreign() from error

    def _foreign(self) -> LatencyTableError:
        return LatencyTableError(f"{self._path} is there and was not written by migserve profile; name another --out")


def _header() -> str:
    return _csv(COLUMNS)


def _by_column(line: str) -> dict[str, str]:
    return dict(zip(COLUMNS, next(csv.reader([line])), strict=False))


def _shown(value: object) -> object:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def _csv(values: Sequence[object]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(values)
    return out.getvalue()
