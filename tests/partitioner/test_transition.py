"""Transitions: what can stay stays, every step is possible, the result is what was wanted."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import (
    GpuModel,
    IllegalLayoutError,
    Layout,
    MigProfile,
    PlacedProfile,
    Placement,
    check,
    maximal_multisets,
    place,
)
from partitioner.transition import arrange, cheapest_assignment, transition

A100 = GPU_MODELS["A100-80GB"]


def placed(text: str, gpu: GpuModel = A100) -> Layout:
    """`3g.40gb@4 1g.10gb@0` as a layout."""
    parts = [part.split("@") for part in text.split()]
    slices = []
    for name, start in parts:
        profile = gpu.profile(name)
        slices.append(PlacedProfile(profile, Placement(int(start), profile.placements[0].size)))
    return tuple(sorted(slices, key=lambda each: each.placement.start))


def names(layout: Layout) -> list[str]:
    return [f"{each.profile.name}@{each.placement.start}" for each in layout]


def test_what_stays_stays() -> None:
    now = placed("1g.10gb@0 1g.10gb@1 2g.20gb@2 3g.40gb@4")
    target = arrange(now, [A100.profile(name) for name in ("3g.40gb", "3g.40gb")], A100)
    assert names(target) == ["3g.40gb@0", "3g.40gb@4"]
    change = transition(now, target, A100)
    assert names(change.kept) == ["3g.40gb@4"]
    assert [(names(r.destroy), names(r.create)) for r in change.rounds] == [
        (["1g.10gb@0", "1g.10gb@1", "2g.20gb@2"], ["3g.40gb@0"])
    ]
    assert change.touched == 4
    assert change.serving_gpcs() == (3,)


def test_a_small_slice_is_put_where_the_large_one_can_stay() -> None:
    now = placed("3g.40gb@0 3g.40gb@4")
    target = arrange(now, [A100.profile(name) for name in ("1g.10gb", "2g.20gb", "3g.40gb")], A100)
    assert "3g.40gb@4" in names(target) or "3g.40gb@0" in names(target)
    assert transition(now, target, A100).touched == 3


def test_nothing_to_do_is_nothing() -> None:
    now = placed("4g.40gb@0 2g.20gb@4 1g.10gb@6")
    change = transition(now, arrange(now, [each.profile for each in now], A100), A100)
    assert change.rounds == ()
    assert change.kept == now


def test_the_cheapest_round_comes_first() -> None:
    now = placed("4g.40gb@0 1g.10gb@4 1g.10gb@5 1g.10gb@6")
    change = transition(now, placed("2g.20gb@0 2g.20gb@2 2g.20gb@4 1g.10gb@6"), A100)
    assert [names(each.destroy) for each in change.rounds] == [["1g.10gb@4", "1g.10gb@5"], ["4g.40gb@0"]]
    assert change.serving_gpcs() == (5, 3)


def test_memory_that_overlaps_is_not_the_only_thing_in_the_way() -> None:
    """Seven 1g slices take all compute slices, though slot 7 of the grid is free."""
    now = placed("1g.10gb@0 1g.10gb@1 1g.10gb@2 1g.10gb@3 1g.10gb@4 1g.10gb@5")
    change = transition(now, placed("1g.10gb@0 1g.10gb@1 1g.10gb@2 1g.10gb@3 1g.10gb@4 1g.20gb@6"), A100)
    assert [(names(r.destroy), names(r.create)) for r in change.rounds] == [([], ["1g.20gb@6"]), (["1g.10gb@5"], [])]


def test_a_target_that_is_illegal_is_refused() -> None:
    with pytest.raises(IllegalLayoutError):
        transition((), placed("4g.40gb@0 3g.40gb@0"), A100)


def test_targets_go_to_the_gpus_they_change_least() -> None:
    assert cheapest_assignment([[5, 0], [0, 5]]) == [1, 0]
    assert cheapest_assignment([[1, 2], [1, 9]]) == [1, 0]


MULTISETS = {name: maximal_multisets(gpu) for name, gpu in GPU_MODELS.items()}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(GPU_MODELS)), st.data())
def test_every_change_is_possible_and_keeps_as_much_as_can_be(name: str, data: st.DataObject) -> None:
    gpu = GPU_MODELS[name]
    of_gpu = st.sampled_from(MULTISETS[name])
    some = data.draw(of_gpu)
    now = place(data.draw(st.permutations(some).map(lambda p: p[: data.draw(st.integers(0, len(p)))])), gpu)
    wanted = data.draw(of_gpu)
    target = arrange(now, wanted, gpu)
    assert sorted(each.profile.name for each in target) == sorted(each.name for each in wanted)
    change = transition(now, target, gpu)

    there = list(now)
    for each in change.rounds:
        assert each.destroy or each.create
        for gone in each.destroy:
            there.remove(gone)
            assert gone not in target, "destroyed although it stays"
        for new in each.create:
            there.append(new)
            check(tuple(there), gpu)  # possible one after the other, in this order
    assert sorted(there, key=lambda p: p.placement.start) == list(target)
    assert set(change.kept) == set(now) & set(target)
    kept = sum(each.profile.gpcs for each in change.kept)
    assert all(serving >= kept for serving in change.serving_gpcs())
    assert len(change.kept) == most_kept(now, wanted)


def most_kept(now: Layout, wanted: tuple[MigProfile, ...]) -> int:
    """By brute force: the most slices of `now` that some legal arrangement of `wanted` can keep."""
    for count in range(min(len(now), len(wanted)), 0, -1):
        for kept in permutations(now, count):
            left = list(wanted)
            try:
                for each in kept:
                    left.remove(each.profile)
            except ValueError:
                continue
            if _placeable(left, kept):
                return count
    return 0


def _placeable(left: list[MigProfile], placed: tuple[PlacedProfile, ...]) -> bool:
    if not left:
        return True
    first, *rest = left
    return any(
        _placeable(rest, (*placed, PlacedProfile(first, place)))
        for place in first.placements
        if not any(place.overlaps(other.placement) for other in placed)
    )
