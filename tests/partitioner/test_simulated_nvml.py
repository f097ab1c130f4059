"""The simulated driver by itself, called as pynvml is: what it refuses, and what it lets happen.

The ten facts are those that stand-ins for NVML usually hide.
"""

from __future__ import annotations

import ctypes
import inspect
from ctypes import byref, c_uint
from typing import Any

import pynvml
import pytest

from partitioner.simulated_calls import Session
from partitioner.simulated_events import EventCalls
from partitioner.simulated_instances import InstanceCalls
from partitioner.simulated_machine import WouldCrashError
from partitioner.simulated_nvml import SimulatedNvml, parse_gpus
from tests.partitioner.machines import NO_ROOM, device, driver, info, place

CALLS = sorted(
    {name for each in (SimulatedNvml, InstanceCalls, EventCalls) for name in vars(each) if name[:4] == "nvml"}
)

# ---- the same face as pynvml ----


@pytest.mark.parametrize("name", CALLS)
def test_every_function_has_the_parameters_of_pynvml_s(name: str) -> None:
    def shape(function: Any) -> list[tuple[str, Any]]:
        return [(each.name, each.default) for each in inspect.signature(function).parameters.values()]

    assert shape(getattr(driver(), name)) == shape(getattr(pynvml, name))


def test_constants_structs_and_exceptions_are_pynvml_s_own() -> None:
    sim = driver()
    assert sim.NVML_DEVICE_MIG_ENABLE == pynvml.NVML_DEVICE_MIG_ENABLE
    assert sim.NVMLError_NotFound is pynvml.NVMLError_NotFound
    assert sim.c_nvmlGpuInstancePlacement_t is pynvml.c_nvmlGpuInstancePlacement_t
    with pytest.raises(AttributeError, match="the simulated driver has no nvmlDeviceGetTemperature"):
        _ = sim.nvmlDeviceGetTemperature


def test_structs_are_those_that_pynvml_returns() -> None:
    sim = driver(layout="3g.40gb")
    gpu = device(sim)
    profile = sim.nvmlDeviceGetGpuInstanceProfileInfo(gpu, 2)
    assert type(profile) is pynvml.c_nvmlGpuInstanceProfileInfo_v2_t
    assert (profile.version, profile.name, profile.memorySizeMB) == (0x02000098, "MIG 3g.40gb", 40192)
    assert type(sim.nvmlDeviceGetGpuInstanceProfileInfo(gpu, 2, 1)) is pynvml.c_nvmlGpuInstanceProfileInfo_t
    with pytest.raises(pynvml.NVMLError_FunctionNotFound):
        sim.nvmlDeviceGetGpuInstanceProfileInfo(gpu, 2, version=3)
    instance = sim.nvmlDeviceGetGpuInstanceById(gpu, 1)
    part = sim.nvmlGpuInstanceGetComputeInstanceById(instance, 0)
    for found, kind in [
        (gpu, pynvml.c_nvmlDevice_t),
        (instance, pynvml.c_nvmlGpuInstance_t),
        (part, pynvml.c_nvmlComputeInstance_t),
        (sim.nvmlGpuInstanceGetInfo(instance), pynvml.c_nvmlGpuInstanceInfo_t),
        (sim.nvmlComputeInstanceGetInfo_v2(part), pynvml.c_nvmlComputeInstanceInfo_t),
        (
            sim.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, 2, 0),
            pynvml.c_nvmlComputeInstanceProfileInfo_v2_t,
        ),
        (sim.nvmlDeviceGetAttributes_v2(sim.nvmlComputeInstanceGetInfo_v2(part).device), pynvml.c_nvmlDeviceAttributes),
        (sim.nvmlDeviceGetPciInfo(gpu), pynvml.nvmlPciInfo_t),
        (sim.nvmlDeviceIsMigDeviceHandle(gpu), c_uint),
    ]:
        assert type(found) is kind


def test_handles_compare_by_identity_and_cannot_be_keys() -> None:
    sim = driver()
    first, second = device(sim), device(sim)
    assert first != second
    assert ctypes.cast(first, ctypes.c_void_p).value == ctypes.cast(second, ctypes.c_void_p).value
    with pytest.raises(TypeError, match="unhashable"):
        hash(first)


