"""Bytes to tensors and back: the HTTP forms of an infer request and its reply. Pure.

Tensor bytes are not copied here: a Tensor holds views of the body, and `write_tensor` copies them, once, to
where the worker will read them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from scheduler.tensors import Signature, TensorSpec
from server import base64_text, json_tensors, wire
from server.errors import Fault, ServeError, invalid

Pieces = list[memoryview]

# Of one varying axis. Whatever is larger makes no sense, and its digits would fill logs.
MAX_DIM = 2**31 - 1
# From so much JSON on, values are counted before they are decoded.
COUNT_FROM_BYTES = 64 * 1024


class Tensor(msgspec.Struct, gc=False):  # a Struct is quicker to make than a NamedTuple
    """One input of a request as it came: `data` is JSON text, or views of its bytes, or BYTES elements."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: msgspec.Raw | Pieces | list[bytes]


class OutputChoice(msgspec.Struct):
    """One output to send back. `binary`: as bytes behind the JSON."""

    name: str
    binary: bool


class DecodedRequest(msgspec.Struct):
    """`outputs` None: all of them, in the form that `binary_default` says."""

    tensors: list[Tensor]
    outputs: list[OutputChoice] | None
    binary_default: bool
    parameters: wire.Parameters | None
    id: str | None


# ---- requests ----


def decode_request(chunks: Sequence[bytes], header_length: int | None) -> DecodedRequest:
    """A whole infer body, in the chunks it came in. Raises ServeError.

    `header_length`: the value of Inference-Header-Content-Length, None if the header is absent (all is JSON).
    """
    size = len(chunks[0]) if len(chunks) == 1 else sum(map(len, chunks))
    if header_length is None:
        header_length = size
    elif not 0 < header_length <= size:
        raise invalid(
            f"Inference-Header-Content-Length is {header_length}, but the body has {size} bytes; expected a "
            f"value between 1 and the body's size, or 0 for a raw body"
        )
    head = chunks[0][:header_length] if len(chunks) == 1 else b"".join(_pieces(chunks, 0, header_length))
    try:
        request = wire.decode_infer_request(head)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(wire.unreadable(head, error)) from None
    if not request.inputs:
        raise invalid("the request has no inputs; expected at least one")
    tensors, end = [], header_length
    for entry in request.inputs:
        tensor, end = _tensor(entry, chunks, end, size)
        if header_length > COUNT_FROM_BYTES and isinstance(tensor.data, msgspec.Raw):
            _check_commas(tensor.data, tensor.name, tensor.shape)
        tensors.append(tensor)
    if end != size:
        raise invalid(f"unexpected additional input data: the inputs end at byte {end}, the body has {size}")
    parameters = request.parameters
    binary_default = wants_binary(parameters, otherwise=False)
    outputs = None
    if request.outputs:
        outputs = [_output_choice(output, binary_default) for output in request.outputs]
    return DecodedRequest(tensors, outputs, binary_default, parameters, request.id)


def wants_binary(parameters: wire.Parameters | None, *, otherwise: bool) -> bool:
    """Of outputs that do not say it themselves. Raises ServeError."""
    return _flag(parameters or {}, "binary_data_output", "the request's", otherwise)


def _tensor(entry: wire.InferInput, chunks: Sequence[bytes], begin: int, size: int) -> tuple[Tensor, int]:
    """One input, and where the next one's bytes begin."""
    parameters = entry.parameters
    if not parameters or "binary_data_size" not in parameters:
        if parameters and "shared_memory_region" in parameters:
            raise ServeError(Fault.UNSUPPORTED, f"input {entry.name}: shared memory is not supported; send the data")
        if not entry.data:
            raise invalid(f"input {entry.name} has neither data nor a binary_data_size")
        return Tensor(entry.name, entry.datatype, entry.shape, entry.data), begin
    nbytes = parameters["binary_data_size"]
    if type(nbytes) is not int or nbytes < 0:
        raise invalid(f"input {entry.name}: binary_data_size must be a number of bytes, not {nbytes!r}")
    if entry.data:
        raise invalid(f"input {entry.name} has both data and a binary_data_size; send one of them")
    end = begin + nbytes
    if end > size:
        raise invalid(
            f"unexpected size for input {entry.name}: {nbytes} bytes are announced, {size - begin} are in the body"
        )
    return Tensor(entry.name, entry.datatype, entry.shape, _pieces(chunks, begin, end)), end


