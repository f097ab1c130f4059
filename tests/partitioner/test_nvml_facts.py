"""The ten facts that stand-ins for NVML usually hide, at the door."""

from __future__ import annotations

from typing import Any

import pynvml
import pytest

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import Placement, parse_layout
from partitioner.nvml import NvmlDoor
from partitioner.nvml_errors import (
    NoRoomError,
)
from partitioner.nvml_types import SliceMemory
from partitioner.simulated_nvml import SimulatedNvml, parse_gpus
from tests.partitioner.machines import setup

A100 = GPU_MODELS["A100-80GB"]


def test_fact_1_door_uses_ids_where_ids_belong() -> None:
    """On this board no id is its enum, and some are the enum of another MIG profile."""
    at = setup("RTX-PRO-6000-96GB")
    assert {profile.name: (profile.enum, profile.profile_id) for profile in at.model.profiles}["4g.96gb"] == (3, 0)
    at.create("1g.24gb", 9)
    at.create("2g.48gb", 0)
    assert at.there() == [("2g.48gb", 0, 1), ("1g.24gb", 9, 1)]


@pytest.mark.parametrize("name", sorted(GPU_MODELS))
def test_fact_2_door_learns_the_grid_from_the_driver(name: str) -> None:
    assert setup(name).model == GPU_MODELS[name]
    assert setup(name, "off").model == GPU_MODELS[name]


def test_fact_3_door_never_takes_success_at_its_word() -> None:
    at = setup("A100-80GB", "off")
    change = at.door.set_mig_mode(at.uuid, True)
    assert (change.done, change.current, change.pending, change.status) == (False, False, True, "RESET_REQUIRED")
    assert "needs a reset: nvidia-smi --gpu-reset" in change.todo
    (gpu,) = at.door.gpus()
    assert (gpu.mig_enabled, gpu.pending_mode, gpu.needs_reset) == (False, True, True)
    at.sim.reset_gpu(at.uuid)
    assert at.door.set_mig_mode(at.uuid, True).done
    assert not at.door.gpus()[0].needs_reset


def test_fact_4_door_places_by_itself_so_that_order_does_not_matter() -> None:
    at = setup()
    for placed in reversed(parse_layout("3g.40gb+2g.20gb+1g.10gb+1g.10gb", A100)):
        at.door.create(at.uuid, placed.profile, placed.placement)
    assert len(at.there()) == 4
    assert "nvmlDeviceCreateGpuInstance" not in at.sim.calls


def test_fact_5_door_passes_placements_by_reference() -> None:
    made = setup().create("3g.40gb", 4)  # the simulated driver raises for anything else
    assert (made.placement, made.gi_id) == (Placement(4, 4), 2)


def test_fact_6_door_sees_instances_that_no_list_of_devices_has() -> None:
    at = setup()
    at.sim.nvmlDeviceCreateGpuInstance(at.sim.nvmlDeviceGetHandleByIndex(0), 9)
    assert at.door.gpus()[0].slices == ()
    (orphan,) = at.door.instances(at.uuid)
    assert (orphan.profile.name, orphan.placement.start, orphan.ci_ids, orphan.device_uuid) == ("3g.40gb", 4, (), None)
    at.door.destroy(at.uuid, orphan.gi_id)
    assert at.there() == []


def test_fact_7_door_tells_a_taken_place_from_a_full_gpu() -> None:
    at = setup(layout="3g.40gb+3g.40gb")
    with pytest.raises(NoRoomError, match=r"1g.10gb@5 would overlap 3g.40gb@4 \(GPU instance 2\)"):
        at.create("1g.10gb", 5)
    full = setup(layout="4g.40gb+1g.10gb+1g.10gb+1g.20gb")
    with pytest.raises(NoRoomError, match=r"1g.10gb@6 would overlap 1g.20gb@6"):
        full.create("1g.10gb", 6)
    stranded = setup(layout="4g.40gb+2g.20gb+1g.20gb")
    stranded.door.destroy(stranded.uuid, 5)
    with pytest.raises(NoRoomError, match=r"would overlap 1g.20gb@6"):
        stranded.create("3g.40gb", 4)


def test_fact_8_door_survives_that_ids_and_uuids_come_again() -> None:
    at = setup(layout="2g.20gb+1g.10gb+1g.10gb+3g.40gb")
    old = at.door.instances(at.uuid)[1]
    at.door.destroy(at.uuid, old.gi_id)
    assert [each.gi_id for each in at.door.gpus()[0].slices] == [3, 10, 2]  # past the hole
    new = at.create("1g.10gb", old.placement.start)
    assert new == old
    assert at.door.memory(str(new.device_uuid)) == SliceMemory(9728 * 1024 * 1024, None)


def test_fact_9_door_calls_profiles_what_the_driver_calls_them() -> None:
    class Early(SimulatedNvml):
        """A GB200 with the driver that called 1g.23gb 1g.24gb, and gave it less memory."""

        def nvmlDeviceGetGpuInstanceProfileInfo(self, device: Any, profile: int, version: int = 2) -> Any:
            info = super().nvmlDeviceGetGpuInstanceProfileInfo(device, profile, version)
            if profile == 0:
                info.name, info.memorySizeMB = "MIG 1g.24gb", 20480
            return info

    door = NvmlDoor(Early(parse_gpus("GB200-186GB", "empty")), simulated=True)
    uuid = door.gpus()[0].uuid
    profile = door.model(uuid).profile("1g.24gb")
    assert (profile.enum, profile.memory_mib) == (0, 20480)
    assert door.create(uuid, profile, Placement(3, 1)).profile.name == "1g.24gb"


def test_fact_10_door_says_unknown_where_nothing_is_measured() -> None:
    at = setup("H100-80GB", None)
    readings = at.door.readings(at.uuid)
    assert (readings.utilization, readings.power_w, readings.energy_j) == (None, None, None)
    assert at.door.utilization(at.uuid) == {1: None, 5: None, 13: None}


def test_fact_10_energy_is_of_the_whole_gpu_and_moves_in_steps() -> None:
    now = [0.0]
    at = setup("H100-80GB", None, clock=lambda: now[0])
    at.sim.draw(at.uuid, 200.0)
    found = []
    for now[0] in (0.05, 0.15, 0.24, 1.0):
        found.append(at.door.energy_j(at.uuid))
    assert found == pytest.approx([0.0, 25.0, 25.0, 200.0])
    at.sim.draw(at.uuid, 100.0)
    now[0] = 2.0
    assert at.door.energy_j(at.uuid) == pytest.approx(300.0)
    device = at.sim.nvmlDeviceGetMigDeviceHandleByIndex(at.sim.nvmlDeviceGetHandleByIndex(0), 0)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        at.sim.nvmlDeviceGetTotalEnergyConsumption(device)
