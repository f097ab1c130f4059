from __future__ import annotations

import math

import pytest

from scheduler import search, workload
from scheduler.mix import Mix, Stream, Trace
from scheduler.policies.elsa import Elsa
from scheduler.report import Report
from scheduler.search import Scene
from scheduler.simulator import EXACT, SimSlice
from scheduler.workload import Arrival

D_MS = 10.0
ONE = SimSlice("one", 1, {"m": [D_MS]})
SINGLE = Mix([Stream("m")])


def waits_at_most(load: float, services: float) -> float:
    """Of an M/D/1 queue: the share of customers that wait at most so many service times (Erlang, 1909)."""
    return (1 - load) * sum(
        (load * (k - services)) ** k / math.factorial(k) * math.exp(-load * (k - services))
        for k in range(math.floor(services) + 1)
    )


def highest_load(share: float, slo_ms: float) -> float:
    loads = [step / 1000 for step in range(1, 1000)]
    return max(load for load in loads if waits_at_most(load, slo_ms / D_MS - 1) >= share)


@pytest.mark.parametrize(("share", "slo_ms"), [(0.95, 30.0), (0.99, 60.0)])
def test_the_highest_rate_of_an_m_d_1_queue_is_that_of_theory(share: float, slo_ms: float) -> None:
    scene = Scene([ONE], SINGLE, {"m": slo_ms}, queries=10_000, noise=EXACT)
    found = [search.highest_rate(scene, Elsa, share, 100.0, seed) for seed in range(3)]
    assert search.median_rate(found) / 100.0 == pytest.approx(highest_load(share, slo_ms), rel=0.04)
    for each in found:
        assert each.report is not None
        assert each.report.models["m"].within_slo >= share


def test_a_probe_that_is_given_up_is_one_that_fails_and_others_are_what_a_full_run_is() -> None:
    scene = Scene([ONE], SINGLE, {"m": 30.0}, queries=5000, noise=EXACT)
    verdicts = set()
    for rate_per_s in (20.0, 50.0, 60.0, 64.0, 66.0, 70.0, 90.0, 130.0):
        probe, full = scene.probe(Elsa, rate_per_s, 1, 0.95), scene.run(Elsa, rate_per_s, 1)
        verdict = search.holds(full, scene.slo_ms, 0.95)
        assert search.holds(probe, scene.slo_ms, 0.95) == verdict
        assert not probe.complete or probe == full
        verdicts.add((verdict, probe.complete))
    assert verdicts >= {(True, True), (False, False)}


def test_a_probe_ends_when_a_query_is_late_beyond_bounds_or_refused_however_many_may_be_late() -> None:
    """At 111 % of what the slice can do they wait longer and longer."""
    busy = [Arrival(index * 9_000_000, "m") for index in range(3000)]
    scene = Scene([ONE], Trace(busy), {"m": 30.0}, noise=EXACT)
    report = scene.probe(Elsa, scene.load.rate_per_s, 0, 0.0)  # type: ignore[attr-defined]
    assert not report.complete
    assert report.models["m"].sent < 1000


def test_where_no_rate_counts_it_is_zero() -> None:
    scene = Scene([ONE], SINGLE, {"m": 5.0}, queries=200, noise=EXACT)
    found = search.highest_rate(scene, Elsa, 0.95, 100.0, 0)
    assert (found.rate_per_s, found.report) == (0.0, None)


def test_the_bound_of_one_model_is_the_best_batch_within_the_slo_of_every_slice() -> None:
    slices = [SimSlice("a", 1, {"m": [10.0, 15.0, 40.0]}), SimSlice("b", 2, {"m": [5.0, 8.0, 10.0]})]
    fours = Mix([Stream("m", 1.0, workload.constant(4))])
    assert search.fluid_bound_per_s(slices, SINGLE, {"m": 20.0}) == pytest.approx(2000 / 15 + 300)
    assert search.fluid_bound_per_s(slices, fours, {"m": 20.0}) == pytest.approx((2000 / 15 + 300) / 4)
    assert search.fluid_bound_per_s(slices, SINGLE, {"m": 4.0}) == 0.0


def test_the_bound_of_several_models_divides_the_slices_among_them() -> None:
    """a runs on both slices, b on the second only: a takes the first, b the second, a the rest of it."""
    slices = [SimSlice("left", 1, {"a": [10.0]}), SimSlice("right", 1, {"a": [10.0], "b": [5.0]})]
    load = Mix([Stream("a", 0.8), Stream("b", 0.2)])
    # 0.8 t = 100 + 100 x, 0.2 t = 200 (1 - x)
    assert search.fluid_bound_per_s(slices, load, {"a": 50.0, "b": 50.0}) == pytest.approx(2000 / 9)


def test_the_bound_of_several_lengths_divides_the_slices_among_them() -> None:
    """Half of the items are short, 10 ms each, half long, 30 ms: 50 a second."""
    both = SimSlice("one", 1, {"m": [10.0, 30.0]}, lengths={"m": (64, 128)})
    load = Trace([Arrival(0, "m", 1, 50), Arrival(1, "m", 1, 100)])
    assert search.fluid_bound_per_s([both], load, {"m": 30.0}) == pytest.approx(50.0)
    assert search.fluid_bound_per_s([both], load, {"m": 20.0}) == pytest.approx(0.0)
    short = Trace([Arrival(0, "m", 1, 50), Arrival(1, "m", 1, 64)])
    assert search.fluid_bound_per_s([both], short, {"m": 30.0}) == pytest.approx(100.0)


def test_a_bound_is_zero_where_a_model_is_served_nowhere() -> None:
    load = Mix([Stream("m", 0.5), Stream("other", 0.5)])
    assert search.fluid_bound_per_s([ONE], load, {"m": 50.0, "other": 50.0}) == pytest.approx(0.0)


def test_lateness_and_large_queries() -> None:
    slow = SimSlice("one", 1, {"m": [float(10 * items) for items in range(1, 33)]})
    sent = [Arrival(0, "m", 1), Arrival(500_000_000, "m", 20), Arrival(900_000_000, "m", 4)]
    scene = Scene([slow], Trace(sent), {"m": 50.0}, noise=EXACT)
    report: Report = scene.run(Elsa, 3.0, 0)
    assert search.max_lateness(report, scene.slo_ms) == pytest.approx(4.0)
    assert search.late_share_large([report]) == 1.0
    assert math.isnan(search.late_share_large([]))
