"""The real door over the simulated driver: what it changes, what it refuses, and what it leaves when things fail."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pynvml
import pytest

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import GpuModel, Placement, parse_layout
from partitioner.nvml import NvmlDoor
from partitioner.nvml_errors import (
    GpuLostError,
    InUseError,
    MachineBusyError,
    NoPermissionError,
    NoRoomError,
    NotFoundError,
    NotSupportedError,
    NvmlError,
    StaleError,
)
from partitioner.nvml_types import EventKind, GpuEvent, Instance, SliceMemory
from partitioner.simulated_nvml import SimulatedGpu, SimulatedNvml, parse_gpus

A100 = GPU_MODELS["A100-80GB"]
PASSTHROUGH = pynvml.NVML_GPU_VIRTUALIZATION_MODE_PASSTHROUGH


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


# ---- the ten facts ----


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


# ---- creating and destroying ----


def test_a_slice_is_made_with_all_its_slices_and_told_as_it_is() -> None:
    at = setup("H100-80GB")
    made = at.create("3g.40gb", 0)
    assert at.door.instances(at.uuid) == [made]
    (there,) = at.door.gpus()[0].slices
    assert (there.device_uuid, there.mig_profile, there.gpcs) == (made.device_uuid, "3g.40gb", 3)


def test_destroying_what_is_gone_is_done() -> None:
    at = setup(layout=None)
    for _ in range(2):
        at.door.destroy(at.uuid, 5)
    assert [gi_id for _, gi_id, _ in at.there()] == [0, 6]
    off = setup(layout="off")
    off.door.destroy(off.uuid, 5)  # MIG was switched off behind us
    with pytest.raises(NotFoundError, match="this machine has no GPU GPU-1"):
        off.door.destroy("GPU-1", 5)


def test_in_use_that_passes_is_waited_for() -> None:
    at = setup(layout=None)
    at.sim.fail("nvmlComputeInstanceDestroy", pynvml.NVML_ERROR_IN_USE, times=3)
    at.sim.fail("nvmlGpuInstanceDestroy", pynvml.NVML_ERROR_IN_USE, times=2)
    at.door.destroy(at.uuid, 5)
    assert at.slept_s == [0.05, 0.1, 0.2, 0.4, 0.8]
    assert [start for _, start, _ in at.there()] == [0, 6]


def test_in_use_that_does_not_pass_names_the_process() -> None:
    at = setup(layout=None)
    _, busy, other = at.door.instances(at.uuid)
    at.held[str(busy.device_uuid)] = [os.getpid()]
    at.held[str(other.device_uuid)] = [1]
    with pytest.raises(
        InUseError, match=rf"GPU instance {busy.gi_id} of .* is held by pid {os.getpid()} \([^,]*\); end it"
    ):
        at.door.destroy(at.uuid, busy.gi_id)
    assert sum(at.slept_s) == pytest.approx(10.0)
    assert max(at.slept_s) == 1.0
    assert len(at.there()) == 3


def test_in_use_by_nobody_that_is_listed_hints_at_who_holds_gpus_secretly() -> None:
    """DCGM was seen to leak file descriptors: DCGM#276."""
    at = setup(layout=None)
    at.sim.fail("nvmlGpuInstanceDestroy", pynvml.NVML_ERROR_IN_USE, times=1000)
    with pytest.raises(InUseError, match=r"fuser -v /dev/nvidia\*; DCGM and its exporter"):
        at.door.destroy(at.uuid, 5)
    assert ("2g.20gb", 4, 0) in at.there()  # without its compute instance now, and still seen
    at.sim.fail_no_more()
    at.door.destroy(at.uuid, 5)
    assert len(at.there()) == 2


@pytest.mark.parametrize(
    "call",
    ["nvmlGpuInstanceGetComputeInstanceProfileInfo", "nvmlGpuInstanceCreateComputeInstance", "nvmlGpuInstanceGetInfo"],
)
def test_a_gpu_instance_is_rolled_back_by_its_id_when_it_gets_no_compute_instance(call: str) -> None:
    """dra-driver-nvidia-gpu#1452: the roll-back looked for a MIG device and found none."""
    at = setup()
    at.door.instances(at.uuid)
    at.sim.fail(call, pynvml.NVML_ERROR_UNKNOWN)
    with pytest.raises(NvmlError, match=f"{call}: UNKNOWN"):
        at.create("2g.20gb", 2)
    assert at.there() == []


