"""Which part of the slices' time each line of work may count on, by what all lines ask for. Pure.

A line is what waits of one kind (model and length bucket), company and class. It asks for as much time as its last
arrivals take at the slices' best, and asks less of a slice the more others ask of it: what all ask of the slices thus
becomes even, as far as they serve the same models, in a few rounds; the next time it goes on from there. A slice's time
is shared max-min fairly among models, by their weights; lines of one model get of its part what they ask of that; lower
classes share what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from scheduler.domain import Pool
from scheduler.policies.lanes import Lanes, LanesKey
from scheduler.policies.rates import RateBook, Rates

# Shares are made anew after so long.
KEPT_NS = 20_000_000
# From FULL of what there is, asking for more begins to count; from OVERFULL on it does wholly.
FULL, OVERFULL = 0.95, 1.05
# How fast lines turn to slices of which less is asked.
TURN = 0.5
# What they go on asking of any slice, of all of its time.
LEAST_ASKED = 1e-4


class Share(NamedTuple):
    """`part`: of the time of the slices that serve the line, its own. `pressed`: 0 if it asks for less than that, 1 if
    it asks for more; `full`: 0 if all lines of its class and of higher ones ask these slices for less than all of their
    time, 1 if more."""

    part: float
    pressed: float
    full: float


ALL = Share(1.0, 0.0, 0.0)


class Shares:
    """`lanes`: all lines that are known."""

    def __init__(self, pool: Pool, rates: RateBook, lanes: Mapping[LanesKey, Lanes]) -> None:
        self._pool = pool
        self._rates = rates
        self._lanes = lanes
        self._shares: dict[LanesKey, Share] = {}
        self._asked: dict[LanesKey, dict[int, float]] = {}  # of each slice's time
        self._next_ns = 0
        self._changes = -1

    def of(self, now_ns: int, key: LanesKey) -> Share:
        if now_ns >= self._next_ns or self._changes != self._pool.changes:
            if self._changes != self._pool.changes:
                self._changes = self._pool.changes
                self._asked.clear()
            self._next_ns = now_ns + KEPT_NS
            self._share(now_ns)
        return self._shares.get(key, ALL)

    def _share(self, now_ns: int) -> None:
        lines = self._lines(now_ns)
        if len(lines) == 1:  # what follows comes to the same, and takes longer
            self._shares = {key: Share(1.0, 0.0, _beyond(asks)) for key, (asks, _) in lines.items()}
            return
        self._asked = {
            key: self._asked.get(key) or dict.fromkeys(rates.ids, asks) for key, (asks, rates) in lines.items()
        }
        parts: dict[LanesKey, dict[int, float]] = {key: {} for key in lines}
        load: dict[int, dict[int, float]] = {}
        for worker in self._pool.workers.values():
            here = {key: asked[worker.id] for key, asked in self._asked.items() if worker.id in asked}
            load[worker.id] = _loads(here)
            for key, part in _parts(here, self._pool.weights).items():
                parts[key][worker.id] = part
        self._shares = {key: self._settle(key, *line, parts[key], load) for key, line in lines.items()}

    def _lines(self, now_ns: int) -> dict[LanesKey, tuple[float, Rates]]:
        """What each asks for, of the time of the slices that serve it."""
        lines = {}
        for key, lanes in self._lanes.items():
            asks_per_ns = lanes.arriving.per_ns(now_ns)
            if asks_per_ns > 0 and lanes.kind in self._pool.serving:
                rates = self._rates.of(lanes.kind, lanes.slo_ns)  # its own may be of slices that are no more
                lines[key] = asks_per_ns / rates.pool_per_ns, rates
        return lines

    def _settle(
        self,
        key: LanesKey,
        asks: float,
        rates: Rates,
        parts: Mapping[int, float],
        loads: Mapping[int, Mapping[int, float]],
    ) -> Share:
        """The line's share, by its parts of slices; and what it asks them for next."""
        asked = self._asked[key]
        load = {worker: of_slice[key[0]] for worker, of_slice in loads.items() if key[0] in of_slice}
        does = {worker.id: rates.fit(worker).items_per_ns / rates.pool_per_ns for worker in rates.workers}
        part = sum(parts[worker] * does[worker] for worker in does)
        full = sum(_beyond(load[worker]) * does[worker] for worker in does)
        wanted = {worker: max(asked[worker] / max(load[worker], 0.01) ** TURN, LEAST_ASKED) for worker in does}
        scale = asks / sum(wanted[worker] * does[worker] for worker in does)
        self._asked[key] = {worker: wants * scale for worker, wants in wanted.items()}
        return Share(min(part, 1.0), _beyond(asks / part if part else 1.0), full)


def _loads(asked: Mapping[LanesKey, float]) -> dict[int, float]:
    """Of one slice's time, what each class and the higher ones ask for: lower ones take nothing from it."""
    loads: dict[int, float] = {}
    total = 0.0
    for priority in sorted({key[0] for key in asked}):
        total += sum(asks for key, asks in asked.items() if key[0] == priority)
        loads[priority] = total
    return loads


def _beyond(asked: float) -> float:
    return min(max((asked - FULL) / (OVERFULL - FULL), 0.0), 1.0)


def _parts(asked: Mapping[LanesKey, float], weights: Mapping[str, float]) -> dict[LanesKey, float]:
    """Of one slice's time, what each line gets if it takes all it can."""
    parts: dict[LanesKey, float] = {}
    left = 1.0
    for priority in sorted({key[0] for key in asked}):
        lines = {key: asks for key, asks in asked.items() if key[0] == priority}
        models: dict[str, float] = {}
        for (_, (model, _), _), asks in lines.items():
            models[model] = models.get(model, 0.0) + asks
        for key, asks in lines.items():
            model = key[1][0]
            parts[key] = fair_part(model, models, weights, left) * asks / models[model]
        left = max(left - sum(models.values()), 0.0)
    return parts


def fair_part(model: str, asked: Mapping[str, float], weights: Mapping[str, float], left: float) -> float:
    """Of what is left, what a model gets that takes all it can, where others take what they ask for or their fair part.

    Max-min fairness with weights (Bertsekas and Gallager, Data Networks, 6.5.2).
    """
    own = weights.get(model, 1.0)
    others = sorted((asks / weights.get(name, 1.0), name) for name, asks in asked.items() if name != model)
    weight = own + sum(weights.get(name, 1.0) for _, name in others)
    for asks_per_weight, name in others:
        if asks_per_weight * weight > left:
            break
        left -= asked[name]
        weight -= weights.get(name, 1.0)
    return left * own / weight
