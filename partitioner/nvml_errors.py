"""What can go wrong at the NVML door. NVML's own errors never leave the door as pynvml types."""

from __future__ import annotations


class NvmlUnavailableError(RuntimeError):
    """NVML cannot be used. The message says why and what to do next."""


class MachineBusyError(RuntimeError):
    """Another process is changing the GPUs of this machine."""


class NvmlError(RuntimeError):
    """A call that NVML refused. `code` is NVML's name for the reason (`IN_USE`), `hint` says what to do next."""

    def __init__(self, call: str, code: str, hint: str = "") -> None:
        hint = hint or _HINTS.get(code, "")
        super().__init__(f"{call}: {code}" + (f"; {hint}" if hint else ""))
        self.call = call
        self.code = code
        self.hint = hint


class NoPermissionError(NvmlError):
    """Only root, CAP_SYS_ADMIN or the mig/config capability may do this."""


class InUseError(NvmlError):
    """Somebody holds what was to be changed."""


class NoRoomError(NvmlError):
    """The place is taken, or the GPU has nothing left; NVML does not tell the two apart."""


class NotFoundError(NvmlError):
    """There is no such GPU or instance (any more)."""


class NotSupportedError(NvmlError):
    """This GPU, driver or mode does not do it."""


class GpuLostError(NvmlError):
    """The GPU has fallen off the bus."""


class StaleError(NvmlError):
    """An argument NVML does not take: most often a handle of something that is gone."""


class ReadBackError(NvmlError):
    """What NVML reports after a change is not what was asked for."""


_CLASSES = {
    "NO_PERMISSION": NoPermissionError,
    "IN_USE": InUseError,
    "INSUFFICIENT_RESOURCES": NoRoomError,
    "NOT_FOUND": NotFoundError,
    "NOT_SUPPORTED": NotSupportedError,
    "FUNCTION_NOT_FOUND": NotSupportedError,
    "GPU_IS_LOST": GpuLostError,
    "INVALID_ARGUMENT": StaleError,
}
_HINTS = {
    "NO_PERMISSION": (
        "run as root or with CAP_SYS_ADMIN; in a container also set NVIDIA_MIG_CONFIG_DEVICES=all (instances alone: "
        "read access to the mig/config capability under /proc/driver/nvidia)"
    ),
    "IN_USE": (
        "something holds it: see fuser -v /dev/nvidia*; DCGM and its exporter, nvidia-persistenced and a loaded "
        "nvidia_drm hold GPUs without being listed"
    ),
    "INSUFFICIENT_RESOURCES": "the place is taken or the GPU is full: see what is there with migserve gpus",
    "NOT_FOUND": "it is gone: read the GPU's state again",
    "NOT_SUPPORTED": "this GPU or driver cannot do it, or MIG mode is off",
    "FUNCTION_NOT_FOUND": "the driver is too old for this; MIG needs R450, this server is written for R525 and later",
    "GPU_IS_LOST": "the GPU has fallen off the bus: see dmesg for its Xid, then reset it or reboot",
    "RESET_REQUIRED": "reset the GPU (nvidia-smi --gpu-reset -i N, with nothing using it) or reboot",
    "UNINITIALIZED": "the NVML session was closed",
}


def nvml_error(call: str, code: str, hint: str = "") -> NvmlError:
    """The NvmlError of the class that `code` has, with a hint of its own or the usual one."""
    return _CLASSES.get(code, NvmlError)(call, code, hint)
