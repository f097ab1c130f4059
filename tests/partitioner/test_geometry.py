from __future__ import annotations

import itertools

import pytest

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import GpuModel, IllegalLayoutError, parse_layout

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
