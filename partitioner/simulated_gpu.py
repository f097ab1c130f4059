"""What a GPU remembers and forbids: MIG mode, GPU instances, compute instances. Pure; knows nothing of pynvml.

The rules are the driver's, and are written apart from `geometry.check`: here with bit masks over the grid,
one instance at a time. A test holds the two against each other.

Not settled by any capture, and so a guess: what switching MIG off does while there are instances (here
IN_USE), where compute instances may start within a GPU instance, and the driver's own choice of a place
on grids that are not 8 wide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from partitioner.geometry import ALL_MEDIA, MEDIA, NO_MEDIA, GpuModel, MigProfile, Placement

T = TypeVar("T", "GpuInstance", "ComputeInstance")

# NVML_COMPUTE_INSTANCE_PROFILE_*, which are the ids too: compute slices of each.
_CI_GPCS = {0: 1, 1: 2, 2: 3, 3: 4, 4: 7, 7: 1}
CI_PROFILE_COUNT = 9
# A second one-slice kind with more SMs, on Hopper; of the same name as the first.
_CI_REV1 = 7
_CI_PROFILES = {1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 1, 3), 7: (0, 1, 2, 3, 4)}
# Where the driver tries to put an instance of that many memory slices of 8; from the MIG guide's transcripts.
_OWN_ORDER_OF_8 = {1: (6, 4, 5, 0, 1, 2, 3), 2: (4, 0, 2, 6), 4: (4, 0)}


class RefusedError(Exception):
    """The driver says no; `code` is NVML's name for why, without NVML_ERROR_."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True)
class ComputeProfile:
    """A way to take compute slices of a GPU instance."""

    id: int
    gpcs: int
    sm_count: int
    max_instances: int
    starts: tuple[int, ...]


@dataclass(slots=True)
class ComputeInstance:
    """`serial` tells apart instances that had the same id one after the other."""

    id: int
    profile: ComputeProfile
    start: int
    mig_index: int
    serial: int


@dataclass(slots=True)
class GpuInstance:
    id: int
    profile: MigProfile
    placement: Placement
    serial: int
    parts: list[ComputeInstance] = field(default_factory=list)


