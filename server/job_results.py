"""The results of a job: packed by item into the ledger, and written from there, in order, as one file."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import numpy as np

from scheduler.answers import Answered
from scheduler.tensors import DATATYPES, TensorSpec
from server.job_inputs import Item
from server.job_store import UNFINISHED, Asked, Ledger, Row, full_disk
from server.job_tensors import SAFETENSORS_TYPES

# One output of one item: its shape, and its bytes.
Packed = list[tuple[tuple[int, ...], bytes]]
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(Packed).decode
JSONL, NPZ, SAFETENSORS = "jsonl", "npz", "safetensors"
OUTPUTS = (JSONL, NPZ, SAFETENSORS)
# What a tensor file has beside the outputs: which items have any, and JSON lines of what is not in arrays.
OK, ERRORS, NAMES = "ok", "errors.jsonl", "names.jsonl"
_DTYPES = {ours: name for name, ours in SAFETENSORS_TYPES.items()}
WRITE_BYTES = 1 << 20
_INSTEAD = "ask for output=npz or safetensors"


class ShapesDifferError(ValueError):
    """Items have outputs of different shapes, which no array can hold. The message names the output."""


def rows_of(
    items: Sequence[int],
    answered: Answered,
    specs: Sequence[TensorSpec],
    *,
    batches: bool,
    as_json: bool,
    lengths: Sequence[int] = (),
) -> list[Row]:
    """The rows of a batch's items. `batches`: the model has a batch axis. What JSON cannot carry is an error there.

    `lengths`: of the items, where they are padded, and not all as long as the request.
    """
    packed: list[Packed] = [[] for _ in items]
    errors: dict[int, str] = {}
    for index, spec in enumerate(specs):
        datatype = DATATYPES[spec.datatype]
        number = 0
        for share in answered.shares:
            shape, data = tuple(share.outputs.shapes[index]), share.outputs.data[index]
            cut = answered.length and batches and -1 in spec.dims
            of_item = shape[1:] if batches else shape
            size = math.prod(of_item) * datatype.itemsize
            for row in range(share.row, share.row + share.items):
                value = data[row * size : (row + 1) * size]
                own = of_item
                if cut:
                    own, value = _cut(of_item, value, spec, lengths[number] if lengths else answered.length)
                if as_json and not _fits_json(value, spec):
                    errors[number] = _not_in_json(spec)
                packed[number].append((own, value))
                number += 1
    return [
        Row(item, errors.get(number), None if number in errors else _pack(packed[number]))
        for number, item in enumerate(items)
    ]


def rows_of_all(finished: Iterable[tuple[Sequence[Item], Answered | str]], asked: Asked) -> list[Row]:
    """Of batches, each with its outcome, or with what is wrong with its items."""
    specs, batches, as_json = asked.signature.outputs, asked.signature.max_batch > 0, asked.output == JSONL
    rows: list[Row] = []
    for items, outcome in finished:
        if isinstance(outcome, str):
            made = [Row(item.number, outcome, None) for item in items]
        else:
            numbers, lengths = [item.number for item in items], [item.length or outcome.length for item in items]
            made = rows_of(numbers, outcome, specs, batches=batches, as_json=as_json, lengths=lengths)
        for row, item in zip(made, items, strict=True):
            row.name = item.name
        rows += made
    return rows


def _cut(shape: tuple[int, ...], data: bytes, spec: TensorSpec, length: int) -> tuple[tuple[int, ...], bytes]:
    """An item's output that varies: its batch was padded, and it is of that length."""
    whole = np.frombuffer(data, DATATYPES[spec.datatype].numpy).reshape(shape)
    own = whole[tuple(slice(length if dim == -1 else None) for dim in spec.dims)]
    return own.shape, own.tobytes()


def _fits_json(value: bytes, spec: TensorSpec) -> bool:
    if not spec.datatype.startswith(("FP", "BF")):
        return True
    return spec.datatype != "BF16" and bool(np.isfinite(np.frombuffer(value, DATATYPES[spec.datatype].numpy)).all())


