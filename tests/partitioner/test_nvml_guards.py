"""The real door over the simulated driver: modes, rights, lost GPUs, guards, events, measurements."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml
import pytest

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import Placement
from partitioner.nvml import NvmlDoor
from partitioner.nvml_errors import (
    GpuLostError,
    MachineBusyError,
    NoPermissionError,
    NotFoundError,
    NotSupportedError,
    NvmlError,
    StaleError,
)
from partitioner.nvml_types import EventKind, GpuEvent, SliceMemory
from partitioner.simulated_nvml import SimulatedGpu, SimulatedNvml, parse_gpus
from tests.partitioner.machines import setup

A100 = GPU_MODELS["A100-80GB"]
PASSTHROUGH = pynvml.NVML_GPU_VIRTUALIZATION_MODE_PASSTHROUGH


# ---- modes ----


def test_mig_is_switched_at_once_where_no_reset_is_needed() -> None:
    at = setup("H200-141GB", "off")
    assert at.door.gpus()[0].slices[0].mig_profile == ""
    assert at.door.set_mig_mode(at.uuid, True).done
    at.create("7g.141gb", 0)
    assert at.door.gpus()[0].slices[0].mig_profile == "7g.141gb"
    assert "nvmlDeviceSetMigMode" in at.sim.calls


def test_a_mode_that_holds_already_is_not_set_again() -> None:
    at = setup(layout=None)
    assert at.door.set_mig_mode(at.uuid, True).done
    assert "nvmlDeviceSetMigMode" not in at.sim.calls


def test_clients_that_block_a_mode_are_named_and_hidden_ones_guessed() -> None:
    """mig-parted#181, gpu-operator#118: nvidia_drm and nvidia-persistenced hold GPUs without being listed."""
    at = setup("H100-80GB", "off")
    at.held[at.uuid] = [os.getpid()]
    change = at.door.set_mig_mode(at.uuid, True)
    assert (change.done, change.status) == (False, "IN_USE")
    assert f"pid {os.getpid()}" in change.todo
    with_instances = setup("H100-80GB", None)
    assert "none of them listed" in with_instances.door.set_mig_mode(with_instances.uuid, False).todo


def test_in_a_virtual_machine_a_reboot_is_asked_for() -> None:
    """gpu-operator#1606: no reset there; say so instead of trying for ever."""
    at = setup("A100-80GB", "off", virtualization=PASSTHROUGH)
    assert at.door.set_mig_mode(at.uuid, True).todo.endswith("this virtual machine needs a reboot")


def test_mig_is_not_switched_off_on_an_ampere_gpu_passed_through() -> None:
    """dra-driver-nvidia-gpu#883, #1006, #1018: it was stuck over reboots."""
    at = setup("A100-80GB", "empty", virtualization=PASSTHROUGH)
    with pytest.raises(NotSupportedError, match="switch MIG off from the host"):
        at.door.set_mig_mode(at.uuid, False)
    assert at.door.gpus()[0].pending_mode
    hopper = setup("H100-80GB", "empty", virtualization=PASSTHROUGH)
    assert hopper.door.set_mig_mode(hopper.uuid, False).done


def test_after_a_reset_everything_is_looked_up_anew() -> None:
    at = setup("H100-80GB", None)
    at.sim.reset_gpu(at.uuid)
    assert at.there() == []
    at.create("1g.10gb", 0)
    at.sim.reboot()
    assert at.door.instances(at.uuid) == []
    (gpu,) = at.door.gpus()
    assert not gpu.mig_enabled  # InstaSlice#452: it must not be taken for one that can be cut


# ---- rights, drivers, lost GPUs ----


def test_without_privilege_one_may_look_and_not_change() -> None:
    at = setup(layout=None, privileged=False)
    (gpu,) = at.door.gpus()
    assert gpu.model == A100  # the catalogue's word: places are told to the privileged only
    assert gpu.memory_mib == 81920
    assert len(gpu.slices) == 3
    assert at.door.refusal(gpu.uuid) is None
    for call in (
        lambda: at.door.instances(gpu.uuid),
        lambda: at.door.destroy(gpu.uuid, 5),
        lambda: at.door.create(gpu.uuid, A100.profile("1g.10gb"), Placement(6, 1)),
        lambda: at.door.set_mig_mode(gpu.uuid, False),
    ):
        with pytest.raises(NoPermissionError, match="NO_PERMISSION; run as root or with CAP_SYS_ADMIN"):
            call()


