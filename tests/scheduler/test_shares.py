"""Shares: what lines of work may count on where more is asked for than the slices can do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.policies.shares import fair_part
from scheduler.simulator import EXACT, SimSlice, simulate
from scheduler.workload import merge, poisson

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


def in_time(per_s: dict[str, float], slices: list[SimSlice], slo_ms: float) -> dict[str, float]:
    """The share of what each model is sent for some seconds."""
    arrivals = merge(*(poisson(model, rate, 4.0, seed) for seed, (model, rate) in enumerate(per_s.items())))
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


def test_a_model_with_other_slices_leaves_the_shared_one_to_that_which_has_no_other() -> None:
    """What they ask for is there, but only just, and only so."""
    slices = [SimSlice("shared", 1, {"a": GROWING, "b": GROWING}), SimSlice("other", 1, {"a": GROWING})]
    shares = in_time({"a": 0.95 * MOST_PER_S, "b": 0.8 * MOST_PER_S}, slices, 100.0)
    assert min(shares.values()) > 0.97
