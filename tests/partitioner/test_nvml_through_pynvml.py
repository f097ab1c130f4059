"""The door over the real pynvml, whose C library is played by the simulated driver.

So what pynvml itself does to arguments and results on their way is in these tests: what works here calls C as C
is to be called, and the simulated driver's own functions answer as pynvml's do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from ctypes import byref, c_int, c_uint, c_void_p, sizeof
from typing import Any

import pynvml
import pytest

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import parse_layout
from partitioner.nvml import NvmlDoor
from partitioner.nvml_errors import InUseError, NoRoomError
from partitioner.simulated_nvml import SimulatedNvml, parse_gpus

# Of each C function: what goes in, and what comes out through pointers behind it.
# In: g GPU or MIG device, i GPU instance, c compute instance, n number, p placement, a array or NULL, # its length.
# Out: h handle, u number, q 64-bit number, uu two numbers, s struct, t text with its length, l list of processes.
SIGNATURES = {
    "nvmlInitWithFlags": "n",
    "nvmlShutdown": "",
    "nvmlSystemGetDriverVersion": ">t",
    "nvmlDeviceGetCount_v2": ">u",
    "nvmlDeviceGetHandleByIndex_v2": "n>h",
    "nvmlDeviceGetUUID": "g>t",
    "nvmlDeviceGetName": "g>t",
    "nvmlDeviceGetPciInfo_v3": "g>s",
    "nvmlDeviceGetMemoryInfo": "g>s",
    "nvmlDeviceGetArchitecture": "g>u",
    "nvmlDeviceGetVirtualizationMode": "g>q",
    "nvmlDeviceGetTotalEnergyConsumption": "g>q",
    "nvmlDeviceGetMigMode": "g>uu",
    "nvmlDeviceSetMigMode": "gn>u",
    "nvmlDeviceGetMaxMigDeviceCount": "g>u",
    "nvmlDeviceGetMigDeviceHandleByIndex": "gn>h",
    "nvmlDeviceGetGpuInstanceId": "g>u",
    "nvmlDeviceGetComputeInstanceId": "g>u",
    "nvmlDeviceGetAttributes_v2": "g>s",
    "nvmlDeviceGetGpuInstanceProfileInfoV": "gn>s",
    "nvmlDeviceGetGpuInstancePossiblePlacements_v2": "gna#",
    "nvmlDeviceCreateGpuInstanceWithPlacement": "gnp>h",
    "nvmlDeviceGetGpuInstances": "gna#",
    "nvmlDeviceGetGpuInstanceById": "gn>h",
    "nvmlGpuInstanceGetInfo": "i>s",
    "nvmlGpuInstanceDestroy": "i",
    "nvmlGpuInstanceGetComputeInstanceProfileInfoV": "inn>s",
    "nvmlGpuInstanceGetComputeInstances": "ina#",
    "nvmlGpuInstanceCreateComputeInstance": "in>h",
    "nvmlComputeInstanceGetInfo_v2": "c>s",
    "nvmlComputeInstanceDestroy": "c",
    "nvmlDeviceGetComputeRunningProcesses_v3": "g>l",
    "nvmlDeviceGetGraphicsRunningProcesses_v3": "g>l",
}
HANDLES = {"g": pynvml.c_nvmlDevice_t, "i": pynvml.c_nvmlGpuInstance_t, "c": pynvml.c_nvmlComputeInstance_t}
ARRAYS = {
    "nvmlDeviceGetGpuInstancePossiblePlacements_v2": pynvml.c_nvmlGpuInstancePlacement_t,
    "nvmlDeviceGetGpuInstances": pynvml.c_nvmlGpuInstance_t,
    "nvmlGpuInstanceGetComputeInstances": pynvml.c_nvmlComputeInstance_t,
}
# C functions that pynvml calls by another name.
PYTHON_NAMES = {
    "nvmlDeviceGetCount_v2": "nvmlDeviceGetCount",
    "nvmlDeviceGetHandleByIndex_v2": "nvmlDeviceGetHandleByIndex",
    "nvmlDeviceGetGpuInstancePossiblePlacements_v2": "nvmlDeviceGetGpuInstancePossiblePlacements",
}


class Library:
    """libnvidia-ml.so.1, as far as the door needs it."""

    def __init__(self, sim: SimulatedNvml) -> None:
        self._sim = sim

    def __getattr__(self, name: str) -> Any:
        if name not in SIGNATURES:
            raise AttributeError(name)
        into, _, out = SIGNATURES[name].partition(">")
        types = [c_uint if kind == "n" else c_void_p for kind in into]
        types += {"t": [c_void_p, c_uint], "uu": [c_void_p] * 2, "l": [c_void_p] * 2, "": []}.get(out, [c_void_p])
        python = getattr(self._sim, PYTHON_NAMES.get(name, name))

        def call(*raw: Any) -> int:
            try:
                result = python(*_decode(name, into, raw))
                return _encode(out, result, raw[len(into) :])
            except pynvml.NVMLError as error:
                return int(error.value)

        return ctypes.CFUNCTYPE(c_int, *types)(call)


def _decode(name: str, into: str, raw: tuple[Any, ...]) -> Iterator[Any]:
    for kind, value in zip(into, raw, strict=False):
        if kind in HANDLES:
            yield ctypes.cast(c_void_p(value), HANDLES[kind])
        elif kind == "p":
            yield byref(pynvml.c_nvmlGpuInstancePlacement_t.from_address(value))
        elif kind == "a":
            length = c_uint.from_address(raw[into.index("#")]).value
            yield None if value is None else (ARRAYS[name] * length).from_address(value)
        elif kind == "#":
            yield byref(c_uint.from_address(value))
        else:
            yield value


def _encode(out: str, result: Any, to: tuple[int, ...]) -> int:
    if out == "h":
        c_void_p.from_address(to[0]).value = ctypes.cast(result, c_void_p).value
    elif out in ("u", "uu"):
        for address, number in zip(to, result if out == "uu" else [result], strict=True):
            c_uint.from_address(address).value = number
    elif out == "q":
        ctypes.c_ulonglong.from_address(to[0]).value = result
    elif out == "s":
        ctypes.memmove(to[0], byref(result), sizeof(result))
    elif out == "t":
        ctypes.memmove(to[0], result.encode() + b"\0", len(result) + 1)
    elif out == "l":
        return _processes(result, *to)
    return int(pynvml.NVML_SUCCESS)


def _processes(found: list[Any], count_at: int, array_at: int | None) -> int:
    count = c_uint.from_address(count_at)
    room, count.value = count.value, len(found)
    if room < len(found):
        return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
    array = (pynvml.c_nvmlProcessInfo_v3_t * room).from_address(array_at or 0) if found else []
    for to, process in zip(array, found, strict=False):
        to.pid, to.gpuInstanceId, to.computeInstanceId = process.pid, process.gpuInstanceId, process.computeInstanceId
    return int(pynvml.NVML_SUCCESS)


@pytest.fixture
def through_pynvml(monkeypatch: pytest.MonkeyPatch) -> Callable[[SimulatedNvml], NvmlDoor]:
    def open_door(sim: SimulatedNvml) -> NvmlDoor:
        monkeypatch.setattr(pynvml, "nvmlLib", Library(sim))
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        return NvmlDoor(pynvml, simulated=True, sleep=lambda seconds: None)

    return open_door


@pytest.mark.parametrize("name", sorted(GPU_MODELS))
def test_pynvml_lets_through_what_the_simulated_driver_says(
    name: str, through_pynvml: Callable[[SimulatedNvml], NvmlDoor]
) -> None:
    direct = NvmlDoor(SimulatedNvml(parse_gpus(f"{name}x2", None)), simulated=True)
    door = through_pynvml(SimulatedNvml(parse_gpus(f"{name}x2", None)))
    assert door.gpus() == direct.gpus()
    for gpu in door.gpus():
        assert gpu.model == GPU_MODELS[name]
        assert door.instances(gpu.uuid) == direct.instances(gpu.uuid)
    assert door.driver_version() == direct.driver_version()
    door.close()


def test_a_gpu_is_cut_through_pynvml(through_pynvml: Callable[[SimulatedNvml], NvmlDoor]) -> None:
    held: list[int] = []
    door = through_pynvml(SimulatedNvml(parse_gpus("H100-80GB", "off"), clients=lambda uuid: held))
    (gpu,) = door.gpus()
    assert not gpu.mig_enabled
    assert door.set_mig_mode(gpu.uuid, True).done
    layout = parse_layout("3g.40gb+2g.20gb+1g.10gb+me+1g.10gb", GPU_MODELS["H100-80GB"])
    made = [door.create(gpu.uuid, each.profile, each.placement) for each in layout]
    assert [each.placed for each in door.instances(gpu.uuid)] == list(layout)
    assert [each.device_uuid for each in door.gpus()[0].slices] == [each.device_uuid for each in made]
    with pytest.raises(NoRoomError, match="would overlap"):
        door.create(gpu.uuid, layout[0].profile, layout[0].placement)
    held.append(1)
    assert [(each.pid, each.gi_id) for each in door.processes(gpu.uuid)] == sorted((1, each.gi_id) for each in made)
    with pytest.raises(InUseError, match=r"is held by pid 1 \("):
        door.destroy(gpu.uuid, made[0].gi_id)
    held.clear()
    for each in made:
        door.destroy(gpu.uuid, each.gi_id)
    assert door.instances(gpu.uuid) == []
    assert door.set_mig_mode(gpu.uuid, False).done
    door.close()


def test_energy_comes_through_pynvml_in_joules(through_pynvml: Callable[[SimulatedNvml], NvmlDoor]) -> None:
    now = [5.0]
    sim = SimulatedNvml(parse_gpus("H100-80GB", "off"), clock=lambda: now[0])
    door = through_pynvml(sim)
    (gpu,) = door.gpus()
    assert door.energy_j(gpu.uuid) is None
    sim.draw(gpu.uuid, 300.0)
    now[0] = 20_000_005.0  # 6e12 mJ: more than 32 bits
    assert door.energy_j(gpu.uuid) == pytest.approx(300.0 * 20_000_000)
    door.close()