# ---- the ten facts ----


def test_fact_1_the_enum_asks_for_a_profile_and_its_id_goes_everywhere_else() -> None:
    sim = driver("RTX-PRO-6000-96GB")
    gpu = device(sim)
    ids = {}
    for enum in range(64):
        try:
            ids[enum] = sim.nvmlDeviceGetGpuInstanceProfileInfo(gpu, enum).id
        except pynvml.NVMLError_NotSupported:
            continue
        except pynvml.NVMLError_InvalidArgument:
            break
    assert ids == {0: 14, 1: 5, 3: 0, 7: 21, 10: 47, 11: 35, 12: 32, 13: 67, 14: 66, 15: 65, 16: 64}
    assert sim.nvmlDeviceGetGpuInstanceProfileInfoById(gpu, 47).name == "MIG 1g.24gb+gfx"
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        sim.nvmlDeviceCreateGpuInstance(gpu, 1)  # an enum that is no id
    # An enum that happens to be an id makes something else: 0 is 1g as an enum, and 4g as an id.
    assert sim.nvmlGpuInstanceGetInfo(sim.nvmlDeviceCreateGpuInstance(gpu, 0)).placement.size == 12


@pytest.mark.parametrize(
    ("spec", "profile_id", "places"),
    [
        ("A100-80GB", 9, [(0, 4), (4, 4)]),
        ("A100-80GB", 5, [(0, 4)]),
        ("A100-80GB", 15, [(0, 2), (2, 2), (4, 2), (6, 2)]),
        ("A100-80GB", 20, [(start, 1) for start in range(7)]),  # one instance, seven places
        ("A30-24GB", 0, [(0, 4)]),
        ("RTX-PRO-6000-96GB", 14, [(0, 3), (3, 3), (6, 3), (9, 3)]),
    ],
)
def test_fact_2_sizes_on_the_grid_do_not_follow_from_the_name(
    spec: str, profile_id: int, places: list[tuple[int, int]]
) -> None:
    sim = driver(spec)
    ask = sim.nvmlDeviceGetGpuInstancePossiblePlacements
    count = c_uint(0)
    assert ask(device(sim), profile_id, None, byref(count)) == pynvml.NVML_SUCCESS
    assert count.value == len(places)
    array = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
    ask(device(sim), profile_id, array, byref(count))
    assert [(each.start, each.size) for each in array] == places
    short = (pynvml.c_nvmlGpuInstancePlacement_t * 0)()
    with pytest.raises(pynvml.NVMLError_InsufficientSize):
        ask(device(sim), profile_id, short, byref(count))


def test_fact_3_set_mig_mode_succeeds_and_does_nothing() -> None:
    sim = driver("A100-80GB", "off")
    assert sim.nvmlDeviceSetMigMode(device(sim), 1) == pynvml.NVML_ERROR_RESET_REQUIRED
    assert sim.nvmlDeviceGetMigMode(device(sim)) == [0, 1]
    with pytest.raises(pynvml.NVMLError_NotSupported):
        sim.nvmlDeviceCreateGpuInstance(device(sim), 19)
    sim.reset_gpu(parse_gpus("A100-80GB", "off")[0].uuid)
    assert sim.nvmlDeviceGetMigMode(device(sim)) == [1, 1]


@pytest.mark.parametrize(
    ("profile_ids", "gi_ids"),
    [
        # Transcripts of the MIG guide, an A100.
        ([19, 14, 5], [13, 5, 1]),
        ([19, 19, 14, 9], [13, 11, 3, None]),
        ([9, 19, 14, 19], [2, 7, 4, 8]),
        ([14, 19, 19, 19, 19, 19], [5, 13, 7, 8, 9, 10]),
        ([19] * 7, [13, 11, 12, 7, 8, 9, 10]),
    ],
)
def test_fact_4_left_to_the_driver_a_set_that_fits_can_fail_by_order(
    profile_ids: list[int], gi_ids: list[int | None]
) -> None:
    sim = driver()
    made: list[int | None] = []
    for profile_id in profile_ids:
        try:
            made.append(info(sim, sim.nvmlDeviceCreateGpuInstance(device(sim), profile_id))[0])
        except NO_ROOM:
            made.append(None)
    assert made == gi_ids


