"""Exact edges against every way to cut there is, and edges that follow the traffic."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.buckets import SeenLengths, best_edges, exact_edges, padded_length, padded_work, relearned, together

histograms = st.dictionaries(st.integers(1, 40), st.integers(1, 9), min_size=1, max_size=8)
# A cost that grows with the length in steps of any kind.
steps = st.lists(st.integers(0, 7), min_size=41, max_size=41)


def growing(step: list[int]):  # type: ignore[no-untyped-def]
    return lambda length: 1.0 + sum(step[: int(length)])


def every_cut(lengths: list[int]) -> list[tuple[int, ...]]:
    return [
        (*cut, lengths[-1]) for count in range(len(lengths)) for cut in combinations(lengths[:-1], count)
    ]  # the longest is always an edge


@given(weights=histograms, step=steps, count=st.integers(1, 9))
def test_no_other_cut_is_better(weights: dict[int, int], step: list[int], count: int) -> None:
    cost = growing(step)
    found = exact_edges(weights, cost, count)
    least = min(padded_work(cut, weights, cost) for cut in every_cut(sorted(weights)) if len(cut) <= count)
    assert len(found) <= count
    assert padded_work(found, weights, cost) == pytest.approx(least)
    assert found == tuple(sorted(set(found)))
    assert found[-1] == max(weights)


@given(weights=histograms, step=steps, of_bucket=st.integers(0, 60))
def test_no_other_number_of_buckets_is_better(weights: dict[int, int], step: list[int], of_bucket: int) -> None:
    cost = growing(step)
    found = best_edges(weights, cost, of_bucket)
    least = min(padded_work(cut, weights, cost) + of_bucket * len(cut) for cut in every_cut(sorted(weights)))
    assert padded_work(found, weights, cost) + of_bucket * len(found) == pytest.approx(least)


def test_few_lengths_need_no_padding() -> None:
    weights = {100: 5.0, 200: 1.0}
    assert exact_edges(weights, float, 8) == (100, 200)
    assert padded_work((100, 200), weights, float) == 700


def test_what_has_no_weight_makes_no_edge() -> None:
    assert exact_edges({10: 1.0, 20: 0.0}, float, 3) == (10,)


@pytest.mark.parametrize(("weights", "count"), [({}, 3), ({10: 0.0}, 3), ({10: 1.0}, 0)])
def test_nothing_to_cut_is_an_error(weights: dict[float, float], count: int) -> None:
    with pytest.raises(ValueError, match=r"lengths|bucket"):
        exact_edges(weights, float, count)


def test_an_item_is_padded_to_the_next_edge() -> None:
    assert [padded_length(length, (10, 20)) for length in (1, 10, 11, 20, 25)] == [10, 10, 20, 20, 25]


def test_old_lengths_are_forgotten() -> None:
    seen = SeenLengths(half_life_s=10, start_s=0)
    seen.observe(0, {50: 8})
    seen.observe(20, {80: 4})
    assert seen.weights() == {50: pytest.approx(2), 80: pytest.approx(4)}
    seen.observe(15, {80: 1})  # the clock jumped back
    assert seen.weights() == {50: pytest.approx(2), 80: pytest.approx(5)}
    seen.observe(1000, {})
    assert seen.weights() == {}


def test_edges_follow_the_traffic_and_hold_still_without_need() -> None:
    before = {100.0: 50.0, 110.0: 50.0, 400.0: 10.0}
    edges = relearned((), before, float, 3, longest=512.0)
    assert edges[-1] == 512
    assert relearned(edges, before, float, 3, longest=512.0) == edges
    assert relearned(edges, {**before, 101.0: 1.0}, float, 3, longest=512.0) == edges
    moved = relearned(edges, {20.0: 90.0, 400.0: 10.0}, float, 3, longest=512.0)
    assert moved == (20.0, 400.0, 512.0)
    assert relearned(moved, {}, float, 3, longest=512.0) == moved


@given(weights=histograms, count=st.integers(1, 5))
def test_everything_that_may_come_has_a_bucket(weights: dict[float, float], count: int) -> None:
    edges = relearned((), weights, float, count, longest=40.0)
    assert edges[-1] == 40
    assert len(edges) <= max(count, 1)


def test_a_few_requests_do_not_shut_out_the_lengths_of_a_job() -> None:
    weights = together({4: 2}, {8: 1500})
    assert weights == {4: 2, 8: pytest.approx(1000)}
    assert relearned((4, 256), weights, lambda length: length, 3, 256) == (4, 8, 256)
    assert together({4: 2}, {}) == {4: 2}


def test_a_large_job_counts_as_much_as_the_requests_where_these_are_many() -> None:
    assert together({4: 2000, 8: 2000}, {8: 1e6}) == {4: 2000, 8: pytest.approx(6000)}
