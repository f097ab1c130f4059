"""What runs a model inside a worker. One door a runtime; the worker knows only `Backend`."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from scheduler.channel import Load
from scheduler.tensors import Signature

# Taken where neither the model nor its configuration bounds the batch.
DEFAULT_MAX_BATCH = 64

Array = np.ndarray[Any, Any]

# torch keeps no books for gradients, from its first model on: entered once, since that takes time.
_for_good = ExitStack()


class ModelLoadError(RuntimeError):
    """The model cannot be served. The message says what is wrong with it, for the operator."""


class Backend(Protocol):
    """One loaded model.

    A batch is begun with `start` and ended with `finish`, in the same order. On a GPU `start` only enqueues,
    so that copying one batch in overlaps computing the one before.
    """

    signature: Signature

    def join(self, parts: list[memoryview], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """One input of a batch, copied together from its requests' bytes, where the device can take it."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """The same, to be written."""

    def start(self, inputs: list[Array]) -> Any:
        """Takes one array an input, whole batch, in the signature's order."""

    def finish(self, started: Any) -> list[Array]:
        """Waits; one contiguous array an output, in the signature's order. Raises what the model raised."""


def join_in_memory(parts: list[memoryview], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """`join` for what computes on the CPU."""
    # Writable, since a model may work in place; and not the arena itself, since it may have to run again.
    return np.frombuffer(bytearray().join(parts), dtype).reshape(shape)


def limit_threads(count: int) -> None:
    """How many threads one operation may take on the CPU, in this process."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
    else:
        os.environ["OMP_NUM_THREADS"] = str(count)  # read by torch, if it is imported later


def behind_others() -> None:
    """This thread, and those that it starts, run on but interrupt nobody when they wake: a core's cache stays warm.

    Who has started the daemon in another class than the usual one (`chrt`) knows why.
    """
    with suppress(OSError):  # where it is forbidden
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def memory_mib(device: str) -> float | None:
    """In use on the CUDA device, by all its processes; on the CPU this process's at its peak. None: unknown."""
    if device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        return float(total - free) / 2**20
    lines = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return float(lines[0].split()[1]) / 1024 if lines else None


def limit_memory(device: str, mib: int) -> None:
    """What this process may take for its data, of the CUDA device's memory or of the machine's."""
    if device == "cuda":
        try:
            import torch
        except ImportError:
            return  # loading says so, as where torch sees no GPU
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(min(1.0, (mib << 20) / torch.cuda.mem_get_info()[1]))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (mib << 20, mib << 20))


def forget_memory(device: str) -> None:
    """Frees what is kept for later, and forgets the peak."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how a runtime says that memory does not suffice; torch's CPU allocator says it in words only."""
    words = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in words
        or "out of memory" in words
    )


def versions(device: str) -> str:
    """Of what computes, such as `torch 2.13.0+cpu`."""
    try:
        import torch
    except ImportError:
        return "without torch"
    cuda = f", CUDA {torch.version.cuda}" if device == "cuda" else ""
    return f"torch {torch.__version__}{cuda}"


def without_cuda(version: str, cuda: str | None, python: str) -> str:
    """Why torch, of such a version and built for such a CUDA, finds no GPU, and what to do about it."""
    if cuda is None:
        renew = f"{python} -m pip uninstall -y torch && {python} -m pip install torch"
        return (
            f"torch {version} is a CPU build, which uses no GPU; on a machine with one, install the CUDA build: {renew}"
        )
    return (
        f"torch {version} is built for CUDA {cuda}, and finds no device. What nvidia-smi says tells why: if it fails, "
        f"the driver does not run, or the container was not given the GPU; if its CUDA Version is below {cuda}, renew "
        f"the driver, or install a torch for that CUDA (pytorch.org/get-started)"
    )


def load(message: Load, device: str, sm_count: int | None = None) -> Backend:
    """Loads a model, in a process that is for nothing else. `device`: "cpu" or "cuda", of whose SMs it takes
    `sm_count`, or all. Raises ModelLoadError.
    """
    source = message.source
    if source.backend == "emulated":
        from scheduler.backends.emulated import EmulatedBackend

        return EmulatedBackend(source, message.latency_ms or (), message.by_length)
    try:
        import torch
    except ImportError as error:
        raise ModelLoadError("torch is not installed; install it with: pip install 'migserve[torch]'") from error
    if not torch.is_inference_mode_enabled():
        _for_good.enter_context(torch.inference_mode())
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ModelLoadError(without_cuda(torch.__version__, torch.version.cuda, sys.executable))
        from scheduler.backends.cuda import CudaBackend

        return CudaBackend(source, sm_count)
    from scheduler.backends.torch import TorchBackend

    behind_others()
    return TorchBackend(source)
