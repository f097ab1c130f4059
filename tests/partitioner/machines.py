"""Simulated machines for tests: the bare driver, and a door to it."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pynvml

from partitioner.geometry import GpuModel, Placement
from partitioner.nvml import NvmlDoor
from partitioner.nvml_types import Instance
from partitioner.simulated_nvml import SimulatedNvml, parse_gpus

NO_ROOM = pynvml.NVMLError_InsufficientResources


def driver(spec: str = "A100-80GB", layout: str | None = "empty", **options: Any) -> SimulatedNvml:
    sim = SimulatedNvml(parse_gpus(spec, layout), **options)
    sim.nvmlInit()
    return sim


def device(sim: SimulatedNvml, index: int = 0) -> Any:
    return sim.nvmlDeviceGetHandleByIndex(index)


def place(start: int, size: int) -> Any:
    return byref(pynvml.c_nvmlGpuInstancePlacement_t(start, size))


def info(sim: SimulatedNvml, instance: Any) -> tuple[int, int]:
    found = sim.nvmlGpuInstanceGetInfo(instance)
    return found.id, found.placement.start


@dataclass
class Setup:
    """A simulated machine with a door to it. `held` are pids by device UUID, `slept_s` the pauses taken."""

    sim: SimulatedNvml
    door: NvmlDoor
    held: dict[str, list[int]]
    slept_s: list[float] = field(default_factory=list)

    @property
    def uuid(self) -> str:
        return self.door.gpus()[0].uuid

    @property
    def model(self) -> GpuModel:
        return self.door.model(self.uuid)

    def create(self, name: str, start: int) -> Instance:
        profile = self.model.profile(name)
        return self.door.create(self.uuid, profile, Placement(start, profile.size))

    def there(self) -> list[tuple[str, int, int]]:
        """(MIG profile, start, how many compute instances) of every GPU instance."""
        return [(each.profile.name, each.placement.start, len(each.ci_ids)) for each in self.door.instances(self.uuid)]


def setup(spec: str = "A100-80GB", layout: str | None = "empty", *, root: Path | None = None, **options: Any) -> Setup:
    held: dict[str, list[int]] = {}

    def clients(uuid: str) -> Sequence[int]:
        return held.get(uuid, [])

    sim = SimulatedNvml(parse_gpus(spec, layout), clients=clients, **options)
    slept_s: list[float] = []
    return Setup(sim, NvmlDoor(sim, simulated=True, root=root, sleep=slept_s.append), held, slept_s)