def test_what_cannot_be_rolled_back_is_told() -> None:
    at = setup()
    at.sim.fail("nvmlGpuInstanceCreateComputeInstance", pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES)
    at.sim.fail("nvmlGpuInstanceDestroy", pynvml.NVML_ERROR_UNKNOWN, times=100)
    with pytest.raises(NoRoomError, match="without compute instance is left behind, since nvmlGpuInstanceDestroy"):
        at.create("2g.20gb", 2)
    assert at.there() == [("2g.20gb", 2, 0)]


def test_an_error_that_comes_after_the_work_was_done_leaves_nothing() -> None:
    at = setup(layout="4g.40gb")
    at.sim.nvmlDeviceCreateGpuInstance(at.sim.nvmlDeviceGetHandleByIndex(0), 19)  # an orphan that is not ours
    at.sim.fail("nvmlDeviceCreateGpuInstanceWithPlacement", pynvml.NVML_ERROR_TIMEOUT, after=True)
    with pytest.raises(NvmlError, match="TIMEOUT"):
        at.create("2g.20gb", 4)
    assert at.there() == [("4g.40gb", 0, 1), ("1g.10gb", 6, 0)]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_IN_USE, pynvml.NVML_ERROR_INVALID_ARGUMENT]
)
def test_a_fault_at_any_call_of_a_creation_leaves_a_whole_slice_or_none(code: int, after: bool) -> None:
    """One passing fault at each call in turn; the slice beside it is never touched."""
    outcomes = set()
    for nth in range(1, 100):
        at = setup(layout="4g.40gb")
        profile, uuid = at.model.profile("2g.20gb"), at.uuid
        before = len(at.sim.calls)
        at.sim.fail("*", code, nth=nth, after=after)
        try:
            at.door.create(uuid, profile, Placement(4, 2))
        except NvmlError:
            outcomes.add("refused")
            rest: list[tuple[str, int, int]] = []
        else:
            outcomes.add("made")
            rest = [("2g.20gb", 4, 1)]
        done = len(at.sim.calls) - before < nth
        at.sim.fail_no_more()
        assert at.there() == [("4g.40gb", 0, 1), *rest]
        if done:
            break
    assert outcomes == {"refused", "made"}


@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_IN_USE, pynvml.NVML_ERROR_INVALID_ARGUMENT]
)
def test_after_a_fault_at_any_call_of_a_destruction_it_can_be_done_again(code: int) -> None:
    for nth in range(1, 100):
        at = setup(layout=None)
        uuid, before = at.uuid, len(at.sim.calls)
        at.sim.fail("*", code, nth=nth)
        try:
            at.door.destroy(uuid, 5)
        except NvmlError:
            at.door.destroy(uuid, 5)
        done = len(at.sim.calls) - before < nth
        at.sim.fail_no_more()
        assert [start for _, start, _ in at.there()] == [0, 6]
        if done:
            return
    pytest.fail("the fault never went beyond the last call")


def test_two_of_the_same_size_and_slices_are_told_apart_by_their_engines() -> None:
    """InstaSlice#478: asked for 2g.12gb of an A30, it made 2g.12gb+me."""
    at = setup("A30-24GB")
    at.create("2g.12gb", 0)
    at.create("2g.12gb+me", 2)
    assert [(name, start) for name, start, _ in at.there()] == [("2g.12gb", 0), ("2g.12gb+me", 2)]


def test_one_name_means_different_profiles_on_different_gpus() -> None:
    """mig-parted#157: 1g.10gb of an A100-40GB has double memory; of an A100-80GB it is the plain one."""
    at = setup("A100-40GB,A100-80GB")
    small, large = at.door.gpus()
    for gpu, size, enum in [(small, 2, 9), (large, 1, 0)]:
        assert gpu.model is not None
        profile = gpu.model.profile("1g.10gb")
        made = at.door.create(gpu.uuid, profile, profile.placements[1])
        assert (made.profile.enum, made.placement.size) == (enum, size)


def test_instances_split_by_others_are_shown_and_destroyed_whole() -> None:
    at = setup("H100-80GB")
    gpu = at.sim.nvmlDeviceGetHandleByIndex(0)
    instance = at.sim.nvmlDeviceCreateGpuInstance(gpu, 9)
    for _ in range(2):
        at.sim.nvmlGpuInstanceCreateComputeInstance(instance, 0)
    at.sim.nvmlGpuInstanceCreateComputeInstance(instance, 7)
    (there,) = at.door.instances(at.uuid)
    assert there.ci_ids == (0, 1, 2)
    slices = at.door.gpus()[0].slices
    assert [each.mig_profile for each in slices] == ["1c.3g.40gb"] * 3
    assert len({each.name for each in slices}) == 3
    at.door.destroy(at.uuid, there.gi_id)
    assert at.there() == []


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
