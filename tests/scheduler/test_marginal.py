"""Least marginal cost: small stories, and the property that it is there for: no promise is broken."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from scheduler.core import SchedulerCore
from scheduler.domain import BatchTable
from scheduler.messages import (
    Answer,
    AnyEvent,
    Arrived,
    BatchDone,
    Cancelled,
    Reason,
    Refuse,
    Request,
    Run,
    Serves,
    Tick,
    Wake,
    WorkerLost,
    WorkerUp,
)
from scheduler.policies import marginal
from scheduler.policies.marginal import MarginalCost
from tests.scheduler.test_baselines import FLAT, GROWS, MS, core_with

ONE = (1, {"m": GROWS})
# Four times as fast for seven times the GPCs.
WHOLE = (7, {"m": [ns // 4 for ns in GROWS]})


def test_a_query_goes_where_it_costs_the_least_of_those_in_time() -> None:
    core = core_with(MarginalCost, WHOLE, ONE)
    assert core.ask(0, due_ms=10) == [(1, [(1, 1)])]  # 10 GPC-ms there, 17.5 on the whole GPU
    assert core.ask(0, due_ms=9) == [(0, [(2, 1)])]


def test_joining_a_batch_that_has_not_started_is_cheaper_than_an_idle_slice() -> None:
    core = core_with(MarginalCost, ONE, WHOLE)
    core.ask(0, due_ms=50)
    assert core.ask(0, due_ms=50) == []  # behind the first: 10 GPC-ms, 17.5 on the idle one
    assert core.ask(0, due_ms=50) == []  # joins: 1 GPC-ms
    assert core.at(10, BatchDone(0, 1)) == [(0, [(2, 1), (3, 1)])]


def test_a_batch_is_not_joined_beyond_what_has_been_promised_in_it() -> None:
    core = core_with(MarginalCost, ONE, WHOLE)
    core.ask(0, due_ms=50)
    core.ask(0, due_ms=21)  # one more item may join it: 11 ms from 10 on
    assert core.ask(0, 2, due_ms=25, whole=True) == [(1, [(3, 2)])]
    assert core.ask(0, due_ms=25) == []
    assert core.at(10, BatchDone(0, 1)) == [(0, [(2, 1), (4, 1)])]


def test_a_batch_is_not_joined_beyond_what_has_been_promised_behind_it() -> None:
    core = core_with(MarginalCost, (1, {"a": GROWS, "b": GROWS}))
    core.ask(0, model="a", due_ms=50)
    core.ask(0, model="a", due_ms=50)  # from 10 to 20
    core.ask(0, model="b", due_ms=31)  # from 20 to 30
    core.ask(0, 2, model="a", due_ms=90, whole=True)  # not with the second, but behind the third
    assert core.ask(0, 1, model="a", due_ms=90) == []  # cheapest with the second: 1 ms, as with the fourth; ends first
    assert core.at(10, BatchDone(0, 1)) == [(0, [(2, 1), (5, 1)])]
    assert core.at(21, BatchDone(0, 2)) == [(0, [(3, 1)])]
    assert core.at(31, BatchDone(0, 3)) == [(0, [(4, 2)])]


def test_a_query_is_cut_where_that_is_the_only_way_in_time() -> None:
    core = core_with(MarginalCost, ONE, ONE)
    assert core.ask(0, 20, due_ms=21) == [(0, [(1, 12)]), (1, [(1, 8)])]


def test_the_pieces_that_cost_the_least_an_item_are_cut_first() -> None:
    core = core_with(MarginalCost, ONE, (7, {"m": FLAT}))
    core.ask(0, due_ms=50)
    core.ask(0, due_ms=25)  # from 10 to 20, with room for five items
    # On the other slice an item takes 10 ms and 70 GPC-ms: seven are not in time there, two must be.
    assert core.ask(0, 7, due_ms=25) == [(1, [(3, 2)])]
    assert core.at(10, BatchDone(0, 1)) == [(0, [(2, 1), (3, 5)])]


@pytest.mark.parametrize("how", [{"whole": True}, {"alone": True}])
def test_what_must_not_be_cut_is_late_in_one_piece(how: dict[str, bool]) -> None:
    core = core_with(MarginalCost, ONE, ONE)
    assert core.ask(0, 20, due_ms=21, **how) == [(0, [(1, 20)])]


def test_what_cannot_be_in_time_is_refused_if_strict_with_how_late_it_would_be() -> None:
    core = core_with(MarginalCost, ONE)
    core.ask(0, due_ms=50)
    core.ask(0, due_ms=15, strict=True)
    assert core.commands == [Refuse(2, Reason.SLO_UNREACHABLE, 5 * MS)]


def test_what_is_late_breaks_no_promise() -> None:
    core = core_with(MarginalCost, ONE)
    core.ask(0, due_ms=50)
    core.ask(0, due_ms=20)
    assert core.ask(0, due_ms=15) == []  # late in any case: not with the second, but behind it
    assert core.at(10, BatchDone(0, 1)) == [(0, [(2, 1)])]


def test_without_a_due_time_a_query_goes_where_it_ends_first() -> None:
    core = core_with(MarginalCost, ONE, WHOLE)
    assert [core.ask(0), core.ask(0)] == [[(1, [(1, 1)])], []]  # the second one ends behind it at 5 ms
    assert core.at(2.5, BatchDone(1, 1)) == [(1, [(2, 1)])]


def test_a_higher_class_goes_before_a_lower_one_as_far_as_promises_allow() -> None:
    core = core_with(MarginalCost, (1, {"a": GROWS, "b": GROWS}))
    core.ask(0, model="a", due_ms=50)
    core.ask(0, model="a", due_ms=20)  # has to be next
    core.ask(0, model="a", whole=True, items=20)
    core.ask(0, model="b", priority=1)
    assert core.at(10, BatchDone(0, 1)) == [(0, [(2, 1)])]
    assert core.at(20, BatchDone(0, 2)) == [(0, [(4, 1)])]


def test_a_lost_promise_binds_nobody() -> None:
    core = core_with(MarginalCost, ONE)
    core.ask(0, due_ms=50)
    core.ask(0, due_ms=22)
    assert core.ask(15, 5, due_ms=90) == []  # the first one is overdue: the second will end at 25 at best
    assert core.at(15, BatchDone(0, 1)) == [(0, [(2, 1), (3, 5)])]


def test_what_waited_for_a_slice_that_died_is_priced_anew() -> None:
    core = core_with(MarginalCost, ONE, WHOLE)
    for _ in range(3):
        core.ask(0, due_ms=50)
    assert core.at(1, WorkerLost(0, False, "killed")) == [(1, [(1, 1)])]  # what ran runs again, alone
    assert core.at(3.5, BatchDone(1, 2)) == [(1, [(2, 1), (3, 1)])]


def test_pieces_that_wait_leave_with_their_query() -> None:
    core = core_with(MarginalCost, ONE, ONE)
    core.ask(0, 20, due_ms=21)
    core.ask(0, 20, due_ms=50)
    core.ask(0, 2, due_ms=60, whole=True)
    core.at(1, Cancelled(2))
    assert core.at(17, BatchDone(1, 2)) + core.at(21, BatchDone(0, 1)) == [(0, [(3, 2)])]


# ---- no promise is broken ----


class Slice(NamedTuple):
    """`first_ms` of one item, `more_ms` of each further one, of each model that it serves (`lengths`: of the first)."""

    gpcs: int
    depth: int
    first_ms: tuple[float, ...]
    more_ms: float


class Ask(NamedTuple):
    after_ms: float
    model: int
    items: int
    length: int
    due_ms: float | None
    priority: int
    how: str


ROWS = 16
LENGTHS = (8, 16)
SLICES = st.builds(
    Slice,
    st.sampled_from([1, 2, 3, 7]),
    st.sampled_from([1, 1, 2]),
    st.lists(st.sampled_from([1, 3, 4.5]), min_size=1, max_size=3).map(tuple),
    st.sampled_from([0, 0.2, 1]),
)
ASKS = st.builds(
    Ask,
    st.sampled_from([0, 0, 0.3, 1, 5]),
    st.integers(0, 2),
    st.one_of(st.integers(1, ROWS), st.integers(1, 3), st.just(2 * ROWS)),
    st.sampled_from([8, 16]),
    st.sampled_from([None, 3, 6, 10, 15, 30, 60]),
    st.sampled_from([100, 100, 1]),
    st.sampled_from(["strict"] * 6 + ["", "whole", "alone", "cancelled"]),
)


@dataclass
class Exact:
    """Slices that take exactly the time of their tables; notes what ends after its due time."""

    slices: list[Slice]
    core: SchedulerCore = field(default_factory=lambda: SchedulerCore(policy=MarginalCost))
    now_ns: int = 0
    requests: dict[int, Request] = field(default_factory=dict)
    late: list[Request] = field(default_factory=list)
    answered: int = 0
    refused: int = 0
    asked_ns: dict[int, int] = field(default_factory=dict)
    ended_ns: dict[int, int] = field(default_factory=dict)
    free_ns: dict[int, int] = field(default_factory=dict)
    heap: list[tuple[int, int, AnyEvent]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for worker_id, each in enumerate(self.slices):
            self.core.handle(0, WorkerUp(worker_id, each.gpcs, each.depth))
            for model in range(len(each.first_ms)):
                row = self.row_ns(worker_id, model, LENGTHS[0])
                rows, lengths = (
                    ((*row, *self.row_ns(worker_id, model, LENGTHS[1])), LENGTHS) if model == 0 else (row, ())
                )
                self.core.handle(0, Serves(worker_id, str(model), rows, lengths))

    def row_ns(self, worker_id: int, model: int, length: int) -> tuple[int, ...]:
        each = self.slices[worker_id]
        scale = 1.7 if model == 0 and length > LENGTHS[0] else 1
        return tuple(int(scale * (each.first_ms[model] + each.more_ms * more) * MS) for more in range(ROWS))

    def until(self, at_ns: float) -> None:
        while self.heap and self.heap[0][0] <= at_ns:
            self.now_ns, _, event = heapq.heappop(self.heap)
            self.tell(event)

    def tell(self, event: AnyEvent) -> None:
        for command in self.core.handle(self.now_ns, event):
            match command:
                case Run():
                    self.run(command)
                case Wake():
                    heapq.heappush(self.heap, (command.at_ns, -1, Tick()))
                case Answer():
                    ended = [self.requests[number] for number in command.request_ids]
                    self.answered += len(ended)
                    self.ended_ns |= dict.fromkeys(command.request_ids, self.now_ns)
                    self.late += [each for each in ended if each.due_ns is not None and each.due_ns < self.now_ns]

                case Refuse():
                    self.refused += 1

    def run(self, run: Run) -> None:
        length = max(self.requests[piece.request_id].length for piece in run.pieces)
        row = self.row_ns(run.worker_id, int(run.model), length)
        start_ns = max(self.now_ns, self.free_ns.get(run.worker_id, 0))
        items = min(
            sum(piece.items for piece in run.pieces), ROWS
        )  # beyond its table: its last row, as the core counts
        end_ns = self.free_ns[run.worker_id] = start_ns + row[items - 1]
        heapq.heappush(self.heap, (end_ns, run.batch_id, BatchDone(run.worker_id, run.batch_id)))

    def ask(self, number: int, ask: Ask) -> None:
        at_ns = self.now_ns + int(ask.after_ms * MS)
        self.until(at_ns)
        self.now_ns = at_ns
        uncut = ask.how in ("whole", "alone")
        self.asked_ns[number] = at_ns
        self.requests[number] = request = Request(
            number,
            str(ask.model),
            min(ask.items, ROWS) if uncut else ask.items,
            due_ns=None if ask.due_ms is None else at_ns + int(ask.due_ms * MS),
            priority=ask.priority,
            alone=ask.how == "alone",
            whole=ask.how == "whole",
            strict=ask.how != "",
            length=ask.length if ask.model == 0 else 0,
        )
        self.tell(Arrived(request))
        if ask.how == "cancelled":
            self.tell(Cancelled(number))


def broken_promises(slices: list[Slice], asks: list[Ask]) -> list[Request]:
    world = Exact(slices)
    for number, ask in enumerate(asks, start=1):
        world.ask(number, ask)
    world.until(float("inf"))
    return [request for request in world.late if request.strict]


STORIES = (st.lists(SLICES, min_size=1, max_size=4), st.lists(ASKS, min_size=10, max_size=60))


@settings(max_examples=300, deadline=None)
@given(*STORIES)
def test_with_exact_service_times_no_promise_is_broken(slices: list[Slice], asks: list[Ask]) -> None:
    assert broken_promises(slices, asks) == []


def test_the_stories_promise_much_and_refuse_some() -> None:
    """Or else the property says little."""
    slices = [Slice(1, 1, (3, 1), 0.2), Slice(3, 2, (1,), 0.2)]
    world = Exact(slices)
    for number in range(1, 200):
        world.ask(number, Ask(0.3, number % 2, 1 + number % 9, 8, 10 + number % 7, 100, "strict"))
    world.until(float("inf"))
    assert 50 < world.answered < 190


def in_front(plan: marginal._Plan, free_ns: int, priority: int, time_ns: int) -> int:
    return 0


def short(table: BatchTable) -> list[int]:
    return [ns * 9 // 10 for ns in table.ns]


def careless(times_ns: list[int], there: int, items: int, within_ns: float, cuts: bool) -> int:
    return items if there + items < len(times_ns) else 0


@pytest.mark.parametrize(("name", "mutation"), [("_place", in_front), ("planned_ns", short), ("_fitting", careless)])
def test_the_property_notices_a_broken_policy(name: str, mutation: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marginal, name, mutation)
    quick = settings(
        max_examples=300, deadline=None, database=None, phases=[Phase.generate], report_multiple_bugs=False
    )

    def check(slices: list[Slice], asks: list[Ask]) -> None:
        assert broken_promises(slices, asks) == []

    with pytest.raises(AssertionError):
        quick(given(*STORIES)(check))()
