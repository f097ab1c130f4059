"""Predicted tables: near the truth, monotone, honest about their spread; and the choice of what to measure."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner import latency, performance, sampling
from partitioner.latency import LatencyTableError, Measurement
from partitioner.performance import Point, features, point_of
from partitioner.predictor import Knowledge, Observations, Predictor, learn, monotone, never_slower
from partitioner.sampling import Budget

ROWS = latency.shipped_measurements()
NEW = "resnet50"
TRUTH = {point_of(each): each.latency_ms for each in ROWS if each.model == NEW}


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    return learn(each for each in ROWS if each.model != NEW)


@pytest.fixture(scope="module")
def predictor(knowledge: Knowledge) -> Predictor:
    return Predictor(knowledge, list(TRUTH))


def some(count: int) -> dict[Point, float]:
    """So many points of the truth, always the same ones."""
    chosen = np.random.default_rng(0).permutation(len(TRUTH))[:count]
    points = list(TRUTH)
    return {points[index]: TRUTH[points[index]] for index in chosen}


def errors(found: Mapping[Point, float], measured: Mapping[Point, float]) -> np.ndarray:
    return np.array([abs(found[point] / ms - 1) for point, ms in TRUTH.items() if point not in measured])


def test_a_tenth_of_the_points_gives_the_whole_table(predictor: Predictor) -> None:
    measured = some(16)
    off = errors(predictor.given(measured).ms(), measured)
    assert np.median(off) < 0.08
    assert np.quantile(off, 0.9) < 0.2


def test_the_more_is_measured_the_surer_it_is(predictor: Predictor) -> None:
    spreads = [float(predictor.given(some(count)).spread.mean()) for count in (0, 4, 16, 64)]
    assert spreads == sorted(spreads, reverse=True)


def test_nine_in_ten_lie_below_the_90_percent_quantile(predictor: Predictor) -> None:
    measured = some(16)
    high = predictor.given(measured).ms(0.9)
    below = np.mean([ms <= high[point] for point, ms in TRUTH.items() if point not in measured])
    assert 0.8 <= below <= 1.0


@pytest.mark.parametrize("number", range(0, 40, 8))
def test_a_wild_measurement_that_others_contradict_spoils_little(predictor: Predictor, number: int) -> None:
    measured = some(40)
    point = list(measured)[number]
    wild = {**measured, point: 2 * measured[point]}
    found = predictor.given(wild).ms()
    assert np.quantile(errors(found, wild), 0.9) < 0.2
    assert found[point] < 1.6 * measured[point]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 30), noise=st.floats(0, 1), quantile=st.floats(0.05, 0.95))
def test_more_work_is_never_faster_and_more_slice_never_slower(
    predictor: Predictor, seed: int, count: int, noise: float, quantile: float
) -> None:
    generator = np.random.default_rng(seed)
    chosen = [predictor.points[index] for index in generator.permutation(len(predictor.points))[:count]]
    measured = {point: TRUTH[point] * math.exp(noise * generator.normal()) for point in chosen}
    found = predictor.given(measured).ms(quantile)
    for one, ms in found.items():
        for other, other_ms in found.items():
            if one.gpcs >= other.gpcs and one.batch <= other.batch and one.processes <= other.processes:
                assert ms <= other_ms * (1 + 1e-9)


def test_monotone_leaves_alone_what_is() -> None:
    points = [Point(f"{gpcs}g.{10 * gpcs}gb", gpcs, batch) for gpcs in (1, 2) for batch in (1, 2, 4)]
    order = never_slower(features(points))
    already = np.array([1.0, 2.0, 3.0, 0.5, 1.0, 2.0])
    assert monotone(already, order) == pytest.approx(already)
    assert monotone(np.array([1.0, 3.0, 2.0, 0.5, 1.0, 2.0]), order)[1:3] == pytest.approx([2.5, 2.5])


def test_rows_say_what_was_measured_and_what_predicted(predictor: Predictor) -> None:
    measured = some(5)
    rows = predictor.given(measured).rows(NEW, "A100-80GB", measured)
    assert {point_of(each) for each in rows if each.source == "measured"} == set(measured)
    assert all(each.latency_ms == measured[point_of(each)] for each in rows if each.source == "measured")
    assert {each.source for each in rows if point_of(each) not in measured} == {"predicted"}
    assert len(rows) == len(TRUTH)


def test_longer_items_take_longer() -> None:
    points = [Point("1g.10gb", 1, batch, 1, length) for batch in (1, 8, 64) for length in (32, 128, 512)]
    predictor = Predictor(learn(ROWS), points)
    measured = {points[0]: 5.0, points[2]: 20.0, points[8]: 1300.0}
    found = predictor.given(measured).ms()
    assert found[points[3]] < found[points[4]] < found[points[5]]
    assert found[points[7]] == pytest.approx(320, rel=0.5)


def test_observations_correct_a_wrong_measurement() -> None:
    point = Point("1g.10gb", 1, 1)
    seen = Observations({point: 10.0})
    for _ in range(500):
        seen.add(point, 20.0)
    other = point._replace(batch=2)
    seen.add(other, 30.0)
    assert seen.ms() == {point: pytest.approx(20.0, rel=0.01), other: pytest.approx(30.0)}


def test_two_other_models_are_needed() -> None:
    with pytest.raises(LatencyTableError, match="at least two"):
        learn(each for each in ROWS if each.model == NEW)


def test_the_formula_fits_what_it_made() -> None:
    points = [Point(f"{gpcs}g.{10 * gpcs}gb", gpcs, 2**n, k) for gpcs in (1, 2, 4) for n in range(7) for k in (1, 2)]
    at = features(points)
    made = performance.log_ms(performance.USUAL, at)
    assert performance.log_ms(performance.fit(at, made), at) == pytest.approx(made, abs=0.02)


# ---- what to measure next ----


def test_the_next_point_is_within_the_budget_and_new(predictor: Predictor) -> None:
    measured = some(4)
    estimate = predictor.given(measured)
    assert sampling.next_point(estimate, Budget(0)) is None
    assert sampling.next_point(estimate, Budget(5, ms=0.001)) is None
    point = sampling.next_point(estimate, Budget(5, ms=10.0))
    assert point is not None
    assert point not in measured
    assert estimate.ms()[point] < 11
    every = set(predictor.points)
    assert sampling.next_point(estimate, Budget(5), impossible=every - {point}) == point
    assert sampling.next_point(estimate, Budget(5), impossible=every) is None


def test_chosen_points_tell_more_than_drawn_ones(predictor: Predictor) -> None:
    chosen = some(1)
    while len(chosen) < 12:
        point = sampling.next_point(predictor.given(chosen), Budget(1))
        assert point is not None
        chosen[point] = TRUTH[point]
    assert predictor.given(chosen).spread.mean() < predictor.given(some(12)).spread.mean()


def test_decisions_become_sure(predictor: Predictor) -> None:
    unsure = sampling.doubt(predictor.given(some(2)), [30.0, 60.0])
    sure = sampling.doubt(predictor.given(TRUTH), [30.0, 60.0])
    assert sure.lost < unsure.lost
    assert unsure.weights.sum() == pytest.approx(1.0)
    assert (unsure.weights >= 0).all()


def test_no_decision_can_be_made_within_an_impossible_limit(predictor: Predictor) -> None:
    found = sampling.doubt(predictor.given(some(16)), [0.001])
    assert found.lost == 0.0
    assert found.weights.sum() == 0.0


def test_points_name_what_a_row_measured() -> None:
    row = Measurement("m", "2g.20gb", 2, 8, 3, 5.0, seq_len=64)
    assert point_of(row) == Point("2g.20gb", 2, 8, 3, 64)
