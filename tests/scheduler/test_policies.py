"""Both policies under random stories of two models with dims, priorities, lone requests, and slices that differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from scheduler.core import SchedulerCore
from scheduler.domain import Pool, Query, Worker
from scheduler.messages import Arrived, Request, Run, Serves, StopsServing, WorkerUp
from scheduler.policies import Policy
from scheduler.policies.elsa import Elsa
from scheduler.policies.late import LateBinding
from tests.scheduler.test_core import MS
from tests.scheduler.test_core_property import World

TABLES = {
    "a": tuple(MS + (batch - 1) * MS // 10 for batch in range(1, 33)),
    "b": tuple(3 * MS + (batch - 1) * MS // 2 for batch in range(1, 17)),
}
MODELS = {0: "ab", 1: "a", 2: "b", 3: "ab", 99: "ab"}  # by worker


@dataclass
class Shared(World):
    """Two models; a worker serves some of them."""

    requests: dict[int, Request] = field(default_factory=dict)
    offered: dict[int, set[str]] = field(default_factory=dict)  # models a worker serves now

    def ask(self, items: int, slo_ms: int | None, timeout_ms: int | None, kind: tuple[str, int, int, bool]) -> None:
        model, length, priority, alone = kind
        number = self.next_request
        self.next_request += 1
        due_ns = None if slo_ms is None else self.now_ns + slo_ms * MS
        expires_ns = None if timeout_ms is None else self.now_ns + timeout_ms * MS
        request = Request(number, model, items, (length,), due_ns, expires_ns, priority, alone)
        self.requests[number] = request
        self.items[number] = items
        self.open.add(number)
        self.tell(Arrived(request))

    def check_batch(self, run: Run) -> None:
        requests = [self.requests[number] for number in run.request_ids]
        assert {request.model for request in requests} == {run.model}, "a batch of several models"
        assert run.model in self.offered[run.worker_id], "the worker does not serve this model"
        assert len({request.dims for request in requests}) == 1, "a batch of several shapes"
        assert len(requests) == 1 or not any(request.alone for request in requests), "batched with others"
        assert sum(request.items for request in requests) <= len(TABLES[run.model]) or len(requests) == 1
        self.check_class(run, requests)

    def check_class(self, run: Run, requests: list[Request]) -> None:
        """No lower class starts while a higher one that anybody might run here waits without a due time."""
        under_way = {number for batches in self.running.values() for ids in batches.values() for number in ids}
        lowest = max(request.priority for request in requests)
        for number in self.open - under_way:
            other = self.requests[number]
            waits_here = isinstance(self.policy(), LateBinding) and other.model in self.offered[run.worker_id]
            assert not (waits_here and other.priority < lowest and other.due_ns is None), "a higher class waits"

    def policy(self) -> Policy:
        return self.core._policy

    def bring_up(self, worker: int, gpcs: int) -> None:
        if worker not in self.up:
            self.up.add(worker)
            self.coming_back.discard(worker)
            self.serving.add(worker)
            self.offered[worker] = set()
            self.tell(WorkerUp(worker, gpcs, self.depth))
            for model in MODELS[worker]:
                self.offered[worker].add(model)
                self.tell(Serves(worker, model, tuple(ns // gpcs for ns in TABLES[model])))

    def unload(self, worker: int, model: str) -> None:
        if worker in self.serving and model in self.offered[worker]:
            self.offered[worker].discard(model)
            self.tell(StopsServing(worker, model))


KINDS = st.tuples(
    st.sampled_from("ab"),
    st.sampled_from([0, 0, 64]),
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
STORIES = (
    st.lists(STEPS, min_size=20, max_size=100),
    st.sampled_from([1, 2]),
    st.sampled_from([3, 4096]),
    st.booleans(),
)


def check_story(
    policy: Callable[[Pool], Policy], steps: list[tuple[object, ...]], depth: int, max_queued: int, refuse_late: bool
) -> None:
    world = Shared(SchedulerCore(max_queued, policy, refuse_late=refuse_late), depth)
    world.bring_up(0, 1)
    for name, *arguments in steps:
        getattr(world, str(name))(*arguments)
    world.finish()
    again = SchedulerCore(max_queued, policy, refuse_late=refuse_late)
    for now_ns, event, commands in world.journal:
        assert again.handle(now_ns, event) == commands


@pytest.mark.parametrize("policy", [Elsa, LateBinding])
def test_every_request_ends_exactly_once_and_the_journal_repeats(policy: type[Policy]) -> None:
    @settings(max_examples=120, deadline=None)
    @given(*STORIES)
    def check(steps: list[tuple[object, ...]], depth: int, max_queued: int, refuse_late: bool) -> None:
        check_story(policy, steps, depth, max_queued, refuse_late)

    check()


# ---- the property notices a broken policy ----


class LosesTheEvicted(LateBinding):
    def evict(self, worker: Worker, model: str | None = None) -> list[Query]:
        super().evict(worker, model)
        return []


class RunsTheCancelled(LateBinding):
    def discard(self, query: Query) -> None:
        pass


class MixesShapes(LateBinding):
    def add(self, now_ns: int, query: Query) -> None:
        query.bucket = (query.request.model, (), 0)
        super().add(now_ns, query)


class StarvesTheOpen(LateBinding):
    def _take_open(self, start_ns: int, worker: Worker, model: str) -> list[Query]:
        return []


class TakesTwice(LateBinding):
    def take(self, now_ns: int, worker: Worker) -> list[Query]:
        batch = super().take(now_ns, worker)
        return batch + batch[:1]


@pytest.mark.parametrize("broken", [LosesTheEvicted, RunsTheCancelled, MixesShapes, StarvesTheOpen, TakesTwice])
def test_the_property_notices_a_broken_policy(broken: type[LateBinding]) -> None:
    @settings(max_examples=1000, deadline=None, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False)
    @given(*STORIES)
    def check(steps: list[tuple[object, ...]], depth: int, max_queued: int, refuse_late: bool) -> None:
        check_story(broken, steps, depth, max_queued, refuse_late)

    with pytest.raises((AssertionError, KeyError)):
        check()
