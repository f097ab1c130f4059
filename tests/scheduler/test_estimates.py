"""What is learned of times: robust, bounded, quick to find a slow slice, the same every time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import workload
from scheduler.estimates import LEAST, MOST, MOST_GUARD, WINDOW, Estimate
from scheduler.simulator import EXACT, Change, SimSlice, SliceEvent, simulate

S = 1_000_000_000


def learned(*ratios: float) -> Estimate:
    estimate = Estimate()
    for ratio in ratios:
        estimate.observe(ratio)
    return estimate


def test_nothing_is_believed_of_a_few_batches() -> None:
    assert learned(3.0, 3.0, 3.0).is_none()


def test_the_correction_is_what_most_batches_take() -> None:
    estimate = learned(*[1.5] * WINDOW)
    assert (estimate.factor, estimate.guard) == (1.5, 1.0)


@given(st.lists(st.floats(0.5, 100.0), max_size=6))
def test_six_of_fifteen_may_be_anything(outliers: list[float]) -> None:
    assert learned(*[1.2] * (WINDOW - len(outliers)), *outliers).factor == pytest.approx(1.2, abs=0.05)


@given(st.lists(st.floats(0.0, 1e9), max_size=60))
def test_it_is_bounded_and_the_same_every_time(ratios: list[float]) -> None:
    estimate, again = learned(*ratios), learned(*ratios)
    assert LEAST <= estimate.factor <= MOST
    assert 1.0 <= estimate.guard <= MOST_GUARD
    assert (estimate.factor, estimate.guard) == (again.factor, again.guard)


def test_the_spread_is_the_guard() -> None:
    estimate = learned(*[0.95, 1.0, 1.05] * 5)
    assert 1.05 < estimate.guard < 1.3


def test_a_slice_that_turns_slow_is_found_out_within_a_window() -> None:
    estimate = learned(*[1.0] * WINDOW)
    for _ in range(WINDOW):
        estimate.observe(3.0)
    assert estimate.factor == 3.0


def test_a_slow_slice_gets_less_work() -> None:
    table = [4.0 + batch for batch in range(1, 33)]
    slices = [SimSlice(name, 1, {"m": table}) for name in ("slow", "a", "b", "c")]
    slow = [SliceEvent(2 * S, "slow", Change.SPEED, 3.0)]
    arrivals = workload.poisson("m", 900.0, 12.0, 1)
    report = simulate(slices, arrivals, slo_ms={"m": 60.0}, noise=EXACT, events=slow, timeline=True)

    def share(begin_s: int, end_s: int) -> float:
        spans = [span for span in report.timeline if begin_s * S <= span.start_ns < end_s * S]
        return sum(span.items for span in spans if span.slice_name == "slow") / sum(span.items for span in spans)

    assert share(0, 2) > 0.2
    assert share(4, 12) < 0.15
    assert report.models["m"].within_slo > 0.97
