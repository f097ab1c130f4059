"""The NVML door: the way in to the driver. It takes any object with pynvml's functions, real or simulated.

Behind it: `nvml_session.py` (raw calls), `nvml_discovery.py` (what there is), `nvml_changes.py` (changing it),
`nvml_events.py`. Only these files and the simulated driver speak pynvml, and its errors do not leave them.

Facts they rely on: MIG devices are enumerated with holes; a GPU instance without compute instance is in no such
list; a mode change may succeed and do nothing; IN_USE may pass; utilisation of an instance is unknown where NVML
does not support it, never zero; power and energy exist per GPU only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pynvml

from partitioner import machine, nvml_changes, nvml_discovery, nvml_events
from partitioner.geometry import GpuModel, MigProfile, Placement
from partitioner.nvml_errors import GpuLostError, MachineBusyError, NotSupportedError, NvmlUnavailableError
from partitioner.nvml_session import NvmlSession
from partitioner.nvml_types import Gpu, GpuProcess, GpuReadings, Instance, ModeChange, SliceMemory

__all__ = ["Gpu", "GpuReadings", "Instance", "ModeChange", "NvmlDoor", "NvmlUnavailableError", "real_gpus"]


class NvmlDoor:
    """One NVML session. Blocking: call it from a thread, never from the event loop.

    Every method raises NvmlError (`nvml_errors.py`) where NVML refuses.
    """

    def __init__(
        self,
        nvml: Any,
        *,
        simulated: bool = False,
        lock_path: Path | None = None,
        root: Path | None = None,
        patience_s: float = 10.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Opens the session. Raises NvmlUnavailableError.

        `lock_path`: of the lock among processes; without it only this door's own threads are kept apart. `root`:
        where traces of other managers of MIG are looked for, if at all. `patience_s`: how long IN_USE is taken for
        passing.
        """
        self._session = NvmlSession(nvml)
        self._simulated = simulated
        self._lock_path = lock_path
        self._lock = threading.Lock()
        self._root = root
        self._patience = nvml_changes.Patience(patience_s, sleep)
        self._models: dict[tuple[str, bool], GpuModel | None] = {}

    def close(self) -> None:
        self._session.call("nvmlShutdown")

    def driver_version(self) -> str:
        return str(self._session.call("nvmlSystemGetDriverVersion"))

    # ---- what there is ----

    def gpus(self) -> list[Gpu]:
        """Every GPU, in NVML's order, with its slices as they are now. Lost ones are left out."""
        return [
            nvml_discovery.gpu(self._session, index, handle, uuid, self._model(handle, uuid), self._simulated)
            for index, handle, uuid in self._session.gpus()
        ]

    def gpu(self, gpu_uuid: str) -> Gpu:
        """One of them; what is wrong with others does not matter. Raises NotFoundError or GpuLostError."""
        for index, handle, uuid in self._session.gpus():
            if uuid == gpu_uuid:
                of = self._model(handle, uuid)
                return nvml_discovery.gpu(self._session, index, handle, uuid, of, self._simulated)
        self._session.gpu(gpu_uuid)  # raises what fits
        raise GpuLostError("nvmlDeviceGetHandleByIndex", "GPU_IS_LOST")

    def model(self, gpu_uuid: str) -> GpuModel:
        """What a GPU can be cut into, in NVML's own names and figures; the catalogue's where NVML is silent.

        Raises NotSupportedError where there is no MIG, or where neither of them knows.
        """
        model = self._model(self._session.gpu(gpu_uuid), gpu_uuid)
        if model is None:
            raise NotSupportedError("nvmlDeviceGetMigMode", "NOT_SUPPORTED", f"{gpu_uuid} has no MIG that is known")
        return model

    def _model(self, handle: Any, uuid: str) -> GpuModel | None:
        """Kept by MIG mode: while it is off, NVML says less."""
        mode = self._session.mig_mode(handle)
        key = (uuid, mode is not None and mode[0])
        if key not in self._models:
            self._models[key] = nvml_discovery.model(self._session, handle)
        return self._models[key]

    def instances(self, gpu_uuid: str) -> list[Instance]:
        """Every GPU instance, by start, also those without a compute instance; none while MIG is off.

        Raises NoPermissionError without the right to see them.
        """
        gpu = self._session.gpu(gpu_uuid)
        mode = self._session.mig_mode(gpu)
        if mode is None or not mode[0]:
            return []
        return nvml_discovery.instances(self._session, gpu, self.model(gpu_uuid))

    # ---- changing it ----

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Only one at a time changes GPUs, of all processes on this machine. Raises MachineBusyError."""
        if not self._lock.acquire(blocking=False):
            raise MachineBusyError("this process is changing the GPUs already; wait until it has finished")
        try:
            if self._lock_path is None:
                yield
            else:
                with machine.exclusive(self._lock_path):
                    yield
        finally:
            self._lock.release()

    def create(self, gpu_uuid: str, profile: MigProfile, placement: Placement) -> Instance:
        """A slice at `placement`, read back; on failure nothing is left of it. Raises NoRoomError and others."""
        of = self.model(gpu_uuid)
        return nvml_changes.create(self._session, gpu_uuid, profile, placement, of, self._patience)

    def destroy(self, gpu_uuid: str, gi_id: int) -> None:
        """A slice with its compute instances; gone already is done. Raises InUseError, naming who holds it."""
        nvml_changes.destroy(self._session, gpu_uuid, gi_id, self._patience)

    def set_mig_mode(self, gpu_uuid: str, on: bool) -> ModeChange:
        """Asks for MIG mode; the answer says whether it holds, and otherwise what it takes."""
        return nvml_changes.set_mode(self._session, gpu_uuid, on)

    # ---- guards ----

    def processes(self, gpu_uuid: str) -> list[GpuProcess]:
        """What uses a GPU or its instances, as far as NVML lists it."""
        return nvml_changes.processes(self._session, self._session.gpu(gpu_uuid))

    def refusal(self, gpu_uuid: str, own_pids: Collection[int] = ()) -> str | None:
        """Why this GPU must not be changed by us; None if it may. `own_pids` are our own workers."""
        manager = machine.foreign_manager(self._root) if self._root else None
        if manager is not None:
            return manager
        gpu = self._session.gpu(gpu_uuid)
        virtualization = self._session.supported("nvmlDeviceGetVirtualizationMode", gpu)
        if virtualization == pynvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU:
            return f"{gpu_uuid} is a vGPU: it is cut on the host, not in this virtual machine"
        listed = self.processes(gpu_uuid)
        foreign = [each for each in listed if each.pid not in own_pids]
        # In a container the driver may list pids as the host counts them: then none of our own are among them.
        translated = not own_pids or len(foreign) < len(listed)
        if foreign and (translated or not machine.in_pid_namespace(self._root)):
            return f"{gpu_uuid} is used by {', '.join(map(str, foreign))}; end that first, or leave this GPU out"
        return None

    # ---- measurements and events ----

    def readings(self, gpu_uuid: str) -> GpuReadings:
        """Measurements of one GPU. Raises GpuLostError."""
        handle = self._session.gpu(gpu_uuid)
        supported = self._session.supported
        memory = supported("nvmlDeviceGetMemoryInfo", handle)
        utilization = supported("nvmlDeviceGetUtilizationRates", handle)
        power_mw = supported("nvmlDeviceGetPowerUsage", handle)
        limit_mw = supported("nvmlDeviceGetEnforcedPowerLimit", handle)
        return GpuReadings(
            memory_total_bytes=None if memory is None else int(memory.total),
            memory_used_bytes=None if memory is None or self._simulated else int(memory.used),
            utilization=None if utilization is None else utilization.gpu / 100,
            power_w=None if power_mw is None else power_mw / 1e3,
            power_limit_w=None if limit_mw is None else limit_mw / 1e3,
            energy_j=self.energy_j(gpu_uuid),
        )

    def energy_j(self, gpu_uuid: str) -> float | None:
        """What the whole GPU has taken, since its driver was loaded; None where NVML does not say.

        Of a MIG device there is no such thing: what one instance takes nobody measures. Raises GpuLostError.
        """
        energy_mj = self._session.supported("nvmlDeviceGetTotalEnergyConsumption", self._session.gpu(gpu_uuid))
        return None if energy_mj is None else energy_mj / 1e3

    def memory(self, device_uuid: str) -> SliceMemory | None:
        """Of a MIG device; None where NVML does not say. Raises NotFoundError when it is gone."""
        handle = self._session.call("nvmlDeviceGetHandleByUUID", device_uuid)
        found = self._session.supported("nvmlDeviceGetMemoryInfo", handle)
        if found is None:
            return None
        return SliceMemory(int(found.total), None if self._simulated else int(found.used))

    def utilization(self, gpu_uuid: str) -> dict[int, float | None]:
        """Share of SMs busy by GPU instance id, over a tenth of a second, in which this blocks; None: unknown.

        By GPM, which Hopper and later GPUs have; elsewhere all are unknown.
        """
        return nvml_events.utilization(self._session, gpu_uuid, self._patience.sleep)

    def events(self) -> AbstractContextManager[nvml_events.Events]:
        """XID errors and changes of the MIG configuration, of every GPU that there is now; close it by `with`."""
        return nvml_events.listen(self._session)


def real_gpus() -> NvmlDoor:
    """The door to this machine's driver. Raises NvmlUnavailableError."""
    return NvmlDoor(pynvml, lock_path=machine.default_lock_path(), root=Path("/"))