def test_fact_5_a_placement_that_is_no_reference_would_crash() -> None:
    sim = driver()
    by_value = pynvml.c_nvmlGpuInstancePlacement_t(4, 4)
    for wrong in (by_value, (4, 4), None, byref(c_uint(4))):
        with pytest.raises(WouldCrashError, match="is no byref"):
            sim.nvmlDeviceCreateGpuInstanceWithPlacement(device(sim), 9, wrong)
    for right in (byref(by_value), ctypes.pointer(by_value)):
        instance = sim.nvmlDeviceCreateGpuInstanceWithPlacement(device(sim), 9, right)
        assert info(sim, instance) == (2, 4)
        sim.nvmlGpuInstanceDestroy(instance)


def test_fact_5_other_raw_arguments_would_crash_as_well() -> None:
    sim = driver()
    gpu = device(sim)
    with pytest.raises(WouldCrashError, match="must hold 7"):
        sim.nvmlDeviceGetGpuInstances(gpu, 19, (pynvml.c_nvmlGpuInstance_t * 1)(), byref(c_uint(1)))
    with pytest.raises(WouldCrashError, match="is no byref"):
        sim.nvmlDeviceGetGpuInstances(gpu, 19, (pynvml.c_nvmlGpuInstance_t * 7)(), 7)
    with pytest.raises(WouldCrashError, match="blindly"):
        sim.nvmlGpuInstanceDestroy(gpu)
    with pytest.raises(WouldCrashError, match="positional"):
        sim.nvmlDeviceGetHandleByUUID(uuid="GPU-1")
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        sim.nvmlDeviceGetName(pynvml.c_nvmlDevice_t())  # NULL


def test_fact_6_both_destroys_say_in_use_and_what_has_no_part_is_not_listed() -> None:
    held: list[int] = []
    sim = driver(layout="3g.40gb", clients=lambda uuid: held)
    gpu = device(sim)
    instance = sim.nvmlDeviceGetGpuInstanceById(gpu, 1)
    part = sim.nvmlGpuInstanceGetComputeInstanceById(instance, 0)
    held.append(4711)
    with pytest.raises(pynvml.NVMLError_InUse):
        sim.nvmlComputeInstanceDestroy(part)
    held.clear()
    with pytest.raises(pynvml.NVMLError_InUse):
        sim.nvmlGpuInstanceDestroy(instance)
    sim.nvmlComputeInstanceDestroy(part)
    for index in range(7):
        with pytest.raises(pynvml.NVMLError_NotFound):
            sim.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)
    count, array = c_uint(0), (pynvml.c_nvmlGpuInstance_t * 2)()
    sim.nvmlDeviceGetGpuInstances(gpu, 9, array, byref(count))
    assert (count.value, info(sim, array[0])[0]) == (1, 1)


def test_fact_6_a_gpu_instance_can_stay_in_use_without_its_compute_instance() -> None:
    sim = driver(layout="3g.40gb")
    sim.fail("nvmlGpuInstanceDestroy", pynvml.NVML_ERROR_IN_USE, times=2)
    instance = sim.nvmlDeviceGetGpuInstanceById(device(sim), 1)
    sim.nvmlComputeInstanceDestroy(sim.nvmlGpuInstanceGetComputeInstanceById(instance, 0))
    for _ in range(2):
        with pytest.raises(pynvml.NVMLError_InUse):
            sim.nvmlGpuInstanceDestroy(instance)
    assert sim.nvmlGpuInstanceDestroy(instance) == pynvml.NVML_SUCCESS


