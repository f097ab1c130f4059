"""Arrivals for the simulator: Poisson, bursty, diurnal, from a trace; several models merged. Pure, seeded."""

from __future__ import annotations

import csv
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

NS_PER_S = 1_000_000_000
BLOCK = 1024


class Arrival(NamedTuple):
    """A query of `items` items for a model; `length` is its varying axis (tokens), 0 where it has none."""

    at_ns: int
    model: str
    items: int = 1
    length: int = 0


Sizes = Callable[[np.random.Generator, int], np.ndarray]


class TraceError(ValueError):
    """A trace that cannot be read. The message names the line."""


def constant(items: int) -> Sizes:
    """Every query has that many items."""
    return lambda _, count: np.full(count, items)


def log_normal(median: float = 6.0, sigma: float = 0.9, most: int = 32, least: int = 1) -> Sizes:
    """Rounded, clipped to least..most. The defaults are those of the workload that PARIS and ELSA are judged by."""

    def draw(generator: np.random.Generator, count: int) -> np.ndarray:
        return np.clip(np.rint(generator.lognormal(math.log(median), sigma, count)), least, most).astype(int)

    return draw


W_PAPER = log_normal()
# Tokens: the median in the middle of 16..512, by ratio, and 95 % inside.
W_LENGTH = log_normal(math.sqrt(16 * 512), math.log(512 / 16) / 4, 512, 16)


def poisson(
    model: str, rate_per_s: float, seconds: float, seed: int, sizes: Sizes | None = None, lengths: Sizes | None = None
) -> Iterator[Arrival]:
    """Queries of one model at a steady mean rate, for `seconds`."""
    generator = np.random.default_rng(seed)
    return _dress(generator, model, _poisson_times(generator, rate_per_s, 0.0, seconds), sizes, lengths)


def bursty(
    model: str,
    rate_per_s: float,
    seconds: float,
    seed: int,
    sizes: Sizes | None = None,
    lengths: Sizes | None = None,
    *,
    burst_factor: float = 3.0,
    burst_s: float = 0.5,
    calm_s: float = 4.5,
) -> Iterator[Arrival]:
    """A Markov-modulated Poisson process with two states, of the mean rate `rate_per_s` over all.

    Bursts have `burst_factor` times the rate of calm times; both last exponential times of these means.
    """
    generator = np.random.default_rng(seed)
    calm_per_s = rate_per_s * (burst_s + calm_s) / (burst_factor * burst_s + calm_s)
    times = _modulated_times(generator, calm_per_s, burst_factor, burst_s, calm_s, seconds)
    return _dress(generator, model, times, sizes, lengths)


def diurnal(
    model: str,
    rate_per_s: float,
    seconds: float,
    seed: int,
    sizes: Sizes | None = None,
    lengths: Sizes | None = None,
    *,
    swing: float = 0.5,
    period_s: float = 60.0,
) -> Iterator[Arrival]:
    """Poisson with a rate that follows a sine of that period: `rate_per_s * (1 + swing * sin)`, by thinning."""
    generator = np.random.default_rng(seed)
    most = 1 + swing
    times = (
        at_s
        for at_s in _poisson_times(generator, rate_per_s * most, 0.0, seconds)
        if generator.random() * most < 1 + swing * math.sin(2 * math.pi * at_s / period_s)
    )
    return _dress(generator, model, times, sizes, lengths)


def trace(lines: Iterable[str]) -> Iterator[Arrival]:
    """Arrivals of a CSV with the columns `seconds, model, items, length` (the last two may be missing).

    Raises TraceError for what is no such CSV, or not sorted by time.
    """
    reader = csv.DictReader(lines)
    last_ns = 0
    try:
        missing = [column for column in ("seconds", "model") if column not in (reader.fieldnames or ())]
        if missing:
            there = ", ".join(reader.fieldnames or ()) or "nothing"
            raise TraceError(
                f"line 1: {missing[0]} is missing; the columns are seconds, model, items, length, there is {there}"
            )
        for row in reader:
            arrival = _recorded(row, f"line {reader.line_num}")
            if arrival.at_ns < last_ns:
                raise TraceError(
                    f"line {reader.line_num}: {row['seconds']} s is before the line above; sort the trace by seconds"
                )
            last_ns = arrival.at_ns
            yield arrival
    except csv.Error as error:
        raise TraceError(f"after line {reader.line_num}: {error}") from error


