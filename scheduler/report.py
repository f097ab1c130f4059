"""What a simulation has shown, per model and per slice. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

NS_PER_MS = 1e6
# Upper ends of the classes of queries by size, in which the late ones are counted.
SIZES = (1, 4, 9, 19, 1_000_000)


class Span(NamedTuple):
    """One batch on one slice, for a timeline."""

    slice_name: str
    start_ns: int
    end_ns: int
    model: str
    items: int


@dataclass(slots=True)
class Tally:
    """What is counted of one model while it runs; one latency and its items per answer."""

    slo_ms: float | None
    sent: int = 0
    latencies_ns: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    refused_items: list[int] = field(default_factory=list)
    refused_after_ns: int = 0  # the longest that one had waited
    late: int = 0  # answered after the SLO
    slo_ns: float = field(init=False)

    def __post_init__(self) -> None:
        self.slo_ns = math.inf if self.slo_ms is None else self.slo_ms * NS_PER_MS

    def answer(self, latency_ns: int, items: int) -> None:
        self.latencies_ns.append(latency_ns)
        self.items.append(items)
        if latency_ns > self.slo_ns:
            self.late += 1

    def refuse(self, reason: str, items: int, waited_ns: int) -> None:
        self.refused[reason] += 1
        self.refused_items.append(items)
        self.refused_after_ns = max(self.refused_after_ns, waited_ns)


class LateShare(NamedTuple):
    """Of the queries with `from_items` to `to_items` items, how many were sent, and how many not answered in time."""

    from_items: int
    to_items: int
    sent: int
    late: int


@dataclass(frozen=True, slots=True)
class ModelReport:
    """Of one model. `within_slo`: share of what was sent that was answered in time (answered at all, without an SLO).

    Latencies are of what was answered; NaN if nothing was. `refused_after_ms`: the longest that a refused one waited.
    """

    sent: int
    answered: int
    refused: Mapping[str, int]
    within_slo: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    late_by_items: tuple[LateShare, ...]
    refused_after_ms: float = 0.0

    @property
    def expired(self) -> int:
        return self.refused.get("expired", 0)

    @property
    def refused_share(self) -> float:
        """Of what was sent."""
        return sum(self.refused.values()) / max(self.sent, 1)


@dataclass(frozen=True, slots=True)
class Report:
    """Of a whole simulation. `utilisation`: busy share of each slice, by its name, over `seconds`.

    One that was given up is not `complete`: its figures are of what had ended by then.
    """

    models: Mapping[str, ModelReport]
    utilisation: Mapping[str, float]
    seconds: float
    batches: int
    timeline: Sequence[Span]
    complete: bool = True

    @property
    def worst_within_slo(self) -> float:
        """The least share within SLO of any model; 1 if nothing was sent."""
        return min((model.within_slo for model in self.models.values()), default=1.0)


def summarise(
    tallies: Mapping[str, Tally],
    busy_ns: Mapping[str, int],
    batches: int,
    end_ns: int,
    timeline: Sequence[Span],
    *,
    complete: bool = True,
) -> Report:
    """The report of a simulation that lasted from 0 to `end_ns`."""
    models = {model: _model_report(tally) for model, tally in sorted(tallies.items())}
    utilisation = {name: busy / max(end_ns, 1) for name, busy in busy_ns.items()}
    return Report(models, utilisation, end_ns / 1e9, batches, timeline, complete)


def _model_report(tally: Tally) -> ModelReport:
    latencies_ms = np.array(tally.latencies_ns, dtype=float) / NS_PER_MS
    items = np.array(tally.items, dtype=int)
    slo_ms = np.inf if tally.slo_ms is None else tally.slo_ms
    late = latencies_ms > slo_ms
    p50, p95, p99, most = (float(each) for each in _quantiles(latencies_ms))
    return ModelReport(
        tally.sent,
        len(items),
        dict(tally.refused),
        (len(items) - int(late.sum())) / max(tally.sent, 1),
        p50,
        p95,
        p99,
        most,
        _late_by_items(items, late, np.array(tally.refused_items, dtype=int)),
        tally.refused_after_ns / NS_PER_MS,
    )


def _quantiles(values: np.ndarray) -> np.ndarray:
    quantiles = [0.5, 0.95, 0.99, 1.0]
    return np.quantile(values, quantiles) if len(values) else np.full(len(quantiles), np.nan)


def _late_by_items(items: np.ndarray, late: np.ndarray, refused_items: np.ndarray) -> tuple[LateShare, ...]:
    shares = []
    lowest = 1
    for highest in SIZES:
        refused = int(((refused_items >= lowest) & (refused_items <= highest)).sum())
        of_this_size = (items >= lowest) & (items <= highest)
        sent = int(of_this_size.sum()) + refused
        if sent:
            shares.append(LateShare(lowest, highest, sent, int((of_this_size & late).sum()) + refused))
        lowest = highest + 1
    return tuple(shares)
