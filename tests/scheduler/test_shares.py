"""Shares: what lines of work may count on where more is asked for than the slices can do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.domain import Pool, Worker
from scheduler.policies.lanes import Lanes, LanesKey
from scheduler.policies.rates import RateBook
from scheduler.policies.shares import Share, Shares, fair_part
from scheduler.simulator import EXACT, SimSlice, simulate
from scheduler.workload import Arrival, merge, poisson

MODELS = st.dictionaries(st.sampled_from("abcde"), st.floats(0, 3), min_size=1)
WEIGHTS = st.dictionaries(st.sampled_from("abcde"), st.floats(0.1, 10))


@pytest.mark.parametrize(
    ("asked", "weights", "parts"),
    [
        ({"a": 0.1, "b": 0.2}, {}, {"a": 0.8, "b": 0.9}),  # what others do not ask for
        ({"a": 2.0, "b": 2.0}, {}, {"a": 0.5, "b": 0.5}),
        ({"a": 2.0, "b": 0.1}, {}, {"a": 0.9, "b": 0.5}),  # b would get its half if it asked for it
        ({"a": 2.0, "b": 2.0}, {"a": 3.0}, {"a": 0.75, "b": 0.25}),
        ({"a": 2.0, "b": 0.3, "c": 0.1}, {}, {"a": 0.6, "b": 0.45, "c": 0.35}),
    ],
)
def test_parts_are_max_min_fair(asked: dict[str, float], weights: dict[str, float], parts: dict[str, float]) -> None:
    assert {model: fair_part(model, asked, weights, 1.0) for model in asked} == pytest.approx(parts)


@given(MODELS, WEIGHTS, st.floats(0.1, 1))
def test_what_all_take_of_their_parts_is_no_more_than_there_is(
    asked: dict[str, float], weights: dict[str, float], left: float
) -> None:
    parts = {model: fair_part(model, asked, weights, left) for model in asked}
    assert sum(min(asked[model], parts[model]) for model in asked) <= left * (1 + 1e-9)
    all_weights = sum(weights.get(model, 1.0) for model in asked)
    for model, part in parts.items():
        assert part >= left * weights.get(model, 1.0) / all_weights * (1 - 1e-9)


def in_time(per_s: dict[str, float], slices: list[SimSlice], slo_ms: float, seconds: float = 4.0) -> dict[str, float]:
    """The share of what each model is sent for some seconds."""
    arrivals = merge(*(poisson(model, rate, seconds, seed) for seed, (model, rate) in enumerate(per_s.items())))
    report = simulate(slices, arrivals, slo_ms=dict.fromkeys(per_s, slo_ms), noise=EXACT, max_queued=100_000)
    return {model: report.models[model].within_slo for model in per_s}


# 32 items in 36 ms.
GROWING = [4.0 + items for items in range(1, 33)]
MOST_PER_S = 32 / 36e-3


def test_models_that_share_slices_keep_under_overload_what_these_can_do() -> None:
    slices = [SimSlice(f"slice {index}", 1, dict.fromkeys("abcd", GROWING)) for index in range(4)]
    good = in_time(dict.fromkeys("abcd", 2 * MOST_PER_S), slices, 60.0)
    assert sum(2 * share for share in good.values()) / 4 > 0.85
    assert min(good.values()) > 0.9 * max(good.values())


def test_overload_is_known_from_the_first_slos_on() -> None:
    """What is taken late before takes the place of what could be in time for ten SLOs."""
    slices = [SimSlice(f"slice {index}", 1, dict.fromkeys("abcd", GROWING)) for index in range(4)]
    good = in_time(dict.fromkeys("abcd", 2 * MOST_PER_S), slices, 60.0, seconds=12 * 0.06)
    assert sum(2 * share for share in good.values()) / 4 > 0.85


# ---- shares by themselves ----

S = 1_000_000_000
TABLE_NS = tuple(int(ms * S / 1000) for ms in GROWING)
ROUND_NS = S // 5


class World:
    """Slices, each with its models (of two length buckets); lines that ask for so many slices' worth."""

    def __init__(self, *slices: str) -> None:
        self.pool = Pool()
        self.lanes: dict[LanesKey, Lanes] = {}
        self.shares = Shares(self.pool, RateBook(self.pool), self.lanes)
        self.now_ns = 0
        for models in slices:
            self.add(models)

    def add(self, models: str) -> None:
        worker = Worker(max(self.pool.workers, default=0) + 1, 1, 1)
        self.pool.add(worker)
        for model in models:
            self.pool.serve(worker, model, 2 * TABLE_NS, (8, 16))

    def ask(self, model: str, slices: float, priority: int = 1, bucket: int = 0) -> None:
        """For what so many slices do in a round."""
        key = (priority, (model, bucket), ((), 0, 0))
        if key not in self.lanes:
            self.lanes[key] = Lanes(key, RateBook(self.pool).of((model, bucket), 0))
        items = round(slices * MOST_PER_S * ROUND_NS / S)
        self.lanes[key].arrived(self.now_ns, items, S)
        self.lanes[key].arriving.add(self.now_ns, items)

    def round(self) -> dict[str, Share]:
        """By model, class and bucket."""
        self.now_ns += ROUND_NS
        return {f"{key[1][0]}{key[0]}{key[1][1]}": self.shares.of(self.now_ns, key) for key in self.lanes}

    def settled(
        self, *asks: tuple[str, float] | tuple[str, float, int] | tuple[str, float, int, int]
    ) -> dict[str, float]:
        """Parts, once such asks have come for some time."""
        shares = {}
        for _ in range(100):
            for ask in asks:
                self.ask(*ask)
            shares = self.round()
        return {line: share.part for line, share in shares.items()}


