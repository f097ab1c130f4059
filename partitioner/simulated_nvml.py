"""A stand-in for the pynvml module: GPUs of the catalogue, cut into a fixed layout.

It has the functions that `nvml.py` calls, with pynvml's own structs, exceptions and habits, and answers as
the driver does: utilisation, power and energy are NOT_SUPPORTED (nothing is measured, so nothing is made up).
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pynvml

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import GpuModel, IllegalLayoutError, Layout, PlacedProfile, parse_layout

MIB = 1024 * 1024
# Names in the style of NVML's for the boards of the catalogue.
_NAMESPACE = uuid.UUID("6ba7b812-9dad-11d1-80b4-00c04fd430c8")


@dataclass(frozen=True, slots=True)
class SimulatedGpu:
    """One simulated GPU with MIG on."""

    index: int
    model: GpuModel
    layout: Layout

    @property
    def uuid(self) -> str:
        return f"GPU-{uuid.uuid5(_NAMESPACE, f'{self.model.name}/{self.index}')}"

    @property
    def name(self) -> str:
        return f"NVIDIA {self.model.name} (simulated)"


@dataclass(frozen=True, slots=True)
class SimulatedMigDevice:
    """One MIG device: GPU instance and its full-size compute instance."""

    gpu: SimulatedGpu
    placed: PlacedProfile
    gi_id: int

    @property
    def uuid(self) -> str:
        # Name-based, as the driver's: the same (GPU, GI, CI) gets the same UUID again.
        return f"MIG-{uuid.uuid5(_NAMESPACE, f'{self.gpu.uuid}/{self.gi_id}/0')}"


def parse_gpus(spec: str, layout: str | None) -> list[SimulatedGpu]:
    """`A100-80GB` or `A100-80GBx4`, every GPU cut into `layout` (by default 4g+2g+1g, or what comes near).

    Raises IllegalLayoutError for unknown GPUs and layouts, naming what there is.
    """
    name, _, count = spec.rpartition("x")
    if not name or not count.isdigit():
        name, count = spec, "1"
    if name not in GPU_MODELS:
        known = ", ".join(GPU_MODELS)
        raise IllegalLayoutError(f"no GPU called {name!r} in the catalogue; there are {known}, each with xN for N")
    model = GPU_MODELS[name]
    cut = parse_layout(layout or default_layout(model), model)
    return [SimulatedGpu(index, model, cut) for index in range(int(count))]


def default_layout(model: GpuModel) -> str:
    """A mixed layout to begin with: 4g+2g+1g, on GPUs of four compute slices 2g+1g+1g."""
    by_gpcs = {profile.gpcs: profile.name for profile in reversed(model.profiles) if profile.name[-1] == "b"}
    sizes = (4, 2, 1) if model.compute_slices == 7 else (2, 1, 1)
    return "+".join(by_gpcs[size] for size in sizes)


class SimulatedNvml:
    """Has pynvml's functions, by their own names."""

    NVMLError = pynvml.NVMLError
    NVMLError_NotFound = pynvml.NVMLError_NotFound
    NVMLError_NotSupported = pynvml.NVMLError_NotSupported
    NVMLError_NoPermission = pynvml.NVMLError_NoPermission
    NVMLError_FunctionNotFound = pynvml.NVMLError_FunctionNotFound
    NVML_DEVICE_MIG_ENABLE = pynvml.NVML_DEVICE_MIG_ENABLE

    def __init__(self, gpus: Sequence[SimulatedGpu]) -> None:
        self._gpus = list(gpus)
        self._sessions = 0

    def nvmlInit(self) -> None:
        self._sessions += 1

    def nvmlShutdown(self) -> None:
        self._check()
        self._sessions -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        self._check()
        return "simulated"

    def nvmlDeviceGetCount(self) -> int:
        self._check()
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> SimulatedGpu:
        self._check()
        if not 0 <= index < len(self._gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        self._check()
        devices: list[SimulatedGpu | SimulatedMigDevice] = [
            *self._gpus,
            *(mig for gpu in self._gpus for mig in _mig_devices(gpu)),
        ]
        for device in devices:
            if device.uuid == uuid:
                return device
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        self._check()
        return str(handle.uuid)

    def nvmlDeviceGetName(self, handle: Any) -> str:
        self._check()
        if isinstance(handle, SimulatedMigDevice):
            return f"{handle.gpu.name} MIG {handle.placed.profile.name}"
        return str(handle.name)

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        self._check()
        mig = isinstance(handle, SimulatedMigDevice)
        total = (handle.placed.profile.memory_mib if mig else handle.model.memory_mib) * MIB
        return pynvml.c_nvmlMemory_t(total=total, free=total, used=0)

    def nvmlDeviceGetMigMode(self, handle: SimulatedGpu) -> list[int]:
        self._check()
        return [pynvml.NVML_DEVICE_MIG_ENABLE, pynvml.NVML_DEVICE_MIG_ENABLE]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: SimulatedGpu) -> int:
        self._check()
        return handle.model.max_mig_devices

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: SimulatedGpu, index: int) -> Any:
        self._check()
        devices = _mig_devices(handle)
        if index >= len(devices):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return devices[index]

    def nvmlDeviceGetGpuInstanceId(self, handle: SimulatedMigDevice) -> int:
        self._check()
        return handle.gi_id

    def nvmlDeviceGetComputeInstanceId(self, handle: SimulatedMigDevice) -> int:
        self._check()
        return 0

    def nvmlDeviceGetAttributes_v2(self, handle: SimulatedMigDevice) -> Any:
        self._check()
        profile = handle.placed.profile
        return pynvml.c_nvmlDeviceAttributes(
            multiprocessorCount=profile.sm_count,
            gpuInstanceSliceCount=profile.gpcs,
            computeInstanceSliceCount=profile.gpcs,
            memorySizeMB=profile.memory_mib,
        )

    def nvmlDeviceGetGpuInstanceById(self, handle: SimulatedGpu, gi_id: int) -> Any:
        self._check()
        for device in _mig_devices(handle):
            if device.gi_id == gi_id:
                return device
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlGpuInstanceGetInfo(self, instance: SimulatedMigDevice) -> Any:
        self._check()
        place = instance.placed.placement
        return pynvml.c_nvmlGpuInstanceInfo_t(
            id=instance.gi_id,
            profileId=instance.placed.profile.profile_id,
            placement=pynvml.c_nvmlGpuInstancePlacement_t(start=place.start, size=place.size),
        )

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        self._refuse()

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> Any:
        self._refuse()

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any) -> Any:
        self._refuse()

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> Any:
        self._refuse()

    def _check(self) -> None:
        if self._sessions <= 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)

    def _refuse(self) -> None:
        self._check()
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def _mig_devices(gpu: SimulatedGpu) -> list[SimulatedMigDevice]:
    return [SimulatedMigDevice(gpu, placed, _gi_id(gpu.model, placed)) for placed in gpu.layout]


def _gi_id(gpu: GpuModel, placed: PlacedProfile) -> int:
    """GPU instance ids are slot-like: the whole grid is 0, halves 1 and 2, and so on down to single slots.

    Seen in captures of 8-wide boards: 7g is 0, 3g and 4g are 1 or 2, 2g is 3 + start / 2, 1g is 7 + start.
    """
    slots = gpu.memory_slices // placed.placement.size
    return slots - 1 + placed.placement.start // placed.placement.size
