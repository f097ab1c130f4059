"""Latency tables by input length, from measurements of which few were made at other lengths than one. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from partitioner.latency import LatencyTableError, Measurement, per_batch


class LengthTable(NamedTuple):
    """Of one model on one slice size: `rows[i][b - 1]` is the time in ms of b items padded to `lengths[i]`."""

    lengths: tuple[int, ...]
    rows: tuple[tuple[float, ...], ...]


def length_tables(measurements: Iterable[Measurement], model: str, max_batch: int) -> dict[int, LengthTable]:
    """By GPCs, for the rows of one process that name a `seq_len`. Raises LatencyTableError if there is none.

    The length with the most batch sizes is the reference. Any other is given by its largest measured batch: an item
    of that length weighs as many items of the reference as take the same time in such a batch, also in smaller ones.
    (Work grows with the tokens, and a GPU that they do not fill takes no longer for more of them: our reading, for
    tables that do not have all lengths at all batch sizes.)
    """
    points: dict[int, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for each in measurements:
        if each.model == model and each.processes == 1 and each.seq_len:
            points[each.gpcs][each.seq_len][each.batch] = each.latency_ms
    if not points:
        raise LatencyTableError(f"no measurements of {model!r} name a seq_len")
    return {gpcs: _table(by_length, max_batch) for gpcs, by_length in sorted(points.items())}


def _table(by_length: dict[int, dict[int, float]], max_batch: int) -> LengthTable:
    reference = max(by_length, key=lambda length: (len(by_length[length]), -length))
    times = per_batch(sorted(by_length[reference].items()), max(by_length[reference]))
    lengths = tuple(sorted(by_length))
    rows = [_row(times, by_length[length], max_batch) for length in lengths]
    for index in range(1, len(rows)):  # longer is never faster
        rows[index] = tuple(max(pair) for pair in zip(rows[index], rows[index - 1], strict=True))
    return LengthTable(lengths, tuple(rows))


def _row(reference: Sequence[float], measured: dict[int, float], max_batch: int) -> tuple[float, ...]:
    batch = max(measured)
    sizes = np.arange(1, len(reference) + 1)
    weight = _inverse(reference, measured[batch]) / batch
    last = reference[-1] / len(reference)
    return tuple(
        float(np.interp(items, sizes, reference)) if items <= len(reference) else items * last
        for items in (weight * size for size in range(1, max_batch + 1))
    )


def _inverse(times: Sequence[float], ms: float) -> float:
    """How many items take so long; below the time of one, in proportion to it, beyond the last likewise."""
    if ms <= times[0]:
        return ms / times[0]
    if ms >= times[-1]:
        return len(times) * ms / times[-1]
    return float(np.interp(ms, times, np.arange(1, len(times) + 1)))