@dataclass(slots=True)
class GpuState:
    """One GPU. Every method that changes it raises RefusedError and changes nothing where the driver would refuse."""

    model: GpuModel
    mode: bool = True
    pending: bool = True
    lost: bool = False
    epoch: int = 0  # of device handles: a reset makes them stale
    serials: int = 0
    instances: list[GpuInstance] = field(default_factory=list)

    # ---- MIG mode ----

    def set_mode(self, on: bool, *, busy: bool, resets_itself: bool) -> str:
        """The activation status. The call itself succeeds, even where nothing has happened."""
        self.pending = on
        if on == self.mode:
            return "SUCCESS"
        if busy or self.instances:
            return "IN_USE"
        if self.model.architecture == "ampere" and not resets_itself:
            return "RESET_REQUIRED"
        self.mode = on
        self.epoch += 1
        return "SUCCESS"

    def reset(self) -> None:
        """What `nvidia-smi --gpu-reset` does."""
        self.mode = self.pending
        self.instances = []
        self.epoch += 1

    def reboot(self) -> None:
        """Ampere keeps its mode over a reboot (it is in the InfoROM); later GPUs come back with MIG off."""
        self.pending = self.pending and self.model.architecture == "ampere"
        self.lost = False
        self.reset()

    # ---- GPU instances ----

    def profile_by_enum(self, enum: int) -> MigProfile | None:
        return next((profile for profile in self.model.profiles if profile.enum == enum), None)

    def profile_by_id(self, profile_id: int) -> MigProfile:
        for profile in self.model.profiles:
            if profile.profile_id == profile_id:
                return profile
        raise RefusedError("INVALID_ARGUMENT")

    def create(self, profile: MigProfile, placement: Placement | None) -> GpuInstance:
        """A new GPU instance at `placement`, or where the driver likes; an occupied place is the same as no room."""
        self._need_mig()
        if placement is not None and placement not in profile.placements:
            raise RefusedError("INVALID_ARGUMENT")
        places = [placement] if placement is not None else self._own_order(profile)
        for place in places:
            if self._has_room(profile, place):
                instance = GpuInstance(self._slot_id(place), profile, place, self._next_serial())
                self.instances.append(instance)
                return instance
        raise RefusedError("INSUFFICIENT_RESOURCES")

    def destroy(self, instance: GpuInstance) -> None:
        if instance.parts:
            raise RefusedError("IN_USE")
        self.instances.remove(instance)

    def by_id(self, gi_id: int) -> GpuInstance:
        self._need_mig()
        return _with_id(self.instances, gi_id)

    def remaining(self, profile: MigProfile) -> int:
        """How many more of `profile` there is room for."""
        self._need_mig()
        trial = GpuState(self.model, instances=list(self.instances))
        count = 0
        for place in sorted(profile.placements, key=lambda at: at.start):
            if trial._has_room(profile, place):
                trial.create(profile, place)
                count += 1
        return count

    def _has_room(self, profile: MigProfile, place: Placement) -> bool:
        occupied = 0
        for each in self.instances:
            occupied |= _mask(each.placement)
        gpcs_free = self.model.compute_slices - sum(each.profile.gpcs for each in self.instances)
        alike = sum(each.profile == profile for each in self.instances)
        return (
            not occupied & _mask(place)
            and profile.gpcs <= gpcs_free
            and alike < profile.max_instances
            and len(self.instances) < self.model.max_mig_devices
            and self._media_free(profile)
        )

    def _media_free(self, profile: MigProfile) -> bool:
        """One set of media engines goes to one instance; `+me.all` takes what every other but `-me` has a share of."""
        if profile.attribute == NO_MEDIA:
            return True
        for each in self.instances:
            if each.profile.attribute == NO_MEDIA:
                continue
            kinds = {each.profile.attribute, profile.attribute}
            if ALL_MEDIA in kinds or kinds == {MEDIA}:
                return False
        return True

    def _own_order(self, profile: MigProfile) -> Sequence[Placement]:
        order = _OWN_ORDER_OF_8.get(profile.size, ()) if self.model.memory_slices == 8 else ()
        legal = {place.start: place for place in profile.placements}
        return [legal[start] for start in order if start in legal] or profile.placements

    def _slot_id(self, place: Placement) -> int:
        """GPU instance ids are slot-like: the whole grid is 0, halves 1 and 2, and so on down to single slots.

        Seen in captures of 8-wide boards: 7g is 0, 3g and 4g are 1 or 2, 2g is 3 + start / 2, 1g is 7 + start.
        """
        return self.model.memory_slices // place.size - 1 + place.start // place.size

    # ---- compute instances ----

    def compute_profile(self, instance: GpuInstance, enum: int) -> ComputeProfile:
        """Raises NOT_SUPPORTED for those that NVML knows and this instance has not, INVALID_ARGUMENT beyond."""
        if not 0 <= enum < CI_PROFILE_COUNT:
            raise RefusedError("INVALID_ARGUMENT")
        gpcs = instance.profile.gpcs
        rev1 = enum == _CI_REV1 and self.model.architecture == "hopper" and gpcs > 1
        if enum not in _CI_PROFILES[gpcs] and not rev1:
            raise RefusedError("NOT_SUPPORTED")
        size = _CI_GPCS[enum]
        step = 4 if size == 3 else size
        starts = tuple(range(0, gpcs - size + 1, step))
        sm_count = instance.profile.sm_count * size // gpcs
        return ComputeProfile(enum, size, sm_count, 1 if rev1 else len(starts), starts)

    def create_part(self, instance: GpuInstance, profile: ComputeProfile, start: int | None) -> ComputeInstance:
        """A new compute instance."""
        if start is not None and start not in profile.starts:
            raise RefusedError("INVALID_ARGUMENT")
        for at in profile.starts if start is None else (start,):
            if _part_fits(instance, profile, at):
                used = {part.mig_index for each in self.instances for part in each.parts}
                part = ComputeInstance(
                    id=_lowest_free(part.id for part in instance.parts),
                    profile=profile,
                    start=at,
                    mig_index=_lowest_free(used),
                    serial=self._next_serial(),
                )
                instance.parts.append(part)
                return part
        raise RefusedError("INSUFFICIENT_RESOURCES")

    def remaining_parts(self, instance: GpuInstance, profile: ComputeProfile) -> int:
        return sum(_part_fits(instance, profile, start) for start in profile.starts)

    def parts(self) -> Iterator[tuple[GpuInstance, ComputeInstance]]:
        """Every MIG device."""
        for instance in self.instances:
            for part in instance.parts:
                yield instance, part

    # ---- to and from plain data ----

    def to_data(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "pending": self.pending,
            "lost": self.lost,
            "epoch": self.epoch,
            "serials": self.serials,
            "instances": [
                {
                    "id": each.id,
                    "profile_id": each.profile.profile_id,
                    "start": each.placement.start,
                    "serial": each.serial,
                    "parts": [
                        [part.id, part.profile.id, part.start, part.mig_index, part.serial] for part in each.parts
                    ],
                }
                for each in self.instances
            ],
        }

    @classmethod
    def from_data(cls, model: GpuModel, data: dict[str, Any]) -> GpuState:
        state = cls(model, data["mode"], data["pending"], data["lost"], data["epoch"], data["serials"])
        for row in data["instances"]:
            profile = state.profile_by_id(row["profile_id"])
            place = next(each for each in profile.placements if each.start == row["start"])
            instance = GpuInstance(row["id"], profile, place, row["serial"])
            for part_id, enum, start, mig_index, serial in row["parts"]:
                kind = state.compute_profile(instance, enum)
                instance.parts.append(ComputeInstance(part_id, kind, start, mig_index, serial))
            state.instances.append(instance)
        return state

    def _need_mig(self) -> None:
        if not self.mode:
            raise RefusedError("NOT_SUPPORTED")

    def _next_serial(self) -> int:
        self.serials += 1
        return self.serials


def part_by_id(instance: GpuInstance, ci_id: int) -> ComputeInstance:
    """Raises RefusedError, NOT_FOUND."""
    return _with_id(instance.parts, ci_id)


def _with_id(found: Sequence[T], wanted: int) -> T:
    for each in found:
        if each.id == wanted:
            return each
    raise RefusedError("NOT_FOUND")


def _part_fits(instance: GpuInstance, profile: ComputeProfile, start: int) -> bool:
    taken = 0
    for part in instance.parts:
        taken |= _mask(Placement(part.start, part.profile.gpcs))
    alike = sum(part.profile.id == profile.id for part in instance.parts)
    return not taken & _mask(Placement(start, profile.gpcs)) and alike < profile.max_instances


def _mask(place: Placement) -> int:
    return ((1 << place.size) - 1) << place.start


def _lowest_free(used: Any) -> int:
    taken = set(used)
    return next(number for number in range(len(taken) + 1) if number not in taken)
