"""Observed traffic: rates and shares that follow it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.demand import LEAST_JOB_S, Demand, Kind, job_demand


def fed(*seconds: dict[Kind, int], half_life_s: float = 10.0) -> Demand:
    """A Demand that was told these counts, one a second."""
    demand = Demand(half_life_s, start_s=0.0)
    for now_s, counts in enumerate(seconds, start=1):
        demand.observe(float(now_s), counts)
    return demand


def test_nothing_was_asked_for_yet() -> None:
    assert Demand(10.0, 0.0).traffic() == {}
    assert fed({}).traffic() == {}


@given(st.integers(1, 400), st.integers(1, 500), st.sampled_from([5.0, 30.0, 300.0]))
def test_a_steady_rate_is_seen_as_it_is_from_the_first_second_on(seconds: int, rate: int, half_life_s: float) -> None:
    steady = fed(*[{Kind("m", 1): rate}] * seconds, half_life_s=half_life_s)
    # Counted at the end of each second: up to half a second's decay too much.
    assert steady.traffic()["m"].rate_per_s == pytest.approx(rate, rel=0.75 / half_life_s)


def test_shares_of_items_and_lengths() -> None:
    traffic = fed({Kind("a", 1, 128): 30, Kind("a", 8, 128): 10, Kind("b", 4): 1}).traffic()
    assert traffic["a"].items == {1: 0.75, 8: 0.25}
    assert traffic["a"].lengths == {128: 1.0}
    assert traffic["b"].items == {4: 1.0}


def test_old_traffic_is_forgotten() -> None:
    changed = fed(*[{Kind("m", 1): 100}] * 60, *[{Kind("m", 32): 100}] * 60)
    items = changed.traffic()["m"].items
    assert items[32] > 0.98
    assert sum(items.values()) == pytest.approx(1.0)


def test_a_model_that_nobody_asks_for_any_more_goes() -> None:
    assert fed({Kind("m", 1): 5}, *[{}] * 200).traffic() == {}


def test_a_job_is_an_even_stream_of_batches_until_its_deadline() -> None:
    demand = job_demand("bert", 32_000, 1000.0, 64)
    assert (demand.model, demand.rate_per_s, demand.items) == ("bert (job)", 2.0, {16: 1.0})
    assert job_demand("bert", 32_000, 1000.0, 4).items == {4: 1.0}, "no larger than its batches"
    assert job_demand("bert", 1600, -5.0, 64).rate_per_s == 100 / LEAST_JOB_S, "one that is late has no time"
