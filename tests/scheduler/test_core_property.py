"""The core: properties over random stories, and a check that they notice a broken core."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from scheduler.core import SchedulerCore
from scheduler.messages import (
    Answer,
    AnyCommand,
    AnyEvent,
    Arrived,
    BatchDone,
    BatchFailed,
    Cancelled,
    Drains,
    Piece,
    Refuse,
    Request,
    Run,
    Serves,
    Tick,
    Wake,
    WorkerLost,
    WorkerUp,
)
from scheduler.policies.named import POLICIES
from tests.scheduler.test_core import MS, TABLE

# By their very definition.
WAIT_FOR_COMPANY = {"static", "preba"}


@dataclass
class World:
    """Workers that do as they are told, and a check of every command the core gives."""

    core: SchedulerCore
    depth: int
    now_ns: int = 0
    next_request: int = 1
    items: dict[int, int] = field(default_factory=dict)
    open: set[int] = field(default_factory=set)  # neither answered, refused, nor cancelled
    whole: set[int] = field(default_factory=set)
    alone: set[int] = field(default_factory=set)
    background: dict[int, int] = field(default_factory=dict)  # which worker it is for
    up: set[int] = field(default_factory=set)
    serving: set[int] = field(default_factory=set)
    coming_back: set[int] = field(default_factory=set)
    running: dict[int, dict[int, tuple[Piece, ...]]] = field(default_factory=dict)
    done: dict[int, set[int]] = field(default_factory=dict)  # items of open requests that have been computed
    wake_ns: int | None = None
    expiries_ns: dict[int, float] = field(default_factory=dict)
    journal: list[tuple[int, AnyEvent, list[AnyCommand]]] = field(default_factory=list)
    may_wait: bool = False  # for company, while a slice is idle

    def tell(self, event: AnyEvent) -> None:
        if isinstance(event, Arrived):
            expires_ns = event.request.expires_ns
            self.expiries_ns[event.request.id] = math.inf if expires_ns is None else expires_ns
        commands = self.core.handle(self.now_ns, event)
        self.journal.append((self.now_ns, event, commands))
        for command in commands:
            match command:
                case Run():
                    self.check_run(command)
                case Answer():
                    for request_id in command.request_ids:
                        assert request_id in self.open, "answered twice, or after it had ended"
                        whole = set(range(self.items[request_id]))
                        assert self.done[request_id] == whole, "answered before all of it was computed"
                        self.open.remove(request_id)
                case Refuse():
                    assert command.request_id in self.open, "refused twice, or after it had ended"
                    self.open.remove(command.request_id)
                case Wake():
                    self.wake_ns = command.at_ns
        self.check_timeouts()

    def check_timeouts(self) -> None:
        """What has not been started has time left, and the core will be woken when that is over."""
        started = {piece.request_id for batches in self.running.values() for ids in batches.values() for piece in ids}
        started |= {number for number, items in self.done.items() if items}
        first_ns = min((self.expiries_ns[number] for number in self.open - started), default=math.inf)
        assert first_ns > self.now_ns, "waits although its time is over"
        assert first_ns == math.inf or (self.wake_ns is not None and self.wake_ns <= first_ns), "nobody will look"

    def check_run(self, run: Run) -> None:
        assert run.worker_id in self.serving, "sent to a worker that is not up"
        elsewhere = self.items_running()
        batches = self.running.setdefault(run.worker_id, {})
        batches[run.batch_id] = run.pieces
        assert len(batches) <= self.depth, "more batches than the worker takes"
        for_it = [self.background[p.request_id] for pieces in batches.values() for p in pieces if self.is_background(p)]
        assert for_it in ([], [run.worker_id]), "more background work than one batch, or on another worker"
        for number, first, items in run.pieces:
            assert number in self.open, "run although it has ended"
            assert 0 <= first < first + items <= self.items[number], "items that it does not have"
            assert items == self.items[number] or number not in self.whole, "cut although it must not be"
            for item in range(first, first + items):
                assert (number, item) not in elsewhere, "one item in two batches at once"
                assert item not in self.done[number], "computed twice"
                elsewhere.add((number, item))
        if len(run.pieces) > 1:
            assert not self.alone & {piece.request_id for piece in run.pieces}, "not alone"

    def is_background(self, piece: Piece) -> bool:
        return piece.request_id in self.background

    def items_running(self) -> set[tuple[int, int]]:
        return {
            (number, item)
            for batches in self.running.values()
            for pieces in batches.values()
            for number, first, items in pieces
            for item in range(first, first + items)
        }

    def arrive(self, items: int, slo_ms: int | None, timeout_ms: int | None, priority: int, how: str) -> None:
        number = self.next_request
        self.next_request += 1
        self.items[number] = items
        self.done[number] = set()
        self.open.add(number)
        if how in ("whole", "alone", "background"):
            self.whole.add(number)
        if how in ("alone", "background"):
            self.alone.add(number)
        if how == "background":
            self.background[number] = number % 3
            slo_ms = None
        due_ns = None if slo_ms is None else self.now_ns + slo_ms * MS
        expires_ns = None if timeout_ms is None else self.now_ns + timeout_ms * MS
        terms = (due_ns, expires_ns, priority, how == "alone", how == "strict", how == "whole")
        worker_id = self.background.get(number)
        self.tell(Arrived(Request(number, "m", items, (), *terms, worker_id=worker_id)))
        idle = [w for w in self.serving if not self.running.get(w)]
        waits = number in self.open and not any(running == number for running, _ in self.items_running())
        all_idle = bool(idle) and len(idle) == len(self.serving)
        if worker_id is not None:
            assert not (waits and worker_id in idle), "background work waits although its worker is idle"
            assert worker_id in self.serving or number not in self.open, "waits for a worker that is not there"
        assert self.may_wait or not (all_idle and waits and due_ns is None), "waits for company"

    def cancel(self, which: int) -> None:
        if self.open:
            number = sorted(self.open)[which % len(self.open)]
            self.open.remove(number)
            self.tell(Cancelled(number))

    def end_batch(self, which: int, fails: bool) -> None:
        batches = [(w, b) for w, running in sorted(self.running.items()) for b in sorted(running)[:1]]
        if batches:
            worker, batch = batches[which % len(batches)]
            pieces = self.running[worker].pop(batch)
            if not fails:
                for number, first, items in pieces:
                    self.done[number] |= set(range(first, first + items))
            self.tell(BatchFailed(worker, batch, "raised") if fails else BatchDone(worker, batch))

    def lose_worker(self, which: int, comes_back: bool) -> None:
        if self.up:
            worker = sorted(self.up)[which % len(self.up)]
            self.up.discard(worker)
            self.serving.discard(worker)
            self.running.pop(worker, None)
            if comes_back:
                self.coming_back.add(worker)
            self.tell(WorkerLost(worker, comes_back, "killed"))

    def drain(self, which: int) -> None:
        if self.serving:
            worker = sorted(self.serving)[which % len(self.serving)]
            self.serving.discard(worker)
            self.tell(Drains(worker))

    def bring_up(self, worker: int, gpcs: int) -> None:
        if worker not in self.up:
            self.up.add(worker)
            self.coming_back.discard(worker)
            self.tell(WorkerUp(worker, gpcs, self.depth))
            self.serving.add(worker)
            self.tell(Serves(worker, "m", TABLE))

    def pass_time(self, ns: int) -> None:
        self.now_ns += ns
        if self.wake_ns is not None and self.wake_ns <= self.now_ns:
            self.wake_ns = None
            self.tell(Tick())

    def finish(self) -> None:
        """With one worker that lives, everything ends."""
        self.bring_up(99, 1)
        for _ in range(10_000):
            if not self.open:
                return
            self.pass_time(MS)
            self.end_batch(0, fails=False)
        raise AssertionError(f"never ended: {sorted(self.open)}")


ARRIVE = st.tuples(
    st.just("arrive"),
    st.integers(1, 30),
    st.one_of(st.none(), st.integers(1, 20)),
    st.one_of(st.none(), st.integers(0, 3), st.integers(0, 20)),
    st.sampled_from([100, 100, 100, 1]),
    st.sampled_from(["", "", "", "strict", "whole", "alone", "background", "background"]),
)
BRING_UP = st.tuples(st.just("bring_up"), st.integers(0, 3), st.sampled_from([1, 2, 4]))
STEPS = st.one_of(
    ARRIVE,
    ARRIVE,
    ARRIVE,
    st.tuples(st.just("cancel"), st.integers(0, 100)),
    st.tuples(st.just("end_batch"), st.integers(0, 100), st.sampled_from([False, False, False, True])),
    st.tuples(st.just("lose_worker"), st.integers(0, 100), st.booleans()),
    st.tuples(st.just("drain"), st.integers(0, 100)),
    BRING_UP,
    BRING_UP,
    st.tuples(st.just("pass_time"), st.sampled_from([1, MS // 3, MS, 3 * MS])),
)


def check_story(policy: str, steps: list[tuple[object, ...]], depth: int, max_queued: int) -> None:
    world = World(SchedulerCore(max_queued, POLICIES[policy]), depth, may_wait=policy in WAIT_FOR_COMPANY)
    world.bring_up(0, 1)
    for name, *arguments in steps:
        getattr(world, str(name))(*arguments)
    world.finish()
    again = SchedulerCore(max_queued, POLICIES[policy])
    for now_ns, event, commands in world.journal:
        assert again.handle(now_ns, event) == commands


STORIES = (st.lists(STEPS, min_size=30, max_size=120), st.sampled_from([1, 2]), st.sampled_from([3, 4096]))


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=100, deadline=None)
@given(*STORIES)
def test_every_request_ends_exactly_once_and_the_journal_repeats(
    policy: str, steps: list[tuple[object, ...]], depth: int, max_queued: int
) -> None:
    check_story(policy, steps, depth, max_queued)


def lose_the_evicted(core: SchedulerCore, now_ns: int, evicted: object) -> None:
    pass


def answer_twice(core: SchedulerCore, now_ns: int, event: BatchDone, real=SchedulerCore._batch_done) -> None:  # type: ignore[no-untyped-def]
    real(core, now_ns, event)
    core._commands.append(core._commands[-1])


def forget_the_parked(core: SchedulerCore, now_ns: int, event: Serves, real=SchedulerCore._serves) -> None:  # type: ignore[no-untyped-def]
    core._parked.pop(event.model, None)
    real(core, now_ns, event)


def run_the_cancelled(core: SchedulerCore, event: Cancelled) -> None:
    core._queries.pop(event.request_id, None)


def answer_the_first_part(core: SchedulerCore, now_ns: int, event: BatchDone, real=SchedulerCore._batch_done) -> None:  # type: ignore[no-untyped-def]
    for part in core._pool.workers[event.worker_id].in_flight[event.batch_id].parts:
        part.query.unfinished = part.items
    real(core, now_ns, event)


def never_expire(core: SchedulerCore, now_ns: int) -> None:
    core._expiries.clear()


@pytest.mark.parametrize(
    ("method", "mutation"),
    [
        ("_place_again", lose_the_evicted),
        ("_batch_done", answer_twice),
        ("_batch_done", answer_the_first_part),
        ("_serves", forget_the_parked),
        ("_cancelled", run_the_cancelled),
        ("_expire", never_expire),
    ],
)
def test_the_property_notices_a_broken_core(method: str, mutation: object, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = "pool"  # it cuts queries
    monkeypatch.setattr(SchedulerCore, method, mutation)
    quick = settings(
        max_examples=1000, deadline=None, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False
    )
    with pytest.raises((AssertionError, KeyError)):
        quick(given(*STORIES)(lambda steps, depth, most: check_story(policy, steps, depth, most)))()
