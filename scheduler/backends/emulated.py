"""A model that is not there: it answers a fixed function of its input, after the time of a latency table.

Lets the whole daemon be measured with the timing of real slices, on a machine without any: it sleeps instead
of computing. Its metadata says `emulated`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from partitioner import latency
from scheduler.backends import DEFAULT_MAX_BATCH, Array, ModelLoadError, join_in_memory
from scheduler.channel import ModelSource
from scheduler.tensors import DATATYPES, Signature


class EmulatedBackend:
    """Output element j of an item is the sum of all input elements of that item, plus j."""

    def __init__(self, source: ModelSource, latency_ms: Sequence[tuple[int, float]]) -> None:
        if not source.inputs or not source.outputs:
            raise ModelLoadError("an emulated model needs its inputs and outputs in config.pbtxt")
        if not latency_ms:
            raise ModelLoadError("an emulated model needs a latency_table in serving.yaml")
        max_batch = DEFAULT_MAX_BATCH if source.max_batch is None else source.max_batch
        self._seconds = [ms / 1e3 for ms in latency.per_batch(latency_ms, max(max_batch, 1))]
        self._batches = max_batch > 0
        varying = sum(dim == -1 for spec in source.inputs for dim in spec.dims)
        self.signature = Signature(source.inputs, source.outputs, max_batch, sample_dims=(1,) * varying)

    def join(self, parts: list[memoryview], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return join_in_memory(parts, shape, dtype)

    def start(self, inputs: list[Array]) -> tuple[float, list[Array]]:
        return time.monotonic(), inputs

    def finish(self, started: tuple[float, list[Array]]) -> list[Array]:
        begin, inputs = started
        items = inputs[0].shape[0] if self._batches else 1
        sums = sum(array.reshape(items, -1).sum(axis=1, dtype=np.float64) for array in inputs)
        outputs = [self._output(np.asarray(sums), spec.dims, spec.datatype) for spec in self.signature.outputs]
        time.sleep(max(0.0, begin + self._seconds[items - 1] - time.monotonic()))
        return outputs

    def _output(self, sums: Array, dims: tuple[int, ...], datatype: str) -> Array:
        of_item = tuple(1 if dim == -1 else dim for dim in dims)
        steps = np.arange(int(np.prod(of_item)), dtype=np.float64).reshape(of_item)
        values = sums.reshape(-1, *(1 for _ in of_item)) + steps
        return (values if self._batches else values[0]).astype(DATATYPES[datatype].numpy)
