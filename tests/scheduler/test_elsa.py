"""ELSA's rule, line by line: the smallest slice with slack, else the least T_wait + T_est."""

from __future__ import annotations

import pytest

from scheduler.core import SchedulerCore
from scheduler.messages import Arrived, Reason, Refuse, Request, Run, Serves, WorkerUp
from scheduler.policies.elsa import Elsa

MS = 1_000_000
# One item takes 40 ms on a slice of one GPC, 20 ms on two, 10 ms on four; nothing is gained by batching.
SIZES = {0: (1, 40), 1: (2, 20), 2: (4, 10)}


def core() -> SchedulerCore:
    made = SchedulerCore(policy=Elsa)
    for worker_id, (gpcs, ms) in SIZES.items():
        made.handle(0, WorkerUp(worker_id, gpcs, 1))
        made.handle(0, Serves(worker_id, "m", tuple(batch * ms * MS for batch in range(1, 9))))
    return made


def started_on(made: SchedulerCore, number: int, slo_ms: int | None, items: int = 1) -> int | None:
    due_ns = None if slo_ms is None else slo_ms * MS
    commands = made.handle(0, Arrived(Request(number, "m", items, due_ns=due_ns)))
    runs = [command for command in commands if isinstance(command, Run)]
    return runs[0].worker_id if runs else None


@pytest.mark.parametrize(("slo_ms", "worker"), [(100, 0), (41, 0), (30, 1), (21, 1), (15, 2), (11, 2)])
def test_step_a_takes_the_smallest_slice_with_slack(slo_ms: int, worker: int) -> None:
    assert started_on(core(), 1, slo_ms) == worker


def test_step_a_counts_what_the_slice_has_to_do_already() -> None:
    made = core()
    assert started_on(made, 1, 100) == 0
    assert started_on(made, 2, 50) == 1  # on the small one it would end at 80 ms


def test_step_a_counts_the_items_of_the_query() -> None:
    assert started_on(core(), 1, 100, items=3) == 1  # 120 ms on the small one, 60 ms here


def test_without_slack_anywhere_the_query_is_refused_with_how_late_it_would_be() -> None:
    assert core().handle(0, Arrived(Request(1, "m", 1, due_ns=4 * MS, strict=True))) == [
        Refuse(1, Reason.SLO_UNREACHABLE, 6 * MS),
    ]


def test_step_b_without_an_slo_takes_the_least_wait_and_work() -> None:
    made = core()
    assert [started_on(made, number, None) for number in (1, 2)] == [2, 1]
    # A third one ends at 20 ms behind the first, at 40 ms on the smallest: it waits for the largest.
    assert started_on(made, 3, None) is None


def test_inside_a_size_the_shortest_wait_wins() -> None:
    made = SchedulerCore(policy=Elsa)
    for worker_id in (0, 1):
        made.handle(0, WorkerUp(worker_id, 1, 1))
        made.handle(0, Serves(worker_id, "m", (40 * MS,)))
    assert [started_on(made, number, 100) for number in (1, 2)] == [0, 1]
