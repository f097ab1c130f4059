"""One NVML session: pynvml's raw calls with its habits taken care of, and errors of our own.

Handles are looked up for every use and never kept: resets, mode changes and other processes make them stale.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pynvml

from partitioner.geometry import Placement
from partitioner.nvml_errors import (
    GpuLostError,
    NoPermissionError,
    NotFoundError,
    NotSupportedError,
    NvmlUnavailableError,
    StaleError,
    nvml_error,
)

_CODES = {
    value: name.removeprefix("NVML_ERROR_") for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_")
}
# Bounds for loops that end at INVALID_ARGUMENT: far beyond what any driver knows.
_MOST_PROFILES = 64
# The driver writes as many handles as it has, and not all drivers count well beforehand how many that can be.
_ROOM = 16
# How many kinds every driver from R525 on knows: only after these can INVALID_ARGUMENT mean that there are no more.
_LEAST_PROFILES = {"nvmlDeviceGetGpuInstanceProfileInfo": 10, "nvmlGpuInstanceGetComputeInstanceProfileInfo": 8}


def address(handle: Any) -> int:
    """What to know a handle by: handles themselves compare by identity and are not hashable."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def code_name(code: int) -> str:
    """NVML's name of a return code, without NVML_ERROR_."""
    return "SUCCESS" if code == pynvml.NVML_SUCCESS else _CODES.get(code, f"code {code}")


