from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import (
    GpuModel,
    IllegalLayoutError,
    Layout,
    PlacedProfile,
    Placement,
    check,
    is_legal,
    legal_layouts,
    maximal_layouts,
    maximal_multisets,
    parse_layout,
    plain_profiles,
)

A100 = GPU_MODELS["A100-80GB"]


def starts(text: str, gpu: GpuModel = A100) -> list[tuple[str, int]]:
    return [(placed.profile.name, placed.placement.start) for placed in parse_layout(text, gpu)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4g.40gb+2g.20gb+1g.10gb", [("4g.40gb", 0), ("2g.20gb", 4), ("1g.10gb", 6)]),
        ("1g.10gb+2g.20gb+4g.40gb", [("4g.40gb", 0), ("2g.20gb", 4), ("1g.10gb", 6)]),
        ("3g.40gb+3g.40gb", [("3g.40gb", 0), ("3g.40gb", 4)]),
        ("4g.40gb + 3g.40gb", [("4g.40gb", 0), ("3g.40gb", 4)]),
        ("1g.10gb+me+2g.20gb", [("2g.20gb", 0), ("1g.10gb+me", 2)]),
        ("1g.20gb+1g.20gb+1g.20gb+1g.20gb", [("1g.20gb", 0), ("1g.20gb", 2), ("1g.20gb", 4), ("1g.20gb", 6)]),
        ("7g.80gb", [("7g.80gb", 0)]),
    ],
)
def test_layouts_are_placed(text: str, expected: list[tuple[str, int]]) -> None:
    assert starts(text) == expected


def test_a_layout_that_fits_in_one_order_only_is_found() -> None:
    # Seven 1g first would leave no room for a 3g: the larger ones are placed first.
    assert len(starts("1g.10gb+1g.10gb+2g.20gb+3g.40gb")) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4g.40gb+4g.40gb", "takes 8 compute slices; A100-80GB has 7"),
        ("4g.40gb+2g.20gb+2g.20gb", "takes 8 compute slices"),
        ("1g.20gb+1g.20gb+1g.20gb+1g.20gb+1g.20gb", "at most 4 of 1g.20gb"),
        ("1g.10gb+me+1g.10gb+me", "at most 1 of 1g.10gb\\+me"),
        ("3g.40gb+3g.40gb+1g.10gb", "no placement without overlap"),
        ("2g.10gb", "no MIG profile '2g.10gb'; did you mean 2g.20gb"),
        ("", "no MIG profile ''"),
    ],
)
def test_illegal_layouts_are_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(IllegalLayoutError, match=message):
        parse_layout(text, A100)


@pytest.mark.parametrize("name", sorted(GPU_MODELS))
def test_what_is_placed_is_legal_on_every_gpu(name: str) -> None:
    """All pairs and triples of MIG profiles: either refused, or on the grid and without overlap."""
    gpu = GPU_MODELS[name]
    placed = 0
    for size in (1, 2, 3):
        for profiles in itertools.combinations_with_replacement(gpu.profiles, size):
            try:
                layout = parse_layout("+".join(profile.name for profile in profiles), gpu)
            except IllegalLayoutError:
                continue
            placed += 1
            assert sorted(each.profile.name for each in layout) == sorted(profile.name for profile in profiles)
            taken: set[int] = set()
            for each in layout:
                assert each.placement in each.profile.placements
                cells = set(range(each.placement.start, each.placement.start + each.placement.size))
                assert not cells & taken
                assert max(cells) < gpu.memory_slices
                taken |= cells
            assert sum(each.profile.gpcs for each in layout) <= gpu.compute_slices
    assert placed >= len(gpu.profiles)


# ---- every legal layout ----


@pytest.mark.parametrize(
    ("name", "legal", "maximal", "multisets"),
    [
        ("A30-24GB", 75, 17, 8),
        *((name, 2318, 239, 44) for name in GPU_MODELS if name not in ("A30-24GB", "RTX-PRO-6000-96GB")),
        ("RTX-PRO-6000-96GB", 716, 302, 64),
    ],
)
def test_legal_and_maximal_layouts_are_counted(name: str, legal: int, maximal: int, multisets: int) -> None:
    gpu = GPU_MODELS[name]
    layouts = list(legal_layouts(gpu))
    assert len(layouts) == len(set(layouts)) == legal
    assert len(list(maximal_layouts(gpu))) == maximal
    assert len(maximal_multisets(gpu)) == multisets
    for layout in layouts:
        check(layout, gpu)
        assert list(layout) == sorted(layout, key=lambda placed: placed.placement.start)


@pytest.mark.parametrize("name", ["A30-24GB", "RTX-PRO-6000-96GB"])
def test_the_enumeration_misses_none(name: str) -> None:
    """Against all subsets of all places of all MIG profiles, where these are few enough to be tried."""
    gpu = GPU_MODELS[name]
    profiles = plain_profiles(gpu) if name != "A30-24GB" else gpu.profiles
    places = [PlacedProfile(profile, at) for profile in profiles for at in profile.placements]
    subsets = itertools.chain.from_iterable(itertools.combinations(places, size) for size in range(1, len(places) + 1))
    legal = {frozenset(subset) for subset in subsets if is_legal(subset, gpu)}
    assert legal == {frozenset(layout) for layout in legal_layouts(gpu, profiles)}