def _check_commas(raw: msgspec.Raw, name: str, shape: tuple[int, ...]) -> None:
    """Refuses many values for a small shape before they are decoded, which takes 50 ns and 50 bytes each.

    That the shape is one that the model takes is checked before, too.
    """
    separated = 1 + bytes(raw).count(b",")
    if separated > max(math.prod(shape), 1):
        raise invalid(f"input {name} has {separated} values in data, shape {list(shape)} takes {math.prod(shape)}")


def _pieces(chunks: Sequence[bytes], begin: int, end: int) -> Pieces:
    """Views of bytes begin..end of the chunks taken together."""
    if len(chunks) == 1:
        return [memoryview(chunks[0])[begin:end]]
    pieces = []
    at = 0
    for chunk in chunks:
        if at < end and at + len(chunk) > begin:
            pieces.append(memoryview(chunk)[max(begin - at, 0) : end - at])
        at += len(chunk)
    return pieces


def _output_choice(output: wire.RequestedOutput, binary_default: bool) -> OutputChoice:
    parameters = output.parameters
    if not parameters:
        return OutputChoice(output.name, binary_default)
    for name, what in (("classification", "classification"), ("shared_memory_region", "shared memory")):
        if parameters.get(name):
            raise ServeError(Fault.UNSUPPORTED, f"output {output.name}: {what} is not supported")
    owner = f"output {output.name}'s"
    binary = _flag(parameters, "binary_data", owner, binary_default)
    return OutputChoice(output.name, binary)


def _flag(parameters: wire.Parameters, name: str, owner: str, otherwise: bool) -> bool:
    value = parameters.get(name, otherwise)
    if type(value) is not bool:
        raise invalid(f"{owner} parameter {name} must be true or false, not {value!r}")
    return value


# ---- checks ----


class Checked(msgspec.Struct):
    """Inputs that fit a signature: in its order, with the items they hold and the values of its -1s."""

    tensors: Sequence[Tensor]
    items: int
    dims: tuple[int, ...]


def check_inputs(signature: Signature, tensors: Sequence[Tensor]) -> Checked:
    """Names, datatypes and shapes of a request against what the model takes. Raises ServeError."""
    specs = signature.inputs
    if len(tensors) != 1 or len(specs) != 1 or tensors[0].name != specs[0].name:
        tensors = _in_order(signature, tensors)
    items = 1
    if signature.max_batch > 0:
        first = tensors[0]
        items = first.shape[0] if first.shape else 0
        if not 1 <= items <= signature.max_batch:
            if len(first.shape) != len(specs[0].dims) + 1:
                raise _other_rank(specs[0], first.shape)
            shape, most = list(first.shape), signature.max_batch
            raise invalid(f"input {first.name} has shape {shape}, a batch of {items} items; expected 1 to {most}")
    dims: tuple[int, ...] = ()
    for tensor, spec in zip(tensors, specs, strict=True):
        if tensor.datatype != spec.datatype:
            raise invalid(f"input {spec.name} has datatype {tensor.datatype}, expected {spec.datatype}")
        expected = (items, *spec.dims) if signature.max_batch > 0 else spec.dims
        if tensor.shape != expected or -1 in expected:
            dims += _varying(spec, tensor.shape, expected)
    return Checked(tensors, items, dims)


def _in_order(signature: Signature, tensors: Sequence[Tensor]) -> list[Tensor]:
    by_name = {tensor.name: tensor for tensor in tensors}
    names = [spec.name for spec in signature.inputs]
    if len(tensors) != len(names) or set(by_name) != set(names):
        raise invalid(f"expected inputs {_names(signature.inputs)}, got {_names(tensors)}")
    return [by_name[name] for name in names]


