"""What the workers made of requests: the outputs of batches, and each request's share of them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from scheduler.channel import Done


class BatchOutputs:
    """The outputs of one batch, copied out of the worker's outbox once, shared by its requests.

    One entry an output: its bytes and its shape.
    """

    __slots__ = ("_values", "data", "shapes")

    def __init__(self, done: Done, outbox: memoryview) -> None:
        self.shapes = done.shapes
        self.data = [
            bytes(outbox[offset : offset + size]) for offset, size in zip(done.offsets, done.sizes, strict=True)
        ]
        self._values: dict[int, list[Any]] = {}

    def values(self, index: int, dtype: str) -> list[Any]:
        """Output `index` of the whole batch as a flat list of Python numbers; made once a batch."""
        values = self._values.get(index)
        if values is None:
            values = self._values[index] = np.frombuffer(self.data[index], dtype).tolist()
        return values


class Share(msgspec.Struct, frozen=True):
    """What a batch made of a piece of a request: `items` rows from `row` on, for its items from `first` on."""

    outputs: BatchOutputs
    row: int
    items: int
    first: int


class Answered(msgspec.Struct, frozen=True):
    """All the outputs of a request, in the order of its items: mostly one share. `late_ns`: after its due time.

    `length`: its own, where batches are padded. `started_ns`: when its first piece was sent to a worker.
    """

    shares: tuple[Share, ...]
    late_ns: int
    length: int = 0
    started_ns: int = 0

    @property
    def nbytes(self) -> int:
        """What it keeps in memory: its batches whole."""
        return sum(len(data) for share in self.shares for data in share.outputs.data)
