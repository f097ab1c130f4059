from __future__ import annotations

import pynvml
import pytest

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import IllegalLayoutError
from partitioner.nvml import NvmlDoor, NvmlUnavailableError
from partitioner.nvml_errors import NvmlError
from partitioner.simulated_nvml import SimulatedNvml, parse_gpus


def door(spec: str, layout: str | None = None) -> NvmlDoor:
    return NvmlDoor(SimulatedNvml(parse_gpus(spec, layout)), simulated=True)


def test_a_simulated_gpu_is_discovered_with_its_slices() -> None:
    (gpu,) = door("A100-80GB", "3g.40gb+2g.20gb+1g.10gb+1g.10gb").gpus()
    assert gpu.simulated
    assert gpu.mig_enabled
    assert [(each.mig_profile, each.start, each.gpcs) for each in gpu.slices] == [
        ("2g.20gb", 0, 2),
        ("1g.10gb", 2, 1),
        ("1g.10gb", 3, 1),
        ("3g.40gb", 4, 3),  # at 0 it would leave only three slots with a legal start
    ]
    assert len({each.device_uuid for each in gpu.slices}) == 4
    assert len({each.name for each in gpu.slices}) == 4


def test_gpu_instance_ids_are_those_of_the_captures() -> None:
    """8-wide boards: 7g is 0, 3g and 4g are 1 or 2, 2g is 3 + start / 2, 1g is 7 + start."""
    (gpu,) = door("A100-80GB", "4g.40gb+2g.20gb+1g.10gb").gpus()
    assert [each.gi_id for each in gpu.slices] == [1, 5, 13]


def test_several_gpus_and_the_same_uuids_each_time() -> None:
    first, again = door("H100-80GBx4").gpus(), door("H100-80GBx4").gpus()
    assert [gpu.index for gpu in first] == [0, 1, 2, 3]
    assert len({gpu.uuid for gpu in first}) == 4
    assert first == again


@pytest.mark.parametrize("name", sorted(GPU_MODELS))
def test_every_gpu_of_the_catalogue_has_a_default_layout(name: str) -> None:
    (gpu,) = door(name).gpus()
    assert len(gpu.slices) == 3
    assert gpu.slices[0].grid == GPU_MODELS[name].memory_slices


def test_what_a_simulation_does_not_measure_is_unknown() -> None:
    opened = door("A100-80GB")
    readings = opened.readings(opened.gpus()[0].uuid)
    assert readings.memory_total_bytes == 80 * 1024**3
    assert (readings.utilization, readings.power_w, readings.power_limit_w, readings.energy_j) == (None,) * 4


@pytest.mark.parametrize("spec", ["A100", "H100-80GBx", "x4", ""])
def test_an_unknown_gpu_is_refused_naming_those_there_are(spec: str) -> None:
    with pytest.raises(IllegalLayoutError, match="A100-80GB"):
        parse_gpus(spec, None)


def test_without_a_driver_the_message_says_what_to_do() -> None:
    class NoDriver(SimulatedNvml):
        def nvmlInit(self) -> None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    with pytest.raises(NvmlUnavailableError, match="--gpu sim:A100-80GB"):
        NvmlDoor(NoDriver([]))


class TwoHoles(SimulatedNvml):
    """A driver that lists its MIG devices at indices 1, 3, 5, as after others were destroyed."""

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: object, index: int) -> object:
        if index % 2 == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return super().nvmlDeviceGetMigDeviceHandleByIndex(handle, index // 2)  # type: ignore[arg-type]


def test_holes_in_the_enumeration_are_passed_over() -> None:
    (gpu,) = NvmlDoor(TwoHoles(parse_gpus("A100-80GB", None))).gpus()
    assert len(gpu.slices) == 3


class MigOff(SimulatedNvml):
    def nvmlDeviceGetMigMode(self, handle: object) -> list[int]:
        return [0, 0]


class NoMig(SimulatedNvml):
    def nvmlDeviceGetMigMode(self, handle: object) -> list[int]:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.mark.parametrize("driver", [MigOff, NoMig])
def test_a_gpu_without_mig_is_served_whole(driver: type[SimulatedNvml]) -> None:
    (gpu,) = NvmlDoor(driver(parse_gpus("A100-80GB", None))).gpus()
    (whole,) = gpu.slices
    assert (whole.device_uuid, whole.gi_id, whole.name) == (gpu.uuid, None, "gpu0")


class Unprivileged(SimulatedNvml):
    def nvmlDeviceGetGpuInstanceById(self, handle: object, gi_id: int) -> object:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)


def test_without_privilege_slices_stand_side_by_side() -> None:
    (gpu,) = NvmlDoor(Unprivileged(parse_gpus("A100-80GB", None))).gpus()
    assert [(each.start, each.size) for each in gpu.slices] == [(0, 4), (4, 2), (6, 1)]


def test_a_call_outside_a_session_fails_as_it_does_in_the_driver() -> None:
    opened = door("A100-80GB")
    opened.close()
    with pytest.raises(NvmlError, match="session was closed"):
        opened.gpus()