@pytest.mark.parametrize("name", sorted(GPU_MODELS))
def test_nothing_can_be_added_to_a_maximal_layout_and_something_to_every_other(name: str) -> None:
    gpu = GPU_MODELS[name]
    places = [PlacedProfile(profile, at) for profile in gpu.profiles for at in profile.placements]
    maximal = set(maximal_layouts(gpu))
    for layout in itertools.islice(legal_layouts(gpu), 0, None, 7):
        assert (layout in maximal) != any(is_legal((*layout, each), gpu) for each in places)


def test_an_a100_has_twelve_maximal_cuts_without_double_memory() -> None:
    sizes = [p for p in plain_profiles(A100) if p.name != "1g.20gb"]
    assert ["+".join(str(p.gpcs) for p in cut) for cut in maximal_multisets(A100, sizes)] == [
        "7",
        "4+3",
        "4+2+1",
        "4+1+1+1",
        "3+3",
        "3+2+2",
        "3+2+1+1",
        "3+1+1+1+1",
        "2+2+2+1",
        "2+2+1+1+1",
        "2+1+1+1+1+1",
        "1+1+1+1+1+1+1",
    ]


# ---- legality, rule by rule ----


def placed(gpu: str, *slices: tuple[str, int]) -> tuple[PlacedProfile, ...]:
    model = GPU_MODELS[gpu]
    return tuple(
        PlacedProfile(model.profile(name), Placement(start, model.profile(name).size)) for name, start in slices
    )


@pytest.mark.parametrize(
    ("gpu", "slices", "message"),
    [
        ("A100-80GB", [("3g.40gb", 0), ("2g.20gb", 2)], "3g.40gb@0:4 and 2g.20gb@2:2 overlap"),
        ("A100-80GB", [("3g.40gb", 2)], "3g.40gb@2:4 is no legal place on A100-80GB; start:size may be 0:4, 4:4"),
        ("A100-80GB", [("1g.10gb", 7)], "no legal place"),
        ("A100-80GB", [("4g.40gb", 4)], "may be 0:4"),
        ("A100-80GB", [("4g.40gb", 0), ("2g.20gb", 4), ("1g.20gb", 6), ("1g.10gb", 6)], "takes 8 compute slices"),
        ("A30-24GB", [("1g.6gb+me", 0), ("2g.12gb+me", 2)], "carry its media engines"),
        ("RTX-PRO-6000-96GB", [("1g.24gb", 1)], "may be 0:3, 3:3, 6:3, 9:3"),
        ("RTX-PRO-6000-96GB", [("1g.24gb+me.all", 0), ("1g.24gb", 3)], "only for slices without any"),
        ("RTX-PRO-6000-96GB", [("1g.24gb+me.all", 0), ("2g.48gb+gfx", 6)], "only for slices without any"),
        ("RTX-PRO-6000-96GB", [("1g.24gb+me.all", 0), ("1g.24gb+me", 3)], "carry its media engines"),
    ],
)
def test_each_rule_is_named_where_it_is_broken(gpu: str, slices: list[tuple[str, int]], message: str) -> None:
    with pytest.raises(IllegalLayoutError, match=message):
        check(placed(gpu, *slices), GPU_MODELS[gpu])


@pytest.mark.parametrize(
    ("gpu", "slices"),
    [
        # Double memory takes all 8 memory slices with 4 of 7 compute slices; 3g + 3g strands one.
        ("A100-80GB", [("1g.20gb", 0), ("1g.20gb", 2), ("1g.20gb", 4), ("1g.20gb", 6)]),
        ("A100-80GB", [("3g.40gb", 0), ("3g.40gb", 4)]),
        ("A100-80GB", [("4g.40gb", 0), ("3g.40gb", 4)]),
        ("A100-80GB", [("1g.10gb+me", 3), ("1g.10gb", 2)]),
        ("RTX-PRO-6000-96GB", [("1g.24gb+me.all", 0), ("1g.24gb-me", 3), ("2g.48gb-me", 6)]),
        ("RTX-PRO-6000-96GB", [("1g.24gb+me", 0), ("1g.24gb", 3), ("2g.48gb+gfx", 6)]),
        ("A30-24GB", []),
    ],
)
def test_what_breaks_no_rule_is_legal(gpu: str, slices: list[tuple[str, int]]) -> None:
    check(placed(gpu, *slices), GPU_MODELS[gpu])


def test_a_gpu_that_takes_two_slices_only_takes_no_third() -> None:
    gpu = replace(GPU_MODELS["RTX-PRO-6000-96GB"], name="small", max_mig_devices=2)
    with pytest.raises(IllegalLayoutError, match="small takes at most 2 slices, the layout has 3"):
        parse_layout("1g.24gb+1g.24gb+1g.24gb", gpu)


def test_a_slice_of_another_gpu_is_refused() -> None:
    """The same name can be another MIG profile elsewhere: 1g.10gb of an A100-40GB has double memory."""
    foreign = PlacedProfile(GPU_MODELS["A100-40GB"].profile("1g.10gb"), Placement(0, 2))
    with pytest.raises(IllegalLayoutError, match=r"1g\.10gb is no MIG profile of A100-80GB as this GPU reports them"):
        check([foreign], A100)


@cache
def all_maximal(name: str) -> list[Layout]:
    return list(maximal_layouts(GPU_MODELS[name]))


@given(st.data())
def test_a_layout_stays_legal_when_a_slice_is_taken_away(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(GPU_MODELS)))
    gpu, layout = GPU_MODELS[name], data.draw(st.sampled_from(all_maximal(name)))
    left = data.draw(st.lists(st.sampled_from(layout), unique=True))
    check(left, gpu)
    order = data.draw(st.permutations(layout))
    check(order, gpu)