def _varying(spec: TensorSpec, shape: tuple[int, ...], expected: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes that stand where -1 is expected. Raises ServeError where a shape differs elsewhere."""
    if len(expected) > len(spec.dims) != len(shape) - 1:
        raise _other_rank(spec, shape)
    pairs = list(zip(shape, expected, strict=False))
    fits = all(1 <= dim <= MAX_DIM if want == -1 else dim == want for dim, want in pairs)
    if len(shape) != len(expected) or not fits:
        may_vary = " (-1: any size from 1 on)" if -1 in expected else ""
        raise invalid(f"input {spec.name} has shape {list(shape)}, expected {list(expected)}{may_vary}")
    return tuple(dim for dim, want in pairs if want == -1)


def _other_rank(spec: TensorSpec, shape: tuple[int, ...]) -> ServeError:
    """For a model that takes batches."""
    missing = "; the batch dimension is missing" if len(shape) == len(spec.dims) else ""
    return invalid(f"input {spec.name} has shape {list(shape)}, expected {[-1, *spec.dims]}{missing}")


def _names(named: Iterable[Tensor | TensorSpec]) -> str:
    return f"[{', '.join(each.name for each in named)}]"


# ---- tensors into memory ----


def write_tensor(tensor: Tensor, spec: TensorSpec, shape: tuple[int, ...], target: memoryview) -> None:
    """Writes a tensor, whose shape was checked, to `target`, which is as long as it is. Raises ServeError."""
    data = tensor.data
    if isinstance(data, msgspec.Raw):
        json_tensors.write_nested(data, spec, shape, target)
        return
    nbytes = sum(map(len, data))
    if nbytes != len(target):
        raise invalid(
            f"unexpected size for input {spec.name}: {nbytes} bytes were sent, {spec.datatype} of shape "
            f"{list(shape)} takes {len(target)}"
        )
    at = 0
    for piece in data:
        target[at : at + len(piece)] = piece
        at += len(piece)


# ---- BYTES ----


def byte_elements(tensor: Tensor, *, text: bool = False) -> list[bytes]:
    """A BYTES tensor's: binary as <uint32 length><bytes>, in JSON as base64, or as it stands. Raises ServeError."""
    data = tensor.data
    count = math.prod(tensor.shape)
    if isinstance(data, msgspec.Raw):
        texts = json_tensors.values_of(data, tensor.name, str, tensor.shape)
        elements = [each.encode() for each in texts] if text else list(base64_text.decode_all(texts, tensor.name))
    elif data and isinstance(data[0], bytes):
        elements = [bytes(element) for element in data]
    else:
        elements = _length_prefixed(b"".join(data), tensor.name, count)
    if len(elements) != count:
        many = len(elements) if len(elements) <= count else f"more than {count}"
        raise invalid(f"input {tensor.name} has {many} elements, shape {list(tensor.shape)} takes {count}")
    return elements


def _length_prefixed(data: bytes, name: str, count: int) -> list[bytes]:
    """Stops at the first element beyond `count`."""
    elements: list[bytes] = []
    at = 0
    while at < len(data) and len(elements) <= count:
        if at + 4 > len(data):
            raise invalid(f"input {name}: {len(data) - at} bytes are left over after its last BYTES element")
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + size > len(data):
            raise invalid(f"input {name}: a BYTES element announces {size} bytes, {len(data) - at} are left")
        elements.append(data[at : at + size])
        at += size
    return elements


# ---- replies ----


class OutputData(msgspec.Struct):
    """One output of one request: either its bytes, views into its batches', or its values for JSON."""

    spec: TensorSpec
    shape: tuple[int, ...]
    data: Pieces | None
    values: list[Any] | None


def encode_reply(
    model: str, version: str, request_id: str | None, outputs: Sequence[OutputData], late_ms: float = 0.0
) -> tuple[list[bytes | memoryview], int | None]:
    """The parts of a reply's body, and the length of its JSON part if binary data follow it."""
    entries = []
    parts: list[bytes | memoryview] = [b""]
    for output in outputs:
        entry = wire.InferOutput(output.spec.name, output.spec.datatype, output.shape)
        if output.data is None:
            entry.data = output.values
        else:
            entry.parameters = {"binary_data_size": sum(map(len, output.data))}
            parts += filter(len, output.data)
        entries.append(entry)
    parameters = {"late_ms": late_ms} if late_ms else None
    parts[0] = wire.encode_json(wire.InferReply(model, version, entries, request_id or None, parameters))
    if b"null" in parts[0]:
        _check_finite(outputs)
    return parts, len(parts[0]) if len(parts) > 1 else None


def _check_finite(outputs: Sequence[OutputData]) -> None:
    """JSON has no infinity and no NaN; what encodes them as null would be taken for an answer. Raises ServeError."""
    for output in outputs:
        if output.values is not None and not all(map(math.isfinite, output.values)):
            raise invalid(
                f"output {output.spec.name} has values that are infinite or not a number, which JSON cannot carry; "
                f"ask for it as binary data"
            )
