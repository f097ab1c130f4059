"""Opening the GPUs that the settings name: real ones through NVML, or simulated ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from partitioner.geometry import IllegalLayoutError
from partitioner.nvml import NvmlDoor, real_gpus
from partitioner.nvml_errors import NvmlUnavailableError
from partitioner.simulated_nvml import SimulatedNvml, parse_gpus

DEFAULT_SIMULATION = "A100-80GB"


class StartError(RuntimeError):
    """The daemon cannot start. The message says why and what to do."""


def open_gpus(
    gpu: str, layout: str | None, state_file: Path | None = None, pids_on: Callable[[str], list[int]] = lambda _: []
) -> NvmlDoor:
    """`nvml`, `sim:A100-80GB`, `sim:A100-80GBx4`, or `auto`: NVML where there is a driver. Raises StartError.

    For simulated ones: the file that they live on in, and who holds a device.
    """
    try:
        if gpu in ("nvml", "auto"):
            try:
                door = real_gpus()
            except NvmlUnavailableError:
                if gpu == "nvml":
                    raise
                return _simulated(DEFAULT_SIMULATION, layout, state_file, pids_on)
            if layout is not None:
                door.close()
                raise StartError("--layout cuts simulated GPUs only; a real one is cut with migserve layout apply")
            return door
        kind, _, spec = gpu.partition(":")
        if kind != "sim" or not spec:
            raise StartError(f"--gpu {gpu!r} is not known; use nvml, sim:A100-80GB, sim:A100-80GBx4 or auto")
        return _simulated(spec, layout, state_file, pids_on)
    except (NvmlUnavailableError, IllegalLayoutError) as error:
        raise StartError(str(error)) from error


def _simulated(spec: str, layout: str | None, state_file: Path | None, pids_on: Callable[[str], list[int]]) -> NvmlDoor:
    lock_path = state_file.with_name(f"{state_file.name}.lock") if state_file else None
    nvml = SimulatedNvml(parse_gpus(spec, layout), clients=pids_on, state_file=state_file)
    return NvmlDoor(nvml, simulated=True, lock_path=lock_path)
