"""A latency table as a picture: ms by batch, both in doublings, a colour for each slice and number of processes; and
in a few lines, for the terminal."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from partitioner.latency import Measurement, is_predicted
from partitioner.performance import Point
from server.shapes import COLOURS, GRID_PX, IDLE, INK, LEFT_PX, MARGIN_PX, TOP_PX, Box, Label, Shape, save

HEIGHT_PX, DOT_PX = 360, 8


def summary(ms_of: Mapping[Point, float]) -> Table:
    """What was measured, a line for each slice, length and number of processes: its smallest batch, and its best."""
    table = Table("slice", "length", "processes", "smallest batch", "ms", "most items/s", "by batches of", "ms")
    groups: dict[Point, dict[int, float]] = defaultdict(dict)
    for point, ms in ms_of.items():
        groups[point._replace(batch=0)][point.batch] = ms
    for group, by_batch in groups.items():
        smallest, best = min(by_batch), max(by_batch, key=lambda batch: batch / by_batch[batch])
        rate = f"{group.processes * best / by_batch[best] * 1e3:,.0f}"
        named = group.mig_profile, str(group.seq_len or ""), str(group.processes)
        table.add_row(*named, str(smallest), f"{by_batch[smallest]:.2f}", rate, str(best), f"{by_batch[best]:.2f}")
    return table


def write(rows: Sequence[Measurement], path: Path) -> None:
    """Draws to a file, by its suffix. Raises ValueError for another suffix than .svg and .png, OSError."""
    save(list(draw(rows)), TOP_PX + HEIGHT_PX + 3 * MARGIN_PX + 18 * (1 + len(_groups(rows)) // 4), path)


def draw(rows: Sequence[Measurement]) -> Iterator[Shape]:
    """Measured points are large, predicted ones small."""
    title = f"{rows[0].model} on {rows[0].gpu}: ms of a batch; large dots were measured, small ones predicted"
    yield Label(MARGIN_PX, MARGIN_PX, title, 15, LEFT_PX + GRID_PX)
    across = _Scale([row.batch for row in rows], LEFT_PX, LEFT_PX + GRID_PX - DOT_PX)
    up = _Scale([row.latency_ms for row in rows], TOP_PX + HEIGHT_PX, TOP_PX)
    for batch in sorted({row.batch for row in rows}):
        yield Label(across.at(batch), TOP_PX + HEIGHT_PX + 12, str(batch), 12, 60)
    for ms in up.doublings():
        yield Box(LEFT_PX, up.at(ms) + DOT_PX / 2, GRID_PX, 1, IDLE)
        yield Label(MARGIN_PX, up.at(ms) - 3, f"{ms:g}", 12, LEFT_PX - MARGIN_PX)
    groups = _groups(rows)
    for row in rows:
        size = DOT_PX / 2 if is_predicted(row.source) else DOT_PX
        shift = (DOT_PX - size) / 2
        colour = COLOURS[groups.index(_group(row)) % len(COLOURS)]
        yield Box(across.at(row.batch) + shift, up.at(row.latency_ms) + shift, size, size, colour)
    yield Box(LEFT_PX, TOP_PX + HEIGHT_PX + DOT_PX, GRID_PX, 1, INK)
    for index, group in enumerate(groups):
        x, y = LEFT_PX + index % 4 * GRID_PX / 4, TOP_PX + HEIGHT_PX + 36 + index // 4 * 18
        yield Box(x, y, 12, 12, COLOURS[index % len(COLOURS)])
        yield Label(x + 18, y, group, 12, GRID_PX / 4 - 20)


def _group(row: Measurement) -> str:
    length = f", length {row.seq_len}" if row.seq_len else ""
    return f"{row.mig_profile} x {row.processes}{length}"


def _groups(rows: Sequence[Measurement]) -> list[str]:
    return list(dict.fromkeys(map(_group, sorted(rows, key=lambda r: (r.gpcs, r.processes, r.seq_len or 0)))))


class _Scale:
    """Doublings along pixels."""

    def __init__(self, values: Sequence[float], begin_px: float, end_px: float) -> None:
        self._least, self._most = min(values), max(values)
        self._begin_px, self._end_px = begin_px, end_px

    def at(self, value: float) -> float:
        room = math.log(self._most / self._least) or 1.0
        return self._begin_px + math.log(value / self._least) / room * (self._end_px - self._begin_px)

    def doublings(self) -> list[float]:
        first, last = math.ceil(math.log2(self._least)), math.floor(math.log2(self._most))
        return [2.0**power for power in range(first, last + 1)]
