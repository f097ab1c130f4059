"""MIG geometry: profiles, placements on the memory-slice grid, layouts and their legality. Pure.

Source: NVIDIA MIG user guide and `nvidia-smi mig -lgipp` captures; see `partitioner/data/README.md`.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


class IllegalLayoutError(ValueError):
    """A layout that the GPU cannot take. The message says which rule it breaks and what would be legal."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`size` memory slices from `start` on, on the GPU's grid."""

    start: int
    size: int

    def overlaps(self, other: Placement) -> bool:
        return self.start < other.start + other.size and other.start < self.start + self.size


@dataclass(frozen=True, slots=True)
class MigProfile:
    """One MIG profile of one GPU model.

    NVML knows it by two numbers: `enum` goes only into GetGpuInstanceProfileInfo, `profile_id` into
    everything else.
    """

    name: str
    enum: int
    profile_id: int
    gpcs: int
    memory_mib: int
    sm_count: int
    max_instances: int
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class GpuModel:
    """What a GPU model can be cut into. `memory_slices` is the width of its grid."""

    name: str
    memory_mib: int
    memory_slices: int
    compute_slices: int
    max_mig_devices: int
    profiles: tuple[MigProfile, ...]

    def profile(self, name: str) -> MigProfile:
        """The MIG profile called `name`. Raises IllegalLayoutError, naming the nearest ones."""
        for profile in self.profiles:
            if profile.name == name:
                return profile
        names = [profile.name for profile in self.profiles]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names
        raise IllegalLayoutError(f"{self.name} has no MIG profile {name!r}; did you mean {', '.join(near)}?")


@dataclass(frozen=True, slots=True)
class PlacedProfile:
    """One slice of a layout: a MIG profile at a place."""

    profile: MigProfile
    placement: Placement


Layout = tuple[PlacedProfile, ...]


@dataclass(frozen=True, slots=True)
class Slice:
    """Where a worker runs: one MIG instance, or a whole GPU where MIG is off (`gi_id` is None).

    `device_uuid` is what CUDA_VISIBLE_DEVICES gets. `start` and `size` are its place on the grid of
    `grid` memory slices, for drawing; `gpcs` are its compute slices. `ci_id` tells apart compute
    instances that share one GPU instance.
    """

    gpu_index: int
    gpu_uuid: str
    gpu_name: str
    device_uuid: str
    mig_profile: str
    gpcs: int
    memory_mib: int
    gi_id: int | None
    ci_id: int | None
    start: int
    size: int
    grid: int
    simulated: bool

    @property
    def name(self) -> str:
        """Short and unique on this machine: `gpu0/2g.20gb@4`, or `gpu0` for a whole GPU."""
        if self.gi_id is None:
            return f"gpu{self.gpu_index}"
        part = f".{self.ci_id}" if self.ci_id else ""
        return f"gpu{self.gpu_index}/{self.mig_profile}@{self.start}{part}"


def parse_layout(text: str, gpu: GpuModel) -> Layout:
    """`4g.40gb+2g.20gb+1g.10gb` as a layout of `gpu`, every slice placed.

    A `+me` after a MIG profile belongs to it, so `1g.10gb+me+2g.20gb` reads as two slices.
    Raises IllegalLayoutError.
    """
    names: list[str] = []
    for part in text.replace(" ", "").split("+"):
        if part[:1].isdigit() or not names:
            names.append(part)
        else:
            names[-1] += f"+{part}"
    return place([gpu.profile(name) for name in names], gpu)


def place(profiles: Sequence[MigProfile], gpu: GpuModel) -> Layout:
    """The first legal placement of `profiles`, sorted by start. Raises IllegalLayoutError."""
    _check_counts(profiles, gpu)
    largest_first = sorted(profiles, key=lambda p: (-p.placements[0].size, -p.gpcs, p.enum))
    for layout in _placements(largest_first, ()):
        return tuple(sorted(layout, key=lambda placed: placed.placement.start))
    names = "+".join(profile.name for profile in profiles)
    raise IllegalLayoutError(
        f"{names} does not fit on the {gpu.memory_slices} memory slices of {gpu.name}: no placement "
        f"without overlap exists"
    )


def _check_counts(profiles: Sequence[MigProfile], gpu: GpuModel) -> None:
    gpcs = sum(profile.gpcs for profile in profiles)
    if gpcs > gpu.compute_slices:
        raise IllegalLayoutError(f"the layout takes {gpcs} compute slices; {gpu.name} has {gpu.compute_slices}")
    for name, count in Counter(profile.name for profile in profiles).items():
        limit = gpu.profile(name).max_instances
        if count > limit:
            raise IllegalLayoutError(f"{gpu.name} takes at most {limit} of {name}, the layout has {count}")
    if sum("+me" in profile.name for profile in profiles) > 1:
        raise IllegalLayoutError("at most one slice of a GPU can carry its media engines (+me)")


def _placements(profiles: Sequence[MigProfile], placed: Layout) -> Iterator[Layout]:
    if not profiles:
        yield placed
        return
    first, *rest = profiles
    for placement in first.placements:
        if not any(placement.overlaps(other.placement) for other in placed):
            yield from _placements(rest, (*placed, PlacedProfile(first, placement)))
