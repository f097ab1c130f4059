"""The core: tables of small stories, and properties over random ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from scheduler.core import STAGE_AHEAD_NS, SchedulerCore
from scheduler.messages import (
    Answer,
    AnyCommand,
    AnyEvent,
    Arrived,
    BatchDone,
    BatchFailed,
    Cancelled,
    Drains,
    Reason,
    Refuse,
    Request,
    Run,
    Serves,
    StopsServing,
    Tick,
    Wake,
    WorkerLost,
    WorkerUp,
)

MS = 1_000_000
# 1 ms for one item, 0.1 ms more for each further one. Peak rate 64 / 7.3 ms; 22 is the first with 80 % of it.
TABLE = tuple(MS + (batch - 1) * MS // 10 for batch in range(1, 65))
KNEE = 22


def core_with(*gpcs: int, depth: int = 1, max_queued: int = 4096, table: tuple[int, ...] = TABLE) -> SchedulerCore:
    """Workers 0, 1, ... of these sizes, all serving model m."""
    core = SchedulerCore(max_queued)
    for worker_id, size in enumerate(gpcs):
        core.handle(0, WorkerUp(worker_id, size, depth))
        core.handle(0, Serves(worker_id, "m", table))
    return core


def request(number: int, items: int = 1, **fields: object) -> Arrived:
    return Arrived(Request(number, "m", items, **fields))  # type: ignore[arg-type]


# ---- small stories ----


def test_a_lone_request_on_an_idle_slice_starts_at_once() -> None:
    assert core_with(1).handle(5, request(1)) == [Run(0, 1, "m", (1,))]


def test_what_comes_while_a_slice_is_busy_runs_together_when_it_is_free() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    for number in (2, 3, 4):
        assert core.handle(number, request(number)) == []
    assert core.handle(9, BatchDone(0, 1)) == [Answer(1, (1,)), Run(0, 2, "m", (2, 3, 4))]


def test_a_batch_ends_at_the_knee() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    for number in range(2, 40):
        core.handle(1, request(number))
    run = core.handle(9, BatchDone(0, 1))[1]
    assert isinstance(run, Run)
    assert run.request_ids == tuple(range(2, 2 + KNEE))


def test_a_request_larger_than_the_knee_runs_by_itself() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    core.handle(1, request(2, items=40))
    core.handle(1, request(3))
    assert core.handle(9, BatchDone(0, 1))[1] == Run(0, 2, "m", (2,))


def test_requests_of_other_dims_are_not_mixed() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    core.handle(1, request(2, dims=(16,)))
    core.handle(2, request(3, dims=(32,)))
    core.handle(3, request(4, dims=(16,)))
    assert core.handle(9, BatchDone(0, 1))[1] == Run(0, 2, "m", (2, 4))
    assert core.handle(19, BatchDone(0, 2))[1] == Run(0, 3, "m", (3,))


def test_a_model_that_does_not_batch_runs_one_by_one() -> None:
    core = core_with(1)
    core.handle(0, request(1, alone=True))
    core.handle(1, request(2, alone=True))
    core.handle(2, request(3, alone=True))
    assert core.handle(9, BatchDone(0, 1))[1] == Run(0, 2, "m", (2,))


def test_a_higher_priority_goes_first() -> None:
    core = core_with(1, table=(MS,))  # batches of one
    core.handle(0, request(1))
    core.handle(1, request(2))
    core.handle(2, request(3, priority=1))
    assert core.handle(9, BatchDone(0, 1))[1] == Run(0, 2, "m", (3,))


def test_a_batch_does_not_grow_past_what_its_earliest_due_time_allows() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    core.handle(1, request(2, due_ns=MS + 2 * MS))  # when it starts at 1 ms, a batch of up to 11 meets that
    for number in range(3, 30):
        core.handle(2, request(number))
    run = core.handle(MS, BatchDone(0, 1))[1]
    assert isinstance(run, Run)
    assert len(run.request_ids) == 11


def test_queue_full_is_refused_with_the_backlog_as_the_time_to_retry() -> None:
    core = core_with(1, max_queued=2)
    for number in (1, 2, 3):
        core.handle(0, request(number))
    assert core.handle(0, request(4)) == [Refuse(4, Reason.QUEUE_FULL, TABLE[0] + TABLE[1])]


def test_a_due_time_that_no_slice_can_meet_is_refused() -> None:
    core = core_with(1)
    assert core.handle(0, request(1, due_ns=MS // 2)) == [Refuse(1, Reason.SLO_UNREACHABLE, MS // 2)]


def test_expired_while_queued_is_dropped_before_compute() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    assert core.handle(1, request(2, expires_ns=500)) == [Wake(500)]
    assert core.handle(500, Tick()) == [Refuse(2, Reason.EXPIRED)]
    assert core.handle(900, BatchDone(0, 1)) == [Answer(1, (1,))]


def test_what_runs_is_not_dropped_when_it_expires() -> None:
    core = core_with(1)
    core.handle(0, request(1, expires_ns=500))
    assert core.handle(500, Tick()) == []
    assert core.handle(900, BatchDone(0, 1)) == [Answer(1, (1,))]


def test_what_expired_while_it_ran_does_not_run_again_after_its_worker_died() -> None:
    core = core_with(1)
    core.handle(0, request(1, expires_ns=500))
    core.handle(500, Tick())
    assert core.handle(600, WorkerLost(0, True, "killed")) == [Refuse(1, Reason.EXPIRED)]


def test_what_waits_for_its_worker_to_come_back_expires_in_time() -> None:
    core = core_with(1)
    core.handle(0, request(1, expires_ns=500))
    assert core.handle(100, WorkerLost(0, True, "killed")) == []
    assert core.handle(500, Tick()) == [Refuse(1, Reason.EXPIRED)]


def test_arriving_expired_is_refused() -> None:
    assert core_with(1).handle(7, request(1, expires_ns=7)) == [Refuse(1, Reason.EXPIRED)]


def test_cancelled_while_queued_is_never_run() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    core.handle(1, request(2))
    core.handle(1, request(3))
    core.handle(2, Cancelled(2))
    assert core.handle(9, BatchDone(0, 1)) == [Answer(1, (1,)), Run(0, 2, "m", (3,))]


def test_cancelled_while_running_is_not_answered_and_the_others_are() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    core.handle(1, request(2))
    core.handle(1, request(3))
    core.handle(9, BatchDone(0, 1))
    core.handle(10, Cancelled(2))
    assert core.handle(19, BatchDone(0, 2)) == [Answer(2, (3,))]


def test_a_dead_workers_requests_run_elsewhere_those_that_ran_alone() -> None:
    core = core_with(1)
    for number in (1, 2, 3, 4):
        core.handle(0, request(number))
    core.handle(1, BatchDone(0, 1))  # now 2, 3 and 4 run together
    core.handle(2, request(5))
    core.handle(3, WorkerUp(1, 1, 1))
    core.handle(3, Serves(1, "m", TABLE))
    assert core.handle(4, WorkerLost(0, True, "killed")) == [Run(1, 3, "m", (2,))]
    assert core.handle(5, BatchDone(1, 3)) == [Answer(3, (2,)), Run(1, 4, "m", (3,))]
    assert core.handle(6, BatchDone(1, 4)) == [Answer(4, (3,)), Run(1, 5, "m", (4,))]
    assert core.handle(7, BatchDone(1, 5)) == [Answer(5, (4,)), Run(1, 6, "m", (5,))]


def test_a_request_whose_worker_dies_twice_is_refused_by_itself() -> None:
    core = core_with(1, 1)
    core.handle(0, request(1))
    assert core.handle(1, WorkerLost(0, True, "killed by SIGSEGV")) == [Run(1, 2, "m", (1,))]
    assert core.handle(2, WorkerLost(1, True, "killed by SIGSEGV")) == [
        Refuse(1, Reason.CRASHED, 0, "killed by SIGSEGV")
    ]


def test_requests_wait_for_the_only_worker_to_come_back() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    core.handle(1, request(2))
    assert core.handle(2, WorkerLost(0, True, "killed")) == []
    assert core.handle(3, request(3)) == []
    core.handle(4, WorkerUp(0, 1, 1))
    assert core.handle(5, Serves(0, "m", TABLE)) == [Run(0, 2, "m", (1,))]
    assert core.handle(6, BatchDone(0, 2)) == [Answer(2, (1,)), Run(0, 3, "m", (2, 3))]


def test_requests_are_refused_when_the_only_worker_stays_out() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    core.handle(1, request(2))
    assert core.handle(2, WorkerLost(0, False, "killed")) == [
        Refuse(1, Reason.UNAVAILABLE),
        Refuse(2, Reason.UNAVAILABLE),
    ]
    assert core.handle(3, request(3)) == [Refuse(3, Reason.UNAVAILABLE)]


def test_requests_are_refused_when_the_worker_comes_back_without_the_model() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    core.handle(1, WorkerLost(0, True, "killed"))
    core.handle(2, WorkerUp(0, 1, 1))
    assert core.handle(3, StopsServing(0, "m")) == [Refuse(1, Reason.UNAVAILABLE)]


def test_a_model_that_is_unloaded_while_its_worker_restarts_is_expected_no_more() -> None:
    core = core_with(1)
    core.handle(1, WorkerLost(0, True, "killed"))
    core.handle(2, StopsServing(0, "m"))
    assert core.handle(3, request(1)) == [Refuse(1, Reason.UNAVAILABLE)]


def test_what_waits_for_a_draining_worker_moves_to_another() -> None:
    core = core_with(1, 1)
    for number in (1, 2, 3, 4):
        core.handle(0, request(number))
    assert core.handle(1, Drains(0)) == []
    assert core.handle(2, BatchDone(0, 1)) == [Answer(1, (1,))]
    assert core.handle(3, BatchDone(1, 2))[1] == Run(1, 3, "m", (3, 4))


def test_requests_wait_while_the_only_slice_is_replaced() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    core.handle(1, request(2))
    assert core.handle(2, Drains(0)) == []
    assert core.handle(3, request(3)) == []
    assert core.handle(4, BatchDone(0, 1)) == [Answer(1, (1,))]
    assert core.handle(5, WorkerLost(0, True, "its slice was re-cut")) == []
    assert core.handle(6, request(4)) == []
    core.handle(7, WorkerUp(1, 1, 1))
    assert core.handle(8, Serves(1, "m", TABLE)) == [Run(1, 2, "m", (2,))]
    assert core.handle(9, WorkerLost(0, False, "its slice was re-cut")) == []
    assert core.handle(10, BatchDone(1, 2)) == [Answer(2, (2,)), Run(1, 3, "m", (3, 4))]


def test_requests_are_refused_when_nothing_comes_in_place_of_a_slice() -> None:
    core = core_with(1)
    core.handle(0, Drains(0))
    core.handle(1, request(1))
    core.handle(2, WorkerLost(0, True, "its slice was re-cut"))
    assert core.handle(3, WorkerLost(0, False, "its slice was re-cut")) == [Refuse(1, Reason.UNAVAILABLE)]


def test_a_model_taken_off_one_worker_moves_its_queue_to_another() -> None:
    core = core_with(1, 1)
    core.handle(0, request(1))
    core.handle(0, request(2))
    core.handle(0, request(3))
    core.handle(0, request(4))
    core.handle(1, StopsServing(0, "m"))
    core.handle(2, BatchDone(0, 1))
    run = core.handle(3, BatchDone(1, 2))[1]
    assert run == Run(1, 3, "m", (3, 4))


def test_when_the_model_fails_on_a_batch_only_the_culprit_fails() -> None:
    core = core_with(1)
    for number in (1, 2, 3):
        core.handle(0, request(number))
    core.handle(1, BatchDone(0, 1))
    assert core.handle(2, BatchFailed(0, 2, "IndexError")) == [Run(0, 3, "m", (2,))]
    assert core.handle(3, BatchFailed(0, 3, "IndexError")) == [
        Refuse(2, Reason.MODEL_FAILED, 0, "IndexError"),
        Run(0, 4, "m", (3,)),
    ]
    assert core.handle(4, BatchDone(0, 4)) == [Answer(4, (3,))]


def test_a_gpu_worker_stages_its_next_batch_only_shortly_before_it_is_needed() -> None:
    core = core_with(7, depth=2, table=(10 * MS, 11 * MS, 12 * MS, 13 * MS))
    core.handle(0, request(1))
    staging = 10 * MS - STAGE_AHEAD_NS
    assert core.handle(MS, request(2)) == [Wake(staging)]
    assert core.handle(2 * MS, request(3)) == []
    assert core.handle(staging, Tick()) == [Run(0, 2, "m", (2, 3))]
    assert core.handle(10 * MS, BatchDone(0, 1)) == [Answer(1, (1,))]


def test_a_gpu_worker_stages_a_full_batch_at_once() -> None:
    core = core_with(7, depth=2, table=(10 * MS, 11 * MS))
    core.handle(0, request(1))
    core.handle(MS, request(2))
    assert core.handle(MS, request(3)) == [Run(0, 2, "m", (2, 3))]
    assert core.handle(MS, request(4)) == []  # one running and one staged is all it takes


# ---- random stories ----


@dataclass
class World:
    """Workers that do as they are told, and a check of every command the core gives."""

    core: SchedulerCore
    depth: int
    now_ns: int = 0
    next_request: int = 1
    items: dict[int, int] = field(default_factory=dict)
    open: set[int] = field(default_factory=set)  # neither answered, refused, nor cancelled
    cancelled: set[int] = field(default_factory=set)
    up: set[int] = field(default_factory=set)
    serving: set[int] = field(default_factory=set)
    coming_back: set[int] = field(default_factory=set)
    running: dict[int, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    wake_ns: int | None = None
    journal: list[tuple[int, AnyEvent, list[AnyCommand]]] = field(default_factory=list)

    def tell(self, event: AnyEvent) -> None:
        commands = self.core.handle(self.now_ns, event)
        self.journal.append((self.now_ns, event, commands))
        for command in commands:
            match command:
                case Run():
                    self.check_run(command)
                case Answer():
                    for request_id in command.request_ids:
                        assert request_id in self.open, "answered twice, or after it had ended"
                        self.open.remove(request_id)
                case Refuse():
                    assert command.request_id in self.open, "refused twice, or after it had ended"
                    self.open.remove(command.request_id)
                case Wake():
                    self.wake_ns = command.at_ns

    def check_run(self, run: Run) -> None:
        assert run.worker_id in self.serving, "sent to a worker that is not up"
        batches = self.running.setdefault(run.worker_id, {})
        batches[run.batch_id] = run.request_ids
        assert len(batches) <= self.depth, "more batches than the worker takes"
        assert len(set(run.request_ids)) == len(run.request_ids)
        elsewhere = [i for w in self.running.values() for b, ids in w.items() if b != run.batch_id for i in ids]
        assert not set(run.request_ids) & set(elsewhere), "one request in two batches at once"
        assert set(run.request_ids) <= self.open, "run although it has ended"
        self.check_batch(run)

    def check_batch(self, run: Run) -> None:
        items = sum(self.items[request_id] for request_id in run.request_ids)
        assert items <= KNEE or len(run.request_ids) == 1

    def arrive(self, items: int, slo_ms: int | None, timeout_ms: int | None, priority: int) -> None:
        number = self.next_request
        self.next_request += 1
        self.items[number] = items
        self.open.add(number)
        due_ns = None if slo_ms is None else self.now_ns + slo_ms * MS
        expires_ns = None if timeout_ms is None else self.now_ns + timeout_ms * MS
        self.tell(Arrived(Request(number, "m", items, (), due_ns, expires_ns, priority)))
        idle = [w for w in self.serving if not self.running.get(w)]
        waits = [i for i in self.open if not any(i in ids for b in self.running.values() for ids in b.values())]
        assert not (idle and waits == [number] and due_ns is None and len(self.serving) == 1), "waits for company"

    def cancel(self, which: int) -> None:
        if self.open:
            number = sorted(self.open)[which % len(self.open)]
            self.open.remove(number)
            self.cancelled.add(number)
            self.tell(Cancelled(number))

    def end_batch(self, which: int, fails: bool) -> None:
        batches = [(w, b) for w, running in sorted(self.running.items()) for b in sorted(running)[:1]]
        if batches:
            worker, batch = batches[which % len(batches)]
            del self.running[worker][batch]
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
    st.one_of(st.none(), st.integers(0, 20)),
    st.sampled_from([100, 100, 100, 1]),
)
STEPS = st.one_of(
    ARRIVE,
    ARRIVE,
    ARRIVE,
    st.tuples(st.just("cancel"), st.integers(0, 100)),
    st.tuples(st.just("end_batch"), st.integers(0, 100), st.sampled_from([False, False, False, True])),
    st.tuples(st.just("lose_worker"), st.integers(0, 100), st.booleans()),
    st.tuples(st.just("drain"), st.integers(0, 100)),
    st.tuples(st.just("bring_up"), st.integers(0, 3), st.sampled_from([1, 2, 4])),
    st.tuples(st.just("pass_time"), st.integers(0, 3 * MS)),
)


def check_story(steps: list[tuple[object, ...]], depth: int, max_queued: int) -> None:
    world = World(SchedulerCore(max_queued), depth)
    world.bring_up(0, 1)
    for name, *arguments in steps:
        getattr(world, str(name))(*arguments)
    world.finish()
    again = SchedulerCore(max_queued)
    for now_ns, event, commands in world.journal:
        assert again.handle(now_ns, event) == commands


STORIES = (st.lists(STEPS, min_size=20, max_size=120), st.sampled_from([1, 2]), st.sampled_from([3, 4096]))


@settings(max_examples=300, deadline=None)
@given(*STORIES)
def test_every_request_ends_exactly_once_and_the_journal_repeats(
    steps: list[tuple[object, ...]], depth: int, max_queued: int
) -> None:
    check_story(steps, depth, max_queued)


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


@pytest.mark.parametrize(
    ("method", "mutation"),
    [
        ("_place_again", lose_the_evicted),
        ("_batch_done", answer_twice),
        ("_serves", forget_the_parked),
        ("_cancelled", run_the_cancelled),
    ],
)
def test_the_property_notices_a_broken_core(method: str, mutation: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SchedulerCore, method, mutation)
    quick = settings(
        max_examples=300, deadline=None, database=None, phases=[Phase.generate], report_multiple_bugs=False
    )
    with pytest.raises((AssertionError, KeyError)):
        quick(given(*STORIES)(check_story))()
