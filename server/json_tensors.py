"""Tensors as JSON: a list of values, flat or nested as the shape is. Pure."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from typing import Any

import msgspec

from scheduler.tensors import DATATYPES, TensorSpec
from server.errors import invalid

# How struct writes each datatype, and what JSON value it takes.
_STRUCT_CODES = {
    "BOOL": ("?", bool),
    "UINT8": ("B", int),
    "UINT16": ("H", int),
    "UINT32": ("I", int),
    "UINT64": ("Q", int),
    "INT8": ("b", int),
    "INT16": ("h", int),
    "INT32": ("i", int),
    "INT64": ("q", int),
    "FP16": ("e", float),
    "FP32": ("f", float),
    "FP64": ("d", float),
}
# Which the binary tensor extension has come in binary only.
_BINARY_ONLY = {"FP16", "BF16"}
# Of text whose values are Python's objects at one time: they take up to sixteen times its room.
PIECE_BYTES = 256 * 1024
MAX_DEPTH = 32
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[],"))
_NO_BRACKETS = bytes.maketrans(b"[]", b"  ")
_Unreadable = (msgspec.MsgspecError, UnicodeDecodeError)


# ---- of requests, which say their shape ----


def write_nested(raw: msgspec.Raw, spec: TensorSpec, shape: tuple[int, ...], target: memoryview) -> None:
    """Raises ServeError."""
    if spec.datatype in _BINARY_ONLY:
        raise invalid(f"input {spec.name}: {spec.datatype} cannot be sent as JSON; use the binary tensor extension")
    count = math.prod(shape)
    values = values_of(raw, spec.name, _STRUCT_CODES[spec.datatype][1], shape)
    if len(values) != count:
        raise invalid(f"input {spec.name} has {len(values)} values in data, shape {list(shape)} takes {count}")
    _pack(values, spec, target)


def _pack(values: list[Any], spec: TensorSpec, target: memoryview) -> None:
    try:
        _packer(spec.datatype, len(values)).pack_into(target, 0, *values)
    except (struct.error, OverflowError) as error:
        raise invalid(f"input {spec.name}: a value does not fit {spec.datatype}: {error}") from None


def values_of(raw: msgspec.Raw, name: str, kind: type, shape: tuple[int, ...]) -> list[Any]:
    """The values of `data`, flat or nested as the shape is, row-major. Raises ServeError."""
    try:
        values: list[Any] = _decoder(kind, 1)(raw)
        return values
    except _Unreadable as error:
        flat_error = str(error)
    if not shape:
        try:
            return [_decoder(kind, 0)(raw)]
        except _Unreadable:
            raise invalid(f"input {name}: data must be one value, or a list of it: {flat_error}") from None
    try:
        return _flatten(_decoder(kind, len(shape))(raw), name, shape)
    except _Unreadable as error:
        # Nested or flat was meant? An array that the nested form misses says: flat.
        reason = flat_error if str(error).startswith("Expected `array`") else str(error)
        raise invalid(f"input {name}: data does not hold what datatype and shape announce: {reason}") from None


@lru_cache(maxsize=256)
def _decoder(kind: Any, depth: int) -> Any:
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind).decode


@lru_cache(maxsize=1024)
def _packer(datatype: str, count: int) -> struct.Struct:
    return struct.Struct(f"<{count}{_STRUCT_CODES[datatype][0]}")


def _flatten(values: list[Any], name: str, shape: tuple[int, ...]) -> list[Any]:
    if len(values) != shape[0]:
        raise invalid(f"input {name}: data is nested in another shape than {list(shape)}")
    level: Iterable[list[Any]] = values
    for size in shape[1:]:
        level = list(level)
        if any(len(part) != size for part in level):
            raise invalid(f"input {name}: data is nested in another shape than {list(shape)}")
        values = list(chain.from_iterable(level))
        level = values
    return values


# ---- of jobs, whose lines may be long and say no shape ----


def shape_of(text: bytes) -> tuple[int, ...] | None:
    """By brackets and commas alone, so that no list becomes an object; () of what is none; None: lists differ.

    `text` is JSON without texts and objects. An empty list is taken for one of a value; `write_pieces` finds it out.
    """
    frame = text.translate(None, _ALL_BUT_BRACKETS)
    depth = len(frame) - len(frame.lstrip(b"["))
    sizes: list[int] = []
    within = 0  # bytes of the frame that one element has
    for level in range(1, min(depth, MAX_DEPTH) + 1):
        # Here ends the first list of those that are nested so deeply; it begins after `depth - level` brackets.
        end = frame.find(b"]" * level)
        whole = end + level - (depth - level)
        sizes.insert(0, (whole - 1) // (within + 1))
        if end < 0 or sizes[0] < 1:
            return None
        within = whole
    return tuple(sizes) if len(sizes) == depth and frame == _frame(sizes) else None


def _frame(sizes: Iterable[int]) -> bytes:
    """What is left of nested lists without their values."""
    frame = b""
    for size in reversed(list(sizes)):
        frame = b"".join((b"[", (frame + b",") * (size - 1), frame, b"]"))
    return frame


def write_pieces(text: bytes, spec: TensorSpec, target: memoryview) -> None:
    """All values in a JSON text, in their order, however they are nested. Raises ServeError.

    They are as many as `shape_of` says, or a list is empty.
    """
    decode, itemsize = _decoder(_STRUCT_CODES[spec.datatype][1], 1), DATATYPES[spec.datatype].itemsize
    begin = at = 0
    while begin < len(text):
        end = text.find(b",", begin + PIECE_BYTES)
        end = len(text) if end < 0 else end
        try:
            values = decode(b"[" + text[begin:end].translate(_NO_BRACKETS) + b"]")
        except _Unreadable as error:
            is_other = isinstance(error, msgspec.ValidationError)
            reason = str(error).split(" - at ")[0] if is_other else "a list is empty, or has more than numbers"
            raise invalid(f"input {spec.name} must hold {spec.datatype}: {reason}") from None
        _pack(values, spec, target[at:])
        begin, at = end + 1, at + len(values) * itemsize
    if at != len(target):
        raise invalid(f"input {spec.name} must hold {spec.datatype}: a list is empty")
