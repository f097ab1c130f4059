"""When a new layout is worth its change."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.autopilot import Proposal, Rules, propose, served, slice_capacities
from partitioner.catalog import GPU_MODELS
from partitioner.geometry import check, parse_layout
from partitioner.latency import shipped
from partitioner.plans import ModelDemand

A100 = GPU_MODELS["A100-80GB"]
BERT = {"bert": shipped("bert")}
ONES = "+".join(["1g.10gb"] * 7)
SMALL = ModelDemand("bert", 140.0, 198.0, {8: 1.0})
LARGE = ModelDemand("bert", 10.0, 198.0, {32: 1.0})
EAGER = Rules(dwell_s=10.0, horizon_s=300.0, change_s=1.0)


def proposal(demand: ModelDemand, *layouts: str, rules: Rules = EAGER, since_change_s: float = 100.0) -> Proposal:
    current = {f"GPU-{index}": parse_layout(layout, A100) for index, layout in enumerate(layouts)}
    return propose([demand], BERT, A100, current, "optimal", rules, since_change_s)


def sizes(found: Proposal) -> list[int]:
    return sorted(placed.profile.gpcs for layout in found.layouts.values() for placed in layout)


def test_small_queries_want_small_slices_and_large_ones_large_slices() -> None:
    assert sizes(proposal(SMALL, "7g.80gb", "7g.80gb")) == [1] * 14
    assert sizes(proposal(LARGE, ONES, ONES)) == [3, 3, 4, 4]


def test_what_the_present_layout_cannot_serve_is_gained() -> None:
    found = proposal(LARGE, ONES, ONES)
    assert (found.served_now, found.served_then) == (0.0, 1.0)
    assert found.worthwhile
    assert found.reason == "it serves 100% of the queries in time, the present one 0%"


def test_a_layout_that_serves_all_is_left_alone() -> None:
    found = proposal(replace(SMALL, rate_per_s=120.0), ONES, "4g.40gb+1g.10gb+1g.10gb+1g.10gb")
    assert found.served_now == pytest.approx(1.0)
    assert not found.worthwhile
    assert "not worth a change" in found.reason


def test_the_best_layout_stays() -> None:
    found = proposal(SMALL, ONES, ONES)
    assert (found.worthwhile, found.reason) == (False, "the layout is the best one already")


def test_no_change_so_soon_after_another() -> None:
    found = proposal(LARGE, ONES, ONES, since_change_s=4.0)
    assert not found.worthwhile
    assert found.reason == "it would serve 100% more, but the last change was just now; in 6 s"


def test_a_gain_that_does_not_pay_for_its_change_is_left() -> None:
    slow = replace(EAGER, change_s=120.0, horizon_s=60.0)
    found = proposal(replace(SMALL, rate_per_s=160.0), "4g.40gb+2g.20gb+1g.10gb", "4g.40gb+2g.20gb+1g.10gb", rules=slow)
    assert found.served_then > found.served_now + slow.min_gain
    assert not found.worthwhile
    assert "which does not pay for" in found.reason


def test_a_demand_that_no_slice_can_serve_is_no_reason_to_change() -> None:
    found = proposal(ModelDemand("bert", 10.0, 50.0, {64: 1.0}), ONES, ONES)
    assert (found.served_now, found.served_then, found.worthwhile) == (0.0, 0.0, False)


DEMANDS = st.builds(
    ModelDemand,
    st.just("bert"),
    st.floats(0.1, 500.0),
    st.floats(20.0, 1000.0),
    st.dictionaries(st.sampled_from([1, 2, 8, 16, 32]), st.floats(0.05, 1.0), min_size=1),
)
LAYOUTS = ["7g.80gb", ONES, "4g.40gb+3g.40gb", "3g.40gb+2g.20gb+1g.10gb+1g.10gb", "1g.10gb"]


@settings(max_examples=60, deadline=None)
@given(DEMANDS, st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3), st.sampled_from(["optimal", "paris"]))
def test_every_proposal_is_legal_and_told_truly(demand: ModelDemand, layouts: list[str], planner: str) -> None:
    current = {f"GPU-{index}": parse_layout(layout, A100) for index, layout in enumerate(layouts)}
    found = propose([demand], BERT, A100, current, planner, EAGER, 100.0)
    assert set(found.layouts) == set(current)
    for layout in found.layouts.values():
        check(layout, A100)
    can = slice_capacities([demand], BERT, A100)
    assert found.served_now == pytest.approx(served(can, current.values()))
    assert 0.0 <= found.served_now <= 1.0
    assert 0.0 <= found.served_then <= 1.0
    if found.worthwhile:
        assert found.served_then >= found.served_now + EAGER.min_gain


@settings(max_examples=60, deadline=None)
@given(DEMANDS, st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
def test_more_slices_never_serve_less(demand: ModelDemand, one: str, other: str) -> None:
    can = slice_capacities([demand], BERT, A100)
    first, second = parse_layout(one, A100), parse_layout(other, A100)
    assert served(can, [first, second]) >= max(served(can, [first]), served(can, [second])) - 1e-6
