"""The real door over the simulated driver: what it creates and destroys, and what it leaves when things fail."""

from __future__ import annotations

import os

import pynvml
import pytest

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import Placement
from partitioner.nvml_errors import (
    InUseError,
    NoRoomError,
    NotFoundError,
    NvmlError,
)
from tests.partitioner.machines import setup

A100 = GPU_MODELS["A100-80GB"]
PASSTHROUGH = pynvml.NVML_GPU_VIRTUALIZATION_MODE_PASSTHROUGH


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
