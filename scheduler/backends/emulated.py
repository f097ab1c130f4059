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
from scheduler.lengths import ByLength, batch_ms, table
from scheduler.tensors import DATATYPES, Signature


class EmulatedBackend:
    """Output element j of an item is the sum of all input elements of that item, plus j."""

    def __init__(self, source: ModelSource, latency_ms: Sequence[tuple[int, float]], by_length: ByLength = ()) -> None:
        if not source.inputs or not source.outputs:
            raise ModelLoadError("an emulated model needs its inputs and outputs in config.pbtxt")
        if not latency_ms:
            raise ModelLoadError("an emulated model needs a latency_table in serving.yaml")
        max_batch = DEFAULT_MAX_BATCH if source.max_batch is None else source.max_batch
        self._max_batch = max(max_batch, 1)
        self._ms: Sequence[float] = latency.per_batch(latency_ms, self._max_batch)
        self._lengths = table(by_length, self._max_batch) if by_length else None
        self._batches = max_batch > 0
        varying = sum(dim == -1 for spec in source.inputs for dim in spec.dims)
        self.signature = Signature(source.inputs, source.outputs, max_batch, sample_dims=(1,) * varying)

    def join(self, parts: list[memoryview], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return join_in_memory(parts, shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.zeros(shape, dtype)

    def start(self, inputs: list[Array]) -> tuple[float, list[Array]]:
        return time.monotonic(), inputs

    def finish(self, started: tuple[float, list[Array]]) -> list[Array]:
        begin, inputs = started
        items = inputs[0].shape[0] if self._batches else 1
        sums = sum(array.reshape(items, -1).sum(axis=1, dtype=np.float64) for array in inputs)
        outputs = [self._output(np.asarray(sums), spec.dims, spec.datatype) for spec in self.signature.outputs]
        time.sleep(max(0.0, begin + self._ms_of(inputs)[items - 1] / 1e3 - time.monotonic()))
        return outputs

    def _ms_of(self, inputs: list[Array]) -> Sequence[float]:
        """By batch, at the length that these have."""
        if self._lengths is None:
            return self._ms
        shapes = zip(self.signature.inputs, inputs, strict=True)
        return batch_ms(
            self._lengths, next(array.shape[1 + spec.dims.index(-1)] for spec, array in shapes if -1 in spec.dims)
        )

    def _output(self, sums: Array, dims: tuple[int, ...], datatype: str) -> Array:
        of_item = tuple(1 if dim == -1 else dim for dim in dims)
        steps = np.arange(int(np.prod(of_item)), dtype=np.float64).reshape(of_item)
        values = sums.reshape(-1, *(1 for _ in of_item)) + steps
        return (values if self._batches else values[0]).astype(DATATYPES[datatype].numpy)
