"""Jobs in the simulator: the daemon's own decisions, in virtual time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from scheduler import workload
from scheduler.job_simulation import SimJob, SimulatedJobs
from scheduler.report import Report
from scheduler.simulator import EXACT, Change, SimSlice, SliceEvent, simulate

S = 1_000_000_000
ONLINE = [2.0 + 0.5 * batch for batch in range(1, 33)]
JOB = [4.0 + 1.0 * batch for batch in range(1, 33)]


def slices(count: int) -> list[SimSlice]:
    return [SimSlice(f"s{number}", 1, {"online": ONLINE, "job": JOB}) for number in range(count)]


def run(
    jobs: Sequence[SimJob], *, rate: float = 100.0, seconds: float = 20.0, events: Sequence[SliceEvent] = ()
) -> tuple[SimulatedJobs, Report]:
    source = SimulatedJobs(jobs, {"online": 50.0})
    arrivals = workload.poisson("online", rate, seconds, 3, workload.constant(2))
    report = simulate(
        slices(4),
        arrivals,
        slo_ms={"online": 50.0},
        noise=EXACT,
        background=source,
        events=events,
        timeline=True,
    )
    return source, report


def items_of(report: Report, model: str) -> int:
    return sum(span.items for span in report.timeline if span.model == model)


def test_a_job_ends_by_its_deadline_on_few_slices_and_every_item_runs_once() -> None:
    source, report = run([SimJob("a", "job", {0: 10_000}, S, 19 * S)])
    assert source.done
    assert 10 * S < source.ended_ns["a"] <= 19 * S, "one slice, all the time"
    assert items_of(report, "job") == 10_000
    assert max(each.slices for each in source.held) == 1
    assert source.told_ns == {}


def test_online_queries_wait_for_one_batch_at_most() -> None:
    _, without = run([], rate=50.0)
    _, beside = run([SimJob("a", "job", {0: 60_000}, 0, S)], rate=50.0)
    longest_ms = max((span.end_ns - span.start_ns) / 1e6 for span in beside.timeline if span.model == "job")
    assert longest_ms <= 0.5 * 50.0, "by its rule, with four slices"
    # And for another query that waited with it.
    assert beside.models["online"].max_ms <= 2 * without.models["online"].max_ms + longest_ms
    assert beside.models["online"].within_slo == 1.0


def test_online_queries_that_have_time_and_room_hardly_notice_a_job() -> None:
    """60 a second, which mostly find the fastest slice free: that is not the one for the job."""

    def times(gpcs: int, fixed_ms: float, item_ms: float, largest: int) -> list[float]:
        return [(fixed_ms + item_ms * batch) * 7 / 3 / gpcs for batch in range(1, largest + 1)]

    def report(jobs: Sequence[SimJob]) -> tuple[SimulatedJobs, Report]:
        source = SimulatedJobs(jobs, {"online": 60.0})
        cut = [
            SimSlice(f"s{n}", gpcs, {"online": times(gpcs, 6, 2, 8), "job": times(gpcs, 4, 0.5, 64)})
            for n, gpcs in enumerate((2, 2, 3))
        ]
        arrivals = workload.poisson("online", 60.0, 60.0, 3, workload.constant(1))
        return source, simulate(cut, arrivals, slo_ms={"online": 60.0}, noise=EXACT, background=source)

    _, without = report([])
    source, beside = report([SimJob("a", "job", {0: 50_000}, 5 * S, 55 * S)])
    assert source.ended_ns["a"] <= 55 * S
    seen, alone = beside.models["online"], without.models["online"]
    assert seen.p50_ms <= 1.1 * alone.p50_ms
    assert seen.p95_ms <= 1.1 * alone.p95_ms


def test_the_earlier_deadline_ends_first() -> None:
    works = [SimJob("later", "job", {0: 10_000}, 0, 19 * S), SimJob("sooner", "job", {0: 5_000}, S, 8 * S)]
    source, _ = run(works)
    assert source.ended_ns["sooner"] <= 8 * S
    assert source.ended_ns["later"] <= 19 * S


def test_it_takes_more_slices_when_it_falls_behind_and_loses_nothing_with_a_slice() -> None:
    slow = [SliceEvent(5 * S, f"s{n}", Change.SPEED, 2.0) for n in range(4)]
    lost = [
        SliceEvent(8 * S, "s0", Change.DRAIN),
        SliceEvent(9 * S, "s1", Change.FAIL),
        SliceEvent(10 * S, "s1", Change.BACK),
    ]
    source, report = run([SimJob("a", "job", {0: 12_000}, S, 19 * S)], events=[*slow, *lost])
    assert source.ended_ns["a"] <= 19 * S
    before = max(each.slices for each in source.held if each.at_ns < 5 * S)
    after = max(each.slices for each in source.held if each.at_ns > 5 * S)
    assert after > before
    failed = [span for span in report.timeline if span.model == "job"]
    assert sum(span.items for span in failed) >= 12_000, "what ran on the slice that failed ran again"


def test_what_cannot_be_in_time_is_known_at_once() -> None:
    source, _ = run([SimJob("a", "job", {0: 60_000}, S, 5 * S)])
    assert source.told_ns["a"] == S
    _, _, ends_ns = source.forecasts[0]
    assert source.ended_ns["a"] - S == pytest.approx(ends_ns, rel=0.1), "the earliest end that was told"


def test_the_same_again_gives_the_same() -> None:
    def held() -> list[object]:
        return list(run([SimJob("a", "job", {0: 5_000}, S, 15 * S)])[0].held)

    assert held() == held()