def test_an_old_driver_is_helped_out_by_the_catalogue_until_mig_is_on() -> None:
    at = setup("H100-80GB", "off", old_driver=True)
    assert at.door.gpus()[0].model == GPU_MODELS["H100-80GB"]
    assert at.door.set_mig_mode(at.uuid, True).done
    before = len(at.sim.calls)
    at.door.model(at.uuid)
    assert "nvmlDeviceGetGpuInstancePossiblePlacements" in at.sim.calls[before:]


def test_figures_that_a_driver_gives_while_mig_is_off_are_asked_for_again() -> None:
    """It says then that there can be no MIG device at all."""
    small = replace(GPU_MODELS["RTX-PRO-6000-96GB"], max_mig_devices=2)
    sim = SimulatedNvml([SimulatedGpu(0, small, (), mig_enabled=False)])
    door = NvmlDoor(sim, simulated=True)
    (gpu,) = door.gpus()
    assert gpu.model == GPU_MODELS["RTX-PRO-6000-96GB"]
    door.set_mig_mode(gpu.uuid, True)
    assert door.model(gpu.uuid) == small


def test_a_driver_that_counts_too_many_instances_is_not_believed() -> None:
    """mig-parted knows an older one by heart: it was wrong about the A30."""

    class Miscounting(SimulatedNvml):
        def nvmlDeviceGetGpuInstanceProfileInfo(self, device: Any, profile: int, version: int = 2) -> Any:
            info = super().nvmlDeviceGetGpuInstanceProfileInfo(device, profile, version)
            info.instanceCount *= 2
            return info

    door = NvmlDoor(Miscounting(parse_gpus("A30-24GB", None)), simulated=True)
    (gpu,) = door.gpus()
    assert gpu.model is not None
    assert {profile.name: profile.max_instances for profile in gpu.model.profiles} == {
        "1g.6gb": 4,
        "1g.6gb+me": 2,  # it has four places, so that the wrong figure cannot be told
        "2g.12gb": 2,
        "2g.12gb+me": 2,
        "4g.24gb": 1,
    }
    assert len(door.instances(gpu.uuid)) == 3


def test_a_gpu_that_is_reset_while_it_is_read_spoils_no_later_reading() -> None:
    """A handle that went stale and the end of a list are the same code."""

    class Racing(SimulatedNvml):
        def nvmlDeviceGetGpuInstanceProfileInfo(self, device: Any, profile: int, version: int = 2) -> Any:
            if profile == 12 and not self.calls.count("nvmlEventSetCreate"):
                self.nvmlEventSetCreate()  # leaves a trace: only once
                self.reset_gpu(parse_gpus("RTX-PRO-6000-96GB", None)[0].uuid)
            return super().nvmlDeviceGetGpuInstanceProfileInfo(device, profile, version)

    door = NvmlDoor(Racing(parse_gpus("RTX-PRO-6000-96GB", "empty")), simulated=True)
    with pytest.raises(StaleError):
        door.gpus()
    assert door.gpus()[0].model == GPU_MODELS["RTX-PRO-6000-96GB"]


def test_a_wheel_or_driver_without_a_function_is_an_unsupported_one() -> None:
    class Old(SimulatedNvml):
        """A driver that has the first version of the profile structs only, without names."""

        def nvmlDeviceGetGpuInstanceProfileInfo(self, device: Any, profile: int, version: int = 2) -> Any:
            if version == 2:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
            return super().nvmlDeviceGetGpuInstanceProfileInfo(device, profile, version)

    door = NvmlDoor(Old(parse_gpus("H200-141GB", "empty")), simulated=True)
    assert door.model(door.gpus()[0].uuid) == GPU_MODELS["H200-141GB"]
    older = setup()
    older.sim.fail("nvmlDeviceGetMigMode", pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, times=100)
    assert older.door.gpus()[0].model is None


def test_a_lost_gpu_does_not_take_the_others_with_it() -> None:
    at = setup("A100-80GBx3", None)
    first, second, third = at.door.gpus()
    at.sim.lose(second.uuid)
    assert [gpu.index for gpu in at.door.gpus()] == [0, 2]
    assert at.door.readings(third.uuid).memory_total_bytes
    at.door.destroy(third.uuid, 5)
    with pytest.raises(GpuLostError, match="see dmesg for its Xid"):
        at.door.readings(second.uuid)
    assert at.door.gpu(first.uuid) == first


