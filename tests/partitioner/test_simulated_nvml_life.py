"""The simulated driver: sessions, ordered faults, lost GPUs, events, the state file."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pynvml
import pytest

from partitioner.simulated_nvml import parse_gpus
from tests.partitioner.machines import device, driver, info

# ---- sessions, faults, lost GPUs ----


def test_handles_do_not_outlive_their_session() -> None:
    sim = driver()
    gpu = device(sim)
    sim.nvmlInit()
    sim.nvmlShutdown()  # counted: the first one is still open
    assert sim.nvmlDeviceGetName(gpu)
    sim.nvmlShutdown()
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        sim.nvmlDeviceGetName(gpu)
    sim.nvmlInit()
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        sim.nvmlDeviceGetName(gpu)


def test_faults_come_at_the_call_they_were_ordered_for() -> None:
    sim = driver()
    sim.fail("nvmlDeviceGetName", pynvml.NVML_ERROR_UNKNOWN, nth=2, times=2)
    gpu = device(sim)
    outcomes = []
    for _ in range(5):
        try:
            outcomes.append(bool(sim.nvmlDeviceGetName(gpu)))
        except pynvml.NVMLError_Unknown:
            outcomes.append(False)
    assert outcomes == [True, False, False, True, True]
    assert sim.calls[-6:] == ["nvmlDeviceGetHandleByIndex"] + ["nvmlDeviceGetName"] * 5
    with pytest.raises(ValueError, match="no function"):
        sim.fail("nvmlDeviceGetNmae", pynvml.NVML_ERROR_UNKNOWN)


def test_a_fault_can_come_after_the_work_was_done_and_be_any_exception() -> None:
    sim = driver()
    sim.fail("nvmlDeviceCreateGpuInstance", pynvml.NVML_ERROR_TIMEOUT, after=True)
    with pytest.raises(pynvml.NVMLError_Timeout):
        sim.nvmlDeviceCreateGpuInstance(device(sim), 9)
    assert sim.nvmlDeviceGetGpuInstanceById(device(sim), 2)
    sim.fail("*", KeyboardInterrupt(), nth=2)
    gpu = device(sim)
    with pytest.raises(KeyboardInterrupt):
        sim.nvmlDeviceGetName(gpu)
    sim.fail("*", pynvml.NVML_ERROR_UNKNOWN, times=1000)
    sim.fail_no_more()
    assert sim.nvmlDeviceGetName(gpu)


def test_a_lost_gpu_is_lost_for_every_call_and_hides_others_from_the_search() -> None:
    sim = driver("A100-80GBx2", None)
    lost, fine = parse_gpus("A100-80GBx2", None)
    gpu = device(sim)
    sim.lose(lost.uuid)
    for call in (lambda: sim.nvmlDeviceGetMigMode(gpu), lambda: device(sim)):
        with pytest.raises(pynvml.NVMLError_GpuIsLost):
            call()
    assert sim.nvmlDeviceGetUUID(device(sim, 1)) == fine.uuid
    with pytest.raises(pynvml.NVMLError_GpuIsLost):
        sim.nvmlDeviceGetHandleByUUID(fine.uuid)


def test_its_driver_version_says_that_it_is_simulated() -> None:
    assert "simulated" in driver().nvmlSystemGetDriverVersion()


# ---- events ----


def test_events_come_to_those_that_registered_the_gpu() -> None:
    sim = driver("H100-80GBx2", "empty")
    (first, second), events = parse_gpus("H100-80GBx2", None), sim.nvmlEventSetCreate()
    both = pynvml.nvmlEventTypeXidCriticalError | pynvml.nvmlEventMigConfigChange
    assert sim.nvmlDeviceGetSupportedEventTypes(device(sim)) & both == both
    sim.nvmlDeviceRegisterEvents(device(sim), both, events)
    sim.xid(second.uuid, 48)
    sim.xid(first.uuid, 31, gi_id=2, ci_id=0)
    sim.nvmlDeviceCreateGpuInstance(device(sim), 9)
    found = [sim.nvmlEventSetWait_v2(events, 1000) for _ in range(2)]
    assert [(each.eventType, each.eventData) for each in found] == [
        (pynvml.nvmlEventTypeXidCriticalError, 31),
        (pynvml.nvmlEventMigConfigChange, 0),
    ]
    assert (found[0].gpuInstanceId, found[0].computeInstanceId, found[1].gpuInstanceId) == (2, 0, 0xFFFFFFFF)
    assert sim.nvmlDeviceGetUUID(found[0].device) == first.uuid
    with pytest.raises(pynvml.NVMLError_Timeout):
        sim.nvmlEventSetWait_v2(events, 1)
    sim.nvmlEventSetFree(events)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        sim.nvmlEventSetWait_v2(events, 1)


def test_events_are_not_for_mig_devices_and_those_of_instances_not_for_everybody() -> None:
    sim = driver("H100-80GB", None, privileged=False)
    events = sim.nvmlEventSetCreate()
    with pytest.raises(pynvml.NVMLError_NotSupported):
        sim.nvmlDeviceRegisterEvents(sim.nvmlDeviceGetMigDeviceHandleByIndex(device(sim), 0), 8, events)
    sim.nvmlDeviceRegisterEvents(device(sim), pynvml.nvmlEventTypeXidCriticalError, events)
    gpu_uuid = parse_gpus("H100-80GB", None)[0].uuid
    sim.xid(gpu_uuid, 31, gi_id=1)
    sim.xid(gpu_uuid, 79)
    assert sim.nvmlEventSetWait_v2(events, 1000).eventData == 79


def test_one_who_waits_does_not_hold_up_the_others() -> None:
    sim = driver("H100-80GB")
    events = sim.nvmlEventSetCreate()
    sim.nvmlDeviceRegisterEvents(device(sim), pynvml.nvmlEventMigConfigChange, events)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(sim.nvmlEventSetWait_v2(events, 60_000)))
    waiting.start()
    sim.nvmlDeviceCreateGpuInstance(device(sim), 9)
    waiting.join(timeout=30)
    assert found[0].eventType == pynvml.nvmlEventMigConfigChange


# ---- the state file ----


def test_a_machine_in_a_file_is_found_again_as_it_was_left(tmp_path: Path) -> None:
    spec, file = "A100-80GB,H200-141GB", tmp_path / "machine.json"
    sim = driver(spec, "empty", state_file=file)
    sim.nvmlDeviceCreateGpuInstance(device(sim), 9)  # and killed here: no compute instance
    instance = sim.nvmlDeviceCreateGpuInstance(device(sim, 1), 14)
    sim.nvmlGpuInstanceCreateComputeInstance(instance, 1)
    sim.nvmlDeviceSetMigMode(device(sim), 0)
    later = driver(spec, "empty", state_file=file)
    assert later.nvmlDeviceGetMigMode(device(later)) == [1, 0]
    assert info(later, later.nvmlDeviceGetGpuInstanceById(device(later), 2)) == (2, 4)
    mig = later.nvmlDeviceGetMigDeviceHandleByIndex(device(later, 1), 0)
    assert later.nvmlDeviceGetName(mig).endswith("MIG 2g.35gb")


def test_two_users_of_one_file_see_each_other_s_changes(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    one, other = (driver("H100-80GB", "empty", state_file=file) for _ in range(2))
    events = other.nvmlEventSetCreate()
    other.nvmlDeviceRegisterEvents(device(other), pynvml.nvmlEventMigConfigChange, events)
    for _ in range(20):
        made = one.nvmlDeviceCreateGpuInstance(device(one), 9)
        theirs = other.nvmlDeviceGetGpuInstanceById(device(other), 2)
        other.nvmlGpuInstanceDestroy(theirs)
        with pytest.raises(pynvml.NVMLError_InvalidArgument):
            one.nvmlGpuInstanceGetInfo(made)
    assert other.nvmlEventSetWait_v2(events, 1000).eventType == pynvml.nvmlEventMigConfigChange


def test_changes_that_follow_at_once_are_all_seen(tmp_path: Path) -> None:
    """Within one tick of the file system's clock, and with inodes used again."""
    file = tmp_path / "machine.json"
    one, other = (driver("H100-80GB", "empty", state_file=file) for _ in range(2))
    for _ in range(20):
        one.nvmlGpuInstanceDestroy(one.nvmlDeviceCreateGpuInstance(device(one), 19))
        made = [other.nvmlDeviceCreateGpuInstance(device(other), 9) for _ in range(2)]
        assert {info(one, one.nvmlDeviceGetGpuInstanceById(device(one), gi_id))[0] for gi_id in (1, 2)} == {1, 2}
        for each in made:
            other.nvmlGpuInstanceDestroy(each)


def test_a_file_of_another_machine_or_of_none_is_refused(tmp_path: Path) -> None:
    from partitioner.nvml_errors import NvmlUnavailableError

    file = tmp_path / "machine.json"
    driver("A100-80GB", state_file=file)
    with pytest.raises(NvmlUnavailableError, match=r"has other GPUs \(A100-80GB\)"):
        driver("H100-80GB", state_file=file)
    for broken in ("", "{}", '{"gpus": [{"model": "A100-80GB"}]}', "[]"):
        file.write_text(broken)
        with pytest.raises(NvmlUnavailableError, match="remove it to begin anew"):
            driver("A100-80GB", state_file=file)
