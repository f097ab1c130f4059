"""What is learned of service times: robust, bounded, quick enough, and put to use."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.estimates import ENOUGH, EVERY, LEAST, MOST, MOST_GUARD, NOTICED, WINDOW, Estimate
from scheduler.report import Report
from scheduler.simulator import Change, Noise, SimSlice, SliceEvent, simulate
from scheduler.workload import constant, poisson

S = 1_000_000_000


def after(ratios: Sequence[float]) -> Estimate:
    estimate = Estimate()
    for ratio in ratios:
        estimate.observe(ratio)
    return estimate


def test_the_table_is_believed_until_enough_batches_have_been_seen() -> None:
    assert after([3.0] * (ENOUGH - 1)).factor == 1.0
    assert after([3.0] * ENOUGH).factor == 3.0


@settings(max_examples=300, deadline=None)
@given(
    st.floats(0.5, 8.0),
    st.lists(st.floats(0.97, 1.03), min_size=WINDOW * 3, max_size=WINDOW * 3),
    st.sets(st.integers(0, WINDOW - 1), max_size=int(0.4 * WINDOW)),
    st.floats(0.0, 1000.0),
)
def test_two_fifths_of_outliers_leave_it_within_the_spread_of_the_others(
    truth: float, spread: list[float], places: set[int], outlier: float
) -> None:
    ratios = [outlier if number % WINDOW in places else truth * each for number, each in enumerate(spread)]
    # What it has noticed may be as old as the last change worth a new table.
    assert after(ratios).factor == pytest.approx(truth, rel=0.03 + NOTICED + 0.01)


@given(st.lists(st.floats(0.0, 1e12), max_size=3 * WINDOW))
def test_whatever_is_measured_it_stays_in_bounds(ratios: list[float]) -> None:
    estimate = after(ratios)
    assert LEAST <= estimate.factor <= MOST
    assert 1.0 <= estimate.guard <= MOST_GUARD


@given(st.lists(st.floats(0.1, 20.0), max_size=3 * WINDOW))
def test_it_says_when_it_has_changed_and_only_then(ratios: list[float]) -> None:
    estimate = Estimate()
    for ratio in ratios:
        before = estimate.factor, estimate.guard
        assert estimate.observe(ratio) == ((estimate.factor, estimate.guard) != before)


@given(st.lists(st.floats(0.1, 20.0), max_size=3 * WINDOW))
def test_the_same_batches_teach_the_same(ratios: list[float]) -> None:
    one, other = after(ratios), after(ratios)
    assert (one.factor, one.guard) == (other.factor, other.guard)


@pytest.mark.parametrize(("before", "then"), [(1.0, 3.0), (3.0, 1.0), (1.0, 1.1)])
def test_a_change_is_found_within_half_a_window_and_a_look(before: float, then: float) -> None:
    estimate = after([before] * 4 * WINDOW)
    found = next(number for number in range(1, 100) if estimate.observe(then) and estimate.factor == then)
    assert found <= WINDOW // 2 + EVERY + 1
    for _ in range(WINDOW + EVERY):
        estimate.observe(then)
    assert (estimate.factor, estimate.guard) == (then, 1.0)


def test_the_spread_of_the_times_is_the_guard_two_sigmas_of_it() -> None:
    factors = Noise(0.05, 0.0, 0.0).factors(1)
    guards = [after([next(factors) for _ in range(2 * WINDOW)]).guard for _ in range(200)]
    assert sum(guards) / len(guards) == pytest.approx(1.1, abs=0.02)


# ---- put to use ----

TABLE = [4.0 + 0.5 * items for items in range(1, 33)]
SLICES = [SimSlice(name, 1, {"m": TABLE}) for name in ("sound", "second", "third", "slow")]
# Six tenths of what the four can do; with one of them three times as slow, nearly three quarters.
SLO_MS = 35.0
RATE_PER_S = 0.6 * 4 * 32 / 20e-3 / 3


def with_a_slow_slice() -> Report:
    arrivals = poisson("m", RATE_PER_S, 8.0, 1, constant(3))
    events = [SliceEvent(4 * S, "slow", Change.SPEED, 3.0)]
    return simulate(SLICES, arrivals, slo_ms={"m": SLO_MS}, seed=1, events=events, timeline=True)


def share_of_items(report: Report, from_s: float, to_s: float) -> float:
    """Of the slow slice."""
    spans = [span for span in report.timeline if from_s * S <= span.start_ns < to_s * S]
    return sum(span.items for span in spans if span.slice_name == "slow") / sum(span.items for span in spans)


def test_a_slice_that_turns_slow_is_used_less_and_the_latency_recovers() -> None:
    report = with_a_slow_slice()
    assert share_of_items(report, 1, 4) == pytest.approx(0.25, abs=0.03)
    assert 0.02 < share_of_items(report, 4.5, 8) < 0.13  # a third of the others' speed is a tenth of all
    # Late binding alone would use it as little, but with batches that end late: 0.975.
    assert report.models["m"].within_slo > 0.99
    late = [span for span in report.timeline if span.slice_name == "slow" and span.start_ns > 4.5 * S]
    assert max(span.end_ns - span.start_ns for span in late) < SLO_MS * 1.3e6


def test_it_is_as_well_off_as_if_it_had_been_known() -> None:
    arrivals = poisson("m", RATE_PER_S, 8.0, 1, constant(3))
    slow = [*SLICES[:3], SimSlice("slow", 1, {"m": [3 * ms for ms in TABLE]})]
    known = simulate(slow, arrivals, slo_ms={"m": SLO_MS}, seed=1)
    found = simulate(
        SLICES,
        poisson("m", RATE_PER_S, 8.0, 1, constant(3)),
        slo_ms={"m": SLO_MS},
        seed=1,
        events=[SliceEvent(0, "slow", Change.SPEED, 3.0)],
    )
    assert found.models["m"].p95_ms == pytest.approx(known.models["m"].p95_ms, rel=0.05)
    assert found.models["m"].within_slo > known.models["m"].within_slo - 0.005


def test_what_is_learned_repeats() -> None:
    assert with_a_slow_slice() == with_a_slow_slice()
