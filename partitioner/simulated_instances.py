"""The simulated driver's calls about GPU instances, compute instances and MIG devices."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import pynvml

from partitioner.geometry import MigProfile, Placement
from partitioner.simulated_calls import Session, api
from partitioner.simulated_gpu import ComputeProfile, GpuInstance, GpuState, RefusedError, part_by_id
from partitioner.simulated_machine import SimulatedGpu, WouldCrashError, pointee

# GPU instance profiles that this driver has heard of; beyond, INVALID_ARGUMENT.
PROFILE_COUNT = 0x12


class InstanceCalls(Session):
    """Which of these calls are privileged is nvml.h's word: all that change, list or look up instances."""

    _old_driver: bool

    # ---- MIG profiles ----

    @api()
    def nvmlDeviceGetGpuInstanceProfileInfo(self, device: Any, profile: int, version: int = 2) -> Any:
        _, state = self._mig_capable(device)
        if not 0 <= profile < PROFILE_COUNT:
            raise RefusedError("INVALID_ARGUMENT")
        found = state.profile_by_enum(profile)
        if found is None or (self._old_driver and not state.mode):
            raise RefusedError("NOT_SUPPORTED")
        if version == 2:
            return _profile_info(pynvml.c_nvmlGpuInstanceProfileInfo_v2_t(), found)
        if version == 1:
            return _profile_info(pynvml.c_nvmlGpuInstanceProfileInfo_t(), found)
        raise RefusedError("FUNCTION_NOT_FOUND")

    nvmlDeviceGetGpuInstanceProfileInfoV = nvmlDeviceGetGpuInstanceProfileInfo

    @api()
    def nvmlDeviceGetGpuInstanceProfileInfoById(self, device: Any, profileId: int) -> Any:
        _, state = self._mig_capable(device)
        if self._old_driver:
            raise RefusedError("FUNCTION_NOT_FOUND")
        return _profile_info(pynvml.c_nvmlGpuInstanceProfileInfo_v2_t(), state.profile_by_id(profileId))

    nvmlDeviceGetGpuInstanceProfileInfoByIdV = nvmlDeviceGetGpuInstanceProfileInfoById

    @api()
    def nvmlDeviceGetGpuInstancePossiblePlacements(
        self, device: Any, profileId: int, placementsRef: Any, countRef: Any
    ) -> int:
        _, state = self._mig_capable(device)
        self._need_privilege()
        if self._old_driver and not state.mode:
            raise RefusedError("NOT_SUPPORTED")
        places = [(place.start, place.size) for place in state.profile_by_id(profileId).placements]
        return _give_places(places, pynvml.c_nvmlGpuInstancePlacement_t, placementsRef, countRef)

    @api()
    def nvmlDeviceGetGpuInstanceRemainingCapacity(self, device: Any, profileId: int) -> int:
        _, state = self._mig_capable(device)
        self._need_privilege()
        return state.remaining(state.profile_by_id(profileId))

    # ---- GPU instances ----

    @api()
    def nvmlDeviceCreateGpuInstance(self, device: Any, profileId: int) -> Any:
        return self._create(device, profileId, None)

    @api()
    def nvmlDeviceCreateGpuInstanceWithPlacement(self, device: Any, profileId: int, placement: Any) -> Any:
        wanted = pointee(placement, pynvml.c_nvmlGpuInstancePlacement_t)
        return self._create(device, profileId, Placement(int(wanted.start), int(wanted.size)))

    def _create(self, device: Any, profile_id: int, placement: Placement | None) -> Any:
        gpu, _ = self._mig_capable(device)
        self._need_privilege()
        with self._machine.change(gpu.uuid) as state:
            instance = state.create(state.profile_by_id(profile_id), placement)
        return self._handles.give("gi", gpu.uuid, instance.serial)

    @api()
    def nvmlGpuInstanceDestroy(self, gpuInstance: Any) -> int:
        gpu, _, found = self._instance(gpuInstance)
        self._need_privilege()
        with self._machine.change(gpu.uuid) as state:
            state.destroy(next(each for each in state.instances if each.serial == found.serial))
        return int(pynvml.NVML_SUCCESS)

    @api()
    def nvmlDeviceGetGpuInstances(self, device: Any, profileId: int, gpuInstancesRef: Any, countRef: Any) -> int:
        gpu, state = self._mig_capable(device)
        self._need_privilege()
        if not state.mode:
            raise RefusedError("NOT_SUPPORTED")
        profile = state.profile_by_id(profileId)
        handles = [
            self._handles.give("gi", gpu.uuid, each.serial) for each in state.instances if each.profile == profile
        ]
        return _give_handles(handles, profile.max_instances, gpuInstancesRef, countRef)

    @api()
    def nvmlDeviceGetGpuInstanceById(self, device: Any, gpuInstanceId: int) -> Any:
        gpu, state = self._mig_capable(device)
        self._need_privilege()
        return self._handles.give("gi", gpu.uuid, state.by_id(gpuInstanceId).serial)

    @api()
    def nvmlGpuInstanceGetInfo(self, gpuInstance: Any) -> Any:
        gpu, _, instance = self._instance(gpuInstance)
        place = pynvml.c_nvmlGpuInstancePlacement_t(instance.placement.start, instance.placement.size)
        profile_id = instance.profile.profile_id
        return pynvml.c_nvmlGpuInstanceInfo_t(self._gpu_handle(gpu), instance.id, profile_id, place)

    # ---- compute instances ----

    @api()
    def nvmlGpuInstanceGetComputeInstanceProfileInfo(
        self, device: Any, profile: int, engProfile: int, version: int = 2
    ) -> Any:
        _, state, instance = self._instance(device)
        if engProfile != pynvml.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED:
            raise RefusedError("INVALID_ARGUMENT")
        found = state.compute_profile(instance, profile)
        if version == 2:
            return _part_info(pynvml.c_nvmlComputeInstanceProfileInfo_v2_t(), found, instance)
        if version == 1:
            return _part_info(pynvml.c_nvmlComputeInstanceProfileInfo_t(), found, instance)
        raise RefusedError("FUNCTION_NOT_FOUND")

    nvmlGpuInstanceGetComputeInstanceProfileInfoV = nvmlGpuInstanceGetComputeInstanceProfileInfo

    @api()
    def nvmlGpuInstanceGetComputeInstanceRemainingCapacity(self, gpuInstance: Any, profileId: int) -> int:
        _, state, instance = self._instance(gpuInstance)
        self._need_privilege()
        return state.remaining_parts(instance, _kind(state, instance, profileId))

    @api()
    def nvmlGpuInstanceGetComputeInstancePossiblePlacements(
        self, gpuInstance: Any, profileId: int, placementsRef: Any, countRef: Any
    ) -> int:
        _, state, instance = self._instance(gpuInstance)
        self._need_privilege()
        kind = _kind(state, instance, profileId)
        places = [(start, kind.gpcs) for start in kind.starts]
        return _give_places(places, pynvml.c_nvmlComputeInstancePlacement_t, placementsRef, countRef)

    @api()
    def nvmlGpuInstanceCreateComputeInstance(self, gpuInstance: Any, profileId: int) -> Any:
        return self._create_part(gpuInstance, profileId, None)

    @api()
    def nvmlGpuInstanceCreateComputeInstanceWithPlacement(
        self, gpuInstance: Any, profileId: int, placement: Any
    ) -> Any:
        wanted = pointee(placement, pynvml.c_nvmlComputeInstancePlacement_t)
        return self._create_part(gpuInstance, profileId, wanted)

    def _create_part(self, handle: Any, profile_id: int, wanted: Any) -> Any:
        gpu, _, found = self._instance(handle)
        self._need_privilege()
        with self._machine.change(gpu.uuid) as state:
            instance = next(each for each in state.instances if each.serial == found.serial)
            kind = _kind(state, instance, profile_id)
            if wanted is not None and wanted.size != kind.gpcs:
                raise RefusedError("INVALID_ARGUMENT")
            part = state.create_part(instance, kind, None if wanted is None else int(wanted.start))
        return self._handles.give("ci", gpu.uuid, part.serial)

    @api()
    def nvmlComputeInstanceDestroy(self, computeInstance: Any) -> int:
        gpu, owner, found = self._part(computeInstance)
        self._need_privilege()
        if self._clients(gpu.mig_uuid(owner.id, found.id)):
            raise RefusedError("IN_USE")
        with self._machine.change(gpu.uuid) as state:
            instance, part = next(each for each in state.parts() if each[1].serial == found.serial)
            instance.parts.remove(part)
        return int(pynvml.NVML_SUCCESS)

    @api()
    def nvmlGpuInstanceGetComputeInstances(
        self, gpuInstance: Any, profileId: int, computeInstancesRef: Any, countRef: Any
    ) -> int:
        gpu, state, instance = self._instance(gpuInstance)
        self._need_privilege()
        kind = _kind(state, instance, profileId)
        handles = [
            self._handles.give("ci", gpu.uuid, part.serial) for part in instance.parts if part.profile.id == kind.id
        ]
        return _give_handles(handles, kind.max_instances, computeInstancesRef, countRef)

    @api()
    def nvmlGpuInstanceGetComputeInstanceById(self, gpuInstance: Any, computeInstanceId: int) -> Any:
        gpu, _, instance = self._instance(gpuInstance)
        self._need_privilege()
        return self._handles.give("ci", gpu.uuid, part_by_id(instance, computeInstanceId).serial)

    @api()
    def nvmlComputeInstanceGetInfo_v2(self, computeInstance: Any) -> Any:
        gpu, instance, part = self._part(computeInstance)
        return pynvml.c_nvmlComputeInstanceInfo_t(
            self._handles.give("mig", gpu.uuid, part.serial),
            self._handles.give("gi", gpu.uuid, instance.serial),
            part.id,
            part.profile.id,
            pynvml.c_nvmlComputeInstancePlacement_t(part.start, part.profile.gpcs),
        )

    nvmlComputeInstanceGetInfo = nvmlComputeInstanceGetInfo_v2

    # ---- MIG devices ----

    @api()
    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Any, index: int) -> Any:
        gpu, state = self._mig_capable(device)
        if not state.mode:
            raise RefusedError("NOT_SUPPORTED")
        if not 0 <= index < gpu.model.max_mig_devices:
            raise RefusedError("INVALID_ARGUMENT")
        for _, part in state.parts():
            if part.mig_index == index:
                return self._handles.give("mig", gpu.uuid, part.serial)
        raise RefusedError("NOT_FOUND")

    @api()
    def nvmlDeviceIsMigDeviceHandle(self, device: Any) -> ctypes.c_uint:
        return ctypes.c_uint(self._device(device).part is not None)

    @api()
    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, migDevice: Any) -> Any:
        return self._gpu_handle(self._mig(migDevice)[0])

    @api()
    def nvmlDeviceGetGpuInstanceId(self, device: Any) -> int:
        return self._mig(device)[1].id

    @api()
    def nvmlDeviceGetComputeInstanceId(self, device: Any) -> int:
        return int(self._mig(device)[2].id)

    @api()
    def nvmlDeviceGetAttributes_v2(self, device: Any) -> Any:
        _, instance, part = self._mig(device)
        whole = instance.profile
        return pynvml.c_nvmlDeviceAttributes(
            multiprocessorCount=part.profile.sm_count,
            sharedCopyEngineCount=whole.copy_engines,
            sharedDecoderCount=whole.nvdec,
            sharedEncoderCount=whole.nvenc,
            sharedJpegCount=whole.jpeg,
            sharedOfaCount=whole.ofa,
            gpuInstanceSliceCount=whole.gpcs,
            computeInstanceSliceCount=part.profile.gpcs,
            memorySizeMB=whole.memory_mib,
        )

    nvmlDeviceGetAttributes = nvmlDeviceGetAttributes_v2

    # ---- inside ----

    def _mig_capable(self, handle: Any) -> tuple[SimulatedGpu, GpuState]:
        gpu, state = self._gpu(handle)
        if not gpu.mig_capable:
            raise RefusedError("NOT_SUPPORTED")
        return gpu, state

    def _mig(self, handle: Any) -> tuple[SimulatedGpu, GpuInstance, Any]:
        """A MIG device, not a GPU."""
        device = self._device(handle)
        if device.part is None:
            raise RefusedError("INVALID_ARGUMENT")
        return device.gpu, device.instance, device.part


