"""One pool: properties over random stories with exact service times, and a check that they notice a broken policy.

That every request ends exactly once, that nothing is lost by cutting, and that a journal repeats, is in
test_core_property.py and test_policies.py, for all policies.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from scheduler.core import SchedulerCore
from scheduler.domain import Worker
from scheduler.policies import admission, lanes, promises
from scheduler.policies.lanes import LATEST
from scheduler.policies.pool import OnePool
from tests.scheduler.test_marginal import ASKS, ROWS, SLICES, Ask, Exact, Slice

# Of one class: for a higher one promises are broken.
STORIES = (
    st.lists(SLICES, min_size=1, max_size=4),
    st.lists(ASKS.map(lambda ask: ask._replace(priority=100)), min_size=10, max_size=60),
)


def run(slices: list[Slice], asks: list[Ask]) -> Exact:
    """Until all has ended."""
    world = Exact(slices, SchedulerCore(policy=OnePool))
    for number, ask in enumerate(asks, start=1):
        world.ask(number, ask)
    world.until(float("inf"))
    cancelled = sum(ask.how == "cancelled" for ask in asks)
    assert world.answered + world.refused <= len(asks) <= world.answered + world.refused + cancelled
    return world


def check_promises(slices: list[Slice], asks: list[Ask]) -> None:
    """No strict request is answered late, whatever is asked beside it."""
    assert [request.id for request in run(slices, asks).late if request.strict] == []


@settings(max_examples=400, deadline=None)
@given(*STORIES)
def test_with_exact_service_times_no_promise_is_broken(slices: list[Slice], asks: list[Ask]) -> None:
    check_promises(slices, asks)


def test_the_stories_promise_much_and_refuse_some() -> None:
    """Or else the property says little."""
    slices = [Slice(1, 1, (3, 1), 0.2), Slice(3, 2, (1,), 0.2)]
    asks = [Ask(0.3, number % 2, 1 + number % 9, 8, 10 + number % 7, 100, "strict") for number in range(1, 200)]
    world = run(slices, asks)
    assert 50 < world.answered < 190


# ---- nobody starves ----

FLOODS = (st.lists(SLICES.map(lambda each: each._replace(depth=1)), min_size=1, max_size=3), st.integers(0, 2**32))


def flood(seed: int) -> list[Ask]:
    """Far more than the slices can do, for several SLOs."""
    draw = random.Random(seed)
    slos_ms = draw.choice([(15,), (30,), (15, 30, 60), (15, 30, None)])
    models, gap_ms = draw.randint(1, 3), draw.choice([0.1, 0.3, 1])
    return [
        Ask(
            draw.choice([0, gap_ms, 3 * gap_ms]),
            draw.randrange(models),
            draw.choice([1, draw.randint(1, ROWS)]),
            draw.choice([8, 16]),
            draw.choice(slos_ms),
            100,
            "",
        )
        for _ in range(300)
    ]


def check_bound(slices: list[Slice], seed: int) -> None:
    """What has been accepted ends within ten SLOs and one batch; open work ends. `run` checks that all ends."""
    world = run(slices, flood(seed))
    batch_ns = max(max(world.row_ns(w, m, 16)) for w, each in enumerate(slices) for m in range(len(each.first_ms)))
    for number, ended_ns in world.ended_ns.items():
        due_ns, asked_ns = world.requests[number].due_ns, world.asked_ns[number]
        if due_ns is not None:
            assert ended_ns - asked_ns <= LATEST * (due_ns - asked_ns) + batch_ns, f"request {number} is too late"


@settings(max_examples=200, deadline=None)
@given(*FLOODS)
def test_what_is_accepted_ends_within_its_bound(slices: list[Slice], seed: int) -> None:
    check_bound(slices, seed)


# ---- the properties notice a broken policy ----


def any_number_of_places(plan: promises._Plan, start_ns: float, key: lanes.LanesKey, due_ns: int) -> int:
    return ROWS


def start_whatever(
    self: promises.Promises, now_ns: int, worker: Worker, of: lanes.Lanes, given_up: int = 0, *, above: bool = False
) -> int:
    return worker.tables[of.kind].max_batch


def never_what_is_planned(self: OnePool, now_ns: int, priority: int) -> None:
    return None


def keep_no_plan(self: promises.Promises, now_ns: int, of: lanes.Lanes, part: object) -> bool:
    return True


def give_up_too_much(slots: list[promises._Slot], items: int) -> int:
    for slot in list(slots):
        if not slot.fixed:
            slot.remove(slot.items)
    return 0


PROMISES: list[tuple[object, str, object]] = [
    (promises._Plan, "room_for_new", any_number_of_places),
    (promises.Promises, "room", start_whatever),
    (promises.Promises, "book", keep_no_plan),
    (OnePool, "_promised", never_what_is_planned),
    (promises, "_give_up", give_up_too_much),
]
BOUNDS: list[tuple[object, str, object]] = [
    (admission.Admission, "_late_excess_ns", lambda self, now_ns, of, part: 0.0),
    (admission.Admission, "_beside", lambda self, of: [of]),
]


@pytest.mark.parametrize(
    ("where", "name", "mutation", "stories", "check"),
    [(*each, STORIES, check_promises) for each in PROMISES] + [(*each, FLOODS, check_bound) for each in BOUNDS],
)
def test_the_properties_notice_a_broken_policy(
    where: object,
    name: str,
    mutation: object,
    stories: tuple[st.SearchStrategy[object], ...],
    check: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(where, name, mutation)
    quick = settings(
        max_examples=1000, deadline=None, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False
    )
    with pytest.raises(AssertionError):
        quick(given(*stories)(lambda slices, asks: check(slices, asks)))()
