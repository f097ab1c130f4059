"""torch models on the one CUDA device that the worker sees.

Three streams: while one batch computes, the next is copied in and the one before is copied out. Host memory
is pinned, or else copies would not overlap anything. It has never been run on a GPU yet: `make check-gpu` will tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from scheduler.backends import Array, ModelLoadError
from scheduler.backends.torch import TorchBackend, as_array
from scheduler.channel import ModelSource


class _Started(NamedTuple):
    inputs: list[torch.Tensor]  # pinned; kept until they have surely been read
    outputs: list[torch.Tensor]  # pinned
    copied_out: torch.cuda.Event


class CudaBackend(TorchBackend):
    """A torch model on `cuda:0`, which is the worker's slice, or on a share of its SMs."""

    def __init__(self, source: ModelSource, sm_count: int | None = None) -> None:
        super().__init__(source, "cuda")
        new_stream: Callable[[], torch.cuda.Stream] = torch.cuda.Stream
        self._copy_in, self._compute, self._copy_out = new_stream(), new_stream(), new_stream()
        if sm_count is not None and sm_count < torch.cuda.get_device_properties(0).multi_processor_count:
            self._share = share_of_sms(sm_count)
            self._compute = self._share.Stream()

    def join(self, parts: list[memoryview], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        pinned = torch.empty(shape, dtype=getattr(torch, dtype.name), pin_memory=True).numpy()
        target = pinned.data.cast("B")
        end = 0
        for part in parts:
            target[end : end + len(part)] = part
            end += len(part)
        return pinned

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return torch.zeros(shape, dtype=getattr(torch, dtype.name), pin_memory=True).numpy()

    def start(self, inputs: list[Array]) -> _Started:  # type: ignore[override]  # a handle of its own kind
        host_inputs = self.as_tensors(inputs)
        with torch.cuda.stream(self._copy_in):
            device_inputs = [tensor.to("cuda", non_blocking=True) for tensor in host_inputs]
        self._compute.wait_stream(self._copy_in)
        with torch.cuda.stream(self._compute):
            device_outputs = self._program(*device_inputs)
        self._copy_out.wait_stream(self._compute)
        with torch.cuda.stream(self._copy_out):
            outputs = [_to_pinned(tensor) for tensor in device_outputs]
            copied_out = self._copy_out.record_event()
        _keep_until_used(device_inputs, self._compute)
        _keep_until_used(device_outputs, self._copy_out)
        return _Started(host_inputs, outputs, copied_out)

    def finish(self, started: _Started) -> list[Array]:  # type: ignore[override]  # what its start gave
        started.copied_out.synchronize()
        return [as_array(tensor) for tensor in started.outputs]


def share_of_sms(count: int) -> Any:
    """A green context (CUDA driver API, 6.35), whose stream computes on so many SMs and no others, while it lives.

    The driver gives what it can split off, on Hopper multiples of 8: perhaps a few more than asked for, or fewer; torch
    does not tell how many (pytorch#195378). Raises ModelLoadError.
    """
    try:
        from torch.cuda.green_contexts import GreenContext

        share: Any = GreenContext.create(num_sms=count, device_id=0)
        share.Stream()
    except (ImportError, AttributeError, RuntimeError) as error:
        raise ModelLoadError(
            f"torch {torch.__version__} gives no share of {count} SMs: {error}; it takes torch 2.12 or later, "
            f"built for CUDA 12.8 or later, and such a driver"
        ) from error
    return share


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def _keep_until_used(tensors: Sequence[torch.Tensor], stream: torch.cuda.Stream) -> None:
    """Memory made on one stream and used on another must not be handed out again in between."""
    for tensor in tensors:
        tensor.record_stream(stream)