def test_pynvml_s_errors_do_not_leave_the_door() -> None:
    codes = {value for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_")}
    for code in codes:
        at = setup()
        at.sim.fail("nvmlSystemGetDriverVersion", code)
        with pytest.raises(NvmlError) as caught:
            at.door.driver_version()
        assert caught.value.call == "nvmlSystemGetDriverVersion"
        assert getattr(pynvml, f"NVML_ERROR_{caught.value.code}") == code
        assert caught.value.__cause__ is caught.value.__context__ is None


# ---- guards ----


def test_foreign_processes_are_a_reason_to_keep_off_and_our_own_are_none() -> None:
    at = setup("A100-80GBx2", None)
    first, second = at.door.gpus()
    at.held[first.slices[1].device_uuid] = [os.getpid(), 1]
    reason = at.door.refusal(first.uuid, own_pids={1})
    assert reason is not None
    assert f"is used by pid {os.getpid()} (" in reason
    assert "pid 1 " not in reason
    assert at.door.refusal(first.uuid, own_pids={1, os.getpid()}) is None
    assert at.door.refusal(second.uuid) is None
    (found, _) = sorted(at.door.processes(first.uuid), key=lambda each: -each.pid)
    assert (found.pid, found.gi_id) == (os.getpid(), first.slices[1].gi_id)


def test_a_machine_that_somebody_else_manages_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "usr/local/vgpu").mkdir(parents=True)
    (tmp_path / "usr/local/vgpu/libvgpu.so").touch()
    at = setup(root=tmp_path)
    assert str(at.door.refusal(at.uuid)).startswith("HAMi manages MIG on this machine")


def test_a_vgpu_guest_is_left_alone() -> None:
    at = setup(virtualization=pynvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU)
    assert "is a vGPU: it is cut on the host" in str(at.door.refusal(at.uuid))


def test_only_one_at_a_time_changes_gpus(tmp_path: Path) -> None:
    sim = SimulatedNvml(parse_gpus("A100-80GB", None))
    doors = [NvmlDoor(sim, simulated=True, lock_path=tmp_path / "lock") for _ in range(2)]
    with doors[0].exclusive():
        for door in doors:
            with pytest.raises(MachineBusyError, match="wait until it has finished"), door.exclusive():
                pass
    with doors[1].exclusive():
        pass
    with NvmlDoor(sim).exclusive():  # no lock file: among this door's threads only
        pass


# ---- events and measurements ----


def test_events_tell_what_happened_and_where() -> None:
    at = setup("H100-80GBx2", None)
    first, second = at.door.gpus()
    with at.door.events() as events:
        assert events.wait(0.001) is None
        at.sim.xid(second.uuid, 79)
        at.sim.xid(first.uuid, 31, gi_id=5, ci_id=0)
        at.door.destroy(first.uuid, 13)
        found = [events.wait(1.0) for _ in range(3)]
    assert found == [
        GpuEvent(EventKind.XID, second.uuid, 79, None, None),
        GpuEvent(EventKind.XID, first.uuid, 31, 5, 0),
        GpuEvent(EventKind.MIG_CONFIG, first.uuid, 0, None, None),
    ]


def test_a_lost_gpu_ends_the_waiting() -> None:
    at = setup("H100-80GB")
    with at.door.events() as events:
        uuid = at.uuid
        at.sim.lose(uuid)
        assert events.wait(1.0) == GpuEvent(EventKind.XID, uuid, 79, None, None)
        with pytest.raises(GpuLostError):
            events.wait(1.0)


def test_gpm_measures_where_it_exists() -> None:
    now = [0.0]
    at = setup("H100-80GB,A100-80GB", None, clock=lambda: now[0])
    hopper, ampere = at.door.gpus()
    for gpu in (hopper, ampere):
        at.sim.set_activity(gpu.uuid, 5, 62.5)

    def sleep(seconds: float) -> None:
        now[0] += seconds

    door = NvmlDoor(at.sim, simulated=True, sleep=sleep)
    assert door.utilization(hopper.uuid) == {1: None, 5: 0.625, 13: None}
    assert door.utilization(ampere.uuid) == {1: None, 5: None, 13: None}
    assert now[0] > 0.1


def test_readings_of_memory_are_of_the_slice() -> None:
    at = setup("H100-80GB", None)
    (gpu,) = at.door.gpus()
    memory = at.door.memory(gpu.slices[1].device_uuid)
    assert memory == SliceMemory(20096 * 1024 * 1024, None)  # simulated: how much is used is not made up
    with pytest.raises(NotFoundError):
        at.door.memory("MIG-1")