def _not_in_json(spec: TensorSpec) -> str:
    if spec.datatype == "BF16":
        return f"output {spec.name} is BF16, which JSON cannot carry; {_INSTEAD}"
    return f"output {spec.name} is infinite or not a number, which JSON cannot carry; {_INSTEAD}"


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
                    file.writelines(_lines(ledger.rows(), specs))
                elif output == NPZ:
                    _write_npz(_arrays(ledger, specs, items), ledger, file)
                else:
                    _write_safetensors(_arrays(ledger, specs, items), ledger, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # it takes room, of which there may be none
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _lines(rows: Iterable[Row], specs: Sequence[TensorSpec]) -> Iterator[bytes]:
    encode = msgspec.json.Encoder().encode
    for row in rows:
        about: dict[str, Any] = {"item": row.item}
        if row.name is not None:
            about["name"] = row.name
        if row.value is None:
            about["error"] = row.error
        elif specs:
            about["outputs"] = _values(row.value, specs)
        yield encode(about) + b"\n"


def _values(value: bytes, specs: Sequence[TensorSpec]) -> dict[str, Any]:
    packed = zip(specs, _unpack(value), strict=True)
    return {
        spec.name: np.frombuffer(data, DATATYPES[spec.datatype].numpy).reshape(shape).tolist()
        for spec, (shape, data) in packed
    }


# ---- tensor files ----


class _Array(NamedTuple):
    """One array of a file; `data` yields its bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Iterator[bytes]


def _arrays(ledger: Ledger, specs: Sequence[TensorSpec], items: int) -> list[_Array]:
    """One an output, and which items have one: an item with an error has zeros."""
    arrays = []
    for index, spec in enumerate(specs):
        shape = _shape(ledger, index)
        arrays.append(_Array(spec.name, spec.datatype, (items, *shape), _column(ledger, index, shape, spec)))
    name = OK
    while any(spec.name == name for spec in specs):
        name += "_"
    return [*arrays, _Array(name, "BOOL", (items,), _ok(ledger))]


def _ok(ledger: Ledger) -> Iterator[bytes]:
    for row in ledger.rows():
        yield b"\0" if row.value is None else b"\1"


def _shape(ledger: Ledger, index: int) -> tuple[int, ...]:
    for row in ledger.rows():
        if row.value is not None:
            return _unpack(row.value)[index][0]
    return ()


def _column(ledger: Ledger, index: int, shape: tuple[int, ...], spec: TensorSpec) -> Iterator[bytes]:
    zeros = bytes(math.prod(shape) * DATATYPES[spec.datatype].itemsize)
    for row in ledger.rows():
        if row.value is None:
            yield zeros
            continue
        found, data = _unpack(row.value)[index]
        if found != shape:
            raise ShapesDifferError(
                f"output {spec.name} has shape {list(found)} for item {row.item}, before {list(shape)}"
            )
        yield data


def _texts(ledger: Ledger) -> dict[str, Callable[[], Iterator[bytes]]]:
    """What goes along as JSON lines."""
    texts: dict[str, Callable[[], Iterator[bytes]]] = {ERRORS: lambda: _lines(ledger.rows(errors_only=True), ())}
    if ledger.has_names:
        texts[NAMES] = lambda: _lines((Row(row.item, None, b"", row.name) for row in ledger.rows()), ())
    return texts


def _write_npz(arrays: Sequence[_Array], ledger: Ledger, file: IO[bytes]) -> None:
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for array in arrays:
            with archive.open(f"{array.name}.npy", "w", force_zip64=True) as member:
                member.write(_npy_header(array))
                _write_pieces(array.data, member)
        for name, lines in _texts(ledger).items():
            with archive.open(name, "w", force_zip64=True) as member:
                _write_pieces(lines(), member)


def _npy_header(array: _Array) -> bytes:
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(DATATYPES[array.datatype].numpy))
    about = {"descr": descr, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_2_0(header, about)
    return header.getvalue()


def _write_safetensors(arrays: Sequence[_Array], ledger: Ledger, file: IO[bytes]) -> None:
    """As huggingface/safetensors, "Format", has it: no holes, and every array at a multiple of its element's size."""
    arrays = sorted(arrays, key=lambda array: -DATATYPES[array.datatype].itemsize)
    for name, lines in _texts(ledger).items():
        arrays.append(_Array(name, "UINT8", (sum(map(len, lines())),), lines()))
    entries, end = {}, 0
    for array in arrays:
        begin, end = end, end + math.prod(array.shape) * DATATYPES[array.datatype].itemsize
        entries[array.name] = {"dtype": _DTYPES[array.datatype], "shape": array.shape, "data_offsets": (begin, end)}
    header = msgspec.json.encode(entries)
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for array in arrays:
        _write_pieces(array.data, file)


def _write_pieces(pieces: Iterable[bytes], file: IO[bytes]) -> None:
    waiting = bytearray()
    for piece in pieces:
        waiting += piece
        if len(waiting) >= WRITE_BYTES:
            file.write(waiting)
            waiting = bytearray()
    file.write(waiting)