def _kind(state: GpuState, instance: GpuInstance, profile_id: int) -> ComputeProfile:
    try:
        return state.compute_profile(instance, profile_id)
    except RefusedError:
        raise RefusedError("INVALID_ARGUMENT") from None


def _profile_info(info: Any, profile: MigProfile) -> Any:
    info.id = profile.profile_id
    info.sliceCount = profile.gpcs
    info.instanceCount = profile.max_instances
    info.multiprocessorCount = profile.sm_count
    info.copyEngineCount = profile.copy_engines
    info.decoderCount = profile.nvdec
    info.encoderCount = profile.nvenc
    info.jpegCount = profile.jpeg
    info.ofaCount = profile.ofa
    info.memorySizeMB = profile.memory_mib
    if hasattr(info, "name"):
        info.name = f"MIG {profile.name}"
    return info


def _part_info(info: Any, part: ComputeProfile, instance: GpuInstance) -> Any:
    info.id = part.id
    info.sliceCount = part.gpcs
    info.instanceCount = part.max_instances
    info.multiprocessorCount = part.sm_count
    info.sharedCopyEngineCount = instance.profile.copy_engines
    info.sharedDecoderCount = instance.profile.nvdec
    info.sharedEncoderCount = instance.profile.nvenc
    info.sharedJpegCount = instance.profile.jpeg
    info.sharedOfaCount = instance.profile.ofa
    if hasattr(info, "name"):
        split = f"{part.gpcs}c." if part.gpcs < instance.profile.gpcs else ""
        info.name = f"MIG {split}{instance.profile.name}"
    return info