def test_a_model_with_other_slices_leaves_the_shared_one_to_that_which_has_no_other() -> None:
    """What they ask for is there, but only so. An even share of the shared one would be too little for b."""
    parts = World("ab", "a").settled(("a", 1.1), ("b", 0.75))
    assert parts["a10"] > 1.1 / 2  # of two slices
    assert parts["b10"] > 0.8


def test_weights_divide_what_all_ask_for() -> None:
    world = World("ab")
    world.pool.weights["a"] = 3.0
    assert world.settled(("a", 2.0), ("b", 2.0)) == pytest.approx({"a10": 0.75, "b10": 0.25})


def test_length_buckets_get_of_their_models_part_what_they_ask_of_it() -> None:
    parts = World("ab").settled(("a", 1.5, 1, 0), ("a", 0.5, 1, 1), ("b", 2.0))
    assert parts == pytest.approx({"a10": 0.375, "a11": 0.125, "b10": 0.5}, abs=0.01)


def test_lower_classes_share_what_is_left() -> None:
    parts = World("abc").settled(("a", 0.4, 1), ("b", 2.0, 2), ("c", 2.0, 2))
    assert parts["a10"] == 1
    assert parts["b20"] == parts["c20"] == pytest.approx(0.3, abs=0.03)
    assert World("ab").settled(("a", 1.2, 1), ("b", 2.0, 2)) == {"a10": 1, "b20": 0}


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from("abc"), st.floats(0.1, 4), st.integers(1, 2), st.integers(0, 1)),
        st.tuples(st.just("add"), st.sampled_from(["a", "ab", "bc", "abc"])),
        st.tuples(st.just("remove"), st.integers(0, 3)),
        st.tuples(st.just("unload"), st.integers(0, 3), st.sampled_from("abc")),
        st.tuples(
            st.just("idle"), st.sampled_from([1, 60, 2900, 2950, 3000])
        ),  # 2980 s are 745 times 4 SLOs: e to the -745 is 0
    ),
    max_size=30,
)


@given(STEPS)
def test_slices_and_models_come_and_go(steps: list[tuple[str, Any]]) -> None:
    """There always are shares, also of those that asked so long ago that hardly anything is left of it."""
    world = World("abc", "ab")
    for what, *how in steps:
        workers = list(world.pool.workers.values())
        if what == "ask" and (how[0], 0) in world.pool.serving:
            world.ask(*how)
        elif what == "add":
            world.add(*how)
        elif what == "remove" and how[0] < len(workers):
            world.pool.remove(workers[how[0]])
        elif what == "unload" and how[0] < len(workers):
            world.pool.withdraw(workers[how[0]], how[1])
        elif what == "idle":
            world.now_ns += int(how[0] * S)
        for line, share in world.round().items():
            assert 0 <= share.part <= 1, line
            assert 0 <= share.pressed <= 1, line
            assert 0 <= share.full <= 1, line


def test_a_flood_of_a_lower_class_has_nobody_of_a_higher_one_refused() -> None:
    """Which comes in bursts, of 40 % of what the slices can do in the mean."""
    slices = [SimSlice(f"slice {index}", 1, {"high": GROWING, "low": GROWING}) for index in range(2)]
    bursts = [Arrival(burst * S // 5 + query * 20_000, "high", 8) for burst in range(25) for query in range(17)]
    flood = poisson("low", 4 * MOST_PER_S, 5.0, 2)
    report = simulate(
        slices,
        merge(bursts, flood),
        slo_ms={"high": 100.0, "low": 100.0},
        priority={"high": 1, "low": 2},
        noise=EXACT,
        max_queued=100_000,
    )
    high = report.models["high"]
    assert high.answered == high.sent
    assert high.within_slo > 0.9
