"""A job's rate and forecast, which may not contradict each other; and workers that it leaves alone."""

from __future__ import annotations

import pytest

from server.job_pace import FULL_S, MOST_FULL_S, Casualties, Pace, Patience


def going(per_s: float, *, starved: bool) -> Pace:
    """For a minute, a look a second."""
    pace = Pace()
    pace.start(0.0)
    for second in range(1, 61):
        pace.count(int(per_s), float(second), starved=starved)
    return pace


def test_where_slices_wait_for_inputs_the_end_follows_from_the_rate() -> None:
    pace = going(100, starved=True)
    assert pace.per_s(60.0) == pytest.approx(100)
    assert pace.ends_s(10_000, 10.0, 60.0) == pytest.approx(100.0), "not in 10 s, as the slices could"
    assert pace.ends_s(10_000, 500.0, 60.0) == 500.0


def test_where_they_do_not_the_plan_knows_better() -> None:
    """It may have given the job more slices a moment ago."""
    assert going(100, starved=False).ends_s(10_000, 10.0, 60.0) == 10.0


def test_what_has_come_to_a_stop_does_not_go_on_showing_its_rate() -> None:
    pace = going(100, starved=False)
    assert [round(pace.per_s(60.0 + seconds)) for seconds in (0, 5, 10, 60)] == [100, 50, 0, 0]
    assert pace.ends_s(10_000, 10.0, 100.0) == 10.0


def test_a_worker_that_died_too_often_is_left_alone_for_a_while() -> None:
    casualties = Casualties(3, 120.0)
    for at_s in (0.0, 10.0, 20.0):
        assert casualties.spared_s(1, at_s) == 0
        casualties.died(1, at_s)
    assert casualties.spared_s(1, 20.0) == 100.0
    assert casualties.spared_s(2, 20.0) == 0
    assert casualties.spared_s(1, 120.0) == 0
    casualties.died(1, 121.0)
    assert casualties.spared_s(1, 121.0) == 9.0


def test_a_full_disk_is_tried_again_ever_later_until_something_can_be_kept() -> None:
    patience, waits, at_s = Patience(), [], 0.0
    assert patience.left_s("a", at_s) == 0
    for done in (5, 5, 5, 5, 5, 5, 5, 6, 6):
        patience.failed("a", done, at_s)
        waits.append(patience.left_s("a", at_s))
        at_s += waits[-1] - 1
        assert patience.left_s("a", at_s) == 1.0
        at_s += 1
        assert patience.left_s("a", at_s) == 0
    assert waits == [FULL_S, 20.0, 40.0, 80.0, 160.0, MOST_FULL_S, MOST_FULL_S, FULL_S, 20.0]
    patience.failed("a", 6, at_s)
    assert patience.left_s("b", at_s) == 0, "of another job"
    patience.forget("a")
    assert patience.left_s("a", at_s) == 0