def _give_places(places: Sequence[tuple[int, int]], kind: Any, array: Any, count_ref: Any) -> int:
    """The two calls of NVML: with None, how many; then an array of at least as many."""
    count = pointee(count_ref, ctypes.c_uint)
    room = 0 if array is None else _room(array, kind)
    if array is not None:
        if min(room, count.value) < len(places):
            raise RefusedError("INSUFFICIENT_SIZE")
        for index, (start, size) in enumerate(places):
            array[index].start, array[index].size = start, size
    count.value = len(places)
    return int(pynvml.NVML_SUCCESS)


def _give_handles(handles: Sequence[Any], must_hold: int, array: Any, count_ref: Any) -> int:
    """The driver trusts the array to hold as many instances as the MIG profile allows; `count_ref` is output only."""
    count = pointee(count_ref, ctypes.c_uint)
    kind = type(handles[0]) if handles else None
    if _room(array, kind) < must_hold:
        raise WouldCrashError(f"the array must hold {must_hold} instances: the driver writes beyond it")
    for index, handle in enumerate(handles):
        array[index] = handle
    count.value = len(handles)
    return int(pynvml.NVML_SUCCESS)


def _room(array: Any, kind: Any) -> int:
    if not isinstance(array, ctypes.Array) or (kind is not None and array._type_ is not kind):
        raise WouldCrashError(f"{array!r} is no array of {kind}: the driver would write somewhere else")
    return len(array)
