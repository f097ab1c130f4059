"""One pool, rule by rule (the numbers are those of pool.py). Random stories are in test_pool_property.py."""

from __future__ import annotations

import pytest

from scheduler.core import STAGE_AHEAD_NS, SchedulerCore
from scheduler.domain import Pool
from scheduler.messages import (
    Arrived,
    BatchDone,
    Cancelled,
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
from scheduler.policies.pool import KEPT, OnePool
from scheduler.simulator import EXACT, Change, SimSlice, SliceEvent, simulate
from scheduler.workload import Arrival, merge, poisson
from tests.scheduler.test_baselines import FLAT, GROWS, MS, Told, core_with

S = 1_000 * MS
# A batch of any size takes as long.
LEVEL = (10 * MS,) * 20
ONE = (1, {"m": GROWS})
# Twice, four times as fast.
TWO = (2, {"m": [ns // 2 for ns in GROWS]})
FOUR = (4, {"m": [ns // 4 for ns in GROWS]})


def busy(*workers: tuple[int, dict[str, tuple[int, ...]]], model: str = "m") -> Told:
    """Each worker runs one open item from 0 on; that many requests have been asked."""
    core = core_with(OnePool, *workers)
    for _ in workers:
        core.ask(0, model=model)
    return core


def refusals(core: Told) -> list[tuple[int, Reason, float]]:
    return [(c.request_id, c.reason, c.retry_after_ns / MS) for c in core.commands if isinstance(c, Refuse)]


# ---- 1: what is timely ----


def test_where_the_timely_lane_becomes_too_long_its_largest_query_goes_to_the_late_one() -> None:
    core = busy(ONE)
    core.ask(0, 20, due_ms=60)
    for _ in range(5):  # theta is .72, from 10 to 60 the slice does 34 items: 24 fit
        core.ask(0, due_ms=60)
    # It was first in the line; now it only fills up.
    assert core.at(10, BatchDone(0, 1)) == [(0, [(3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (2, 15)])]


def test_a_query_that_fits_in_the_next_batch_of_a_free_slice_is_timely_whatever_theta_says() -> None:
    core = core_with(OnePool, ONE)
    assert core.ask(0, 20, due_ms=29, strict=True) == [(0, [(1, 20)])]


def test_so_is_one_that_is_the_only_one_to_wait() -> None:
    core = busy(ONE)
    core.ask(0, 20, due_ms=39, strict=True)
    assert refusals(core) == []
    assert core.at(10, BatchDone(0, 1)) == [(0, [(2, 20)])]


def test_what_others_have_been_promised_is_not_promised_again() -> None:
    """Two models, each of which could have the slice for itself."""
    core = busy((1, {"m": GROWS, "other": GROWS}))
    core.ask(0, 20, due_ms=39, strict=True)
    core.ask(0, 20, due_ms=39, model="other", strict=True)
    assert [number for number, *_ in refusals(core)] == [3]


# ---- 2: what is hopeless ----


def test_what_no_slice_can_end_in_time_is_late_and_lets_others_pass() -> None:
    core = busy(ONE)
    core.ask(0, due_ms=9)
    core.ask(1, 20, due_ms=60)
    assert core.at(10, BatchDone(0, 1)) == [(0, [(3, 20)])]
    assert core.at(39, BatchDone(0, 2)) == [(0, [(2, 1)])]


def test_of_what_must_not_be_cut_all_has_to_be_in_time() -> None:
    core = busy(ONE)
    core.ask(0, 20, due_ms=38, whole=True)  # ends at 39; a single item of it would be in time
    core.ask(1, 5, due_ms=60)
    assert core.at(10, BatchDone(0, 1)) == [(0, [(3, 5)])]


@pytest.mark.parametrize("how", ["whole", "alone"])
def test_a_large_query_that_must_not_be_cut_and_cannot_be_in_time_starts_on_a_free_slice_at_once(how: str) -> None:
    assert core_with(OnePool, ONE).ask(0, 20, due_ms=28, **{how: True}) == [(0, [(1, 20)])]


def test_a_query_for_which_only_a_busy_slice_is_quick_enough_waits_and_does_not_hold_up_others() -> None:
    core = core_with(OnePool, ONE, FOUR)
    core.ask(0, due_ms=4)  # 2.5 ms on the large one
    assert core.ask(0, due_ms=8) == []
    assert core.ask(0, 3, due_ms=30) == [(0, [(3, 3)])]
    assert core.at(2.5, BatchDone(1, 1)) == [(1, [(2, 1)])]


# ---- 3: what goes first ----


def test_the_highest_class_goes_first_whatever_its_model_and_due_time() -> None:
    core = busy((1, {"m": FLAT, "b": FLAT}))
    core.ask(0, due_ms=25)
    core.ask(0, model="b", priority=1)
    assert core.at(10, BatchDone(0, 1)) == [(0, [(3, 1)])]


def test_of_several_models_the_least_laxity_relative_to_its_slo_goes_first() -> None:
    core = busy((1, {"m": FLAT, "b": FLAT, "c": FLAT}))
    core.ask(0, due_ms=200)  # when the slice is free: 180 of 200 ms left
    core.ask(0, model="b", due_ms=60)  # 40 of 60
    core.ask(0, model="c", due_ms=45)  # 25 of 45
    assert core.at(10, BatchDone(0, 1)) == [(0, [(4, 1)])]
    assert core.at(20, BatchDone(0, 2)) == [(0, [(3, 1)])]
    assert core.at(30, BatchDone(0, 3)) == [(0, [(2, 1)])]


def test_timely_then_late_then_open_work() -> None:
    core = busy((1, {"m": FLAT, "b": FLAT, "c": FLAT}))
    core.ask(0, model="c")
    core.ask(0, model="b", due_ms=9)  # late
    core.ask(0, due_ms=100)
    assert core.at(10, BatchDone(0, 1)) == [(0, [(4, 1)])]
    assert core.at(20, BatchDone(0, 2)) == [(0, [(3, 1)])]
    assert core.at(30, BatchDone(0, 3)) == [(0, [(2, 1)])]


def test_of_late_work_that_whose_bound_is_next_goes_first() -> None:
    core = busy((1, {"m": FLAT, "b": FLAT}))
    core.ask(0, model="b", due_ms=9)  # by 90
    core.ask(1, due_ms=9)  # by 81
    assert core.at(10, BatchDone(0, 1)) == [(0, [(3, 1)])]


def flooded(until_ms: int) -> list[int]:
    """What a slice runs after a late query of 25 ms came at 0, in a stream of timely ones that takes all its time."""
    core = busy((1, {"m": FLAT, "late": FLAT}))
    core.ask(0, 3, model="late", due_ms=25)
    started = []
    for number in range(1, until_ms // 10 + 1):
        core.ask(10 * number - 1, due_ms=10 * number + 39)
        ((_, pieces),) = core.at(10 * number, BatchDone(0, number))
        started.append(pieces[0][0])
        if pieces[0][0] == 2:
            break
    return started


def test_late_work_that_is_nearly_ten_slos_old_goes_first() -> None:
    started = flooded(400)
    assert 2 in started
    begin_ms = 10 * len(started)
    assert 125 <= begin_ms <= 190  # by 250, less two and a half SLOs and what it takes


def test_open_work_gets_a_turn_after_a_second_but_no_more_than_its_share() -> None:
    slices = [SimSlice("one", 1, {"timely": [10.0], "open": [10.0]})]
    # Twice as much as the slice can do, and some work without an SLO.
    arrivals = merge(poisson("timely", 200.0, 20.0, 1), [Arrival(i * S // 10, "open") for i in range(30)])
    report = simulate(slices, arrivals, slo_ms={"timely": 100.0}, noise=EXACT, timeline=True)
    assert report.models["open"].answered == 30
    under_load = [span for span in report.timeline if span.end_ns < 20 * S]
    shares = sum(span.model == "open" for span in under_load) / len(under_load)
    assert 0.01 < shares <= 0.055
    first_ns = min(span.start_ns for span in report.timeline if span.model == "open")
    assert first_ns == 0 or S <= first_ns < 1.1 * S
    assert report.models["timely"].within_slo > 0.42


# ---- 4: timely batches ----


def test_a_batch_ends_before_its_first_query_is_due() -> None:
    core = busy(ONE)
    core.ask(1, due_ms=25)
    for _ in range(17):
        core.ask(2, due_ms=200)
    ((_, pieces),) = core.at(10, BatchDone(0, 1))
    assert pieces == [(number, 1) for number in range(2, 8)]  # 15 ms


def test_with_the_spread_of_the_estimates_as_margin() -> None:
    core = core_with(OnePool, (1, {"m": LEVEL}))
    at_ms = 0.0
    for number in range(1, 40):  # they take 8.4 to 11.6 ms: 16 % up and down, more than which is no surprise
        core.ask(at_ms, due_ms=at_ms + 1000)
        at_ms += 10 + 0.4 * (number % 9 - 4)
        core.at(at_ms, BatchDone(0, number))
    core.ask(at_ms, due_ms=at_ms + 11, strict=True)
    assert [number for number, *_ in refusals(core)] == [40]  # it could be in time, but not surely
    assert core.ask(at_ms, due_ms=at_ms + 15, strict=True) != []


def test_a_batch_has_the_number_of_items_with_the_most_items_per_time() -> None:
    table = tuple(ms * MS for ms in (10, 12, 14, 30, 31, 32))  # three in 14 ms are better than any other number
    core = busy((1, {"m": table}))
    for _ in range(7):
        core.ask(0, due_ms=500)
    assert core.at(10, BatchDone(0, 1)) == [(0, [(2, 1), (3, 1), (4, 1)])]


def test_of_free_slices_it_goes_to_the_one_that_it_uses_best() -> None:
    core = core_with(OnePool, FOUR, ONE)
    # 21 ms on the small slice: 86 % of its best in 27 ms. It would be 83 % of the large one's.
    assert core.ask(0, 12, due_ms=27) == [(1, [(1, 12)])]
    assert core.ask(0, 1, due_ms=8) == [(0, [(2, 1)])]


def test_a_query_is_cut_where_that_gains_and_its_pieces_are_joined_before_the_answer() -> None:
    core = core_with(OnePool, ONE, ONE)
    assert core.ask(0, 20, due_ms=22) == [(0, [(1, 13)]), (1, [(1, 7)])]
    core.at(16, BatchDone(1, 2))
    assert [command.request_ids for command in core.commands if hasattr(command, "request_ids")] == [()]
    core.at(22, BatchDone(0, 1))
    assert [command.request_ids for command in core.commands if hasattr(command, "request_ids")] == [(1,)]


def test_a_batch_ends_with_a_whole_query_where_that_costs_next_to_nothing() -> None:
    table = tuple(round((10 + 0.001 * n) * MS * n) for n in range(1, 21))  # hardly anything is lost by small batches
    core = busy((1, {"m": table}))
    core.ask(0, 7, due_ms=1000)
    core.ask(0, 7, due_ms=1000)
    core.ask(0, 7, due_ms=1000)
    ((_, pieces),) = core.at(10.01, BatchDone(0, 1))
    assert all(items == 7 for _, items in pieces)


@pytest.mark.parametrize("how", ["whole", "alone"])
def test_what_must_not_be_cut_is_not(how: str) -> None:
    core = core_with(OnePool, ONE, ONE)
    assert core.ask(0, 12, due_ms=22, **{how: True}) == [(0, [(1, 12)])]


def test_what_must_not_be_cut_is_passed_over_where_it_does_not_fit() -> None:
    core = busy(ONE)
    core.ask(0, 5, due_ms=28)  # there is time for nine
    core.ask(0, 12, due_ms=80, whole=True)
    core.ask(0, 4, due_ms=90)
    assert core.at(10, BatchDone(0, 1)) == [(0, [(2, 5), (4, 4)])]


def test_lone_queries_and_other_shapes_are_not_mixed() -> None:
    core = busy(ONE)
    core.ask(0, due_ms=200, dims=(16,))
    core.ask(0, due_ms=210, dims=(32,))
    core.ask(0, due_ms=300, dims=(16,), alone=True)
    core.ask(0, due_ms=310, dims=(16,), alone=True)
    core.ask(0, due_ms=240, dims=(16,))
    assert core.at(10, BatchDone(0, 1)) == [(0, [(2, 1), (6, 1)])]
    assert core.at(21, BatchDone(0, 2)) == [(0, [(3, 1)])]
    assert core.at(31, BatchDone(0, 3)) == [(0, [(4, 1)])]
    assert core.at(41, BatchDone(0, 4)) == [(0, [(5, 1)])]


def test_where_the_timely_lane_is_empty_late_and_open_items_fill_the_batch_up_as_long_as_it_is_in_time() -> None:
    core = busy(ONE)
    core.ask(0, 30)
    core.ask(0, 3, due_ms=9)  # late
    core.ask(0, 2, due_ms=27)
    # Until 27 there is time for eight.
    assert core.at(10, BatchDone(0, 1)) == [(0, [(4, 2), (3, 3), (2, 3)])]


BUCKETS = (8, 16)
# Twice the time for the longer ones.
SLOWER = (*GROWS, *(2 * ns for ns in GROWS))


def test_length_buckets_are_batched_apart_each_by_its_own_times() -> None:
    core = core_with(OnePool, (1, {"m": SLOWER}), lengths=BUCKETS)
    core.ask(0, length=3)
    core.ask(0, 12, due_ms=90, length=16)
    core.ask(0, 3, due_ms=60, length=8)
    core.ask(0, 3, due_ms=61, length=5)
    assert core.at(10, BatchDone(0, 1)) == [(0, [(3, 3), (4, 3)])]
    assert core.at(25, BatchDone(0, 2)) == [(0, [(2, 12)])]
    core.ask(25, due_ms=25 + 42 + 19, length=16, strict=True)  # 42 ms for those, and 20 for one more
    ((number, _, retry_ms),) = refusals(core)
    assert number == 5
    assert 0 < retry_ms < 10


# ---- 5: late and open batches ----


def test_a_late_batch_may_take_one_and_a_half_slos() -> None:
    core = busy(ONE)
    core.ask(0, 6, due_ms=11)
    core.ask(0, 6, due_ms=11)
    assert core.at(10, BatchDone(0, 1)) == [(0, [(2, 6), (3, 1)])]  # 16 of 16.5 ms


def test_where_no_slice_does_anything_within_the_slo_late_batches_go_up_to_the_knee() -> None:
    core = busy(ONE)
    core.ask(0, 20, due_ms=9.9)
    assert core.at(10, BatchDone(0, 1)) == [(0, [(2, 12)])]


@pytest.mark.parametrize(("waiting", "batch"), [(3, 3), (20, 12), (30, 20)])
def test_open_batches_go_up_to_the_knee_and_to_the_peak_where_much_waits(waiting: int, batch: int) -> None:
    core = busy(ONE)
    for _ in range(waiting):
        core.ask(0)
    ((_, pieces),) = core.at(10, BatchDone(0, 1))
    assert len(pieces) == batch


# ---- 6: nobody's batch blocks others for long ----


def longest_batch(long_table: list[float], short_slo_ms: float) -> int:
    """Items, of a model with a long SLO and much to do, beside one with a short SLO that takes a third of the time."""
    slices = [SimSlice("one", 1, {"short": [1.0], "long": long_table})]
    arrivals = merge([Arrival(3 * MS * n, "short") for n in range(700)], poisson("long", 500.0, 2.0, 1))
    slo_ms = {"short": short_slo_ms, "long": 2000.0}
    report = simulate(slices, arrivals, slo_ms=slo_ms, noise=EXACT, timeline=True)
    # Until it is known what comes, and after it has gone, there is nobody to be blocked.
    spans = [span for span in report.timeline if S // 2 < span.start_ns < 2 * S and span.model == "long"]
    return max(span.items for span in spans)


def test_beside_a_model_with_a_short_slo_batches_are_short() -> None:
    assert longest_batch([9.0 + items for items in range(1, 21)], 30.0) == 10  # 19 ms of 0.65 * 30


def test_where_one_item_is_too_long_already_as_many_go_as_take_no_longer() -> None:
    """Batches of one would block others as long, and do next to nothing."""
    assert longest_batch([10.0] * 20, 12.0) > 10


def test_where_other_slices_carry_the_short_one_batches_are_as_long_as_is_good() -> None:
    core = core_with(OnePool, (1, {"short": FLAT}), (1, {"short": FLAT, "long": GROWS}))
    core.ask(0, model="short", due_ms=30)
    for _ in range(20):
        core.ask(1, model="long", due_ms=2000)
    assert [len(pieces) for _, pieces in core.at(10, BatchDone(1, 2))] in ([19], [20])


# ---- 1 again: shares. More of them are in test_shares.py ----


def test_a_model_that_floods_does_not_take_what_another_has_a_share_in() -> None:
    """One sends 1.5 times what the slices can do, the other 30 %: it gets nearly all of that, in time."""
    table = [5.0 + 0.5 * items for items in range(1, 33)]
    slices = [SimSlice(f"slice {index}", 1, {"flood": table, "fair": table}) for index in range(4)]
    most_per_s = 4 * 32 / 21e-3
    arrivals = merge(poisson("flood", 1.5 * most_per_s, 6.0, 1), poisson("fair", 0.3 * most_per_s, 6.0, 2))
    report = simulate(slices, arrivals, slo_ms={"flood": 60.0, "fair": 60.0}, max_queued=100_000, timeline=True)
    fair, flood = report.models["fair"], report.models["flood"]
    assert fair.within_slo > 0.9
    assert flood.max_ms < 10 * 60  # what was accepted
    assert 0.3 * fair.within_slo + 1.5 * flood.within_slo > 0.85  # of what the slices can do, in time
    under_load = [span for span in report.timeline if S < span.start_ns < 6 * S]
    time_ns = {model: sum(s.end_ns - s.start_ns for s in under_load if s.model == model) for model in report.models}
    assert 0.27 < time_ns["fair"] / sum(time_ns.values()) < 0.37


# ---- 7 and 8: refusals, promises ----


def test_a_strict_query_that_would_be_late_is_refused_with_how_late() -> None:
    core = core_with(OnePool, ONE)
    core.ask(0, due_ms=7.5, strict=True)
    assert refusals(core) == [(1, Reason.SLO_UNREACHABLE, 2.5)]
    core.ask(0, 20, due_ms=25, strict=True, whole=True)
    assert refusals(core) == [(2, Reason.SLO_UNREACHABLE, 4)]


def test_one_that_does_not_fit_any_more_is_told_when_there_is_room() -> None:
    core = busy(ONE)
    for _ in range(100):
        core.ask(0, due_ms=60, strict=True)
        if refusals(core):
            break
    ((number, reason, retry_ms),) = refusals(core)
    assert 20 < number < 40
    assert reason is Reason.SLO_UNREACHABLE
    assert 0 < retry_ms < 60


def test_what_the_late_lane_has_no_room_for_is_refused_with_how_long_that_lasts() -> None:
    core = busy(ONE)
    refused = []
    for _ in range(200):
        core.ask(0, 10, due_ms=40)
        refused += refusals(core)
    first = refused[0][0]
    # The slice does 27 items in 40 ms: seven or eight SLOs' worth of them are let in.
    assert 6 * 27 < 10 * (first - 2) < 9 * 27
    assert refused[0][1] is Reason.OVERLOADED
    assert 0 < refused[0][2] < 40
    assert len(refused) == 202 - first


def test_a_strict_query_is_not_late_for_the_sake_of_others() -> None:
    """What is due sooner, and comes later, does not take its place."""
    core = busy((1, {"m": FLAT, "b": FLAT}))
    core.ask(0, 2, due_ms=31, strict=True)  # from 10 or 11 on it has to run
    core.ask(1, model="b", due_ms=25)
    core.ask(1, model="b", due_ms=25, strict=True)
    assert [number for number, *_ in refusals(core)] == [4]
    assert core.at(10, BatchDone(0, 1)) + core.at(20, BatchDone(0, 2)) == [(0, [(2, 1)]), (0, [(2, 1)])]


def test_what_leaves_the_time_that_is_promised_goes_beside_it() -> None:
    core = busy((1, {"m": FLAT, "b": FLAT}))
    core.ask(0, 2, due_ms=41, strict=True)
    core.ask(1, model="b", due_ms=33)  # not so soon that batches of the other model had to be short
    assert core.at(10, BatchDone(0, 1)) == [(0, [(3, 1)])]
    assert core.at(20, BatchDone(0, 2)) == [(0, [(2, 2)])]


def test_a_cancelled_strict_query_keeps_nobody_out() -> None:
    core = busy((1, {"m": FLAT}))
    core.ask(0, 4, due_ms=60, strict=True)
    core.ask(0, 2, due_ms=60, strict=True)
    assert [number for number, *_ in refusals(core)] == [3]
    core.at(1, Cancelled(2))
    core.ask(1, 2, due_ms=60, strict=True)
    assert refusals(core) == []


# ---- the rest ----


def test_requests_that_run_alone_share_one_queue_and_one_bound() -> None:
    """Each has a batch of its own, and yet a thousand of them are a thousand in front of the next."""
    core = core_with(OnePool, (1, {"m": (10 * MS,)}))
    refused = 0
    for _ in range(300):
        core.ask(0, due_ms=50, alone=True)
        refused += len(refusals(core))
    assert 30 < 300 - refused < 50  # of 10 ms each, within 10 SLOs
    assert [core.at(10 * n, BatchDone(0, n))[0][1][0][1] for n in range(1, 6)] == [1] * 5


def test_one_query_in_a_hurry_does_not_make_batches_small() -> None:
    core = busy(ONE)
    for _ in range(20):
        core.ask(0, due_ms=400)
    core.ask(0, due_ms=0.1)
    ((_, pieces),) = core.at(10, BatchDone(0, 1))
    assert len(pieces) == 20


def test_the_backlog_is_the_time_that_the_slices_need_for_what_waits() -> None:
    pool = Pool()
    core = SchedulerCore(max_queued=40, policy=lambda made: OnePool(made))
    told = Told(OnePool)
    told.core = core
    for worker in (0, 1):
        told.at(0, WorkerUp(worker, 1, 1))
        told.at(0, Serves(worker, "m", GROWS))
    for _ in range(42):
        told.ask(0)
    told.ask(0)
    ((_, reason, retry_ms),) = refusals(told)
    assert reason is Reason.QUEUE_FULL
    assert retry_ms == pytest.approx(10 + 40 / (2 * 20 / 29), rel=0.01)
    assert OnePool(pool).backlog_ns(0, "m") == 0


def test_a_busy_gpu_worker_stages_only_shortly_before_it_is_free_even_a_full_batch() -> None:
    core = SchedulerCore(policy=OnePool)
    core.handle(0, WorkerUp(0, 7, 2))
    core.handle(0, Serves(0, "m", GROWS))
    core.handle(0, Arrived(Request(1, "m", 1, due_ns=S)))
    assert core.handle(0, Arrived(Request(2, "m", 1, due_ns=S))) == [Wake(10 * MS - STAGE_AHEAD_NS)]
    for number in range(3, 40):
        assert core.handle(MS, Arrived(Request(number, "m", 1, due_ns=S))) == []
    (run,) = core.handle(10 * MS - STAGE_AHEAD_NS, Tick())
    assert isinstance(run, Run)
    assert [piece.request_id for piece in run.pieces] == list(range(2, 22))


def test_what_waits_stays_while_another_slice_serves_it_and_is_refused_when_none_does() -> None:
    core = core_with(OnePool, (1, {"m": FLAT}), (1, {"m": FLAT}))
    for due_ms in (None, None, None, 100):
        core.ask(0, due_ms=due_ms)
    core.ask(0, due_ms=100, strict=True)
    core.at(1, WorkerLost(0, False, "killed"))
    assert refusals(core) == []
    core.at(2, StopsServing(1, "m"))
    assert sorted(refusals(core)) == [(number, Reason.UNAVAILABLE, 0) for number in (1, 3, 4, 5)]


def test_after_a_wait_for_the_only_worker_the_highest_class_starts_first() -> None:
    core = core_with(OnePool, (1, {"m": FLAT}))
    core.at(0, WorkerLost(0, True, "killed"))
    core.ask(1)
    core.ask(2, priority=2)
    core.at(3, WorkerUp(0, 1, 1))
    assert core.at(4, Serves(0, "m", FLAT)) == [(0, [(2, 1)])]


def test_shapes_and_classes_that_come_once_are_not_kept() -> None:
    policies: list[OnePool] = []

    def made(pool: Pool) -> OnePool:
        policies.append(OnePool(pool))
        return policies[0]

    core = core_with(made, ONE)
    for number in range(10 * KEPT):
        core.ask(100 * number, due_ms=100 * number + (50 if number % 2 else 5), dims=(number,), strict=True)
        if core.commands and isinstance(core.commands[-1], Run):
            core.at(100 * number + 20, BatchDone(0, core.commands[-1].batch_id))
    assert len(policies[0]._lanes) <= KEPT + 1


def test_a_line_that_is_forgotten_after_all_of_it_was_cancelled_does_no_harm() -> None:
    """Nobody was asked for work in between: it was still listed as one where something waits."""
    core = busy((1, {"m": GROWS}), (1, {"m": GROWS, "gone": GROWS}))
    for number in range(KEPT + 1):
        core.ask(0, dims=(100 + number,))  # each a line of its own, which stays
    for fields in ({}, {"model": "gone"}):
        core.ask(0, dims=(1,), **fields)  # type: ignore[arg-type]
        core.at(0, Cancelled(core.number))
    for dims in (2, 3, 4, 5):
        core.ask(0, due_ms=1, dims=(dims,), strict=True)  # refused: an empty line goes for this one
        core.ask(0, dims=(dims,))
    core.at(1, StopsServing(1, "gone"))
    assert len(core.at(10, BatchDone(0, 1))) == 1
    assert len(core.at(10, BatchDone(1, 2))) == 1


def test_strict_queries_are_tried_again_after_a_slow_moment() -> None:
    """What was learned while a slice was slow is no reason to refuse for ever: nothing would run to unlearn it."""
    slices = [SimSlice("one", 1, {"m": [10.0 + batch for batch in range(1, 9)]})]
    slow = [SliceEvent(0, "one", Change.SPEED, 3.0), SliceEvent(S // 5, "one", Change.SPEED, 1.0)]
    arrivals = poisson("m", 50.0, 20.0, 1)
    report = simulate(slices, arrivals, slo_ms={"m": 33.0}, noise=EXACT, strict=True, events=slow).models["m"]
    assert report.answered > 0.9 * report.sent


@pytest.mark.parametrize("slow", [False, True])
def test_strict_queries_of_two_models_keep_the_slices_busy_under_overload(slow: bool) -> None:
    """Batches are not the shorter for plans; and who has lost a place, to a slow moment, is not given another's."""
    table = [4.0 + batch for batch in range(1, 33)]
    slices = [SimSlice(name, 1, {"a": table, "b": table}) for name in ("one", "two")]
    events = (
        [SliceEvent(S, "one", Change.SPEED, 3.0), SliceEvent(S + S // 20, "one", Change.SPEED, 1.0)] if slow else ()
    )
    most_per_s = 2 * 32 / 36e-3
    arrivals = merge(*(poisson(model, most_per_s, 5.0, seed) for seed, model in enumerate("ab")))
    slo_ms = {"a": 60.0, "b": 60.0}
    report = simulate(slices, arrivals, slo_ms=slo_ms, noise=EXACT, strict=True, events=events, max_queued=100_000)
    models = report.models.values()
    assert sum(each.within_slo * each.sent for each in models) > 0.75 * 5 * most_per_s
    late = sum(each.answered - each.within_slo * each.sent for each in models)
    assert late < 64 * slow + 1e-6  # as many as one batch of each slice
    assert max(each.max_ms for each in models) < 10 * 60


def test_a_model_that_has_been_idle_is_asked_for_its_slices_as_they_are_now() -> None:
    """Rule 6 looks at what other models of a slice may need: of slices that came after their last query, too."""
    table = tuple(MS * (9 + batch) for batch in range(1, 33))
    core = SchedulerCore()
    core.handle(0, WorkerUp(0, 1, 1))
    core.handle(0, Serves(0, "idle", table))
    core.handle(0, Arrived(Request(1, "idle", 1, due_ns=20 * MS)))
    core.handle(10 * MS, BatchDone(0, 1))
    core.handle(11 * MS, WorkerUp(1, 1, 1))
    for model in ("idle", "busy"):
        core.handle(11 * MS, Serves(1, model, table))
    commands = core.handle(12 * MS, Arrived(Request(2, "busy", 32, due_ns=S)))
    assert [command.worker_id for command in commands if isinstance(command, Run)] == [1]


def test_a_crowded_model_gives_up_its_oldest_rather_than_its_efficiency() -> None:
    core = busy(ONE)
    for _ in range(5):
        core.ask(0, due_ms=42)
    for _ in range(60):
        core.ask(1, due_ms=142)
    core.ask(1, 1, due_ms=999)
    # The slice is free much later than it said: there are 11 ms for the oldest, a batch of two, while 20 are due.
    ((_, pieces),) = core.at(31, BatchDone(0, 1))
    assert pieces == [(number, 1) for number in range(7, 27)]