def _recorded(row: Mapping[str, str | None], where: str) -> Arrival:
    """Raises TraceError."""
    model = (row["model"] or "").strip()
    if not model:
        raise TraceError(f"{where}: a query has a model; there is {list(row.values())}")
    try:
        at_ns = round(float(row["seconds"] or "") * NS_PER_S)
    except (ValueError, OverflowError) as error:
        raise TraceError(f"{where}: seconds is {row['seconds']!r}, not a number") from error
    return Arrival(at_ns, model, _whole(row, "items", 1, where), _whole(row, "length", 0, where))


def _whole(row: Mapping[str, str | None], column: str, least: int, where: str) -> int:
    """A whole number of at least `least`, which also stands for an empty field."""
    text = row.get(column) or str(least)
    try:
        number = int(text)
    except ValueError as error:
        raise TraceError(f"{where}: {column} is {text!r}, not a whole number") from error
    if number < least:
        raise TraceError(f"{where}: {column} is {number}, must be at least {least}")
    return number


def write_trace(arrivals: Iterable[Arrival]) -> Iterator[str]:
    """The lines of the CSV that `trace` reads, without their ends."""
    yield "seconds,model,items,length"
    for at_ns, model, items, length in arrivals:
        yield f"{at_ns / NS_PER_S:.9f},{model},{items},{length or ''}"


def merge(*streams: Iterable[Arrival]) -> Iterator[Arrival]:
    """Several streams as one, by time; ties by model, then in the order given."""
    return heapq.merge(*streams, key=lambda arrival: arrival[:2])


def _poisson_times(generator: np.random.Generator, rate_per_s: float, from_s: float, until_s: float) -> Iterator[float]:
    if rate_per_s <= 0:
        return
    at_s = from_s
    while True:
        times = at_s + np.cumsum(generator.exponential(1 / rate_per_s, BLOCK))
        at_s = float(times[-1])
        if at_s >= until_s:
            yield from times[times < until_s].tolist()
            return
        yield from times.tolist()


def _modulated_times(
    generator: np.random.Generator, calm_per_s: float, factor: float, burst_s: float, calm_s: float, seconds: float
) -> Iterator[float]:
    at_s = 0.0
    bursting = bool(generator.random() < burst_s / (burst_s + calm_s))
    while at_s < seconds:
        end_s = at_s + float(generator.exponential(burst_s if bursting else calm_s))
        rate_per_s = calm_per_s * (factor if bursting else 1.0)
        yield from _poisson_times(generator, rate_per_s, at_s, min(end_s, seconds))
        at_s, bursting = end_s, not bursting


def _dress(
    generator: np.random.Generator, model: str, times: Iterator[float], sizes: Sizes | None, lengths: Sizes | None
) -> Iterator[Arrival]:
    """Gives times their sizes and lengths, drawn in blocks."""
    # Of a generator of their own, so that the times do not depend on what is drawn beside them.
    drawn = generator.spawn(1)[0]
    items = _stream(drawn, sizes)
    tokens = _stream(drawn, lengths)
    for at_s in times:
        at_ns = round(at_s * NS_PER_S)
        yield Arrival(at_ns, model, next(items) if items else 1, next(tokens) if tokens else 0)


def _stream(generator: np.random.Generator, sizes: Sizes | None) -> Iterator[int] | None:
    if sizes is None:
        return None

    def draw() -> Iterator[int]:
        while True:
            yield from sizes(generator, BLOCK).tolist()

    return draw()