class NvmlSession:
    """`nvml` is the pynvml module, or anything with its functions."""

    def __init__(self, nvml: Any) -> None:
        """Opens the session. Raises NvmlUnavailableError."""
        self._nvml = nvml
        self._compute_profiles: dict[tuple[str, int], list[tuple[int, Any]]] = {}
        try:
            nvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NvmlUnavailableError(
                f"no usable NVIDIA driver here ({error}); on a machine without a GPU use --gpu sim:A100-80GB, "
                f"in a container check that the NVIDIA runtime is on"
            ) from error

    def call(self, name: str, *args: Any) -> Any:
        """One of pynvml's functions. Raises NvmlError."""
        function = getattr(self._nvml, name, None)
        if function is None:
            raise nvml_error(
                name, "FUNCTION_NOT_FOUND", "nvidia-ml-py is too old for this: pip install -U nvidia-ml-py"
            )
        try:
            return function(*args)
        except pynvml.NVMLError as error:
            code = code_name(error.value)
        # Outside of the handler: pynvml's exceptions cannot be compared, hashed or pickled like others.
        raise nvml_error(name, code)

    def supported(self, name: str, *args: Any) -> Any:
        """As `call`, but None where NVML does not support or not permit it."""
        try:
            return self.call(name, *args)
        except (NotSupportedError, NoPermissionError):
            return None

    # ---- GPUs ----

    def gpus(self) -> Iterator[tuple[int, Any, str]]:
        """(index, handle, UUID) of every GPU but the lost ones."""
        for index in range(self.call("nvmlDeviceGetCount")):
            try:
                handle = self.call("nvmlDeviceGetHandleByIndex", index)
                yield index, handle, str(self.call("nvmlDeviceGetUUID", handle))
            except GpuLostError:
                continue

    def gpu(self, gpu_uuid: str) -> Any:
        """The handle of a GPU. Raises NotFoundError, or GpuLostError where a lost GPU may be the one.

        Not by NVML's own search for UUIDs: that fails for every GPU when one of them is lost.
        """
        found = None
        seen = 0
        for _, handle, uuid in self.gpus():
            seen += 1
            if uuid == gpu_uuid:
                found = handle
        if found is not None:
            return found
        if seen < self.call("nvmlDeviceGetCount"):
            raise GpuLostError("nvmlDeviceGetHandleByIndex", "GPU_IS_LOST")
        raise NotFoundError("nvmlDeviceGetHandleByIndex", "NOT_FOUND", f"this machine has no GPU {gpu_uuid}")

    def mig_mode(self, gpu: Any) -> tuple[bool, bool] | None:
        """(current, pending), or None where there is no MIG."""
        try:
            mode = self.call("nvmlDeviceGetMigMode", gpu)
        except NotSupportedError:
            return None
        return bool(mode[0]), bool(mode[1])

    def mig_devices(self, gpu: Any) -> Iterator[Any]:
        """Handles of the MIG devices: those of compute instances. Holes between them are passed over."""
        for index in range(self.call("nvmlDeviceGetMaxMigDeviceCount", gpu)):
            try:
                yield self.call("nvmlDeviceGetMigDeviceHandleByIndex", gpu, index)
            except NotFoundError:
                continue

    # ---- MIG profiles ----

    def mig_profiles(self, gpu: Any) -> Iterator[tuple[int, Any]]:
        """(enum, info) of every MIG profile. The wheel's own count of them is not trusted."""
        yield from self._enumerate("nvmlDeviceGetGpuInstanceProfileInfo", gpu)

    def compute_profiles(self, instance: Any, board: str, profile_id: int) -> list[tuple[int, Any]]:
        """(enum, info) of what a GPU instance can be split into: the same for all of a board and MIG profile."""
        key = (board, profile_id)
        if key not in self._compute_profiles:
            name = "nvmlGpuInstanceGetComputeInstanceProfileInfo"
            self._compute_profiles[key] = list(self._enumerate(name, instance, 0))
        return self._compute_profiles[key]

    def _enumerate(self, name: str, target: Any, *more: Any) -> Iterator[tuple[int, Any]]:
        """Up to the first INVALID_ARGUMENT, which before the least that there are means a handle that went stale."""
        for enum in range(_MOST_PROFILES):
            try:
                yield enum, self._info(name, target, enum, *more)
            except NotSupportedError:
                continue
            except StaleError:
                if enum < _LEAST_PROFILES[name]:
                    raise
                return

    def _info(self, name: str, *args: Any) -> Any:
        try:
            return self.call(name, *args)
        except StaleError:
            return self.call(name, *args)  # the end, if it says so twice
        except NotSupportedError as error:
            if error.code != "FUNCTION_NOT_FOUND":
                raise
            return self.call(name, *args, 1)  # an old driver: without names

    def placements(self, gpu: Any, profile_id: int) -> tuple[Placement, ...]:
        """All legal places of a MIG profile, taken or not, in the driver's order."""
        name = "nvmlDeviceGetGpuInstancePossiblePlacements"
        count = ctypes.c_uint(0)
        self.call(name, gpu, profile_id, None, ctypes.byref(count))
        array = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
        self.call(name, gpu, profile_id, array, ctypes.byref(count))
        return tuple(Placement(int(place.start), int(place.size)) for place in array[: count.value])

    # ---- instances ----

    def instances(self, gpu: Any, profile_id: int, at_most: int) -> list[Any]:
        """Handles of the GPU instances of one MIG profile; `at_most` as many as there can be."""
        return self._listed("nvmlDeviceGetGpuInstances", gpu, profile_id, at_most, pynvml.c_nvmlGpuInstance_t)

    def parts(self, instance: Any, board: str, profile_id: int) -> list[Any]:
        """Handles of the compute instances of a GPU instance; the largest kinds first, until all slices are found."""
        name, kind = "nvmlGpuInstanceGetComputeInstances", pynvml.c_nvmlComputeInstance_t
        kinds = sorted(self.compute_profiles(instance, board, profile_id), key=lambda each: -int(each[1].sliceCount))
        found: list[Any] = []
        left = max((int(info.sliceCount) for _, info in kinds), default=0)
        for _, info in kinds:
            if left > 0:
                listed = self._listed(name, instance, int(info.id), int(info.instanceCount), kind)
                left -= len(listed) * int(info.sliceCount)
                found += listed
        return found

    def _listed(self, name: str, target: Any, profile_id: int, at_most: int, kind: Any) -> list[Any]:
        array = (kind * max(at_most, _ROOM))()
        count = ctypes.c_uint(len(array))
        self.call(name, target, profile_id, array, ctypes.byref(count))
        return list(array[: count.value])

    def create(self, gpu: Any, profile_id: int, place: Placement) -> Any:
        """A GPU instance at `place`. pynvml hands the placement on as it is: it must be a reference."""
        wanted = pynvml.c_nvmlGpuInstancePlacement_t(place.start, place.size)
        return self.call("nvmlDeviceCreateGpuInstanceWithPlacement", gpu, profile_id, ctypes.byref(wanted))

    def create_part(self, instance: Any, board: str, profile_id: int, gpcs: int) -> Any:
        """A compute instance of all `gpcs` slices of a GPU instance."""
        for _, info in self.compute_profiles(instance, board, profile_id):
            if int(info.sliceCount) == gpcs:
                return self.call("nvmlGpuInstanceCreateComputeInstance", instance, int(info.id))
        raise NotSupportedError("nvmlGpuInstanceCreateComputeInstance", "NOT_SUPPORTED", f"none has {gpcs} slices")
