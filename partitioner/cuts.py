"""The ways to cut a GPU that a planner chooses between: every maximal multiset of its plain MIG profiles. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from partitioner.geometry import GpuModel, IllegalLayoutError, Layout, MigProfile, place


def plain_profiles(gpu: GpuModel) -> list[MigProfile]:
    """One MIG profile a slice size, by size: no media engines or graphics asked for, and no extra memory."""
    plain: dict[int, MigProfile] = {}
    for profile in sorted(gpu.profiles, key=lambda p: (p.gpcs, p.memory_mib, p.enum)):
        if profile.name.endswith("gb"):
            plain.setdefault(profile.gpcs, profile)
    return list(plain.values())


@lru_cache(maxsize=32)
def cuts(gpu: GpuModel) -> tuple[Layout, ...]:
    """Layouts to which no slice can be added, one for each multiset of plain MIG profiles; 12 on an A100.

    The fewest slices first, so that the order never depends on chance.
    """
    legal = {layout_counts(layout): layout for layout in _legal(tuple(plain_profiles(gpu)), gpu, ())}
    maximal = [counts for counts in legal if not any(_inside(counts, other) for other in legal)]
    maximal.sort(key=lambda counts: (sum(count for _, count in counts), counts))
    return tuple(legal[counts] for counts in maximal)


def layout_counts(layout: Layout) -> tuple[tuple[int, int], ...]:
    """(GPCs, how many slices of them), by GPCs, with each size once."""
    return tuple(sorted(Counter(placed.profile.gpcs for placed in layout).items()))


def _legal(profiles: tuple[MigProfile, ...], gpu: GpuModel, chosen: tuple[MigProfile, ...]) -> Iterator[Layout]:
    for index, profile in enumerate(profiles):
        try:
            layout = place([*chosen, profile], gpu)
        except IllegalLayoutError:
            continue
        yield layout
        yield from _legal(profiles[index:], gpu, (*chosen, profile))


def _inside(counts: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...]) -> bool:
    larger = dict(other)
    return counts != other and all(count <= larger.get(gpcs, 0) for gpcs, count in counts)
