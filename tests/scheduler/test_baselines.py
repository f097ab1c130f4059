"""The baselines, rule by rule: small stories. Random ones are in test_policies.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest

from scheduler.core import SchedulerCore
from scheduler.domain import Part, Pool, Query, Worker
from scheduler.messages import (
    AnyCommand,
    AnyEvent,
    Arrived,
    BatchDone,
    Reason,
    Refuse,
    Request,
    Run,
    Serves,
    StopsServing,
    Tick,
    Wake,
    WorkerUp,
)
from scheduler.policies import Policy
from scheduler.policies.fifs import FirstIdle
from scheduler.policies.jsq import ShortestQueue
from scheduler.policies.preba import Preba
from scheduler.policies.static import StaticBatching

MS = 1_000_000
# Nothing is gained by batching.
FLAT = tuple(batch * 10 * MS for batch in range(1, 9))
# 10 ms for one item, 1 ms more for each further one. 80 % of the peak (20 in 29 ms) at 12, which take 21 ms.
GROWS = tuple((9 + batch) * MS for batch in range(1, 21))
Sort = Callable[[Pool], Policy]


def core_with(policy: Sort, *workers: tuple[int, dict[str, Sequence[int]]], lengths: tuple[int, ...] = ()) -> Told:
    """Workers 0, 1, ... by GPCs and the tables of what they serve."""
    told = Told(policy)
    for worker_id, (gpcs, tables) in enumerate(workers):
        told.at(0, WorkerUp(worker_id, gpcs, 1))
        for model, table in tables.items():
            told.at(0, Serves(worker_id, model, tuple(table), lengths))
    return told


class Told:
    """A core, and what came of the last event."""

    def __init__(self, policy: Sort) -> None:
        self.core = SchedulerCore(policy=policy)
        self.number = 0
        self.commands: list[AnyCommand] = []

    def at(self, ms: float, event: AnyEvent) -> list[tuple[int, list[tuple[int, int]]]]:
        """The batches that are started: worker, and (request, items) of each piece."""
        self.commands = self.core.handle(int(ms * MS), event)
        runs = [command for command in self.commands if isinstance(command, Run)]
        return [(run.worker_id, [(piece.request_id, piece.items) for piece in run.pieces]) for run in runs]

    def ask(
        self, ms: float, items: int = 1, model: str = "m", due_ms: float | None = None, **fields: object
    ) -> list[tuple[int, list[tuple[int, int]]]]:
        """Requests are numbered from 1."""
        self.number += 1
        due_ns = None if due_ms is None else int(due_ms * MS)
        return self.at(ms, Arrived(Request(self.number, model, items, due_ns=due_ns, **fields)))  # type: ignore[arg-type]

    def wakes_ms(self) -> list[float]:
        return [command.at_ns / MS for command in self.commands if isinstance(command, Wake)]


ONE = (1, {"m": FLAT})


# ---- first idle, first serve ----


def test_fifs_takes_queries_one_by_one_as_they_came() -> None:
    core = core_with(FirstIdle, ONE)
    assert [core.ask(0, items) for items in (1, 2, 1)] == [[(0, [(1, 1)])], [], []]
    assert core.at(10, BatchDone(0, 1)) == [(0, [(2, 2)])]
    assert core.at(30, BatchDone(0, 2)) == [(0, [(3, 1)])]


def test_fifs_prefers_the_slice_that_became_idle_first() -> None:
    core = core_with(FirstIdle, (7, {"m": FLAT}), ONE)
    assert [core.ask(0), core.ask(0)] == [[(0, [(1, 1)])], [(1, [(2, 1)])]]
    core.at(5, BatchDone(1, 2))
    core.at(6, BatchDone(0, 1))
    assert [core.ask(7), core.ask(7)] == [[(1, [(3, 1)])], [(0, [(4, 1)])]]


def test_fifs_passes_over_what_the_idle_slice_does_not_serve() -> None:
    core = core_with(FirstIdle, (1, {"a": FLAT}), (1, {"b": FLAT}))
    for model in "abab":
        core.ask(0, model=model)
    assert core.at(10, BatchDone(1, 2)) == [(1, [(4, 1)])]


def test_fifs_counts_the_work_ahead_when_it_promises() -> None:
    core = core_with(FirstIdle, ONE)
    core.ask(0)
    core.ask(0)
    core.ask(0, due_ms=25, strict=True)  # would end at 30
    assert core.commands == [Refuse(3, Reason.SLO_UNREACHABLE, 5 * MS)]
    core.ask(0, due_ms=25, strict=True, priority=1)  # goes before the second
    assert core.commands == []


# ---- join the shortest queue ----


def test_jsq_joins_the_fewest_queries_then_the_least_work_then_the_lowest_id() -> None:
    core = core_with(ShortestQueue, ONE, ONE, ONE)
    assert [core.ask(0, items) for items in (3, 1, 2)] == [[(0, [(1, 3)])], [(1, [(2, 1)])], [(2, [(3, 2)])]]
    for items in (8, 1, 1, 1):  # one query each: slice 1 is free first, then 2, then 0; then the least work is at 2
        core.ask(0, items)
    assert core.at(10, BatchDone(1, 2)) == [(1, [(4, 8)])]
    assert core.at(20, BatchDone(2, 3)) == [(2, [(5, 1)])]
    assert core.at(30, BatchDone(2, 4 + 1)) == [(2, [(7, 1)])]
    assert core.at(30, BatchDone(0, 1)) == [(0, [(6, 1)])]


def test_jsq_never_looks_back() -> None:
    core = core_with(ShortestQueue, ONE, (7, {"m": [MS] * 8}))
    for _ in range(4):
        core.ask(0)
    assert core.at(1, BatchDone(1, 2)) == [(1, [(3, 1)])]  # it was free first, and is now as long as the other
    assert core.at(2, BatchDone(1, 3)) == []  # the fourth waits for slice 0


def test_jsq_places_anew_what_waits_for_a_model_that_goes() -> None:
    core = core_with(ShortestQueue, (1, {"a": FLAT, "b": FLAT}), (1, {"a": FLAT, "b": FLAT}))
    for model in "aabbaa":
        core.ask(0, model=model)
    assert core.at(1, StopsServing(0, "a")) == []
    assert [core.at(10 * n, BatchDone(1, n + 1)) for n in (1,)] == [[(1, [(4, 1)])]]
    assert core.at(10, BatchDone(0, 1)) == [(0, [(3, 1)])]


# ---- what they have in common ----


@pytest.mark.parametrize("policy", [FirstIdle, ShortestQueue, partial(StaticBatching, max_items=1, delay_ns=0), Preba])
def test_a_higher_class_goes_first(policy: Sort) -> None:
    core = core_with(policy, ONE)
    core.ask(0, 8)
    core.ask(0, 8)
    core.ask(0, 8, priority=1)
    assert core.at(80, BatchDone(0, 1)) == [(0, [(3, 8)])]


# ---- static dynamic batching ----

FOUR = partial(StaticBatching, max_items=4, delay_ns=5 * MS)


def test_static_waits_for_company_until_the_oldest_has_waited_for_the_delay() -> None:
    core = core_with(FOUR, ONE)
    assert core.ask(0) == []
    assert core.wakes_ms() == [5]
    assert core.ask(3, 2) == []
    assert core.at(5, Tick()) == [(0, [(1, 1), (2, 2)])]


def test_static_leaves_at_once_with_the_largest_size() -> None:
    core = core_with(FOUR, ONE)
    assert [core.ask(0, 3), core.ask(1, 1)] == [[], [(0, [(1, 3), (2, 1)])]]


def test_static_cuts_nothing() -> None:
    core = core_with(FOUR, ONE, ONE)
    core.ask(0, 3)
    assert core.ask(1, 3) == [(0, [(1, 3)])]  # with six items it is time, but only three fit
    assert core.at(5, Tick()) == []  # the other three wait for their own time
    assert core.wakes_ms() == [6]
    assert core.at(6, Tick()) == [(1, [(2, 3)])]


def test_static_runs_what_is_larger_than_the_largest_size_by_itself() -> None:
    core = core_with(FOUR, ONE)
    assert core.ask(0, 7) == [(0, [(1, 7)])]


def test_static_does_not_hold_back_what_nobody_may_join() -> None:
    core = core_with(FOUR, ONE)
    assert core.ask(0, alone=True) == [(0, [(1, 1)])]


def test_static_keeps_shapes_apart() -> None:
    core = core_with(FOUR, ONE)
    for dim in (16, 32, 16):
        core.ask(0, dims=(dim,))
    assert core.at(5, Tick()) == [(0, [(1, 1), (3, 1)])]


def test_static_by_default_takes_half_the_slo_for_a_batch_on_the_smallest_slice_and_a_tenth_for_waiting() -> None:
    core = core_with(StaticBatching, (7, {"m": [MS] * 8}), ONE)
    assert core.ask(0, due_ms=60) == []
    assert core.wakes_ms() == [6]
    assert core.ask(1, due_ms=61) == []
    assert core.ask(2, due_ms=62) == [(0, [(1, 1), (2, 1), (3, 1)])]  # three take 30 ms on the small slice


def test_static_without_an_slo_holds_nothing_back_as_triton_by_default() -> None:
    core = core_with(StaticBatching, ONE)
    assert core.ask(0) == [(0, [(1, 1)])]


# ---- PREBA ----


def test_preba_leaves_with_the_knee_or_after_time_knee_shared_by_the_slices() -> None:
    core = core_with(Preba, (1, {"m": GROWS}), (1, {"m": GROWS}))
    assert core.ask(0) == []
    assert core.wakes_ms() == [10.5]  # 21 ms, two slices
    assert core.ask(1, 11) == [(0, [(1, 1), (2, 11)])]


def test_preba_time_queue_on_unlike_slices_is_that_of_their_joint_speed() -> None:
    core = core_with(Preba, (1, {"m": GROWS}), (2, {"m": [ns // 2 for ns in GROWS]}))
    core.ask(0)
    assert core.wakes_ms() == [7]  # 1 / (1/21 + 2/21)


def test_preba_takes_the_batch_max_of_the_slice_that_takes_it() -> None:
    core = core_with(Preba, ONE, (7, {"m": GROWS}))  # the small one's knee is a single item
    assert core.ask(0) == [(0, [(1, 1)])]
    assert core.ask(0) == []  # the large one holds out for twelve
    assert core.ask(1, 11) == [(1, [(2, 1), (3, 11)])]


def test_preba_goes_to_the_slice_that_was_free_first() -> None:
    core = core_with(Preba, (1, {"m": GROWS}), (1, {"m": GROWS}))
    assert [core.ask(0, 12), core.ask(0, 12)] == [[(0, [(1, 12)])], [(1, [(2, 12)])]]
    core.at(20, BatchDone(1, 2))
    core.at(21, BatchDone(0, 1))
    assert core.ask(30, 12) == [(1, [(3, 12)])]


BUCKETS = (8, 16, 32)
SLOWER = [scale * ns for scale in (1, 2, 4) for ns in GROWS]  # all have their knee at twelve


@pytest.mark.parametrize(
    ("waiting", "batch"),
    [
        ([(8, 1), (16, 1), (32, 1)], [1, 2, 3]),
        ([(16, 2), (32, 5), (8, 5)], [1, 3, 2]),  # shorter neighbours first
        ([(16, 2), (32, 5), (8, 6)], [1, 3]),  # what does not fit stays
        ([(8, 4), (32, 4), (16, 4)], [1, 3, 2]),  # the nearest first
    ],
)
def test_preba_fills_a_short_batch_up_from_adjacent_buckets(waiting: list[tuple[int, int]], batch: list[int]) -> None:
    core = core_with(Preba, (1, {"m": SLOWER}), lengths=BUCKETS)
    for length, items in waiting:
        assert core.ask(0, items, length=length) == []
    wake_ms = 42 if waiting[0][0] == 16 else 21
    ((_, pieces),) = core.at(wake_ms, Tick())
    assert [number for number, _ in pieces] == batch


def test_preba_keeps_to_the_batch_max_of_the_longest_input() -> None:
    table = [*GROWS, *(batch * 10 * MS for batch in range(1, 21))]  # longer ones gain nothing: their knee is one item
    pool = Pool()
    worker = Worker(0, 1, 1)
    pool.add(worker)
    pool.serve(worker, "m", tuple(table), (8, 16))
    policy = Preba(pool)
    for number, (length, items) in enumerate([(8, 3), (16, 3)], start=1):
        part = Query(Request(number, "m", items, length=length), 0).parts[0]
        part.kind = pool.kind_of(part.query.request)
        policy.offer(0, part, None)
    start = policy.next(100 * MS)
    assert start is not None
    assert (start.kind, ids(start.parts)) == (("m", 0), [1])


def ids(parts: Sequence[Part]) -> list[int]:
    return [part.query.request.id for part in parts]
