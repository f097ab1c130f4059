"""Tensor files as the inputs of a job: npz and safetensors, looked at when they come, read a few rows at a time."""

from __future__ import annotations

import errno
import lzma
import math
import os
import shutil
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from scheduler.tensors import DATATYPES, Signature
from server.errors import invalid
from server.job_inputs import READ_BYTES, Item
from server.job_store import Position, full_disk

MAX_HEADER_BYTES = 16 * 1024 * 1024

# Of a safetensors file: dtype -> ours.
SAFETENSORS_TYPES = {
    "BOOL": "BOOL",
    "U8": "UINT8",
    "U16": "UINT16",
    "U32": "UINT32",
    "U64": "UINT64",
    "I8": "INT8",
    "I16": "INT16",
    "I32": "INT32",
    "I64": "INT64",
    "F16": "FP16",
    "BF16": "BF16",
    "F32": "FP32",
    "F64": "FP64",
}
_BAD_ZIP = zipfile.BadZipFile, zipfile.LargeZipFile
_OF_NUMPY = {each.numpy: name for name, each in DATATYPES.items() if name != "BF16"}


class RawTensor(msgspec.Struct, frozen=True):
    """One array in a file: from `offset` on, row-major. `shape[0]`: the items."""

    file: str
    offset: int
    datatype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * DATATYPES[self.datatype].itemsize


class _Entry(msgspec.Struct, frozen=True):
    """Of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_decode_entry = msgspec.json.Decoder(_Entry).decode


def unpack_npz(path: Path, most_bytes: int) -> dict[str, RawTensor]:
    """Puts the arrays of an npz file beside it, each as a file, and takes the npz away. Raises ServeError."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > most_bytes:
                raise invalid(f"the npz file holds more than {most_bytes >> 20} MiB, see --jobs-max-input-mib")
            for index, name in enumerate(archive.namelist()):
                out = path.with_name(f"array-{index}")
                with full_disk(), archive.open(name) as member, out.open("wb") as file:
                    datatype, shape = _npy_header(member, name)
                    shutil.copyfileobj(member, file, 1 << 20)
                found[name.removesuffix(".npy")] = tensor = RawTensor(out.name, 0, datatype, shape)
                _check_bytes(tensor, name, out.stat().st_size)
    except OSError as error:
        if error.errno != errno.EINVAL:  # that is what a place before the file's begin comes to
            raise
        raise invalid("the npz file cannot be read: it is damaged") from None
    # RuntimeError: it is encrypted. UnicodeDecodeError: of a name.
    except (*_BAD_ZIP, zlib.error, lzma.LZMAError, RuntimeError, EOFError, UnicodeDecodeError) as error:
        raise invalid(f"the npz file cannot be read: {error}") from None
    path.unlink()
    return found


def _check_bytes(tensor: RawTensor, name: str, nbytes: int) -> None:
    """Are there as many as its shape says? Raises ServeError."""
    if min(tensor.shape, default=0) < 0 or math.prod(tensor.shape) * DATATYPES[tensor.datatype].itemsize != nbytes:
        raise invalid(f"array {name[:100]} has shape {list(tensor.shape)[:20]}, which {nbytes} bytes are not")


def _npy_header(member: Any, name: str) -> tuple[str, tuple[int, ...]]:
    try:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
    except ValueError as error:
        raise invalid(f"array {name[:100]} of the npz file cannot be read: {error}") from None
    # numpy reads it as a literal of Python: TypeError is of keys, MemoryError of deep nesting.
    except (tokenize.TokenError, TypeError, MemoryError, RecursionError):
        raise invalid(
            f"array {name[:100]} of the npz file cannot be read: its header is not as numpy writes it"
        ) from None
    if fortran or dtype.byteorder == ">" or dtype.name not in _OF_NUMPY:
        order = " in Fortran order" if fortran else ""
        raise invalid(f"array {name[:100]} has dtype {dtype}{order}; expected little-endian numbers, row by row")
    return _OF_NUMPY[dtype.name], shape


