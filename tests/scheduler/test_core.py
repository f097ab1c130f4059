"""The core: small stories. Random ones are in test_core_property.py."""

from __future__ import annotations

from scheduler.core import STAGE_AHEAD_NS, SchedulerCore
from scheduler.messages import (
    Answer,
    Arrived,
    BatchDone,
    BatchFailed,
    Cancelled,
    Drains,
    Piece,
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
from scheduler.policies.elsa import Elsa

MS = 1_000_000
# 1 ms for one item, 0.1 ms more for each further one. Peak rate 64 / 7.3 ms; 22 is the first with 80 % of it.
TABLE = tuple(MS + (batch - 1) * MS // 10 for batch in range(1, 65))
KNEE = 22


def core_with(*gpcs: int, depth: int = 1, max_queued: int = 4096, table: tuple[int, ...] = TABLE) -> SchedulerCore:
    """Workers 0, 1, ... of these sizes, all serving model m."""
    core = SchedulerCore(max_queued, Elsa)
    for worker_id, size in enumerate(gpcs):
        core.handle(0, WorkerUp(worker_id, size, depth))
        core.handle(0, Serves(worker_id, "m", table))
    return core


def run(worker_id: int, batch_id: int, *numbers: int) -> Run:
    """Of whole requests with one item each."""
    return Run(worker_id, batch_id, "m", tuple(Piece(number, 0, 1) for number in numbers))


def request(number: int, items: int = 1, **fields: object) -> Arrived:
    return Arrived(Request(number, "m", items, **fields))  # type: ignore[arg-type]


# ---- small stories ----


def test_a_lone_request_on_an_idle_slice_starts_at_once() -> None:
    assert core_with(1).handle(5, request(1)) == [run(0, 1, 1)]


def test_what_comes_while_a_slice_is_busy_runs_together_when_it_is_free() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    for number in (2, 3, 4):
        assert core.handle(number, request(number)) == []
    assert core.handle(9, BatchDone(0, 1)) == [Answer((1,)), run(0, 2, 2, 3, 4)]


def test_a_batch_ends_at_the_knee() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    for number in range(2, 40):
        core.handle(1, request(number))
    assert core.handle(9, BatchDone(0, 1))[1] == run(0, 2, *range(2, 2 + KNEE))


def test_a_request_larger_than_the_knee_runs_by_itself() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    core.handle(1, request(2, items=40))
    core.handle(1, request(3))
    assert core.handle(9, BatchDone(0, 1))[1] == Run(0, 2, "m", (Piece(2, 0, 40),))


def test_requests_of_other_dims_are_not_mixed() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    core.handle(1, request(2, dims=(16,)))
    core.handle(2, request(3, dims=(32,)))
    core.handle(3, request(4, dims=(16,)))
    assert core.handle(9, BatchDone(0, 1))[1] == run(0, 2, 2, 4)
    assert core.handle(19, BatchDone(0, 2))[1] == run(0, 3, 3)


def test_a_model_that_does_not_batch_runs_one_by_one() -> None:
    core = core_with(1)
    core.handle(0, request(1, alone=True))
    core.handle(1, request(2, alone=True))
    core.handle(2, request(3, alone=True))
    assert core.handle(9, BatchDone(0, 1))[1] == run(0, 2, 2)


def test_a_higher_priority_goes_first() -> None:
    core = core_with(1, table=(MS,))  # batches of one
    core.handle(0, request(1))
    core.handle(1, request(2))
    core.handle(2, request(3, priority=1))
    assert core.handle(9, BatchDone(0, 1))[1] == run(0, 2, 3)


def test_a_batch_does_not_grow_past_what_its_earliest_due_time_allows() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    core.handle(1, request(2, due_ns=MS + 2 * MS))  # when it starts at 1 ms, a batch of up to 11 meets that
    for number in range(3, 30):
        core.handle(2, request(number))
    assert core.handle(MS, BatchDone(0, 1))[1] == run(0, 2, *range(2, 13))


def test_queue_full_is_refused_with_the_backlog_as_the_time_to_retry() -> None:
    core = core_with(1, max_queued=2)
    for number in (1, 2, 3):
        core.handle(0, request(number))
    assert core.handle(0, request(4)) == [Refuse(4, Reason.QUEUE_FULL, TABLE[0] + TABLE[1])]


def test_a_due_time_that_no_slice_can_meet_is_refused_to_a_strict_request_and_served_late_to_others() -> None:
    core = core_with(1)
    assert core.handle(0, request(1, due_ns=MS // 2, strict=True)) == [Refuse(1, Reason.SLO_UNREACHABLE, MS // 2)]
    assert core.handle(0, request(2, due_ns=MS // 2)) == [run(0, 1, 2)]


def test_what_would_end_later_than_ten_times_its_time_is_refused() -> None:
    core = core_with(1)
    assert core.handle(0, request(1, due_ns=MS // 20)) == [Refuse(1, Reason.OVERLOADED, MS - MS // 2)]
    assert core.handle(0, request(2, due_ns=MS // 10)) == [run(0, 1, 2)]


def test_expired_while_queued_is_dropped_before_compute() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    assert core.handle(1, request(2, expires_ns=500)) == [Wake(500)]
    assert core.handle(500, Tick()) == [Refuse(2, Reason.EXPIRED)]
    assert core.handle(900, BatchDone(0, 1)) == [Answer((1,))]


def test_what_runs_is_not_dropped_when_it_expires() -> None:
    core = core_with(1)
    core.handle(0, request(1, expires_ns=500))
    assert core.handle(500, Tick()) == []
    assert core.handle(900, BatchDone(0, 1)) == [Answer((1,))]


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
    assert core.handle(9, BatchDone(0, 1)) == [Answer((1,)), run(0, 2, 3)]


def test_cancelled_while_running_is_not_answered_and_the_others_are() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    core.handle(1, request(2))
    core.handle(1, request(3))
    core.handle(9, BatchDone(0, 1))
    core.handle(10, Cancelled(2))
    assert core.handle(19, BatchDone(0, 2)) == [Answer((3,))]


def test_a_dead_workers_requests_run_elsewhere_those_that_ran_alone() -> None:
    core = core_with(1)
    for number in (1, 2, 3, 4):
        core.handle(0, request(number))
    core.handle(1, BatchDone(0, 1))  # now 2, 3 and 4 run together
    core.handle(2, request(5))
    core.handle(3, WorkerUp(1, 1, 1))
    core.handle(3, Serves(1, "m", TABLE))
    assert core.handle(4, WorkerLost(0, True, "killed")) == [run(1, 3, 2)]
    assert core.handle(5, BatchDone(1, 3)) == [Answer((2,)), run(1, 4, 3)]
    assert core.handle(6, BatchDone(1, 4)) == [Answer((3,)), run(1, 5, 4)]
    assert core.handle(7, BatchDone(1, 5)) == [Answer((4,)), run(1, 6, 5)]


def test_a_request_whose_worker_dies_twice_is_refused_by_itself() -> None:
    core = core_with(1, 1)
    core.handle(0, request(1))
    assert core.handle(1, WorkerLost(0, True, "killed by SIGSEGV")) == [run(1, 2, 1)]
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
    assert core.handle(5, Serves(0, "m", TABLE)) == [run(0, 2, 1)]
    assert core.handle(6, BatchDone(0, 2)) == [Answer((1,)), run(0, 3, 2, 3)]


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
    assert core.handle(2, BatchDone(0, 1)) == [Answer((1,))]
    assert core.handle(3, BatchDone(1, 2))[1] == run(1, 3, 3, 4)


def test_requests_wait_while_the_only_slice_is_replaced() -> None:
    core = core_with(1)
    core.handle(0, request(1))
    core.handle(1, request(2))
    assert core.handle(2, Drains(0)) == []
    assert core.handle(3, request(3)) == []
    assert core.handle(4, BatchDone(0, 1)) == [Answer((1,))]
    assert core.handle(5, WorkerLost(0, True, "its slice was re-cut")) == []
    assert core.handle(6, request(4)) == []
    core.handle(7, WorkerUp(1, 1, 1))
    assert core.handle(8, Serves(1, "m", TABLE)) == [run(1, 2, 2, 3, 4)]
    assert core.handle(9, WorkerLost(0, False, "its slice was re-cut")) == []
    assert core.handle(10, BatchDone(1, 2)) == [Answer((2, 3, 4))]


def test_a_worker_that_drains_while_it_loads_again_is_given_nothing() -> None:
    """It had died: what it has not loaded again yet is expected back elsewhere, and is not served by it any more."""
    core = core_with(1)
    core.handle(0, WorkerLost(0, True, "killed"))
    core.handle(1, WorkerUp(0, 1, 1))
    core.handle(2, Drains(0))
    assert core.handle(3, request(1)) == [], "parked"
    assert core.handle(4, Serves(0, "m", TABLE)) == []
    core.handle(5, WorkerLost(0, True, "its slice was re-cut"))
    core.handle(6, WorkerUp(1, 1, 1))
    assert core.handle(7, Serves(1, "m", TABLE)) == [run(1, 1, 1)]


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
    assert core.handle(3, BatchDone(1, 2))[1] == run(1, 3, 3, 4)


def test_when_the_model_fails_on_a_batch_only_the_culprit_fails() -> None:
    core = core_with(1)
    for number in (1, 2, 3):
        core.handle(0, request(number))
    core.handle(1, BatchDone(0, 1))
    assert core.handle(2, BatchFailed(0, 2, "IndexError")) == [run(0, 3, 2)]
    assert core.handle(3, BatchFailed(0, 3, "IndexError")) == [
        Refuse(2, Reason.MODEL_FAILED, 0, "IndexError"),
        run(0, 4, 3),
    ]
    assert core.handle(4, BatchDone(0, 4)) == [Answer((3,))]


def test_a_gpu_worker_stages_its_next_batch_only_shortly_before_it_is_needed() -> None:
    core = core_with(7, depth=2, table=(10 * MS, 11 * MS, 12 * MS, 13 * MS))
    core.handle(0, request(1))
    staging = 10 * MS - STAGE_AHEAD_NS
    assert core.handle(MS, request(2)) == [Wake(staging)]
    assert core.handle(2 * MS, request(3)) == []
    assert core.handle(staging, Tick()) == [run(0, 2, 2, 3)]
    assert core.handle(10 * MS, BatchDone(0, 1)) == [Answer((1,))]
