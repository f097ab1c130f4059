"""MIG geometry: profiles, placements on the memory-slice grid, layouts and their legality. Pure.

Source: NVIDIA MIG user guide, nvml.h and `nvidia-smi mig -lgipp` captures; see `partitioner/data/README.md`.

The compute slices in a MIG profile's name say nothing about its place on the grid: 3g and 4g both take 4 of 8
memory slices, 7g all 8, 1g with double memory 2; a 1g of an RTX PRO 6000 takes 3 of 12.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


class IllegalLayoutError(ValueError):
    """A layout that the GPU cannot take. The message says which rule it breaks and what would be legal."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`size` memory slices from `start` on, on the GPU's grid."""

    start: int
    size: int

    def overlaps(self, other: Placement) -> bool:
        return self.start < other.start + other.size and other.start < self.start + self.size


# NVML_GPU_INSTANCE_PROFILE_*: what the name's ending says, kept by number since drivers change names.
ALL_MEDIA, MEDIA, NO_MEDIA, GRAPHICS = "+me.all", "+me", "-me", "+gfx"
_ATTRIBUTES = {
    **dict.fromkeys((0x7, 0x8), MEDIA),
    **dict.fromkeys((0xA, 0xB, 0xC, 0x11), GRAPHICS),
    **dict.fromkeys((0xD, 0xE), NO_MEDIA),
    **dict.fromkeys((0xF, 0x10), ALL_MEDIA),
}


@dataclass(frozen=True, slots=True)
class MigProfile:
    """One MIG profile of one GPU model.

    NVML knows it by two numbers: `enum` goes only into GetGpuInstanceProfileInfo, `profile_id` into
    everything else. Counts of engines are 0 where there are none, or where none were ever captured.
    """

    name: str
    enum: int
    profile_id: int
    gpcs: int
    memory_mib: int
    sm_count: int
    max_instances: int
    placements: tuple[Placement, ...]
    copy_engines: int = 0
    nvdec: int = 0
    nvenc: int = 0
    jpeg: int = 0
    ofa: int = 0

    @property
    def attribute(self) -> str:
        """`+me`, `+me.all`, `-me`, `+gfx`, or nothing. Two MIG profiles can differ in this alone."""
        return _ATTRIBUTES.get(self.enum, "")

    @property
    def size(self) -> int:
        """Memory slices it takes, wherever it stands."""
        return self.placements[0].size


@dataclass(frozen=True, slots=True)
class GpuModel:
    """What a GPU model can be cut into. `memory_slices` is the width of its grid.

    `pci_device_ids` are as mig-parted's filters have them: `0x20B210DE`.
    """

    name: str
    memory_mib: int
    memory_slices: int
    compute_slices: int
    max_mig_devices: int
    profiles: tuple[MigProfile, ...]
    architecture: str = ""
    pci_device_ids: tuple[str, ...] = ()

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


def conventional_name(enum: int, gpcs: int, memory_mib: int, gpu_memory_mib: int) -> str:
    """The name of a MIG profile, for drivers that tell none: its share of the GPU's memory in eighths, in GB.

    The rule is go-nvlib's. Names that a driver tells may differ from it, and change between drivers.
    """
    eighths = math.ceil(memory_mib / gpu_memory_mib * 8)
    gigabytes = math.floor(eighths / 8 * math.ceil(gpu_memory_mib / 1024) + 0.5)
    return f"{gpcs}g.{gigabytes}gb{_ATTRIBUTES.get(enum, '')}"


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
    _check_set(profiles, gpu)
    largest_first = sorted(profiles, key=lambda p: (-p.size, -p.gpcs, p.enum))
    for layout in _placements(largest_first, ()):
        return tuple(sorted(layout, key=lambda placed: placed.placement.start))
    names = "+".join(profile.name for profile in profiles)
    raise IllegalLayoutError(
        f"{names} does not fit on the {gpu.memory_slices} memory slices of {gpu.name}: no placement "
        f"without overlap exists"
    )


def check(layout: Sequence[PlacedProfile], gpu: GpuModel) -> None:
    """Raises IllegalLayoutError unless `gpu` can hold every slice of `layout` at its place, all at once."""
    _check_set([placed.profile for placed in layout], gpu)
    for placed in layout:
        _check_place(placed, gpu)
    in_order = sorted(layout, key=lambda placed: placed.placement.start)
    for left, right in pairwise(in_order):
        if left.placement.overlaps(right.placement):
            raise IllegalLayoutError(
                f"{_at(left)} and {_at(right)} overlap on the grid of {gpu.name}; move or leave out one of them"
            )


def is_legal(layout: Sequence[PlacedProfile], gpu: GpuModel) -> bool:
    """Whether `check` lets `layout` pass."""
    try:
        check(layout, gpu)
    except IllegalLayoutError:
        return False
    return True


def legal_layouts(gpu: GpuModel, profiles: Sequence[MigProfile] | None = None) -> Iterator[Layout]:
    """Every legal layout of `gpu` but the empty one, each once, in lexical order of its starts.

    `profiles` restricts them to some of the MIG profiles, say to those without media attributes.
    """
    choices = sorted(
        (PlacedProfile(profile, placement) for profile in profiles or gpu.profiles for placement in profile.placements),
        key=lambda placed: (placed.placement.start, placed.profile.enum),
    )
    yield from _extensions((), choices, gpu)


