"""The simulated driver by itself, called as pynvml is: what it refuses, and what it lets happen.

The ten facts are those that stand-ins for NVML usually hide.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import threading
from ctypes import byref, c_uint
from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import GpuModel, PlacedProfile, Placement, is_legal
from partitioner.simulated_calls import Session
from partitioner.simulated_events import EventCalls
from partitioner.simulated_instances import InstanceCalls
from partitioner.simulated_machine import WouldCrashError
from partitioner.simulated_nvml import SimulatedGpu, SimulatedNvml, parse_gpus

CALLS = sorted(
    {name for each in (SimulatedNvml, InstanceCalls, EventCalls) for name in vars(each) if name[:4] == "nvml"}
)
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


# ---- what it accepts is what geometry calls legal ----


@st.composite
def placed_sets(draw: st.DrawFn) -> tuple[GpuModel, list[PlacedProfile]]:
    """Any MIG profiles of a GPU, each mostly at places that are legal for it by itself.

    Of a GPU of the catalogue, or of one with narrower limits: on the known ones many limits follow from others.
    """
    known_gpu = GPU_MODELS[draw(st.sampled_from(["A30-24GB", "A100-80GB", "H200-141GB", "RTX-PRO-6000-96GB"]))]
    limit = st.integers(1, 7) if draw(st.booleans()) else st.just(99)
    gpu = replace(
        known_gpu,
        compute_slices=min(known_gpu.compute_slices, draw(limit)),
        max_mig_devices=min(known_gpu.max_mig_devices, draw(limit)),
        profiles=tuple(
            replace(each, max_instances=min(each.max_instances, draw(limit))) for each in known_gpu.profiles
        ),
    )
    chosen = []
    for profile in draw(st.lists(st.sampled_from(gpu.profiles), min_size=1, max_size=8)):
        anywhere = st.builds(Placement, st.integers(0, gpu.memory_slices), st.integers(1, gpu.memory_slices))
        known = st.sampled_from(profile.placements)
        chosen.append(PlacedProfile(profile, draw(st.one_of(known, known, known, known, known, known, anywhere))))
    return gpu, chosen


@settings(max_examples=600, deadline=None)
@given(placed_sets())
def test_the_driver_takes_exactly_what_geometry_calls_legal(case: tuple[GpuModel, list[PlacedProfile]]) -> None:
    gpu, wanted = case
    sim = SimulatedNvml([SimulatedGpu(0, gpu, ())])
    sim.nvmlInit()
    held: list[PlacedProfile] = []
    for each in wanted:
        at = place(each.placement.start, each.placement.size)
        try:
            sim.nvmlDeviceCreateGpuInstanceWithPlacement(device(sim), each.profile.profile_id, at)
            accepted = True
        except (NO_ROOM, pynvml.NVMLError_InvalidArgument):
            accepted = False
        assert accepted == is_legal([*held, each], gpu)
        held += [each] * accepted
    for profile in gpu.profiles:
        remaining = sim.nvmlDeviceGetGpuInstanceRemainingCapacity(device(sim), profile.profile_id)
        fits = any(is_legal([*held, PlacedProfile(profile, at)], gpu) for at in profile.placements)
        assert bool(remaining) == fits


@pytest.mark.parametrize(("start", "left"), [(4, 4), (0, 3)])
def test_one_3g_leaves_four_1g_or_three_by_its_place(start: int, left: int) -> None:
    sim = driver()
    capacity = sim.nvmlDeviceGetGpuInstanceRemainingCapacity
    assert capacity(device(sim), 19) == 7
    sim.nvmlDeviceCreateGpuInstanceWithPlacement(device(sim), 9, place(start, 4))
    assert capacity(device(sim), 19) == left


# ---- compute instances ----


def test_a_gpu_instance_can_be_split_and_its_parts_are_devices_of_their_own() -> None:
    sim = driver("H100-80GB")
    instance = sim.nvmlDeviceCreateGpuInstance(device(sim), 9)
    kinds = []
    for enum in range(64):
        try:
            kinds.append(sim.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, enum, 0))
        except pynvml.NVMLError_NotSupported:
            continue
        except pynvml.NVMLError_InvalidArgument:
            break
    # Two kinds of one slice on Hopper, of the same name: told apart by id alone.
    assert [(each.id, each.sliceCount, each.name) for each in kinds] == [
        (0, 1, "MIG 1c.3g.40gb"),
        (1, 2, "MIG 2c.3g.40gb"),
        (2, 3, "MIG 3g.40gb"),
        (7, 1, "MIG 1c.3g.40gb"),
    ]
    sim.nvmlGpuInstanceCreateComputeInstance(instance, 1)
    assert sim.nvmlGpuInstanceGetComputeInstanceRemainingCapacity(instance, 0) == 1
    at = byref(pynvml.c_nvmlComputeInstancePlacement_t(2, 1))
    sim.nvmlGpuInstanceCreateComputeInstanceWithPlacement(instance, 0, at)
    with pytest.raises(NO_ROOM):
        sim.nvmlGpuInstanceCreateComputeInstance(instance, 0)
    names = [sim.nvmlDeviceGetName(sim.nvmlDeviceGetMigDeviceHandleByIndex(device(sim), index)) for index in (0, 1)]
    assert [name.rsplit(" ", 1)[1] for name in names] == ["2c.3g.40gb", "1c.3g.40gb"]


# ---- modes ----


@pytest.mark.parametrize(
    ("spec", "options", "status", "mode"),
    [
        ("A100-80GB", {}, pynvml.NVML_ERROR_RESET_REQUIRED, [0, 1]),
        ("A100-80GB", {"resets_itself": True}, pynvml.NVML_SUCCESS, [1, 1]),
        ("H100-80GB", {}, pynvml.NVML_SUCCESS, [1, 1]),
        ("B200-180GB", {}, pynvml.NVML_SUCCESS, [1, 1]),
        ("H100-80GB", {"clients": lambda uuid: [1]}, pynvml.NVML_ERROR_IN_USE, [0, 1]),
        ("A100-80GB", {"clients": lambda uuid: [1], "resets_itself": True}, pynvml.NVML_ERROR_IN_USE, [0, 1]),
    ],
)
def test_ampere_needs_a_reset_and_later_gpus_none(
    spec: str, options: dict[str, Any], status: int, mode: list[int]
) -> None:
    sim = driver(spec, "off", **options)
    gpu = device(sim)
    assert sim.nvmlDeviceGetMaxMigDeviceCount(gpu) == 0
    assert sim.nvmlDeviceSetMigMode(gpu, 1) == status
    assert sim.nvmlDeviceGetMigMode(device(sim)) == mode


def test_instances_end_with_a_reset_and_hopper_forgets_its_mode_at_a_reboot() -> None:
    sim = driver("A100-80GB,H100-80GB", None)
    before = device(sim, 0)
    sim.reboot()
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        sim.nvmlDeviceGetName(before)
    assert [sim.nvmlDeviceGetMigMode(device(sim, index)) for index in (0, 1)] == [[1, 1], [0, 0]]
    with pytest.raises(pynvml.NVMLError_NotFound):
        sim.nvmlDeviceGetMigDeviceHandleByIndex(device(sim, 0), 0)


def test_mig_is_not_switched_off_under_its_instances() -> None:
    sim = driver("H100-80GB", None)
    assert sim.nvmlDeviceSetMigMode(device(sim), 0) == pynvml.NVML_ERROR_IN_USE
    assert sim.nvmlDeviceGetMigMode(device(sim)) == [1, 0]
    assert sim.nvmlDeviceSetMigMode(device(sim), 1) == pynvml.NVML_SUCCESS  # takes the wish back
    assert sim.nvmlDeviceGetMigMode(device(sim)) == [1, 1]


def test_an_old_driver_tells_nothing_of_profiles_while_mig_is_off() -> None:
    sim = driver("H100-80GB", "off", old_driver=True)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        sim.nvmlDeviceGetGpuInstanceProfileInfo(device(sim), 0)
    with pytest.raises(pynvml.NVMLError_FunctionNotFound):
        sim.nvmlDeviceGetGpuInstanceProfileInfoById(device(sim), 19)
    sim.nvmlDeviceSetMigMode(device(sim), 1)
    assert sim.nvmlDeviceGetGpuInstanceProfileInfo(device(sim), 0).id == 19


def test_a_gpu_without_mig_supports_none_of_it() -> None:
    sim = SimulatedNvml([SimulatedGpu(0, GPU_MODELS["A100-80GB"], (), mig_enabled=False, mig_capable=False)])
    sim.nvmlInit()
    for call in (sim.nvmlDeviceGetMigMode, lambda gpu: sim.nvmlDeviceSetMigMode(gpu, 1)):
        with pytest.raises(pynvml.NVMLError_NotSupported):
            call(device(sim))
    assert sim.nvmlDeviceGetMaxMigDeviceCount(device(sim)) == 0


# ---- who may what ----


def test_without_privilege_exactly_these_calls_are_refused() -> None:
    sim = driver(layout="3g.40gb", privileged=False)
    gpu = device(sim)
    mig = sim.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 0)
    count = byref(c_uint(7))
    refused = [
        lambda: sim.nvmlDeviceSetMigMode(gpu, 0),
        lambda: sim.nvmlDeviceCreateGpuInstance(gpu, 19),
        lambda: sim.nvmlDeviceCreateGpuInstanceWithPlacement(gpu, 19, place(0, 1)),
        lambda: sim.nvmlDeviceGetGpuInstances(gpu, 19, (pynvml.c_nvmlGpuInstance_t * 7)(), count),
        lambda: sim.nvmlDeviceGetGpuInstanceById(gpu, 1),
        lambda: sim.nvmlDeviceGetGpuInstancePossiblePlacements(gpu, 19, None, count),
        lambda: sim.nvmlDeviceGetGpuInstanceRemainingCapacity(gpu, 19),
        lambda: sim.nvmlDeviceGetMemoryInfo(gpu),
        lambda: sim.nvmlDeviceGetComputeRunningProcesses_v3(gpu),
    ]
    for call in refused:
        with pytest.raises(pynvml.NVMLError_NoPermission):
            call()
    assert sim.nvmlDeviceGetGpuInstanceProfileInfo(gpu, 0).id == 19
    assert sim.nvmlDeviceGetMigMode(gpu) == [1, 1]
    assert sim.nvmlDeviceGetMemoryInfo(mig).total
    assert sim.nvmlDeviceGetComputeRunningProcesses_v3(mig) == []
    assert sim.nvmlDeviceGetUUID(mig).startswith("MIG-")


def test_processes_are_listed_with_the_instance_that_they_hold() -> None:
    gpu_spec = parse_gpus("A100-80GB", "4g.40gb+3g.40gb")[0]
    sim = driver(layout="4g.40gb+3g.40gb", clients=lambda uuid: [7, 8] if uuid == gpu_spec.mig_uuid(2, 0) else [])
    for handle in (device(sim), sim.nvmlDeviceGetMigDeviceHandleByIndex(device(sim), 1)):
        found = sim.nvmlDeviceGetComputeRunningProcesses_v3(handle)
        assert [(each.pid, each.gpuInstanceId, each.computeInstanceId) for each in found] == [(7, 2, 0), (8, 2, 0)]
        assert found[0].usedGpuMemory is None
    assert sim.nvmlDeviceGetComputeRunningProcesses_v3(sim.nvmlDeviceGetMigDeviceHandleByIndex(device(sim), 0)) == []
    assert "python" in sim.nvmlSystemGetProcessName(os.getpid())


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


def test_nothing_of_the_simulated_face_is_left_out_of_these_tests() -> None:
    """A function that is added is compared with pynvml's signature above."""
    public = {name for name in dir(SimulatedNvml) if name.startswith("nvml")}
    assert public == set(CALLS)
    assert all(name.startswith("_") for name in vars(Session))
