"""Late binding, rule by rule."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from scheduler.core import STAGE_AHEAD_NS, SchedulerCore
from scheduler.messages import (
    Answer,
    AnyCommand,
    Arrived,
    BatchDone,
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
from scheduler.policies.late import LateBinding
from scheduler.simulator import EXACT, SimSlice, simulate
from scheduler.workload import Arrival, merge, poisson

MS = 1_000_000
S = 1_000 * MS
# 10 ms for one item, 1 ms more for each further one, up to 20: the more the better.
GROWS = tuple((9 + batch) * MS for batch in range(1, 21))
# Nothing is gained by batching.
FLAT = tuple(batch * 10 * MS for batch in range(1, 9))


def core_with(
    *workers: tuple[int, dict[str, Sequence[int]]], depth: int = 1, refuse_late: bool = True
) -> SchedulerCore:
    """Workers 0, 1, ... by GPCs and the tables of what they serve."""
    core = SchedulerCore(policy=LateBinding, refuse_late=refuse_late)
    for worker_id, (gpcs, tables) in enumerate(workers):
        core.handle(0, WorkerUp(worker_id, gpcs, depth))
        for model, table in tables.items():
            core.handle(0, Serves(worker_id, model, tuple(table)))
    return core


def request(number: int, model: str = "m", items: int = 1, **fields: object) -> Arrived:
    return Arrived(Request(number, model, items, **fields))  # type: ignore[arg-type]


def runs(commands: list[AnyCommand]) -> list[tuple[int, tuple[int, ...]]]:
    return [(run.worker_id, run.request_ids) for run in commands if isinstance(run, Run)]


SIZES = [(gpcs, {"m": [ns // gpcs for ns in FLAT]}) for gpcs in (1, 2, 4)]


@pytest.mark.parametrize(("slo_ms", "worker"), [(100, 0), (10, 0), (9, 1), (5, 1), (4, 2), (None, 2)])
def test_a_query_starts_on_the_smallest_idle_slice_in_time_and_on_the_fastest_without_an_slo(
    slo_ms: int | None, worker: int
) -> None:
    due_ns = None if slo_ms is None else slo_ms * MS
    assert runs(core_with(*SIZES).handle(0, request(1, due_ns=due_ns))) == [(worker, (1,))]


def test_a_query_that_only_a_busy_slice_serves_in_time_waits_for_it() -> None:
    core = core_with(*SIZES)
    core.handle(0, request(1, due_ns=4 * MS))  # 2.5 ms on the largest
    assert core.handle(MS, request(2, due_ns=5 * MS)) == []  # the next size would end it at 6 ms
    assert runs(core.handle(2 * MS, BatchDone(2, 1))) == [(2, (2,))]


def test_what_waits_is_bound_to_whichever_slice_is_free_first() -> None:
    core = core_with((1, {"m": FLAT}), (1, {"m": FLAT}))
    for number in (1, 2, 3):
        core.handle(0, request(number, due_ns=100 * MS))
    assert runs(core.handle(MS, BatchDone(1, 2))) == [(1, (3,))]


def test_a_due_time_that_no_slice_can_meet_is_refused_with_how_late_it_would_be() -> None:
    assert core_with(*SIZES).handle(0, request(1, due_ns=2 * MS)) == [Refuse(1, Reason.SLO_UNREACHABLE, MS // 2)]


def test_a_due_time_that_the_queue_makes_unreachable_is_refused() -> None:
    core = core_with((1, {"m": FLAT}))
    for number in (1, 2, 3):
        core.handle(0, request(number, due_ns=35 * MS))
    # One runs, two wait: this one would end at 40 ms.
    assert core.handle(0, request(4, due_ns=35 * MS)) == [Refuse(4, Reason.SLO_UNREACHABLE, 5 * MS)]


def test_without_refusing_what_is_late_is_served_after_what_can_be_in_time() -> None:
    core = core_with((1, {"m": FLAT}), refuse_late=False)
    core.handle(0, request(1, due_ns=100 * MS))
    core.handle(0, request(2, due_ns=5 * MS))
    core.handle(0, request(3, due_ns=100 * MS))
    assert runs(core.handle(10 * MS, BatchDone(0, 1))) == [(0, (3,))]
    assert runs(core.handle(20 * MS, BatchDone(0, 2))) == [(0, (2,))]


def test_a_query_whose_time_passed_while_it_waited_is_answered_late_not_dropped() -> None:
    core = core_with((1, {"m": FLAT}))
    core.handle(0, request(1))
    core.handle(0, request(2, due_ns=30 * MS))
    assert core.handle(50 * MS, BatchDone(0, 1)) == [Answer(1, (1,)), Run(0, 2, "m", (2,))]


def test_a_free_slice_takes_the_model_with_the_least_laxity_relative_to_its_slo() -> None:
    core = core_with((1, {"a": FLAT, "b": FLAT, "c": FLAT}))
    core.handle(0, request(1, "a"))
    core.handle(0, request(2, "a", due_ns=200 * MS))  # when the slice is free: 180 of 200 ms left
    core.handle(0, request(3, "b", due_ns=50 * MS))  # 30 of 50
    core.handle(0, request(4, "c", due_ns=45 * MS))  # 25 of 45
    assert runs(core.handle(10 * MS, BatchDone(0, 1))) == [(0, (4,))]
    assert runs(core.handle(20 * MS, BatchDone(0, 2))) == [(0, (3,))]
    assert runs(core.handle(30 * MS, BatchDone(0, 3))) == [(0, (2,))]


def test_a_higher_class_goes_first_whatever_its_model_and_due_time() -> None:
    core = core_with((1, {"a": FLAT, "b": FLAT}))
    core.handle(0, request(1, "a"))
    core.handle(0, request(2, "a", due_ns=25 * MS))
    core.handle(0, request(3, "b", priority=1))
    assert runs(core.handle(10 * MS, BatchDone(0, 1))) == [(0, (3,))]


def test_a_batch_stays_within_the_earliest_due_time() -> None:
    core = core_with((1, {"m": GROWS}))
    core.handle(0, request(1))
    core.handle(1, request(2, due_ns=25 * MS))
    for number in range(3, 20):
        core.handle(2, request(number, due_ns=200 * MS))
    ((_, ids),) = runs(core.handle(10 * MS, BatchDone(0, 1)))
    assert ids == (2, 3, 4, 5, 6)  # 14 ms; with the guard, one more would be too many


def test_a_batch_ends_where_items_per_time_are_the_most() -> None:
    table = [10, 12, 14, 30, 31, 32]  # three items in 14 ms are better than any other number
    core = core_with((1, {"m": [ms * MS for ms in table]}))
    for number in range(1, 8):
        core.handle(0, request(number, due_ns=500 * MS))
    assert runs(core.handle(10 * MS, BatchDone(0, 1))) == [(0, (2, 3, 4))]


def test_lone_requests_and_other_shapes_are_not_mixed() -> None:
    core = core_with((1, {"m": GROWS}))
    core.handle(0, request(1))
    core.handle(0, request(2, dims=(16,)))
    core.handle(0, request(3, dims=(32,)))
    core.handle(0, request(4, dims=(16,), alone=True))
    core.handle(0, request(5, dims=(16,)))
    assert runs(core.handle(10 * MS, BatchDone(0, 1))) == [(0, (2, 5))]
    assert runs(core.handle(30 * MS, BatchDone(0, 2))) == [(0, (3,))]
    assert runs(core.handle(60 * MS, BatchDone(0, 3))) == [(0, (4,))]


def test_beside_a_model_with_a_short_slo_batches_are_short() -> None:
    core = core_with((1, {"short": FLAT, "long": GROWS}))
    core.handle(0, request(1, "short", due_ns=30 * MS))
    core.handle(0, request(2, "short", due_ns=30 * MS))  # so much is known of its SLO
    for number in range(3, 30):
        core.handle(0, request(number, "long", due_ns=5 * S))
    core.handle(10 * MS, BatchDone(0, 1))
    ((_, ids),) = runs(core.handle(20 * MS, BatchDone(0, 2)))
    assert len(ids) == 9  # 18 ms; 0.65 of 30 ms, less the guard


def test_a_crowded_model_gives_up_its_oldest_rather_than_its_efficiency() -> None:
    core = core_with((1, {"m": GROWS}), refuse_late=False)
    core.handle(0, request(1))
    for number in range(2, 7):
        core.handle(0, request(number, due_ns=42 * MS))
    for number in range(7, 40):
        core.handle(1, request(number, due_ns=82 * MS))
    # At 30 ms there are 12 left for the oldest: batches of two, where batches of twenty are due.
    ((_, ids),) = runs(core.handle(30 * MS, BatchDone(0, 1)))
    assert ids == tuple(range(7, 27))


def test_work_without_an_slo_gets_a_turn_after_a_second_but_no_more_than_its_share() -> None:
    slices = [SimSlice("one", 1, {"timely": [10.0], "open": [10.0]})]
    # Twice as much as the slice can do, and some work without an SLO.
    arrivals = merge(poisson("timely", 200.0, 20.0, 1), [Arrival(i * S // 10, "open") for i in range(30)])
    report = simulate(slices, arrivals, slo_ms={"timely": 100.0}, noise=EXACT, timeline=True)
    assert report.models["open"].answered == 30
    under_load = [span for span in report.timeline if span.end_ns < 20 * S]
    shares = sum(span.model == "open" for span in under_load) / len(under_load)
    assert 0.01 < shares <= 0.055
    assert report.models["timely"].within_slo > 0.46


def test_a_loose_slo_does_not_let_a_request_expire_while_larger_slices_idle() -> None:
    """Binding on arrival to the smallest slice in time, as ELSA does, would let most of these twelve expire."""
    slices = [SimSlice(f"{gpcs}g", gpcs, {"m": [100.0 / gpcs]}) for gpcs in (1, 2, 4)]
    arrivals = [Arrival(0, "m") for _ in range(12)]
    late, elsa = (
        simulate(slices, arrivals, policy, slo_ms={"m": 60_000.0}, timeout_ms={"m": 500.0}, noise=EXACT).models["m"]
        for policy in (LateBinding, Elsa)
    )
    assert (late.answered, late.expired) == (12, 0)
    assert elsa.expired > 0, "or else this shows nothing"


def test_a_busy_gpu_worker_stages_only_shortly_before_it_is_free_even_a_full_batch() -> None:
    core = core_with((7, {"m": GROWS}), depth=2)
    core.handle(0, request(1, due_ns=S))
    assert core.handle(0, request(2, due_ns=S)) == [Wake(10 * MS - STAGE_AHEAD_NS)]
    for number in range(3, 40):
        assert core.handle(MS, request(number, due_ns=S)) == []
    assert runs(core.handle(10 * MS - STAGE_AHEAD_NS, Tick())) == [(0, tuple(range(2, 22)))]


def test_what_waits_stays_while_another_slice_serves_it_and_is_refused_when_none_does() -> None:
    core = core_with((1, {"m": FLAT}), (1, {"m": FLAT}))
    for number in (1, 2, 3):
        core.handle(0, request(number))
    assert core.handle(1, WorkerLost(0, False, "killed")) == []
    assert core.handle(2, StopsServing(1, "m")) == [
        Refuse(1, Reason.UNAVAILABLE),
        Refuse(3, Reason.UNAVAILABLE),
    ]


def test_after_a_wait_for_the_only_worker_the_highest_class_starts_first() -> None:
    core = core_with((1, {"m": FLAT}))
    core.handle(0, WorkerLost(0, True, "killed"))
    core.handle(1, request(1))
    core.handle(2, request(2, priority=1))
    core.handle(3, WorkerUp(0, 1, 1))
    assert runs(core.handle(4, Serves(0, "m", FLAT))) == [(0, (2,))]
