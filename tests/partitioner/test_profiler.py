"""Which points are measured: all, or those that a budget allows; and none that cannot fit."""

from __future__ import annotations

from itertools import pairwise

import pytest

from partitioner import latency
from partitioner.performance import Point, point_of
from partitioner.predictor import Knowledge, learn
from partitioner.profiler import Campaign

ROWS = latency.shipped_measurements()
TRUTH = {point_of(each): each.latency_ms for each in ROWS if each.model == "vgg16" and each.processes <= 2}


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    return learn(each for each in ROWS if each.model != "vgg16")


def run(campaign: Campaign) -> list[Point]:
    asked = []
    while (point := campaign.next()) is not None:
        asked.append(point)
        campaign.took(point, TRUTH[point])
    return asked


def test_everything_is_measured_once_small_batches_first() -> None:
    asked = run(Campaign(list(TRUTH), {}))
    assert sorted(asked) == sorted(TRUTH)
    for one, other in pairwise(asked):
        assert one[:2] != other[:2] or one.processes < other.processes or one.batch < other.batch


def test_what_was_measured_before_is_not_measured_again() -> None:
    before = dict(list(TRUTH.items())[:10])
    campaign = Campaign(list(TRUTH), {**before, Point("9g.90gb", 9, 1): 1.0})
    assert campaign.left == len(TRUTH) - 10
    assert not set(run(campaign)) & set(before)


def test_what_does_not_fit_spares_all_that_is_larger() -> None:
    points = [
        Point(f"{g}g.{10 * g}gb", g, batch, processes) for g in (1, 2) for processes in (1, 2) for batch in (1, 8, 64)
    ]
    campaign = Campaign(points, {})
    campaign.does_not_fit(Point("1g.10gb", 1, 8, 1))
    asked = set()
    while (point := campaign.next()) is not None:
        asked.add(point)
        campaign.took(point, 1.0)
    assert {point for point in points if point not in asked} == {
        Point("1g.10gb", 1, batch, processes) for batch in (8, 64) for processes in (1, 2)
    }


def test_a_failed_point_says_nothing_of_others() -> None:
    campaign = Campaign(list(TRUTH), {})
    bad = next(iter(TRUTH))
    campaign.failed(bad)
    assert set(run(campaign)) == set(TRUTH) - {bad}


def test_a_budget_is_kept_and_the_rest_predicted(knowledge: Knowledge) -> None:
    campaign = Campaign(list(TRUTH), {}, 10, knowledge)
    asked = run(campaign)
    assert len(asked) == len(set(asked)) == 10
    assert asked[0].gpcs == 7  # the quickest of all comes first, while nothing is known of times
    rest = campaign.rest("vgg16", "A100-80GB")
    assert {point_of(each) for each in rest} == set(TRUTH) - set(asked)
    assert {each.source for each in rest} == {"predicted"}
    off = sorted(abs(each.latency_ms / TRUTH[point_of(each)] - 1) for each in rest)
    assert off[len(off) // 2] < 0.1


def test_measuring_stops_when_decisions_are_sure_enough(knowledge: Knowledge) -> None:
    asked = run(Campaign(list(TRUTH), {}, 60, knowledge, sure=0.05))
    assert len(asked) < 60


def test_without_a_predictor_nothing_is_predicted() -> None:
    assert Campaign(list(TRUTH), TRUTH).rest("vgg16", "A100-80GB") == []
