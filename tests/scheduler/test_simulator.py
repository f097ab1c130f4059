from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import workload
from scheduler.policies import Policy
from scheduler.policies.elsa import Elsa
from scheduler.policies.pool import OnePool
from scheduler.report import Report
from scheduler.simulator import EXACT, Change, Noise, SimSlice, SimulationError, SliceEvent, simulate
from scheduler.workload import NS_PER_S, Arrival

MS = 1_000_000
ONE = SimSlice("one", 1, {"m": [10.0]})
PAIR = [SimSlice("left", 1, {"m": [10.0, 12.0]}), SimSlice("right", 2, {"m": [6.0, 8.0]})]


def every(ms: float, count: int, model: str = "m") -> list[Arrival]:
    return [Arrival(round(index * ms * MS), model) for index in range(count)]


def test_one_slice_one_model_is_a_queue_that_can_be_worked_out_by_hand() -> None:
    report = simulate([ONE], every(4.0, 3), slo_ms={"m": 17.0}, noise=EXACT, timeline=True)
    model = report.models["m"]
    assert [(span.start_ns // MS, span.end_ns // MS) for span in report.timeline] == [(0, 10), (10, 20), (20, 30)]
    assert (model.sent, model.answered, model.p50_ms, model.max_ms) == (3, 3, 16.0, 22.0)
    assert model.within_slo == pytest.approx(2 / 3)
    assert report.utilisation == {"one": 1.0}


def test_what_is_strict_and_cannot_be_in_time_is_counted_as_refused_and_not_within_the_slo() -> None:
    report = simulate([ONE], every(4.0, 3), slo_ms={"m": 17.0}, noise=EXACT, strict=True)
    model = report.models["m"]
    assert (model.answered, dict(model.refused)) == (2, {"slo_unreachable": 1})
    assert model.within_slo == pytest.approx(2 / 3)


def test_expired_requests_are_counted() -> None:
    report = simulate([ONE], every(1.0, 3), noise=EXACT, timeout_ms={"m": 9.5})
    assert (report.models["m"].answered, report.models["m"].expired) == (2, 1)


def test_late_queries_are_counted_by_their_items() -> None:
    table = SimSlice("one", 1, {"m": [float(10 * items) for items in range(1, 21)]})
    arrivals = [Arrival(0, "m", 1), Arrival(500 * MS, "m", 20)]
    report = simulate([table], arrivals, slo_ms={"m": 50.0}, noise=EXACT)
    assert [tuple(share) for share in report.models["m"].late_by_items] == [(1, 1, 1, 0), (20, 1_000_000, 1, 1)]


def test_utilisation_of_a_poisson_queue_is_its_load() -> None:
    report = simulate([ONE], workload.poisson("m", 50.0, 200.0, 1))
    assert report.utilisation["one"] == pytest.approx(0.5, abs=0.03)


def test_waiting_times_are_those_of_queueing_theory() -> None:
    """M/D/1 at load 0.5: the mean wait is half a service time, so the mean time is 1.5 of them."""
    report = simulate([ONE], workload.poisson("m", 50.0, 400.0, 1), noise=EXACT, timeline=True)
    arrivals = list(workload.poisson("m", 50.0, 400.0, 1))
    times = [span.end_ns - arrival.at_ns for span, arrival in zip(report.timeline, arrivals, strict=True)]
    assert float(np.mean(times)) / MS == pytest.approx(15.0, rel=0.05)


def test_service_times_are_drawn_around_the_table_with_a_tail() -> None:
    factors = Noise(0.03, 0.01, 0.25).factors(5)
    drawn = np.array([next(factors) for _ in range(100_000)])
    assert drawn.mean() == pytest.approx(1.0 + 0.01 * 0.25, abs=0.001)
    assert np.quantile(drawn, 0.84) == pytest.approx(1.03, abs=0.005)
    assert drawn.max() > 1.8


def outcome(report: Report) -> tuple[object, ...]:
    return report.models["m"], report.utilisation, report.batches, report.timeline


def test_the_seed_repeats_and_another_one_differs() -> None:
    def run(seed: int) -> tuple[object, ...]:
        return outcome(simulate(PAIR, workload.poisson("m", 100.0, 5.0, 1), seed=seed, timeline=True))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_slice_that_fails_loses_nothing_and_comes_back() -> None:
    events = [
        SliceEvent(1 * NS_PER_S, "left", Change.FAIL),
        SliceEvent(1 * NS_PER_S, "right", Change.FAIL),
        SliceEvent(2 * NS_PER_S, "right", Change.BACK),
        SliceEvent(3 * NS_PER_S, "left", Change.BACK),
    ]
    report = simulate(PAIR, every(20.0, 250), events=events, timeline=True)
    assert report.models["m"].answered == 250
    assert report.models["m"].max_ms > 900
    assert not [span for span in report.timeline if 1.01 < span.start_ns / NS_PER_S < 2]


def test_a_drained_slice_finishes_what_it_runs_and_gets_nothing_new() -> None:
    events = [SliceEvent(1 * NS_PER_S, "right", Change.DRAIN), SliceEvent(2 * NS_PER_S, "right", Change.BACK)]
    report = simulate(PAIR, every(7.0, 500), events=events, timeline=True)
    starts = [span.start_ns / NS_PER_S for span in report.timeline if span.slice_name == "right"]
    assert report.models["m"].answered == 500
    assert not [start for start in starts if 1 <= start < 2]
    assert [start for start in starts if start > 2]


def test_a_slice_that_turns_slow_takes_longer() -> None:
    events = [SliceEvent(0, "one", Change.SPEED, 3.0)]
    report = simulate([ONE], every(50.0, 5), events=events, noise=EXACT)
    assert report.models["m"].p50_ms == pytest.approx(30.0)


def test_requests_are_refused_when_the_only_slice_is_gone_for_good() -> None:
    events = [SliceEvent(15 * MS, "one", Change.FAIL_FOR_GOOD)]
    report = simulate([ONE], every(10.0, 4), events=events, noise=EXACT)
    assert report.models["m"].answered == 1
    assert dict(report.models["m"].refused) == {"unavailable": 3}


def test_waiting_for_a_slice_that_never_comes_back_is_an_error() -> None:
    events = [SliceEvent(15 * MS, "one", Change.FAIL)]
    with pytest.raises(SimulationError, match="of m never end"):
        simulate([ONE], every(10.0, 4), events=events)


@pytest.mark.parametrize(
    ("slices", "arrivals", "events", "says"),
    [
        ([ONE, ONE], [], [], "the same name"),
        ([ONE], [], [SliceEvent(0, "two", Change.BACK)], "no slice is called 'two'; there are one"),
        ([ONE], [Arrival(5, "m"), Arrival(4, "m")], [], "sort them by time"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    slices: list[SimSlice], arrivals: list[Arrival], events: list[SliceEvent], says: str
) -> None:
    with pytest.raises(SimulationError, match=says):
        simulate(slices, arrivals, events=events)


def test_a_model_that_nobody_serves_is_refused() -> None:
    report = simulate([ONE], every(1.0, 2, "other"))
    assert dict(report.models["other"].refused) == {"unavailable": 2}
    assert math.isnan(report.models["other"].p50_ms)
    assert report.worst_within_slo == 0.0


@pytest.mark.parametrize("policy", [Elsa, OnePool])
def test_under_a_load_it_can_bear_nothing_waits_for_long(policy: type[Policy]) -> None:
    """Two models share a slice; one has no SLO. Whatever the mix, everything ends soon after it came."""
    table = [5.0 + items for items in range(1, 17)]
    slices = [SimSlice("both", 2, {"a": table, "b": table}), SimSlice("only b", 1, {"b": table})]

    @settings(max_examples=25, deadline=None)
    @given(st.floats(5, 400), st.floats(5, 400), st.integers(0, 1000), st.sampled_from([30.0, 200.0]))
    def check(rate_a: float, rate_b: float, seed: int, slo_ms: float) -> None:
        arrivals = workload.merge(
            workload.poisson("a", rate_a, 3.0, seed), workload.poisson("b", rate_b, 3.0, seed + 1, workload.constant(2))
        )
        report = simulate(slices, arrivals, policy, slo_ms={"a": slo_ms}, seed=seed)
        for model in report.models.values():
            assert model.sent == model.answered + sum(model.refused.values())
            assert model.max_ms < 3000 or not model.answered

    check()


@pytest.mark.parametrize("policy", [Elsa, OnePool])
def test_batches_of_a_slice_follow_each_other(policy: type[Policy]) -> None:
    slices = [SimSlice("a", 1, {"m": [5.0, 6.0, 7.0]}, depth=2), SimSlice("b", 2, {"m": [3.0, 4.0, 5.0]}, depth=2)]
    report = simulate(slices, workload.poisson("m", 700.0, 3.0, 1), policy, timeline=True)
    for name in ("a", "b"):
        spans = [span for span in report.timeline if span.slice_name == name]
        assert all(one.end_ns <= other.start_ns for one, other in pairwise(spans))


def test_with_exact_times_and_room_everything_is_in_time() -> None:
    table = [4.0 + items for items in range(1, 33)]
    slices = [SimSlice(f"slice {index}", 1 + index, {"m": table}) for index in range(4)]
    arrivals = workload.poisson("m", 1500.0, 10.0, 1)  # of about 3500
    report = simulate(slices, arrivals, slo_ms={"m": 80.0}, noise=EXACT)
    assert report.models["m"].within_slo == 1.0
