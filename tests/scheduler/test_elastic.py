"""Which slices a job holds: pure decisions, checked against what is known of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.domain import BatchTable
from scheduler.elastic import WITHOUT_SLO_NS, Elastic, IdleShares, Place, Work, batch_for, decide, patience_ns

S = 1e9


def slices(count: int, gpcs: int = 1, ns: float = 1e6, idle: float = 1.0, first: int = 0) -> list[Place]:
    """That do an item in so many ns, in batches of ten."""
    return [Place(first + n, gpcs, idle, {0: (10, 10 * ns)}) for n in range(count)]


def held(work: Work, places: list[Place], before: tuple[int, ...] = ()) -> list[int]:
    return list(decide([work], {work.job: places}, {work.job: before})[work.job].planned)


def test_as_many_slices_as_carry_it_by_the_deadline() -> None:
    # 25,000 items at 1,000 a second, in ten seconds: two and a half slices.
    assert held(Work("a", {0: 25_000}, 10 * S), slices(7)) == [0, 1, 2]
    assert held(Work("a", {0: 25_000}, 100 * S), slices(7)) == [0]


def test_what_online_work_takes_is_made_up_for() -> None:
    assert len(held(Work("a", {0: 25_000}, 10 * S), slices(7, idle=0.5))) == 6


def test_the_least_gpc_time_goes_first() -> None:
    small, large = slices(2), slices(1, gpcs=4, ns=0.3e6, first=5)  # 1 and 1.2 GPC-ms an item
    assert held(Work("a", {0: 15_000}, 10 * S), small + large) == [0, 1]
    assert held(Work("a", {0: 25_000}, 10 * S), small + large) == [0, 1, 5]


def test_where_it_costs_about_the_same_the_large_slices_are_left_to_online_work() -> None:
    small, large = slices(2), slices(1, gpcs=4, ns=0.24e6, first=5)  # 1 and 0.96 GPC-ms an item
    assert held(Work("a", {0: 15_000}, 10 * S), large + small) == [0, 1]
    dear = slices(2, ns=1.2e6)  # 1.2
    assert held(Work("a", {0: 15_000}, 10 * S), large + dear) == [5]


def test_each_bucket_goes_where_it_is_cheapest() -> None:
    small = Place(0, 1, 1.0, {"short": (10, 10e6), "long": (1, 100e6)})
    large = Place(1, 4, 1.0, {"short": (10, 5e6), "long": (10, 50e6)})
    holding = decide([Work("a", {"short": 100, "long": 100}, 10 * S)], {"a": [small, large]}, {})["a"]
    assert holding.planned[0]["short"] == pytest.approx(0.1 * S)
    assert holding.planned[0]["long"] == pytest.approx(0)
    assert holding.planned[1]["long"] == pytest.approx(0.5 * S)


def test_slices_that_are_held_are_kept_and_given_back_late() -> None:
    assert held(Work("a", {0: 15_000}, 10 * S), slices(7), before=(5,)) == [5, 0]
    barely = Work("a", {0: 8_700}, 10 * S)  # one slice would just do
    assert held(barely, slices(7), before=(2, 3)) == [2, 3]
    assert held(barely, slices(7), before=(2,)) == [2]


def test_what_cannot_be_is_said_with_the_earliest_end() -> None:
    holding = decide([Work("a", {0: 70_000}, 5 * S)], {"a": slices(7)}, {})["a"]
    assert not holding.feasible
    assert len(holding.planned) == 7, "it holds everything"
    assert holding.ends_ns == pytest.approx(10 * S, rel=0.02)


def test_a_few_items_of_several_buckets_wait_where_an_overdue_job_needs_all_the_time() -> None:
    """So few that a solver of linear programmes takes the time that they need for none."""
    places = [
        Place(1, 2, 0.17, {0: (8, 0.4e6), 1: (8, 0.8e6)}),
        Place(3, 1, 0.5, {0: (8, 0.8e6), 1: (8, 1.6e6)}),
    ]
    works = [Work("small", {0: 1, 1: 2}, -1 * S), Work("overdue", {0: 43e6, 1: 1}, -5 * S)]
    found = decide(works, {work.job: places for work in works}, {})
    assert list(found["overdue"].planned) == [1, 3]
    assert (found["small"].feasible, found["small"].planned) == (False, {})
    assert found["small"].ends_ns > 0.98 * found["overdue"].ends_ns


def test_a_job_that_cannot_be_in_time_any_more_comes_after_those_that_can() -> None:
    works = [
        Work("overdue", {0: 7e6}, -5 * S),
        Work("small", {0: 15_000}, 20 * S),
        Work("whenever", {0: 100}, math.inf),
    ]
    found = decide(works, {work.job: slices(3) for work in works}, {"overdue": [0, 1, 2]})
    assert (found["small"].feasible, list(found["small"].planned)) == (True, [0])
    assert (found["overdue"].feasible, list(found["overdue"].planned)) == (False, [1, 2])
    assert found["overdue"].ends_ns == pytest.approx(3500 * S, rel=0.02)
    assert found["whenever"].planned == {}


def test_of_two_that_cannot_be_in_time_the_second_one_has_a_forecast_behind_the_first() -> None:
    works = [Work("first", {0: 70_000}, -5 * S), Work("second", {0: 7_000}, 0.1 * S)]
    found = decide(works, {work.job: slices(7) for work in works}, {})
    assert len(found["first"].planned) == 7
    assert (found["second"].planned, found["second"].feasible) == ({}, False)
    assert found["second"].ends_ns == pytest.approx(11 * S, rel=0.03)


def test_barely_late_a_job_keeps_its_turn() -> None:
    works = [Work("a", {0: 71_000}, 10 * S), Work("b", {0: 5_000}, 12 * S)]
    found = decide(works, {work.job: slices(7) for work in works}, {})
    assert len(found["a"].planned) == 7
    assert not found["a"].feasible
    assert found["b"].feasible


def test_a_deadline_that_has_passed_is_no_end_of_it() -> None:
    holding = decide([Work("a", {0: 7_000}, -5 * S)], {"a": slices(7)}, {})["a"]
    assert (holding.feasible, len(holding.planned)) == (False, 7)
    assert holding.ends_ns == pytest.approx(1 * S, rel=0.02)


def test_a_job_without_a_deadline_leaves_half_of_the_slices_alone() -> None:
    work = Work("a", {0: 7_000}, math.inf)
    places = slices(2, gpcs=4, ns=0.3e6, first=5) + slices(3)
    holding = decide([work], {"a": places}, {})["a"]
    assert (sorted(holding.planned), holding.feasible) == ([0, 1, 2], True)
    assert held(work, slices(1)) == [0], "but for the only one"


def test_without_slices_there_is_no_end() -> None:
    holding = decide([Work("a", {0: 7}, S)], {"a": []}, {})["a"]
    assert (holding.feasible, holding.planned) == (False, {})


def test_the_earliest_deadline_goes_first_and_the_next_one_has_what_is_left() -> None:
    works = [Work("late", {0: 20_000}, 20 * S), Work("soon", {0: 34_000}, 10 * S)]
    found = decide(works, {"late": slices(5), "soon": slices(5)}, {})
    assert (len(found["soon"].planned), len(found["late"].planned)) == (4, 1)
    assert found["soon"].feasible
    assert found["late"].feasible
    assert not set(found["soon"].planned) & set(found["late"].planned)


def test_a_job_that_would_displace_one_due_sooner_is_told_so() -> None:
    works = [Work("late", {0: 60_000}, 11 * S), Work("soon", {0: 45_000}, 10 * S)]
    found = decide(works, {"late": slices(5), "soon": slices(5)}, {})
    assert found["soon"].feasible
    assert not found["late"].feasible
    assert found["late"].ends_ns == pytest.approx(21 * S, rel=0.03)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, 3), st.floats(1, 1e5), min_size=1),
    st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.floats(0.1, 1.0)), min_size=1, max_size=8),
    st.floats(0.1, 1e3),
)
def test_a_feasible_plan_does_everything_in_the_time_there_is(
    left: dict[int, float], sizes: list[tuple[int, float]], seconds: float
) -> None:
    places = [
        Place(n, gpcs, idle, {bucket: (8, (bucket + 1) * 8e6 / gpcs**0.9) for bucket in range(4)})
        for n, (gpcs, idle) in enumerate(sizes)
    ]
    holding = decide([Work("a", left, seconds * S)], {"a": places}, {})["a"]
    by_id = {place.worker_id: place for place in places}
    within_ns = seconds * S if holding.feasible else holding.ends_ns
    for bucket, items in left.items():
        done = sum(ns[bucket] / by_id[w].batches[bucket][1] * 8 for w, ns in holding.planned.items())
        assert done == pytest.approx(items, rel=1e-4)
    assert math.isfinite(within_ns)
    gpc_ns = sum(sum(ns.values()) * by_id[w].gpcs for w, ns in holding.planned.items())
    assert gpc_ns == pytest.approx(holding.gpc_ns, rel=1e-4)
    least = sum(items * min(p.batches[b][1] / 8 * p.gpcs for p in places) for b, items in left.items())
    assert gpc_ns >= least * (1 - 1e-4)


def test_a_batch_is_the_best_that_online_work_can_wait_for() -> None:
    table = BatchTable([1_000_000 + 100_000 * n for n in range(64)])
    assert batch_for(table, 2e6) == (11, 2_000_000)
    assert batch_for(table, 4e6, factor=2.0) == (11, 4_000_000)
    assert batch_for(table, 0.1e6) == (3, 1_200_000), "none is short enough: hardly longer than the shortest"
    assert batch_for(table, None) == (64, table.ns[64])
    assert table.ns[64] < WITHOUT_SLO_NS


def test_one_slice_may_be_blocked_for_a_fifth_of_an_slo_and_many_for_one() -> None:
    assert patience_ns(100e6, 1) == pytest.approx(20e6)
    assert patience_ns(100e6, 4) == pytest.approx(50e6)
    assert patience_ns(100e6, 40) == pytest.approx(100e6)


def test_idle_shares_follow_what_was_busy() -> None:
    shares = IdleShares()
    assert shares.idle(1) == 1.0
    shares.observe(0, 1, 500)
    shares.observe(int(S), 1, 500 + int(S) // 4)
    assert shares.idle(1) == pytest.approx(0.75)
    shares.observe(int(S), 1, 500 + int(S) // 4)  # nothing has passed
    shares.observe(int(301 * S), 1, 500 + int(S) // 4)
    assert shares.idle(1) == pytest.approx(1.0, abs=1e-3)


def test_batches_are_handed_out_as_planned() -> None:
    elastic = Elastic()
    place = Place(0, 1, 1.0, {"short": (10, 10e6), "long": (10, 30e6)})
    elastic.decide([Work("a", {"short": 100, "long": 100}, 10 * S)], {"a": [place]})
    assert elastic.held("a") == [0]
    picked = []
    for _ in range(8):
        bucket = elastic.pick("a", 0, ["short", "long"])
        elastic.started("a", 0, bucket, place.batches[bucket][1])
        picked.append(bucket)
    assert picked.count("long") == 7, "it owes most of that"
    assert elastic.pick("a", 0, ["short"]) == "short"
    assert elastic.pick("a", 0, []) is None
    assert elastic.pick("a", 3, ["short"]) is None
    elastic.decide([], {})
    assert elastic.held("a") == []
