"""Tensors between the processes: datatypes, signatures, and where a request's inputs lie in its slot. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

ALIGN = 64


@dataclass(frozen=True, slots=True)
class Datatype:
    """One datatype of the Open Inference Protocol. `numpy` is the dtype that carries its bytes."""

    itemsize: int
    numpy: str


# BYTES is not here: it has no fixed size, so it never enters the arena.
DATATYPES: dict[str, Datatype] = {
    "BOOL": Datatype(1, "bool"),
    "UINT8": Datatype(1, "uint8"),
    "UINT16": Datatype(2, "uint16"),
    "UINT32": Datatype(4, "uint32"),
    "UINT64": Datatype(8, "uint64"),
    "INT8": Datatype(1, "int8"),
    "INT16": Datatype(2, "int16"),
    "INT32": Datatype(4, "int32"),
    "INT64": Datatype(8, "int64"),
    "FP16": Datatype(2, "float16"),
    "BF16": Datatype(2, "uint16"),  # numpy has no bfloat16; only its bits are moved
    "FP32": Datatype(4, "float32"),
    "FP64": Datatype(8, "float64"),
}


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output. `dims` is the shape of one item, without the batch axis; -1 may vary."""

    name: str
    datatype: str
    dims: tuple[int, ...]


class Signature(msgspec.Struct, frozen=True):
    """What a model takes and gives. `max_batch` 0: it does not batch, and `dims` are whole shapes.

    `min_batch`: smaller batches are filled up with zeros (some exports take no batch of 1). `sample_dims` are
    values for the inputs' -1s, in order, with which the model surely runs.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    min_batch: int = 1
    sample_dims: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor inside a slot: byte offset from the slot's start, size in bytes, whole shape."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """A request's arena slot: its size, and one place an input."""

    nbytes: int
    places: tuple[TensorPlace, ...]


class InputLayout:
    """Where the inputs of a request lie in its arena slot; the daemon writes by it, the worker reads by it."""

    def __init__(self, signature: Signature) -> None:
        self._inputs = signature.inputs
        self._batches = signature.max_batch > 0
        self._cache: dict[tuple[int, tuple[int, ...]], SlotLayout] = {}

    def slot(self, items: int, dims: tuple[int, ...]) -> SlotLayout:
        """For a request of `items` items, whose -1s are `dims`, in order."""
        key = (items, dims)
        slot = self._cache.get(key)
        if slot is None:
            if len(self._cache) > 1024:
                self._cache.clear()  # endless different lengths must not become a leak
            slot = self._cache[key] = self._lay_out(items, dims)
        return slot

    def piece(self, total: int, dims: tuple[int, ...], first: int, items: int) -> tuple[TensorPlace, ...]:
        """Where items `first` .. `first + items - 1` of a request of `total` items lie in its slot, by input."""
        places = []
        for place in self.slot(total, dims).places:
            of_item = place.nbytes // total
            offset = place.offset + first * of_item
            places.append(TensorPlace(offset, items * of_item, (items, *place.shape[1:])))
        return tuple(places)

    def _lay_out(self, items: int, dims: tuple[int, ...]) -> SlotLayout:
        places = []
        varying = iter(dims)
        end = 0
        for spec in self._inputs:
            offset = -(-end // ALIGN) * ALIGN
            of_item = tuple(next(varying) if dim == -1 else dim for dim in spec.dims)
            shape = (items, *of_item) if self._batches else of_item
            nbytes = math.prod(shape) * DATATYPES[spec.datatype].itemsize
            places.append(TensorPlace(offset, nbytes, shape))
            end = offset + nbytes
        return SlotLayout(end, tuple(places))