def maximal_layouts(gpu: GpuModel, profiles: Sequence[MigProfile] | None = None) -> Iterator[Layout]:
    """Those of `legal_layouts` that nothing (of `profiles`) can be added to."""
    choices = [PlacedProfile(profile, at) for profile in profiles or gpu.profiles for at in profile.placements]
    for layout in legal_layouts(gpu, profiles):
        if not any(_fits_beside(each, layout, gpu) for each in choices):
            yield layout


def maximal_multisets(gpu: GpuModel, profiles: Sequence[MigProfile] | None = None) -> list[tuple[MigProfile, ...]]:
    """What `gpu` can be cut into, whatever the places: each multiset once, its largest MIG profiles first.

    Only those are listed that are part of no other legal one. Of a GPU with 1g, 2g, 3g, 4g and 7g there are 12.
    """
    found = {
        tuple(sorted((placed.profile for placed in layout), key=_largest_first)): Counter(
            placed.profile for placed in layout
        )
        for layout in maximal_layouts(gpu, profiles)
    }
    maximal = [names for names, counts in found.items() if not any(counts < other for other in found.values())]
    return sorted(maximal, key=lambda multiset: [_largest_first(profile) for profile in multiset])


def _largest_first(profile: MigProfile) -> tuple[int, int, int]:
    return -profile.gpcs, -profile.size, profile.enum


def plain_profiles(gpu: GpuModel) -> tuple[MigProfile, ...]:
    """The MIG profiles of `gpu` that differ from all others in size alone: without +me, -me, +gfx."""
    return tuple(profile for profile in gpu.profiles if not profile.attribute)


def _extensions(layout: Layout, choices: Sequence[PlacedProfile], gpu: GpuModel) -> Iterator[Layout]:
    """`layout` with one or more of `choices`, which all start after it, added."""
    for index, each in enumerate(choices):
        if _fits_beside(each, layout, gpu):
            longer = (*layout, each)
            yield longer
            end = each.placement.start + each.placement.size
            yield from _extensions(longer, [c for c in choices[index + 1 :] if c.placement.start >= end], gpu)


def _fits_beside(new: PlacedProfile, layout: Layout, gpu: GpuModel) -> bool:
    """Whether a legal `layout` stays legal with `new`."""
    if any(new.placement.overlaps(placed.placement) for placed in layout):
        return False
    return _broken_rule((*(placed.profile for placed in layout), new.profile), gpu) is None


def _check_set(profiles: Sequence[MigProfile], gpu: GpuModel) -> None:
    for profile in profiles:
        if profile not in gpu.profiles:
            raise IllegalLayoutError(f"{profile.name} is no MIG profile of {gpu.name} as this GPU reports them")
    broken = _broken_rule(tuple(profiles), gpu)
    if broken is not None:
        raise IllegalLayoutError(broken)


def _broken_rule(profiles: tuple[MigProfile, ...], gpu: GpuModel) -> str | None:
    """The first rule that these break together, wherever they stand."""
    gpcs = sum(profile.gpcs for profile in profiles)
    if gpcs > gpu.compute_slices:
        return f"the layout takes {gpcs} compute slices; {gpu.name} has {gpu.compute_slices}"
    for profile, count in Counter(profiles).items():
        if count > profile.max_instances:
            return f"{gpu.name} takes at most {profile.max_instances} of {profile.name}, the layout has {count}"
    if len(profiles) > gpu.max_mig_devices:
        return f"{gpu.name} takes at most {gpu.max_mig_devices} slices, the layout has {len(profiles)}"
    return _broken_media_rule(profiles)


def _broken_media_rule(profiles: tuple[MigProfile, ...]) -> str | None:
    attributes = [profile.attribute for profile in profiles]
    if sum(attribute in (MEDIA, ALL_MEDIA) for attribute in attributes) > 1:
        return "at most one slice of a GPU can carry its media engines (+me)"
    if ALL_MEDIA in attributes and attributes.count(NO_MEDIA) + 1 < len(attributes):
        return "a slice that has all media engines (+me.all) leaves room only for slices without any (-me)"
    return None


def _check_place(placed: PlacedProfile, gpu: GpuModel) -> None:
    if placed.placement not in placed.profile.placements:
        legal = ", ".join(f"{at.start}:{at.size}" for at in placed.profile.placements)
        raise IllegalLayoutError(f"{_at(placed)} is no legal place on {gpu.name}; start:size may be {legal}")


def _at(placed: PlacedProfile) -> str:
    return f"{placed.profile.name}@{placed.placement.start}:{placed.placement.size}"


def _placements(profiles: Sequence[MigProfile], placed: Layout) -> Iterator[Layout]:
    if not profiles:
        yield placed
        return
    first, *rest = profiles
    for placement in first.placements:
        if not any(placement.overlaps(other.placement) for other in placed):
            yield from _placements(rest, (*placed, PlacedProfile(first, placement)))
