"""How a call of the simulated driver goes: session, trace, ordered faults, handles, privileges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import pynvml

from partitioner.simulated_gpu import ComputeInstance, GpuInstance, GpuState, RefusedError
from partitioner.simulated_machine import Faults, Handles, Machine, SimulatedGpu, WouldCrashError

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Session")


def api(*, session: bool = True) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """Makes a method one of NVML's calls: under the lock, counted, subject to ordered faults, with pynvml's errors."""

    def decorate(function: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        @wraps(function)
        def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            if kwargs and any(isinstance(value, str) for value in kwargs.values()):
                raise WouldCrashError("pynvml encodes strings only where they are positional arguments")
            with self._machine.lock:
                fault = self._faults.due(function.__name__)
                if fault is not None and not fault[1]:
                    raise fault[0]
                if session and self._sessions <= 0:
                    raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
                self._machine.refresh()
                try:
                    result = function(self, *args, **kwargs)
                except RefusedError as refusal:
                    raise pynvml.NVMLError(getattr(pynvml, f"NVML_ERROR_{refusal.code}")) from None
                if fault is not None:
                    raise fault[0]
                return result

        return call

    return decorate


@dataclass(slots=True)
class Device:
    """What a device handle stands for: a GPU, or with `part` one of its MIG devices."""

    gpu: SimulatedGpu
    state: GpuState
    found: tuple[GpuInstance, ComputeInstance] | None

    @property
    def part(self) -> ComputeInstance | None:
        return self.found[1] if self.found else None

    @property
    def instance(self) -> GpuInstance:
        assert self.found is not None
        return self.found[0]


class Session:
    """What every group of calls needs. Stale or foreign handles end in INVALID_ARGUMENT, lost GPUs in GPU_IS_LOST."""

    def __init__(
        self,
        gpus: Sequence[SimulatedGpu],
        clients: Callable[[str], Sequence[int]],
        privileged: bool,
        state_file: Path | None,
    ) -> None:
        self._machine = Machine(gpus, state_file)
        self._handles = Handles()
        self._faults = Faults()
        self._clients = clients
        self._privileged = privileged
        self._sessions = 0

    def __getattr__(self, name: str) -> Any:
        """Constants, structs and exceptions are pynvml's own."""
        function = name.startswith("nvml") and callable(getattr(pynvml, name, None))
        if name.startswith("_") or (function and not isinstance(getattr(pynvml, name), type)):
            raise AttributeError(f"the simulated driver has no {name}")
        return getattr(pynvml, name)

    def _need_privilege(self) -> None:
        if not self._privileged:
            raise RefusedError("NO_PERMISSION")

    def _gpu_handle(self, gpu: SimulatedGpu) -> Any:
        state = self._machine.states[gpu.uuid]
        if state.lost:
            raise RefusedError("GPU_IS_LOST")
        return self._handles.give("gpu", gpu.uuid, state.epoch)

    def _gpu(self, handle: Any) -> tuple[SimulatedGpu, GpuState]:
        """A GPU, not a MIG device."""
        device = self._device(handle)
        if device.found is not None:
            raise RefusedError("INVALID_ARGUMENT")
        return device.gpu, device.state

    def _device(self, handle: Any) -> Device:
        kind, (gpu_uuid, serial) = self._handles.take(handle, "gpu", "mig")
        gpu, state = self._machine.gpu(gpu_uuid), self._alive(gpu_uuid)
        if kind == "gpu":
            if serial != state.epoch:
                raise RefusedError("INVALID_ARGUMENT")
            return Device(gpu, state, None)
        return Device(gpu, state, _with_part(state, serial))

    def _instance(self, handle: Any) -> tuple[SimulatedGpu, GpuState, GpuInstance]:
        _, (gpu_uuid, serial) = self._handles.take(handle, "gi")
        state = self._alive(gpu_uuid)
        for instance in state.instances:
            if instance.serial == serial:
                return self._machine.gpu(gpu_uuid), state, instance
        raise RefusedError("INVALID_ARGUMENT")

    def _part(self, handle: Any) -> tuple[SimulatedGpu, GpuInstance, ComputeInstance]:
        _, (gpu_uuid, serial) = self._handles.take(handle, "ci")
        instance, part = _with_part(self._alive(gpu_uuid), serial)
        return self._machine.gpu(gpu_uuid), instance, part

    def _alive(self, gpu_uuid: str) -> GpuState:
        state = self._machine.states[gpu_uuid]
        if state.lost:
            raise RefusedError("GPU_IS_LOST")
        return state

    def _busy(self, gpu_uuid: str) -> bool:
        """Whether any process holds the GPU or one of its MIG devices."""
        gpu = self._machine.gpu(gpu_uuid)
        devices = [gpu.mig_uuid(instance.id, part.id) for instance, part in self._machine.states[gpu_uuid].parts()]
        return any(self._clients(device) for device in [gpu_uuid, *devices])


def _with_part(state: GpuState, serial: int) -> tuple[GpuInstance, ComputeInstance]:
    for instance, part in state.parts():
        if part.serial == serial:
            return instance, part
    raise RefusedError("INVALID_ARGUMENT")
