"""What a simulation is fed with: streams of several models at one total rate, or a recorded trace. Pure, seeded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from scheduler import workload
from scheduler.workload import NS_PER_S, Arrival, Sizes

ARRIVALS = ("poisson", "bursty", "diurnal")
# So many days a run of diurnal arrivals, and at least so many seconds one of bursty ones, about five cycles.
DAYS, BURSTY_SECONDS = 2, 25.0
# The rarest model of a mix gets about so many queries, unless the run became longer than by this factor.
RARE_QUERIES, MOST_STRETCH = 300, 4.0


class Load(Protocol):
    """Queries at any mean rate, of all models together."""

    def draw(self, rate_per_s: float, queries: int, seed: int) -> list[Arrival]:
        """About so many, sorted by time."""

    @property
    def items(self) -> Mapping[str, float]:
        """Mean items of a query, by model."""

    @property
    def shares(self) -> Mapping[str, float]:
        """Of the queries, by model; in all 1."""

    @property
    def lengths(self) -> Mapping[str, Mapping[int, float]]:
        """Of the items of each model, the share that has that length; 0: none."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Queries of one model: its share of all, how many items they carry, how long their input is."""

    model: str
    share: float = 1.0
    sizes: Sizes | None = None
    lengths: Sizes | None = None


@dataclass(frozen=True)
class Mix:
    """Independent streams. `arrivals`: one of ARRIVALS."""

    streams: Sequence[Stream]
    arrivals: str = "poisson"

    def draw(self, rate_per_s: float, queries: int, seed: int) -> list[Arrival]:
        rarest = min(stream.share for stream in self.streams)
        total = min(max(queries, RARE_QUERIES / rarest), MOST_STRETCH * queries)
        seconds = total / rate_per_s
        if self.arrivals == "bursty":
            seconds = max(seconds, BURSTY_SECONDS)
        # Apart for each stream and each seed.
        seeds = (seed * len(self.streams) + index for index in range(len(self.streams)))
        drawn = (self._stream(each, rate_per_s, seconds, own) for each, own in zip(self.streams, seeds, strict=True))
        return list(workload.merge(*drawn))

    def _stream(self, stream: Stream, rate_per_s: float, seconds: float, seed: int) -> Iterator[Arrival]:
        asked = (stream.model, stream.share * rate_per_s, seconds, seed, stream.sizes, stream.lengths)
        match self.arrivals:
            case "bursty":
                return workload.bursty(*asked)
            case "diurnal":
                return workload.diurnal(*asked, period_s=seconds / DAYS)
            case _:
                return workload.poisson(*asked)

    @property
    def items(self) -> dict[str, float]:
        return {stream.model: _mean(stream) for stream in self.streams}

    @property
    def shares(self) -> dict[str, float]:
        return {stream.model: stream.share for stream in self.streams}

    @property
    def lengths(self) -> dict[str, dict[int, float]]:
        return {stream.model: _of_lengths(stream) for stream in self.streams}


def _of_lengths(stream: Stream) -> dict[int, float]:
    if stream.lengths is None:
        return {0: 1.0}
    drawn = Counter(arrival.length for arrival in workload.poisson("", 1000.0, 200.0, 0, None, stream.lengths))
    return {length: count / drawn.total() for length, count in sorted(drawn.items())}


def _mean(stream: Stream) -> float:
    if stream.sizes is None:
        return 1.0
    drawn = [arrival.items for arrival in workload.poisson("", 1000.0, 200.0, 0, stream.sizes)]
    return sum(drawn) / len(drawn)


@dataclass(frozen=True)
class Trace:
    """What was recorded, in full, whatever is asked for; at another rate its times are stretched."""

    arrivals: Sequence[Arrival]
    rate_per_s: float = field(init=False)

    def __post_init__(self) -> None:
        first, last = self.arrivals[0].at_ns, self.arrivals[-1].at_ns
        rate_per_s = (len(self.arrivals) - 1) * NS_PER_S / (last - first) if last > first else 1.0
        object.__setattr__(self, "rate_per_s", rate_per_s)

    def draw(self, rate_per_s: float, queries: int, seed: int) -> list[Arrival]:
        first = self.arrivals[0].at_ns
        stretch = self.rate_per_s / rate_per_s
        return [each._replace(at_ns=round((each.at_ns - first) * stretch)) for each in self.arrivals]

    @property
    def items(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for arrival in self.arrivals:
            total[arrival.model] += arrival.items
        queries = Counter(arrival.model for arrival in self.arrivals)
        return {model: total[model] / count for model, count in queries.items()}

    @property
    def shares(self) -> dict[str, float]:
        queries = Counter(arrival.model for arrival in self.arrivals)
        return {model: count / len(self.arrivals) for model, count in queries.items()}

    @property
    def lengths(self) -> dict[str, dict[int, float]]:
        items: dict[str, Counter[int]] = {}
        for arrival in self.arrivals:
            items.setdefault(arrival.model, Counter())[arrival.length] += arrival.items
        return {
            model: {length: count / of_model.total() for length, count in of_model.items()}
            for model, of_model in items.items()
        }