def test_fact_7_a_taken_place_and_a_full_gpu_are_the_same_code() -> None:
    sim = driver(layout="3g.40gb+3g.40gb")
    with pytest.raises(NO_ROOM):  # taken
        sim.nvmlDeviceCreateGpuInstanceWithPlacement(device(sim), 9, place(4, 4))
    with pytest.raises(NO_ROOM):  # a compute slice is free, but no memory slice
        sim.nvmlDeviceCreateGpuInstance(device(sim), 19)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):  # no place at all
        sim.nvmlDeviceCreateGpuInstanceWithPlacement(device(sim), 9, place(2, 4))


def test_fact_8_ids_indices_and_uuids_come_again_and_handles_do_not() -> None:
    sim = driver(layout="2g.20gb+1g.10gb+1g.10gb+3g.40gb")
    gpu = device(sim)
    mig = sim.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 1)
    uuid, gi_id = sim.nvmlDeviceGetUUID(mig), sim.nvmlDeviceGetGpuInstanceId(mig)
    assert uuid[18] == "5"  # version 5: made from a name
    instance = sim.nvmlDeviceGetGpuInstanceById(gpu, gi_id)
    start = info(sim, instance)[1]
    part = sim.nvmlGpuInstanceGetComputeInstanceById(instance, 0)
    sim.nvmlComputeInstanceDestroy(part)
    sim.nvmlGpuInstanceDestroy(instance)
    with pytest.raises(pynvml.NVMLError_NotFound):  # a hole; those behind it are there still
        sim.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 1)
    assert sim.nvmlDeviceGetUUID(sim.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 2))
    again = sim.nvmlDeviceCreateGpuInstanceWithPlacement(gpu, 19, place(start, 1))
    sim.nvmlGpuInstanceCreateComputeInstance(again, 0)
    fresh = sim.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 1)
    assert (sim.nvmlDeviceGetUUID(fresh), sim.nvmlDeviceGetGpuInstanceId(fresh)) == (uuid, gi_id)
    for call, stale in [
        (sim.nvmlDeviceGetUUID, mig),
        (sim.nvmlGpuInstanceGetInfo, instance),
        (sim.nvmlComputeInstanceGetInfo_v2, part),
    ]:
        with pytest.raises(pynvml.NVMLError_InvalidArgument):
            call(stale)


def test_fact_8_gpu_instance_ids_are_slots_on_every_grid() -> None:
    sim = driver("RTX-PRO-6000-96GB,A30-24GB")
    ids = [info(sim, sim.nvmlDeviceCreateGpuInstanceWithPlacement(device(sim), 14, place(at, 3)))[0] for at in (0, 3)]
    ids.append(info(sim, sim.nvmlDeviceCreateGpuInstanceWithPlacement(device(sim), 5, place(6, 6)))[0])
    assert ids == [3, 4, 2]


def test_fact_9_is_about_names_and_sizes_that_differ_between_boards() -> None:
    """The same id, enum and slices; other names and sizes."""
    sim = driver("A100-40GB,A100-80GB,B200-180GB")
    found = [sim.nvmlDeviceGetGpuInstanceProfileInfoById(device(sim, index), 19) for index in range(3)]
    assert [each.name for each in found] == ["MIG 1g.5gb", "MIG 1g.10gb", "MIG 1g.23gb"]
    assert len({each.memorySizeMB for each in found}) == 3


@pytest.mark.parametrize("name", ["UtilizationRates", "PowerUsage", "EnforcedPowerLimit", "TotalEnergyConsumption"])
def test_fact_10_what_is_not_measured_is_not_supported(name: str) -> None:
    sim = driver(layout=None)
    mig = sim.nvmlDeviceGetMigDeviceHandleByIndex(device(sim), 0)
    for handle in (device(sim), mig):
        with pytest.raises(pynvml.NVMLError_NotSupported):
            getattr(sim, f"nvmlDeviceGet{name}")(handle)
    assert sim.nvmlDeviceGetMemoryInfo(mig).total == 40192 * 1024 * 1024


def test_nothing_of_the_simulated_face_is_left_out_of_these_tests() -> None:
    """A function that is added is compared with pynvml's signature above."""
    public = {name for name in dir(SimulatedNvml) if name.startswith("nvml")}
    assert public == set(CALLS)
    assert all(name.startswith("_") for name in vars(Session))
