"""Changing GPUs: instances made and destroyed, MIG switched. Functions over a session; each reads back what it did."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pynvml

from partitioner import machine, nvml_discovery
from partitioner.geometry import GpuModel, MigProfile, Placement
from partitioner.nvml_errors import (
    GpuLostError,
    InUseError,
    NoPermissionError,
    NoRoomError,
    NotFoundError,
    NotSupportedError,
    NvmlError,
    ReadBackError,
    StaleError,
)
from partitioner.nvml_session import NvmlSession, code_name
from partitioner.nvml_types import GpuProcess, Instance, ModeChange

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long IN_USE is taken for passing: what a worker held is given back a little after its end."""

    budget_s: float = 10.0
    sleep: Callable[[float], None] = time.sleep


def create(
    session: NvmlSession, gpu_uuid: str, profile: MigProfile, place: Placement, of: GpuModel, patience: Patience
) -> Instance:
    """A GPU instance with one compute instance of all its slices. On failure nothing is left of it.

    Raises NvmlError: NoRoomError naming what is in the way, and others as NVML gives them.
    """
    gpu = session.gpu(gpu_uuid)
    try:
        handle = session.create(gpu, profile.profile_id, place)
    except NoRoomError as error:
        raise NoRoomError(error.call, error.code, _in_the_way(session, gpu, profile, place, of)) from error
    except (NoPermissionError, NotSupportedError, GpuLostError):
        raise
    except NvmlError as error:
        # Nobody says of the other codes that nothing was done.
        _undo(error, lambda: _destroy_unfinished(session, gpu_uuid, place, of, patience))
        raise
    try:
        gi_id = int(session.call("nvmlGpuInstanceGetInfo", handle).id)
    except NvmlError as error:
        _undo(error, lambda: session.call("nvmlGpuInstanceDestroy", handle))
        raise
    try:
        session.create_part(handle, of.name, profile.profile_id, profile.gpcs)
        made = nvml_discovery.instance(session, handle, of)
        if (made.profile, made.placement, len(made.ci_ids)) != (profile, place, 1):
            asked = f"{profile.name}@{place.start}"
            raise ReadBackError("read back", "MISMATCH", f"asked for {asked}, there is {_describe(made)}")
    except NvmlError as error:
        # By the id of the GPU instance: without a compute instance no list of MIG devices shows it.
        _undo(error, lambda: destroy(session, gpu_uuid, gi_id, patience))
        raise
    return made


def _undo(reason: NvmlError, undo: Callable[[], object]) -> None:
    """Clears up after `reason`. Raises an error of its kind that tells of both, if that fails as well."""
    try:
        undo()
    except NvmlError as error:
        left = f"a GPU instance without compute instance is left behind, since {error}"
        hint = f"{reason.hint}; {left}" if reason.hint else left
        raise type(reason)(reason.call, reason.code, hint) from reason


def _destroy_unfinished(
    session: NvmlSession, gpu_uuid: str, place: Placement, of: GpuModel, patience: Patience
) -> None:
    """What stands at `place` without a compute instance."""
    for each in nvml_discovery.instances(session, session.gpu(gpu_uuid), of):
        if each.placement == place and not each.ci_ids:
            destroy(session, gpu_uuid, each.gi_id, patience)


def _in_the_way(session: NvmlSession, gpu: Any, profile: MigProfile, place: Placement, of: GpuModel) -> str:
    """NVML gives the same code for a taken place and for a full GPU: the GPU's state tells which."""
    there = nvml_discovery.instances(session, gpu, of)
    blocking = [_describe(each) for each in there if each.placement.overlaps(place)]
    if blocking:
        return f"{profile.name}@{place.start} would overlap {', '.join(blocking)}"
    return f"{profile.name} does not fit beside {', '.join(map(_describe, there)) or 'nothing'}"


def _describe(each: Instance) -> str:
    return f"{each.profile.name}@{each.placement.start} (GPU instance {each.gi_id})"


def destroy(session: NvmlSession, gpu_uuid: str, gi_id: int, patience: Patience) -> None:
    """Compute instances first, then the GPU instance. What is gone already, or went with MIG mode, is done.

    Raises InUseError, naming who holds it, when it is still held after the budget of `patience`.
    """
    left_s, pause_s = patience.budget_s, FIRST_PAUSE_S
    while True:
        try:
            return _destroy_once(session, gpu_uuid, gi_id)
        except StaleError:
            if left_s <= 0:
                raise
        except InUseError as error:
            if left_s <= 0:
                raise InUseError(error.call, error.code, _held_by(session, gpu_uuid, gi_id, error)) from error
        wait_s = min(pause_s, left_s)
        patience.sleep(wait_s)
        left_s, pause_s = left_s - wait_s, min(2 * pause_s, LONGEST_PAUSE_S)


