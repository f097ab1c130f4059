"""The simulated driver: what it accepts, how instances are split, who may what, how modes change."""

from __future__ import annotations

import os
from ctypes import byref, c_uint
from dataclasses import replace
from typing import Any

import pynvml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import GpuModel, PlacedProfile, Placement, is_legal
from partitioner.simulated_nvml import SimulatedGpu, SimulatedNvml, parse_gpus
from tests.partitioner.machines import NO_ROOM, device, driver, place

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
