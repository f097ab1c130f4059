"""The only file that speaks NVML. It takes any object with pynvml's functions, real or simulated.

Facts it relies on: MIG devices are enumerated with holes (NOT_FOUND means go on, not stop); utilisation is
not supported where MIG is on, which means unknown, never zero; power and energy exist per GPU only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import Slice

MIB = 1024 * 1024
# A whole GPU counts as its largest MIG profile, so that it sorts after every slice.
WHOLE_GPU_GPCS = 7


class NvmlUnavailableError(RuntimeError):
    """NVML cannot be used. The message says why and what to do next."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU and what can be served on: its MIG instances, or itself where MIG is off."""

    index: int
    uuid: str
    name: str
    memory_mib: int
    mig_enabled: bool
    simulated: bool
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class GpuReadings:
    """What NVML measures of a whole GPU now. None means that NVML does not say."""

    memory_total_bytes: int | None
    memory_used_bytes: int | None
    utilization: float | None
    power_w: float | None
    power_limit_w: float | None
    energy_j: float | None


class NvmlDoor:
    """One NVML session. Blocking: call it from a thread, never from the event loop."""

    def __init__(self, nvml: Any, *, simulated: bool = False) -> None:
        """Opens the session. Raises NvmlUnavailableError."""
        self._nvml = nvml
        self._simulated = simulated
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise NvmlUnavailableError(
                f"no usable NVIDIA driver here ({error}); on a machine without a GPU use --gpu sim:A100-80GB, "
                f"in a container check that the NVIDIA runtime is on"
            ) from error

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def driver_version(self) -> str:
        return str(self._nvml.nvmlSystemGetDriverVersion())

    def gpus(self) -> list[Gpu]:
        """Every GPU, in NVML's order, with its slices as they are now."""
        return [self._gpu(index) for index in range(self._nvml.nvmlDeviceGetCount())]

    def readings(self, gpu_uuid: str) -> GpuReadings:
        """Measurements of one GPU. Raises NVMLError when the GPU is lost."""
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByUUID(gpu_uuid)
        memory = self._supported(nvml.nvmlDeviceGetMemoryInfo, handle)
        utilization = self._supported(nvml.nvmlDeviceGetUtilizationRates, handle)
        power_mw = self._supported(nvml.nvmlDeviceGetPowerUsage, handle)
        limit_mw = self._supported(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        energy_mj = self._supported(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        return GpuReadings(
            memory_total_bytes=None if memory is None else int(memory.total),
            memory_used_bytes=None if memory is None or self._simulated else int(memory.used),
            utilization=None if utilization is None else utilization.gpu / 100,
            power_w=None if power_mw is None else power_mw / 1e3,
            power_limit_w=None if limit_mw is None else limit_mw / 1e3,
            energy_j=None if energy_mj is None else energy_mj / 1e3,
        )

    def _supported(self, call: Callable[..., Any], *args: Any) -> Any:
        """The call's result, or None where NVML does not support it here or does not permit it."""
        nvml = self._nvml
        try:
            return call(*args)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission, nvml.NVMLError_FunctionNotFound):
            return None

    def _gpu(self, index: int) -> Gpu:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid, name = str(nvml.nvmlDeviceGetUUID(handle)), str(nvml.nvmlDeviceGetName(handle))
        memory_mib = int(nvml.nvmlDeviceGetMemoryInfo(handle).total) // MIB
        mode = self._supported(nvml.nvmlDeviceGetMigMode, handle)
        mig_enabled = mode is not None and mode[0] == nvml.NVML_DEVICE_MIG_ENABLE
        if mig_enabled:
            slices = self._mig_slices(handle, index, uuid, name)
        else:
            slices = (self._whole_gpu(index, uuid, name, memory_mib),)
        return Gpu(index, uuid, name, memory_mib, mig_enabled, self._simulated, slices)

    def _whole_gpu(self, index: int, uuid: str, name: str, memory_mib: int) -> Slice:
        return Slice(
            gpu_index=index,
            gpu_uuid=uuid,
            gpu_name=name,
            device_uuid=uuid,
            mig_profile="",
            gpcs=WHOLE_GPU_GPCS,
            memory_mib=memory_mib,
            gi_id=None,
            ci_id=None,
            start=0,
            size=1,
            grid=1,
            simulated=self._simulated,
        )

    def _mig_slices(self, gpu: Any, index: int, uuid: str, name: str) -> tuple[Slice, ...]:
        nvml = self._nvml
        slices: list[Slice] = []
        for mig_index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
            try:
                handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, mig_index)
            except nvml.NVMLError_NotFound:
                continue  # a hole: instances were destroyed, later indices may still exist
            attributes = nvml.nvmlDeviceGetAttributes_v2(handle)
            gi_id = int(nvml.nvmlDeviceGetGpuInstanceId(handle))
            start, size = self._grid_place(gpu, gi_id, slices, int(attributes.gpuInstanceSliceCount))
            slices.append(
                Slice(
                    gpu_index=index,
                    gpu_uuid=uuid,
                    gpu_name=name,
                    device_uuid=str(nvml.nvmlDeviceGetUUID(handle)),
                    # NVML's own name of a MIG device ends in its MIG profile: "... MIG 1g.10gb".
                    mig_profile=str(nvml.nvmlDeviceGetName(handle)).rsplit("MIG ", 1)[-1],
                    gpcs=int(attributes.computeInstanceSliceCount),
                    memory_mib=int(attributes.memorySizeMB),
                    gi_id=gi_id,
                    ci_id=int(nvml.nvmlDeviceGetComputeInstanceId(handle)),
                    start=start,
                    size=size,
                    grid=_grid_width(name),
                    simulated=self._simulated,
                )
            )
        return tuple(sorted(slices, key=lambda s: s.start))

    def _grid_place(self, gpu: Any, gi_id: int, before: list[Slice], gpcs: int) -> tuple[int, int]:
        """(start, size) on the memory-slice grid; without the right to ask, side by side in NVML's order."""
        instance = self._supported(self._nvml.nvmlDeviceGetGpuInstanceById, gpu, gi_id)
        if instance is None:
            return max((s.start + s.size for s in before), default=0), gpcs
        placement = self._nvml.nvmlGpuInstanceGetInfo(instance).placement
        return int(placement.start), int(placement.size)


def real_gpus() -> NvmlDoor:
    """The door to this machine's driver. Raises NvmlUnavailableError."""
    import pynvml

    return NvmlDoor(pynvml)


def _grid_width(gpu_name: str) -> int:
    """Memory slices across a GPU that NVML calls `gpu_name`; 8 on every data-centre board but a few."""
    for model in GPU_MODELS.values():
        if model.name.rsplit("-", 1)[0].replace("-", " ") in gpu_name.replace("-", " "):
            return model.memory_slices
    return 8
