"""What the NVML door tells, as values. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from partitioner.geometry import GpuModel, MigProfile, PlacedProfile, Placement, Slice


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU and what can be served on: its MIG instances, or itself where MIG is off.

    `model` is what it can be cut into, as NVML reports it; None where it has no MIG, or where neither the driver
    nor the catalogue tells. `pending_mode` is the MIG mode after the next reset. `pci_device_id` and
    `pci_subsystem_id` are in the form of mig-parted's filters: `0x20B210DE`; empty where NVML does not say.
    """

    index: int
    uuid: str
    name: str
    memory_mib: int
    mig_enabled: bool
    simulated: bool
    slices: tuple[Slice, ...]
    model: GpuModel | None = None
    pending_mode: bool = False
    pci_device_id: str = ""
    pci_subsystem_id: str = ""

    @property
    def needs_reset(self) -> bool:
        """Whether a change of the MIG mode waits for a reset of the GPU."""
        return self.pending_mode != self.mig_enabled


@dataclass(frozen=True, slots=True)
class GpuReadings:
    """What NVML measures of a whole GPU now. None means that NVML does not say."""

    memory_total_bytes: int | None
    memory_used_bytes: int | None
    utilization: float | None
    power_w: float | None
    power_limit_w: float | None
    energy_j: float | None


@dataclass(frozen=True, slots=True)
class SliceMemory:
    """Memory of one MIG device, shared by all compute instances of its GPU instance. None: not measured."""

    total_bytes: int
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class Instance:
    """One GPU instance. `device_uuid` is that of its first compute instance; None where it has none.

    Ids and UUIDs are used again by later instances at the same place.
    """

    gi_id: int
    profile: MigProfile
    placement: Placement
    ci_ids: tuple[int, ...]
    device_uuid: str | None

    @property
    def placed(self) -> PlacedProfile:
        return PlacedProfile(self.profile, self.placement)


@dataclass(frozen=True, slots=True)
class ModeChange:
    """What became of a wish to switch MIG. `done` says whether it holds now; else `todo` says what it takes."""

    wanted: bool
    current: bool
    pending: bool
    status: str
    todo: str

    @property
    def done(self) -> bool:
        return self.current == self.wanted == self.pending


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that uses a GPU; `gi_id` is None where it uses the whole of it."""

    pid: int
    command: str
    gi_id: int | None

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command})"


class EventKind(StrEnum):
    XID = "xid"
    MIG_CONFIG = "mig_config"


@dataclass(frozen=True, slots=True)
class GpuEvent:
    """An XID error (`code`), or a change of the MIG configuration. Without `gi_id` it is about the whole GPU."""

    kind: EventKind
    gpu_uuid: str
    code: int
    gi_id: int | None
    ci_id: int | None
