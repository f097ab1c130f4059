"""The results of a job: packed by item into the ledger, and written from there, in order, as one file."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from scheduler.answers import Answered
from scheduler.tensors import DATATYPES, TensorSpec
from server.job_store import UNFINISHED, Asked, Ledger, Row, full_disk

# One output of one item: its shape, and its bytes.
Packed = list[tuple[tuple[int, ...], bytes]]
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(Packed).decode
JSONL, NPZ = "jsonl", "npz"
OUTPUTS = (JSONL, NPZ)
ERRORS = "errors.jsonl"
WRITE_BYTES = 1 << 20


class ShapesDifferError(ValueError):
    """Items have outputs of different shapes, which no array can hold. The message names the output."""


def rows_of(
    items: Sequence[int], answered: Answered, specs: Sequence[TensorSpec], *, batches: bool, as_json: bool
) -> list[Row]:
    """The rows of a batch's items. `batches`: the model has a batch axis. What JSON cannot carry is an error there."""
    packed: list[Packed] = [[] for _ in items]
    errors: dict[int, str] = {}
    for index, spec in enumerate(specs):
        datatype = DATATYPES[spec.datatype]
        number = 0
        for share in answered.shares:
            shape, data = tuple(share.outputs.shapes[index]), share.outputs.data[index]
            if answered.length and batches and -1 in spec.dims:
                shape, data = _cut(shape, data, spec, answered.length)
            of_item = shape[1:] if batches else shape
            size = math.prod(of_item) * datatype.itemsize
            for row in range(share.row, share.row + share.items):
                value = data[row * size : (row + 1) * size]
                if as_json and not _fits_json(value, spec):
                    errors[number] = _not_in_json(spec)
                packed[number].append((of_item, value))
                number += 1
    return [
        Row(item, errors.get(number), None if number in errors else _pack(packed[number]))
        for number, item in enumerate(items)
    ]


def _cut(shape: tuple[int, ...], data: bytes, spec: TensorSpec, length: int) -> tuple[tuple[int, ...], bytes]:
    """Of an output that varies: its batch was padded, and its items are of that length."""
    whole = np.frombuffer(data, DATATYPES[spec.datatype].numpy).reshape(shape)
    own = whole[(slice(None), *(slice(length if dim == -1 else None) for dim in spec.dims))]
    return own.shape, own.tobytes()


def _fits_json(value: bytes, spec: TensorSpec) -> bool:
    if not spec.datatype.startswith(("FP", "BF")):
        return True
    return spec.datatype != "BF16" and bool(np.isfinite(np.frombuffer(value, DATATYPES[spec.datatype].numpy)).all())


def _not_in_json(spec: TensorSpec) -> str:
    if spec.datatype == "BF16":
        return f"output {spec.name} is BF16, which JSON cannot carry; ask for output=npz"
    return f"output {spec.name} is infinite or not a number, which JSON cannot carry; ask for output=npz"


def write_as_asked(ledger: Ledger, asked: Asked) -> str:
    """The results of a job whose items are all finished; returns why they are not in the form that was asked for."""
    specs, path = asked.signature.outputs, ledger.folder / f"results.{asked.output}"
    try:
        write(ledger, specs, asked.items, asked.output, path)
    except ShapesDifferError as error:
        write(ledger, specs, asked.items, JSONL, path.with_suffix(f".{JSONL}"))
        return f"the results are JSON lines, since {error}"
    return ""


def write(ledger: Ledger, specs: Sequence[TensorSpec], items: int, output: str, path: Path) -> None:
    """Writes a results file. It is there as a whole or not at all. Raises DiskFullError, ShapesDifferError."""
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with full_disk():
            with unfinished.open("wb") as file:
                if output == JSONL:
                    _write_json_lines(ledger.rows(), specs, file)
                else:
                    _write_npz(ledger, specs, items, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # it takes room, of which there may be none
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _write_json_lines(rows: Iterable[Row], specs: Sequence[TensorSpec], file: IO[bytes]) -> None:
    encode = msgspec.json.Encoder().encode
    for row in rows:
        if row.value is None:
            file.write(encode({"item": row.item, "error": row.error}) + b"\n")
        else:
            file.write(encode({"item": row.item, "outputs": _values(row.value, specs)}) + b"\n")


def _values(value: bytes, specs: Sequence[TensorSpec]) -> dict[str, Any]:
    packed = zip(specs, _unpack(value), strict=True)
    return {
        spec.name: np.frombuffer(data, DATATYPES[spec.datatype].numpy).reshape(shape).tolist()
        for spec, (shape, data) in packed
    }


def _write_npz(ledger: Ledger, specs: Sequence[TensorSpec], items: int, file: IO[bytes]) -> None:
    """An array an output, `ok`, and what went wrong. An item with an error has zeros."""
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for index, spec in enumerate(specs):
            shape = _shape(ledger, index)
            zeros = bytes(math.prod(shape) * DATATYPES[spec.datatype].itemsize)
            data = (_data(row, index, shape, spec) if row.value is not None else zeros for row in ledger.rows())
            _add_array(archive, spec.name, DATATYPES[spec.datatype].numpy, (items, *shape), data)
        ok = (b"\0" if row.value is None else b"\1" for row in ledger.rows())
        _add_array(archive, "ok", "bool", (items,), ok)
        with archive.open(ERRORS, "w", force_zip64=True) as member:
            _write_json_lines(ledger.rows(errors_only=True), (), member)


def _shape(ledger: Ledger, index: int) -> tuple[int, ...]:
    for row in ledger.rows():
        if row.value is not None:
            return _unpack(row.value)[index][0]
    return ()


def _data(row: Row, index: int, shape: tuple[int, ...], spec: TensorSpec) -> bytes:
    found, data = _unpack(row.value or b"")[index]
    if found != shape:
        raise ShapesDifferError(f"output {spec.name} has shape {list(found)} for item {row.item}, before {list(shape)}")
    return data


def _add_array(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...], data: Iterator[bytes]) -> None:
    header = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(header, about)
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        member.write(header.getvalue())
        waiting = bytearray()
        for piece in data:
            waiting += piece
            if len(waiting) >= WRITE_BYTES:
                member.write(waiting)
                waiting = bytearray()
        member.write(waiting)
