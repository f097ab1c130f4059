"""A stand-in for the pynvml module: any mix of the catalogue's GPUs, as strict as the driver.

It has pynvml's functions, by their own names and with their own signatures, pynvml's structs and exceptions,
and the habits that hurt: ids that are not the enum, handles that go stale, holes between MIG indices, the
driver's own order of placement, mode changes that succeed and do nothing, errors that say little. Utilisation,
power and energy are NOT_SUPPORTED: nothing is measured, so nothing is made up.

What pynvml has not is for those who test: `fail`, `xid`, `lose`, `reset_gpu`, `reboot`, `set_activity`, `calls`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pynvml

from partitioner.simulated_calls import Session, api
from partitioner.simulated_events import EventCalls
from partitioner.simulated_gpu import RefusedError
from partitioner.simulated_instances import InstanceCalls
from partitioner.simulated_machine import SimulatedGpu, parse_gpus

__all__ = ["SimulatedGpu", "SimulatedNvml", "parse_gpus"]

MIB = 1024 * 1024
DRIVER_VERSION = "580.00-simulated"
_ARCHITECTURES = {
    "ampere": pynvml.NVML_DEVICE_ARCH_AMPERE,
    "hopper": pynvml.NVML_DEVICE_ARCH_HOPPER,
    "blackwell": pynvml.NVML_DEVICE_ARCH_BLACKWELL,
}
SUBSYSTEM_ID = 0x147F10DE  # of every simulated board
FALLEN_OFF_THE_BUS = 79
NOT_AN_INSTANCE = 0xFFFFFFFF
# The counter of energy moves in steps, as a power sensor has samples.
ENERGY_STEP_S = 0.125


def nobody(device_uuid: str) -> Sequence[int]:
    """No process holds the device."""
    return ()


class SimulatedNvml(InstanceCalls, EventCalls):
    """Has pynvml's functions, by their own names. Any thread may call them."""

    def __init__(
        self,
        gpus: Sequence[SimulatedGpu],
        *,
        clients: Callable[[str], Sequence[int]] = nobody,
        privileged: bool = True,
        state_file: Path | None = None,
        resets_itself: bool = False,
        old_driver: bool = False,
        virtualization: int = pynvml.NVML_GPU_VIRTUALIZATION_MODE_NONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clients(uuid)`: pids that hold a MIG device, or a GPU whose MIG is off, just now.

        `state_file` keeps modes and instances over the end of the process, and shares them with other ones; where
        it exists, it wins over the layouts in `gpus`. `resets_itself`: an idle Ampere GPU is reset by the driver
        when its mode is set, as on bare metal; otherwise it waits for `reset_gpu`. `old_driver`: R535, which tells
        nothing of MIG profiles while MIG is off. Raises NvmlUnavailableError for a state file of other GPUs.
        """
        Session.__init__(self, gpus, clients, privileged, state_file)
        EventCalls.__init__(self)
        self._resets_itself = resets_itself
        self._old_driver = old_driver
        self._virtualization = virtualization
        self._clock = clock
        self._drawn: dict[str, list[tuple[float, float]]] = {}  # by GPU: from when on, so many watts

    # ---- what a test orders ----

    def fail(self, call: str, error: int | BaseException, *, nth: int = 1, times: int = 1, after: bool = False) -> None:
        """From its `nth` call from now on, `call` (`*`: any) ends with `error`, `times` times.

        `error` is an NVML_ERROR_* number or an exception. With `after` the call does its work before it fails.
        """
        self._faults.order(call, error, nth, times, after)

    def fail_no_more(self) -> None:
        """Forgets what `fail` ordered."""
        self._faults.clear()

    @property
    def calls(self) -> list[str]:
        """Names of the functions called, oldest first; the last 10,000."""
        return list(self._faults.calls)

    def draw(self, gpu_uuid: str, watts: float) -> None:
        """What the whole GPU shall draw from now on; before, it measures no energy."""
        self._drawn.setdefault(gpu_uuid, []).append((self._clock(), watts))

    def lose(self, gpu_uuid: str) -> None:
        """The GPU falls off the bus, with XID 79, until the next reboot."""
        self.xid(gpu_uuid, FALLEN_OFF_THE_BUS)
        with self._machine.change(gpu_uuid, tell=False) as state:
            state.lost = True

    def reset_gpu(self, gpu_uuid: str) -> None:
        """As `nvidia-smi --gpu-reset`: a pending mode takes hold. Raises NVMLError, IN_USE, while somebody holds it."""
        if self._busy(gpu_uuid):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_IN_USE)
        with self._machine.change(gpu_uuid) as state:
            state.reset()

    def reboot(self) -> None:
        """Every instance is gone; on Hopper and later MIG is off again, on Ampere the mode stays."""
        for gpu in self._machine.gpus:
            with self._machine.change(gpu.uuid) as state:
                state.reboot()

    # ---- session ----

    @api(session=False)
    def nvmlInit(self) -> None:
        self._sessions += 1

    @api(session=False)
    def nvmlInitWithFlags(self, flags: int) -> None:
        self._sessions += 1

    @api()
    def nvmlShutdown(self) -> None:
        self._sessions -= 1
        if self._sessions == 0:
            self._handles.forget()

    @api()
    def nvmlSystemGetDriverVersion(self) -> str:
        return DRIVER_VERSION

    @api()
    def nvmlSystemGetProcessName(self, pid: int) -> str:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError as error:
            raise RefusedError("NOT_FOUND") from error
        return command.replace(b"\0", b" ").decode(errors="replace").strip()

    # ---- devices ----

    @api()
    def nvmlDeviceGetCount(self) -> int:
        return len(self._machine.gpus)

    @api()
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        if not 0 <= index < len(self._machine.gpus):
            raise RefusedError("INVALID_ARGUMENT")
        return self._gpu_handle(self._machine.gpus[index])

    @api()
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        for gpu in self._machine.gpus:
            # The search brings up every GPU on its way: a lost one hides those behind it.
            if self._machine.states[gpu.uuid].lost:
                raise RefusedError("GPU_IS_LOST")
            if gpu.uuid == uuid:
                return self._gpu_handle(gpu)
            for instance, part in self._machine.states[gpu.uuid].parts():
                if gpu.mig_uuid(instance.id, part.id) == uuid:
                    return self._handles.give("mig", gpu.uuid, part.serial)
        raise RefusedError("NOT_FOUND")

    @api()
    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        device = self._device(handle)
        if device.part is None:
            return device.gpu.uuid
        return device.gpu.mig_uuid(device.instance.id, device.part.id)

    @api()
    def nvmlDeviceGetName(self, handle: Any) -> str:
        device = self._device(handle)
        if device.part is None:
            return device.gpu.name
        name = device.instance.profile.name
        if device.part.profile.gpcs < device.instance.profile.gpcs:
            name = f"{device.part.profile.gpcs}c.{name}"
        return f"{device.gpu.name} MIG {name}"

    @api()
    def nvmlDeviceGetPciInfo_v3(self, handle: Any) -> Any:
        gpu = self._device(handle).gpu
        info = pynvml.nvmlPciInfo_t(
            bus=gpu.index + 1, pciDeviceId=int(gpu.model.pci_device_ids[0], 16), pciSubSystemId=SUBSYSTEM_ID
        )
        info.busId = f"00000000:{gpu.index + 1:02X}:00.0"
        return info

    nvmlDeviceGetPciInfo = nvmlDeviceGetPciInfo_v3

    @api()
    def nvmlDeviceGetArchitecture(self, device: Any) -> int:
        return int(_ARCHITECTURES[self._device(device).gpu.model.architecture])

    @api()
    def nvmlDeviceGetVirtualizationMode(self, handle: Any) -> int:
        self._gpu(handle)
        return self._virtualization

    @api()
    def nvmlDeviceGetMemoryInfo(self, handle: Any, version: Any = None) -> Any:
        device = self._device(handle)
        if device.part is None:
            self._need_aggregate(device.state)
            total = device.gpu.model.memory_mib * MIB
        else:
            total = device.instance.profile.memory_mib * MIB
        return pynvml.c_nvmlMemory_t(total=total, free=total, used=0)

    @api()
    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any) -> list[Any]:
        device = self._device(handle)
        if device.part is not None:
            return self._processes(device.gpu, device.instance.id, device.part.id)
        self._need_aggregate(device.state)
        found = [
            process
            for instance, part in device.state.parts()
            for process in self._processes(device.gpu, instance.id, part.id)
        ]
        return found or [_process(pid) for pid in self._clients(device.gpu.uuid)]

    @api()
    def nvmlDeviceGetGraphicsRunningProcesses_v3(self, handle: Any) -> list[Any]:
        self._need_aggregate(self._device(handle).state)
        return []

    @api()
    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        self._measures_nothing(handle)

    @api()
    def nvmlDeviceGetPowerUsage(self, handle: Any) -> Any:
        self._measures_nothing(handle)

    @api()
    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any) -> Any:
        self._measures_nothing(handle)

    @api()
    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> Any:
        device = self._device(handle)
        drawn = self._drawn.get(device.gpu.uuid)
        if device.part is not None or drawn is None:  # of an instance nothing is known
            raise RefusedError("NOT_SUPPORTED")
        at = self._clock() // ENERGY_STEP_S * ENERGY_STEP_S
        ends = [begin for begin, _ in drawn[1:]] + [at]
        return int(sum(1e3 * watts * max(end - begin, 0) for (begin, watts), end in zip(drawn, ends, strict=True)))

    def _measures_nothing(self, handle: Any) -> None:
        self._device(handle)
        raise RefusedError("NOT_SUPPORTED")

    # ---- MIG mode ----

    @api()
    def nvmlDeviceGetMigMode(self, device: Any) -> list[int]:
        gpu, state = self._gpu(device)
        if not gpu.mig_capable:
            raise RefusedError("NOT_SUPPORTED")
        return [int(state.mode), int(state.pending)]

    @api()
    def nvmlDeviceSetMigMode(self, device: Any, mode: int) -> int:
        gpu, _ = self._gpu(device)
        if mode not in (pynvml.NVML_DEVICE_MIG_DISABLE, pynvml.NVML_DEVICE_MIG_ENABLE):
            raise RefusedError("INVALID_ARGUMENT")
        if not gpu.mig_capable:
            raise RefusedError("NOT_SUPPORTED")
        self._need_privilege()
        busy = self._busy(gpu.uuid)
        with self._machine.change(gpu.uuid) as state:
            status = state.set_mode(bool(mode), busy=busy, resets_itself=self._resets_itself)
        return int(pynvml.NVML_SUCCESS if status == "SUCCESS" else getattr(pynvml, f"NVML_ERROR_{status}"))

    @api()
    def nvmlDeviceGetMaxMigDeviceCount(self, device: Any) -> int:
        gpu, state = self._gpu(device)
        return gpu.model.max_mig_devices if gpu.mig_capable and state.mode else 0

    # ---- inside ----

    def _need_aggregate(self, state: Any) -> None:
        """A parent in MIG mode tells sums over its instances to the privileged only."""
        if state.mode:
            self._need_privilege()

    def _processes(self, gpu: SimulatedGpu, gi_id: int, ci_id: int) -> list[Any]:
        return [_process(pid, gi_id, ci_id) for pid in self._clients(gpu.mig_uuid(gi_id, ci_id))]


def _process(pid: int, gi_id: int = NOT_AN_INSTANCE, ci_id: int = NOT_AN_INSTANCE) -> Any:
    return pynvml.nvmlFriendlyObject(
        {"pid": pid, "usedGpuMemory": None, "gpuInstanceId": gi_id, "computeInstanceId": ci_id}
    )