def _destroy_once(session: NvmlSession, gpu_uuid: str, gi_id: int) -> None:
    """With handles looked up afresh: others may have changed the GPU meanwhile."""
    try:
        instance = session.call("nvmlDeviceGetGpuInstanceById", session.gpu(gpu_uuid), gi_id)
        profile_id = int(session.call("nvmlGpuInstanceGetInfo", instance).profileId)
        for part in session.parts(instance, gpu_uuid, profile_id):
            session.call("nvmlComputeInstanceDestroy", part)
        session.call("nvmlGpuInstanceDestroy", instance)
    except NotFoundError:
        session.gpu(gpu_uuid)  # the instance is gone; that the GPU is there must hold
    except NotSupportedError:
        mode = session.mig_mode(session.gpu(gpu_uuid))
        if mode is None or mode[0]:
            raise


def _held_by(session: NvmlSession, gpu_uuid: str, gi_id: int, error: InUseError) -> str:
    holders = [each for each in processes(session, session.gpu(gpu_uuid)) if each.gi_id in (gi_id, None)]
    if not holders:
        return f"GPU instance {gi_id} of {gpu_uuid}: {error.hint}"
    return f"GPU instance {gi_id} of {gpu_uuid} is held by {', '.join(map(str, holders))}; end it first"


def set_mode(session: NvmlSession, gpu_uuid: str, on: bool) -> ModeChange:
    """Asks for MIG mode, and tells what came of it: NVML's SUCCESS alone says nothing.

    Raises NotSupportedError where there is no MIG, and for switching it off on an Ampere GPU passed through to a
    virtual machine: that was seen to leave the GPU stuck over reboots (dra-driver-nvidia-gpu#883).
    """
    gpu = session.gpu(gpu_uuid)
    before = session.mig_mode(gpu)
    if before is None:
        raise NotSupportedError("nvmlDeviceSetMigMode", "NOT_SUPPORTED", f"{gpu_uuid} has no MIG")
    if before == (on, on):
        return ModeChange(on, on, on, "SUCCESS", "")
    passed_through = pynvml.NVML_GPU_VIRTUALIZATION_MODE_PASSTHROUGH
    virtual = session.supported("nvmlDeviceGetVirtualizationMode", gpu) == passed_through
    if not on and virtual and nvml_discovery.is_ampere(session, gpu):
        raise NotSupportedError(
            "nvmlDeviceSetMigMode", "NOT_SUPPORTED", "switch MIG off from the host: within a VM this GPU gets stuck"
        )
    status = code_name(session.call("nvmlDeviceSetMigMode", gpu, int(on)))
    current, pending = session.mig_mode(session.gpu(gpu_uuid)) or (False, False)
    return ModeChange(on, current, pending, status, _todo(session, gpu_uuid, on, current, pending, status))


def _todo(session: NvmlSession, gpu_uuid: str, on: bool, current: bool, pending: bool, status: str) -> str:
    if current == on == pending:
        return ""
    word = "on" if on else "off"
    if pending != on:
        return f"the driver did not take the wish to switch MIG {word} ({status}); see dmesg, then try again"
    if status == "IN_USE":
        holders = ", ".join(map(str, processes(session, session.gpu(gpu_uuid))))
        who = f"{holders} hold it" if holders else "clients hold it, none of them listed (DCGM? nvidia_drm?)"
        return (
            f"MIG {word} is pending: {who}; end them (fuser -v /dev/nvidia*) and destroy its instances, then try again"
        )
    if session.supported("nvmlDeviceGetVirtualizationMode", session.gpu(gpu_uuid)):
        return f"MIG {word} is pending ({status}): this virtual machine needs a reboot"
    return f"MIG {word} is pending ({status}): the GPU needs a reset: nvidia-smi --gpu-reset -i {gpu_uuid}, or a reboot"


def processes(session: NvmlSession, gpu: Any) -> list[GpuProcess]:
    """What uses a GPU or its instances, as far as NVML lists it and permits it to be seen."""
    found: dict[tuple[int, int | None], GpuProcess] = {}
    for name in ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3"):
        for handle in _devices(session, gpu):
            for each in session.supported(name, handle) or ():
                gi_id = None if each.gpuInstanceId == 0xFFFFFFFF else int(each.gpuInstanceId)
                found[each.pid, gi_id] = GpuProcess(int(each.pid), machine.command(each.pid), gi_id)
    return [found[key] for key in sorted(found, key=lambda key: (key[0], key[1] or 0))]


def _devices(session: NvmlSession, gpu: Any) -> Sequence[Any]:
    """The GPU and its MIG devices: the sum that a GPU in MIG mode tells is for the privileged only."""
    return [gpu, *session.mig_devices(gpu)]