def read_safetensors(path: Path) -> dict[str, RawTensor]:
    """What is in a safetensors file (huggingface/safetensors, "Format"). Raises ServeError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise invalid("the safetensors file cannot be read: its header does not fit in it")
        try:
            raw = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
            entries = {name: _decode_entry(entry) for name, entry in raw.items() if name != "__metadata__"}
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise invalid(f"the safetensors file's header cannot be read: {error}") from None
    return {name: _safetensor(path, name, entry, 8 + length, size) for name, entry in entries.items()}


def _safetensor(path: Path, name: str, entry: _Entry, base: int, size: int) -> RawTensor:
    begin, end = entry.data_offsets
    if entry.dtype not in SAFETENSORS_TYPES:
        raise invalid(f"array {name[:100]} of the safetensors file cannot be used: its dtype is {entry.dtype[:20]!r}")
    if not 0 <= begin <= end <= size - base:
        raise invalid(
            f"array {name[:100]} of the safetensors file cannot be used: its bytes are not where they should be"
        )
    found = RawTensor(path.name, base + begin, SAFETENSORS_TYPES[entry.dtype], entry.shape)
    _check_bytes(found, name, end - begin)
    return found


def check_tensors(found: dict[str, RawTensor], signature: Signature) -> tuple[list[RawTensor], int]:
    """Arrays in the order of the model's inputs, and their number of items. Raises ServeError."""
    names = [spec.name for spec in signature.inputs]
    if set(found) != set(names):
        raise invalid(f"expected arrays {', '.join(names)}; the file has {', '.join(sorted(found)[:20]) or 'none'}")
    tensors = [found[name] for name in names]
    items = tensors[0].shape[0] if tensors[0].shape else 0
    for spec, tensor in zip(signature.inputs, tensors, strict=True):
        fits = len(tensor.shape) == 1 + len(spec.dims) and all(
            want == size or (want == -1 and size > 0) for want, size in zip(spec.dims, tensor.shape[1:], strict=True)
        )
        if not fits or tensor.shape[0] != items or tensor.datatype != spec.datatype:
            raise invalid(
                f"array {spec.name} is {tensor.datatype} {list(tensor.shape)}, expected {spec.datatype} "
                f"{[items or 'items', *spec.dims]}"
            )
    return tensors, items


class TensorReader:
    """Rows of arrays, read where they are: nothing is mapped, so that nothing counts as memory of ours."""

    def __init__(self, folder: Path, tensors: Sequence[RawTensor], start: Position, signature: Signature) -> None:
        self._tensors = list(tensors)
        self._files = [os.open(folder / tensor.file, os.O_RDONLY) for tensor in tensors]
        self._next = start.item
        self._items = tensors[0].shape[0]
        self._dims = tuple(
            size
            for spec, tensor in zip(signature.inputs, tensors, strict=True)
            for want, size in zip(spec.dims, tensor.shape[1:], strict=True)
            if want == -1
        )

    def read(self, count: int) -> list[Item]:
        first = self._next
        row_bytes = sum(tensor.row_bytes for tensor in self._tensors)
        count = max(min(count, self._items - first, READ_BYTES // max(row_bytes, 1)), min(1, self._items - first))
        rows = []
        for file, tensor in zip(self._files, self._tensors, strict=True):
            size = tensor.row_bytes
            data = os.pread(file, count * size, tensor.offset + first * size)
            if len(data) < count * size:  # the file has become shorter
                count = len(data) // size
            rows.append([data[n * size : (n + 1) * size] for n in range(count)])
        self._next += count
        dims = self._dims
        return [Item(first + n, 0, dims, tuple(row[n] for row in rows), dims=dims) for n in range(count)]

    @property
    def position(self) -> Position:
        return Position(self._next)

    def close(self) -> None:
        for file in self._files:
            os.close(file)
