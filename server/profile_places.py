"""Where `migserve profile` measures: threads of the CPU, a GPU's slices or shares, or emulated ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from partitioner.catalog import GPU_MODELS
from partitioner.cuts import slice_profiles
from partitioner.geometry import Slice
from partitioner.latency import CPU, SHARES, LatencyTable
from partitioner.nvml import NvmlDoor
from partitioner.nvml_errors import NvmlError
from partitioner.nvml_types import Gpu
from scheduler.channel import ModelSource
from scheduler.measuring import NO_GAUGES, Device, Gauges
from server.gpus import StartError
from server.plan_command import UsageError, nearest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """A slice to measure on, by its MIG profile (or what stands for it), and how to get there."""

    mig_profile: str
    gpcs: int
    device: Device
    gauges: Gauges = NO_GAUGES


@dataclass(frozen=True, slots=True)
class Machine:
    """What the rows say of where they come from, and its slices by name."""

    gpu: str
    source: str
    driver: str
    places: Mapping[str, Place]
    close: Callable[[], None] = lambda: None


def cpu(names: Collection[str], memory_mib: int | None) -> Machine:
    """A number of threads stands for a slice. Raises UsageError."""
    places = {}
    for name in names or ("1",):
        if not name.isdecimal() or not int(name):
            raise UsageError(f"--slices: on the CPU these are numbers of threads, such as 1,2, not {name!r}")
        places[name] = Place(f"{CPU}{name}", int(name), Device(None, int(name), None, memory_mib))
    return Machine(_cpu_name(), "measured", "", places)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0]}" if names else "CPU"


def cuda(door: NvmlDoor) -> Machine:
    """One slice of each MIG profile that there is, or a whole GPU; the machine closes the door.

    Written for GPUs, and never run on one yet. Raises StartError, NvmlError.
    """
    try:
        gpus, driver = door.gpus(), door.driver_version()
        return _slices(gpus, driver, door)
    except BaseException:
        door.close()
        raise


def _slices(gpus: Sequence[Gpu], driver: str, door: NvmlDoor) -> Machine:
    slices = [each for gpu in gpus for each in gpu.slices]
    if not slices:
        raise StartError("no slice to measure on: see migserve layout apply")
    gpu = next(each for each in gpus if each.uuid == slices[0].gpu_uuid)
    places = {}
    for each in gpu.slices:
        name = each.mig_profile or f"{each.gpcs}g.{round(each.memory_mib / 1024)}gb"
        if name not in places:
            gauges = _gauges(door, each, alone=len(gpu.slices) == 1)
            places[name] = Place(name, each.gpcs, Device(each.device_uuid), gauges)
    return Machine(gpu.model.name if gpu.model else gpu.name, "measured", driver, places, door.close)


def _gauges(door: NvmlDoor, of: Slice, *, alone: bool) -> Gauges:
    """Energy is counted by GPU: it is a slice's only where there is no other one that may work meanwhile.

    How busy the SMs are GPM tells by GPU instance, on Hopper and later; not where two slices share one.
    """

    def energy_j() -> float | None:
        return _or_none(partial(door.energy_j, of.gpu_uuid))

    def sm_activity() -> float | None:
        return (_or_none(partial(door.utilization, of.gpu_uuid)) or {}).get(of.gi_id or 0)

    return Gauges(energy_j if alone else None, None if of.gi_id is None else sm_activity)


def shares(door: NvmlDoor) -> Machine:
    """Shares of the SMs and of the memory of a whole GPU that nobody uses, each for a slice that it could be cut into.

    An approximation: a slice has its part of the L2 cache and of the memory's bandwidth, too, which a share has all of.
    Closes the door. Raises StartError, NvmlError.
    """
    try:
        gpus, driver = door.gpus(), door.driver_version()
        users = {gpu.uuid: door.processes(gpu.uuid) for gpu in gpus if not gpu.mig_enabled}
    finally:
        door.close()
    whole = [gpu for gpu in gpus if not gpu.mig_enabled]
    if not whole:
        raise StartError("every GPU is cut: leave --device out, which measures the slices themselves")
    gpu = next((each for each in whole if not users[each.uuid]), None)
    if gpu is None:
        pids = ", ".join(map(str, users[whole[0].uuid]))
        raise StartError(f"GPU {whole[0].index} is used by {pids}: what is measured beside others says nothing")
    if gpu.model is None:
        raise StartError(f"nobody knows which slices a {gpu.name} could be cut into: it has no MIG")
    profiles = slice_profiles(gpu.model)
    if unknown := [each.name for each in profiles if not each.sm_count]:
        raise StartError(f"how many SMs {', '.join(unknown)} of a {gpu.name} have is not known: cut it to measure them")
    places = {
        each.name: Place(
            each.name, each.gpcs, Device(gpu.uuid, memory_mib=each.memory_mib, sm_count=each.sm_count), NO_GAUGES
        )
        for each in profiles
    }
    return Machine(gpu.model.name, SHARES, driver, places)


def _or_none(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except NvmlError:
        return None  # the GPU is lost: what runs on it will say so


def emulated(gpu: str, source: ModelSource, memory_mib: int | None) -> Machine:
    """The slices of a GPU of the catalogue; nothing is computed, times are those of the model's own table.

    Raises UsageError.
    """
    if gpu not in GPU_MODELS:
        raise UsageError(f"no GPU is called {gpu!r}; {nearest(gpu, list(GPU_MODELS))}")
    if not source.latency_ms:
        raise UsageError(f"{source.name} is emulated, and has no latency_table in serving.yaml")
    table = LatencyTable({gpcs: dict(points) for gpcs, points in source.latency_ms.items()})
    places = {
        each.name: Place(each.name, each.gpcs, Device(None, 1, tuple(table.points(each.gpcs)), memory_mib))
        for each in slice_profiles(GPU_MODELS[gpu])
    }
    return Machine(gpu, "emulated", "", places)
