"""Background work: batches for one worker, when nobody else has anything for it."""

from __future__ import annotations

import pytest

from scheduler.core import STAGE_AHEAD_NS
from scheduler.messages import (
    Answer,
    BatchDone,
    BatchFailed,
    Cancelled,
    Drains,
    Piece,
    Reason,
    Refuse,
    Run,
    Serves,
    StopsServing,
    Tick,
    WorkerLost,
)
from tests.scheduler.test_core import MS, TABLE, core_with, request


def run(worker_id: int, batch_id: int, number: int, items: int) -> Run:
    return Run(worker_id, batch_id, "m", (Piece(number, 0, items),))


def test_it_runs_on_its_worker_as_one_batch_though_another_is_idle() -> None:
    core = core_with(1, 4)
    assert core.handle(0, request(1, 40, worker_id=0)) == [run(0, 1, 1, 40)]
    assert core.handle(1, request(2, 40, worker_id=0)) == []
    assert core.handle(MS, BatchDone(0, 1)) == [Answer((1,)), run(0, 2, 2, 40)]


def test_other_work_goes_first_whatever_its_class() -> None:
    core = core_with(1)
    core.handle(0, request(1, worker_id=0))
    core.handle(1, request(2, worker_id=0))
    core.handle(2, request(3, priority=1_000))
    assert core.handle(MS, BatchDone(0, 1)) == [Answer((1,)), run(0, 2, 3, 1)]


def test_a_worker_that_takes_two_batches_has_one_of_background_at_most() -> None:
    core = core_with(1, depth=2)
    core.handle(0, request(1, worker_id=0))
    core.handle(0, request(2, worker_id=0))
    late_ns = TABLE[0] - STAGE_AHEAD_NS // 2
    assert not [c for c in core.handle(late_ns, Tick()) if isinstance(c, Run)]
    assert core.handle(late_ns + 1, request(3)) == [run(0, 2, 3, 1)], "others are staged behind it"


@pytest.mark.parametrize("end", [Drains(0), StopsServing(0, "m"), WorkerLost(0, True, "killed")])
def test_what_waits_is_refused_when_its_worker_goes(end: object) -> None:
    core = core_with(1, 1)
    core.handle(0, request(1, worker_id=0))
    core.handle(1, request(2, worker_id=0))
    assert Refuse(2, Reason.UNAVAILABLE) in core.handle(2, end)  # type: ignore[arg-type]


def test_what_ran_on_a_worker_that_died_is_not_tried_again_here() -> None:
    core = core_with(1, 1)
    core.handle(0, request(1, 8, worker_id=0))
    assert core.handle(1, WorkerLost(0, True, "killed")) == [Refuse(1, Reason.CRASHED, 0, "killed")]


def test_a_worker_that_is_not_there_is_told_at_once() -> None:
    assert core_with(1).handle(0, request(1, worker_id=7)) == [Refuse(1, Reason.UNAVAILABLE)]


def test_a_model_that_fails_on_it_ends_it() -> None:
    core = core_with(1)
    core.handle(0, request(1, 8, worker_id=0))
    assert core.handle(1, BatchFailed(0, 1, "no")) == [Refuse(1, Reason.MODEL_FAILED, 0, "no")]


def test_what_is_cancelled_while_it_waits_never_runs() -> None:
    core = core_with(1)
    core.handle(0, request(1, worker_id=0))
    core.handle(1, request(2, worker_id=0))
    core.handle(2, Cancelled(2))
    assert core.handle(MS, BatchDone(0, 1)) == [Answer((1,))]


def test_it_waits_on_when_its_worker_serves_the_model_anew() -> None:
    core = core_with(1)
    core.handle(0, request(1, worker_id=0))
    core.handle(1, request(2, worker_id=0))
    assert core.handle(2, Serves(0, "m", TABLE)) == []
    assert core.handle(MS, BatchDone(0, 1)) == [Answer((1,)), run(0, 2, 2, 1)]
