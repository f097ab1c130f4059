"""The ways to cut a GPU that a planner chooses between: one MIG profile a slice size, all maximal multisets. Pure."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from partitioner.geometry import GpuModel, Layout, MigProfile, maximal_multisets, place, plain_profiles


def slice_profiles(gpu: GpuModel) -> list[MigProfile]:
    """One MIG profile for each number of GPCs, by size: the plain one with the least memory."""
    chosen: dict[int, MigProfile] = {}
    for profile in sorted(plain_profiles(gpu), key=lambda p: (p.gpcs, p.memory_mib, p.enum)):
        chosen.setdefault(profile.gpcs, profile)
    return list(chosen.values())


@lru_cache(maxsize=32)
def cuts(gpu: GpuModel) -> tuple[Layout, ...]:
    """Layouts to which no slice can be added, one for each multiset of MIG profiles; 12 on an A100."""
    return tuple(place(multiset, gpu) for multiset in maximal_multisets(gpu, slice_profiles(gpu)))


def layout_counts(layout: Layout) -> tuple[tuple[int, int], ...]:
    """(GPCs, how many slices of them), by GPCs, with each size once."""
    return tuple(sorted(Counter(placed.profile.gpcs for placed in layout).items()))
