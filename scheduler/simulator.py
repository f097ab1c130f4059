"""The scheduler's own core in virtual time: a heap keyed by time and serial number. Pure, seeded.

What is simulated is what runs: arrivals, workers and their ends are told to a SchedulerCore, and its commands
are carried out. Only the workers are made up: a batch takes the time of its table times a random factor.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from scheduler.background import FIRST_ID, Source
from scheduler.core import SchedulerCore
from scheduler.domain import Pool
from scheduler.messages import (
    DEFAULT_PRIORITY,
    Answer,
    AnyCommand,
    AnyEvent,
    Arrived,
    BatchDone,
    Drains,
    Refuse,
    Request,
    Run,
    Serves,
    Tick,
    Wake,
    WorkerLost,
    WorkerUp,
)
from scheduler.policies import Policy
from scheduler.policies.pool import OnePool
from scheduler.report import Report, Span, Tally, summarise
from scheduler.workload import Arrival

NS_PER_MS = 1_000_000
BLOCK = 4096
# After so many arrivals it is asked again whether a simulation may be given up.
LOOK_EVERY = 64


class SimulationError(ValueError):
    """Something simulated that cannot be: the message says what."""


@dataclass(frozen=True, slots=True)
class SimSlice:
    """A slice with one worker; `tables[model][b - 1]`: milliseconds of a batch of b items.

    A gang of k processes that share the slice is one worker too: b counts the items of all of them. A model in
    `lengths` has such a row for each of its lengths (ascending), one after the other; a batch takes the time of
    the first that is no shorter than its longest item.
    """

    name: str
    gpcs: int
    tables: Mapping[str, Sequence[float]]
    depth: int = 1
    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def batch_ms(self, model: str, items: int, length: int = 0) -> float:
        """What the table says; proportional beyond its last batch."""
        lengths = self.lengths.get(model, (0,))
        rows = len(self.tables[model]) // len(lengths)
        begin = rows * min(bisect.bisect_left(lengths, length), len(lengths) - 1)
        beyond = max(items / rows, 1.0)
        return self.tables[model][begin + min(items, rows) - 1] * beyond


@dataclass(frozen=True, slots=True)
class Noise:
    """Service times over the table's: log-normal with mean 1, and a tail.

    `sigma`: of the logarithm. `tail_share` of the batches take longer by an exponential share with mean `tail_mean`.
    """

    sigma: float = 0.03
    tail_share: float = 0.01
    tail_mean: float = 0.25

    def factors(self, seed: int) -> Iterator[float]:
        """Endless."""
        generator = np.random.default_rng(seed)
        while True:
            body = generator.lognormal(-(self.sigma**2) / 2, self.sigma, BLOCK)
            in_tail = generator.random(BLOCK) < self.tail_share
            yield from (body * (1 + in_tail * generator.exponential(self.tail_mean, BLOCK))).tolist()


EXACT = Noise(0.0, 0.0, 0.0)


class Change(Enum):
    """What can happen to a slice."""

    FAIL = "fail"  # its worker dies; what ran is lost
    FAIL_FOR_GOOD = "fail for good"  # and nobody expects it back
    DRAIN = "drain"  # takes nothing new; what runs is let finish
    BACK = "back"  # from any of these
    SPEED = "speed"  # service times are multiplied by the factor from now on


@dataclass(frozen=True, slots=True)
class SliceEvent:
    """A change of one slice, by its name, at a time. `factor`: for SPEED only."""

    at_ns: int
    slice_name: str
    change: Change
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class GiveUp:
    """When a simulation need not go on: what it was to show it cannot show any more.

    A query was refused. `late`: more queries of a model than this were answered after its SLO. `lateness`: a query has
    been there for longer than so many SLOs of its model. (Looked at now and then, so it may be found out later.)
    """

    late: Mapping[str, int]
    lateness: float


def simulate(
    slices: Sequence[SimSlice],
    arrivals: Iterable[Arrival],
    policy: Callable[[Pool], Policy] = OnePool,
    *,
    slo_ms: Mapping[str, float] | None = None,
    seed: int = 0,
    noise: Noise = Noise(),
    events: Iterable[SliceEvent] = (),
    priority: Mapping[str, int] | None = None,
    timeout_ms: Mapping[str, float] | None = None,
    max_queued: int = 4096,
    strict: bool = False,
    bounded: bool = True,
    timeline: bool = False,
    give_up: GiveUp | None = None,
    background: Source | None = None,
) -> Report:
    """Runs `arrivals` (sorted by time) through a core over `slices`, until everything has ended.

    `slo_ms`, `priority`, `timeout_ms`: by model, where it has one. `strict`: nobody wants to be served late;
    `bounded`: nobody wants to be served later than ten SLOs. The same arguments give the same report.
    With `give_up` it may end early; the report then is not complete, and says so.
    Raises SimulationError where requests are left that nothing will ever end.
    """
    core = SchedulerCore(max_queued, policy, bounded=bounded)
    simulation = _Simulation(core, slices, noise.factors(seed), timeline)
    padded = frozenset(model for each in slices for model in each.lengths)
    simulation.demands = _Demands(slo_ms or {}, priority or {}, timeout_ms or {}, padded, strict)
    simulation.give_up = give_up
    simulation.background = background
    simulation.schedule(events)
    complete = simulation.run(arrivals)
    end_ns, spans = simulation.now_ns, simulation.spans
    return summarise(simulation.tallies, simulation.busy_ns, simulation.batches, end_ns, spans, complete=complete)


@dataclass(frozen=True, slots=True)
class _Demands:
    """What the requests of each model ask for."""

    slo_ms: Mapping[str, float]
    priority: Mapping[str, int]
    timeout_ms: Mapping[str, float]
    padded: frozenset[str] = frozenset()
    strict: bool = False

    def request(self, number: int, arrival: Arrival) -> Request:
        model, length = arrival.model, arrival.length
        slo_ms, timeout_ms = self.slo_ms.get(model), self.timeout_ms.get(model)
        padded = model in self.padded
        return Request(
            number,
            model,
            arrival.items,
            (length,) if length and not padded else (),
            None if slo_ms is None else arrival.at_ns + int(slo_ms * NS_PER_MS),
            None if timeout_ms is None else arrival.at_ns + int(timeout_ms * NS_PER_MS),
            self.priority.get(model, DEFAULT_PRIORITY),
            strict=self.strict,
            length=length if padded else 0,
        )


@dataclass(slots=True)
class _Worker:
    """The made-up worker of a slice. `life` tells its batches from those of one that has died."""

    where: SimSlice
    life: int = 0
    up: bool = True
    serves: bool = True
    speed: float = 1.0
    free_ns: int = 0


class _Look:
    """The background work is to be asked again."""


_Due = tuple[int, int, AnyEvent | SliceEvent | _Look, int]  # when, serial, what, life of the worker


@dataclass(slots=True)
class _Simulation:
    core: SchedulerCore
    slices: Sequence[SimSlice]
    factors: Iterator[float]
    keeps_timeline: bool
    demands: _Demands = field(default_factory=lambda: _Demands({}, {}, {}))
    give_up: GiveUp | None = None
    background: Source | None = None
    now_ns: int = 0
    batches: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)
    busy_ns: dict[str, int] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    _workers: list[_Worker] = field(default_factory=list)
    _heap: list[_Due] = field(default_factory=list)
    _serial: int = 0
    _wake_ns: int = -1
    _open: dict[int, Arrival] = field(default_factory=dict)
    _online_ns: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for worker_id, where in enumerate(self.slices):
            self._workers.append(_Worker(where))
            self.busy_ns[where.name] = 0
            self._bring_up(worker_id)
        if len(self.busy_ns) < len(self.slices):
            raise SimulationError("two slices have the same name")

    def schedule(self, events: Iterable[SliceEvent]) -> None:
        for event in events:
            if event.slice_name not in self.busy_ns:
                raise SimulationError(f"no slice is called {event.slice_name!r}; there are {', '.join(self.busy_ns)}")
            self._push(event.at_ns, event, 0)

    def run(self, arrivals: Iterable[Arrival]) -> bool:
        """Whether it was run to the end."""
        heap = self._heap
        if self.background is not None:
            self._push(0, _Look(), 0)
        for number, arrival in enumerate(arrivals, start=1):
            at_ns = arrival.at_ns
            while heap and heap[0][0] <= at_ns:
                self._happen(*heapq.heappop(heap))
            if number % LOOK_EVERY == 0 and self._hopeless():
                return False
            self._arrive(at_ns, number, arrival)
        while heap:
            self._happen(*heapq.heappop(heap))
        if self._open:
            models = sorted({arrival.model for arrival in self._open.values()})
            raise SimulationError(f"{len(self._open)} requests of {', '.join(models)} never end: is a slice awaited?")
        return True

    def _hopeless(self) -> bool:
        limits = self.give_up
        if limits is None:
            return False
        for model, tally in self.tallies.items():
            if tally.refused or tally.late > limits.late.get(model, tally.sent):
                return True
        oldest = next(iter(self._open.values()), None)
        return oldest is not None and self.now_ns - oldest.at_ns > limits.lateness * self.tallies[oldest.model].slo_ns

    # ---- what happens ----

    def _arrive(self, at_ns: int, number: int, arrival: Arrival) -> None:
        if at_ns < self.now_ns:
            raise SimulationError(f"arrival {number} is before the one above; sort them by time")
        tally = self.tallies.get(arrival.model)
        if tally is None:
            tally = self.tallies[arrival.model] = Tally(self.demands.slo_ms.get(arrival.model))
        tally.sent += 1
        self._open[number] = arrival
        self.now_ns = at_ns
        self._tell(Arrived(self.demands.request(number, arrival)))

    def _happen(self, at_ns: int, _serial: int, what: AnyEvent | SliceEvent | _Look, life: int) -> None:
        if isinstance(what, BatchDone):
            if self._workers[what.worker_id].life == life:
                self.now_ns = at_ns
                self._tell(what)
        elif isinstance(what, Tick):
            if self._wake_ns == at_ns:
                self._wake_ns = -1
                self.now_ns = at_ns
                self._tell(what)
        elif isinstance(what, SliceEvent):
            self.now_ns = at_ns
            self._change(what)
        elif isinstance(what, _Look) and self.background is not None and not self.background.done:
            self.now_ns = at_ns
            self.background.look(at_ns, self.core.pool, self._online_ns)
            self._push(at_ns + self.background.every_ns, what, 0)
        if self.background is not None:
            for request in self.background.requests(self.now_ns):
                self._tell(Arrived(request))

    def _change(self, event: SliceEvent) -> None:
        worker_id = list(self.busy_ns).index(event.slice_name)
        worker = self._workers[worker_id]
        match event.change:
            case Change.SPEED:
                worker.speed = event.factor
            case Change.DRAIN:
                if worker.up and worker.serves:
                    worker.serves = False
                    self._tell(Drains(worker_id))
            case Change.BACK:
                if not (worker.up and worker.serves):
                    self._bring_up(worker_id)
            case Change.FAIL | Change.FAIL_FOR_GOOD:
                if worker.up:
                    # What it had not finished is not counted as work.
                    self.busy_ns[worker.where.name] -= max(worker.free_ns - self.now_ns, 0)
                    worker.life += 1
                    worker.up, worker.free_ns = False, 0
                self._tell(WorkerLost(worker_id, event.change is Change.FAIL, "simulated failure"))

    def _bring_up(self, worker_id: int) -> None:
        worker = self._workers[worker_id]
        if not (worker.up and worker.serves) or self.now_ns == 0:
            self._tell(WorkerUp(worker_id, worker.where.gpcs, worker.where.depth))
        worker.up = worker.serves = True
        for model, table in worker.where.tables.items():
            latency_ns = tuple(int(ms * NS_PER_MS) for ms in table)
            self._tell(Serves(worker_id, model, latency_ns, worker.where.lengths.get(model, ())))

    # ---- what the core wants ----

    def _tell(self, event: AnyEvent) -> None:
        for command in self.core.handle(self.now_ns, event):
            self._carry_out(command)

    def _carry_out(self, command: AnyCommand) -> None:
        if isinstance(command, Run):
            self._run(command)
        elif isinstance(command, Answer):
            now_ns = self.now_ns
            for request_id in command.request_ids:
                if request_id >= FIRST_ID:
                    self._background_ended(request_id, answered=True)
                    continue
                arrival = self._open.pop(request_id)
                self.tallies[arrival.model].answer(now_ns - arrival.at_ns, arrival.items)
        elif isinstance(command, Refuse) and command.request_id >= FIRST_ID:
            self._background_ended(command.request_id, answered=False)
        elif isinstance(command, Refuse):
            arrival = self._open.pop(command.request_id)
            self.tallies[arrival.model].refuse(command.reason, arrival.items, self.now_ns - arrival.at_ns)
        elif isinstance(command, Wake):
            self._wake_ns = command.at_ns
            self._push(command.at_ns, Tick(), 0)

    def _background_ended(self, request_id: int, *, answered: bool) -> None:
        if self.background is not None:
            self.background.ended(self.now_ns, request_id, answered=answered)

    def _length(self, request_id: int) -> int:
        if request_id >= FIRST_ID and self.background is not None:
            return self.background.length(request_id)
        return self._open[request_id].length

    def _run(self, run: Run) -> None:
        worker = self._workers[run.worker_id]
        items = length = 0
        for request_id, _, of_piece in run.pieces:
            items += of_piece
            if worker.where.lengths:
                length = max(length, self._length(request_id))
        table_ms = worker.where.batch_ms(run.model, items, length)
        time_ns = int(table_ms * worker.speed * NS_PER_MS * next(self.factors))
        start_ns = max(self.now_ns, worker.free_ns)
        worker.free_ns = start_ns + time_ns
        self.batches += 1
        self.busy_ns[worker.where.name] += time_ns
        if run.pieces[0].request_id < FIRST_ID:
            self._online_ns[run.worker_id] += time_ns
        if self.keeps_timeline:
            self.spans.append(Span(worker.where.name, start_ns, worker.free_ns, run.model, items))
        self._push(worker.free_ns, BatchDone(run.worker_id, run.batch_id), worker.life)

    def _push(self, at_ns: int, what: AnyEvent | SliceEvent | _Look, life: int) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (at_ns, self._serial, what, life))
