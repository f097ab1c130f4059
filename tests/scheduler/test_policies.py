"""Every policy under random stories of two models with shapes, lengths, classes, lone requests, and unlike slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from scheduler.core import SchedulerCore
from scheduler.domain import Part, Pool, Worker
from scheduler.messages import Arrived, Request, Run, Serves, StopsServing, WorkerUp
from scheduler.policies import Policy, Start
from scheduler.policies.named import POLICIES
from scheduler.policies.preba import Preba
from tests.scheduler.test_core import MS
from tests.scheduler.test_core_property import World

LENGTHS = {"a": (8, 16, 32), "b": ()}
# A row for each length, one after the other.
TABLES = {
    "a": tuple(scale * (MS + (batch - 1) * MS // 10) for scale in (1, 2, 5) for batch in range(1, 33)),
    "b": tuple(3 * MS + (batch - 1) * MS // 2 for batch in range(1, 17)),
}
MODELS = {0: "ab", 1: "a", 2: "b", 3: "ab", 99: "ab"}  # by worker
LARGEST = {"a": 32, "b": 16}
# An idle slice of these takes whatever it can.
NEVER_HELD_BACK = {"fifs"}


@dataclass
class Shared(World):
    """Two models; a worker serves some of them."""

    never_held_back: bool = False
    requests: dict[int, Request] = field(default_factory=dict)
    offered: dict[int, set[str]] = field(default_factory=dict)  # models a worker serves now

    def ask(
        self, items: int, slo_ms: int | None, timeout_ms: int | None, kind: tuple[str, int, int, int, bool]
    ) -> None:
        model, dim, length, priority, alone = kind
        number = self.next_request
        self.next_request += 1
        due_ns = None if slo_ms is None else self.now_ns + slo_ms * MS
        expires_ns = None if timeout_ms is None else self.now_ns + timeout_ms * MS
        request = Request(number, model, items, (dim,), due_ns, expires_ns, priority, alone, length=length)
        self.requests[number] = request
        self.items[number] = items
        self.done[number] = set()
        if alone:
            self.alone.add(number)
            self.whole.add(number)
        self.open.add(number)
        self.tell(Arrived(request))

    def check_run(self, run: Run) -> None:
        super().check_run(run)
        requests = [self.requests[piece.request_id] for piece in run.pieces]
        assert {request.model for request in requests} == {run.model}, "a batch of several models"
        assert run.model in self.offered[run.worker_id], "the worker does not serve this model"
        assert len({request.dims for request in requests}) == 1, "a batch of several shapes"
        assert len(run.pieces) == 1 or sum(piece.items for piece in run.pieces) <= LARGEST[run.model], "too large"
        lowest = max(request.priority for request in requests)
        waiting = self.open - {number for number, _ in self.items_running()}
        for number in waiting if self.never_held_back else ():
            other = self.requests[number]
            runs_here = other.model in self.offered[run.worker_id]
            assert not (runs_here and other.priority < lowest), "a higher class waits"

    def bring_up(self, worker: int, gpcs: int) -> None:
        if worker not in self.up:
            self.up.add(worker)
            self.coming_back.discard(worker)
            self.serving.add(worker)
            self.offered[worker] = set()
            self.tell(WorkerUp(worker, gpcs, self.depth))
            for model in MODELS[worker]:
                self.offered[worker].add(model)
                self.tell(Serves(worker, model, tuple(ns // gpcs for ns in TABLES[model]), LENGTHS[model]))

    def unload(self, worker: int, model: str) -> None:
        if worker in self.serving and model in self.offered[worker]:
            self.offered[worker].discard(model)
            self.tell(StopsServing(worker, model))


KINDS = st.tuples(
    st.sampled_from("ab"),
    st.sampled_from([0, 0, 64]),
    st.sampled_from([1, 8, 9, 16, 30, 100]),
    st.sampled_from([100, 100, 1]),
    st.sampled_from([False] * 5 + [True]),
)
ASK = st.tuples(
    st.just("ask"),
    st.sampled_from([1, 1, 2, 3, 20]),
    st.one_of(st.none(), st.integers(1, 30)),
    st.one_of(st.none(), st.integers(0, 20)),
    KINDS,
)
STEPS = st.one_of(
    *[ASK] * 8,
    st.tuples(st.just("cancel"), st.integers(0, 100)),
    st.tuples(st.just("end_batch"), st.integers(0, 100), st.sampled_from([False, False, False, True])),
    st.tuples(st.just("end_batch"), st.integers(0, 100), st.just(False)),
    st.tuples(st.just("lose_worker"), st.integers(0, 100), st.booleans()),
    st.tuples(st.just("drain"), st.integers(0, 100)),
    st.tuples(st.just("bring_up"), st.integers(0, 3), st.sampled_from([1, 2, 4])),
    st.tuples(st.just("unload"), st.integers(0, 3), st.sampled_from("ab")),
    st.tuples(st.just("pass_time"), st.integers(0, 3 * MS)),
)
STORIES = (st.lists(STEPS, min_size=20, max_size=100), st.sampled_from([1, 2]), st.sampled_from([3, 4096]))


def check_story(
    policy: Callable[[Pool], Policy],
    steps: list[tuple[object, ...]],
    depth: int,
    max_queued: int,
    never_held_back: bool = False,
) -> None:
    world = Shared(SchedulerCore(max_queued, policy), depth, never_held_back=never_held_back)
    world.bring_up(0, 1)
    for name, *arguments in steps:
        getattr(world, str(name))(*arguments)
    world.finish()
    again = SchedulerCore(max_queued, policy)
    for now_ns, event, commands in world.journal:
        assert again.handle(now_ns, event) == commands


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=120, deadline=None)
@given(*STORIES)
def test_every_request_ends_exactly_once_and_the_journal_repeats(
    policy: str, steps: list[tuple[object, ...]], depth: int, max_queued: int
) -> None:
    check_story(POLICIES[policy], steps, depth, max_queued, policy in NEVER_HELD_BACK)


# ---- the property notices a broken policy ----


class LosesTheEvicted(Preba):
    def evict(self, worker: Worker, model: str | None = None) -> list[Part]:
        super().evict(worker, model)
        return []


class RunsTheCancelled(Preba):
    def discard(self, part: Part) -> None:
        pass


class MixesShapes(Preba):
    def offer(self, now_ns: int, part: Part, bound_ns: int | None) -> int:
        part.company = ((), 0, 0)
        return super().offer(now_ns, part, bound_ns)


class StarvesTheUnhurried(Preba):
    def wake_ns(self, now_ns: int) -> int | None:
        return None


class TakesTwice(Preba):
    def next(self, now_ns: int) -> Start | None:
        start = super().next(now_ns)
        return start and Start(start.worker, start.kind, start.parts + start.parts[:1])


@pytest.mark.parametrize("broken", [LosesTheEvicted, RunsTheCancelled, MixesShapes, StarvesTheUnhurried, TakesTwice])
def test_the_property_notices_a_broken_policy(broken: type[Preba]) -> None:
    quick = settings(
        max_examples=1000, deadline=None, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False
    )
    with pytest.raises((AssertionError, KeyError)):
        quick(given(*STORIES)(lambda steps, depth, most: check_story(broken, steps, depth, most)))()
