"""What a line of JSON has: tensors, by the model's inputs, or texts for its pipeline."""

from __future__ import annotations

import itertools
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np

from scheduler.lengths import Lengths
from scheduler.tensors import DATATYPES, Signature, TensorSpec
from server.errors import ServeError, both_given
from server.json_tensors import shape_of, write_pieces

_decode_any = msgspec.json.Decoder().decode
_decode_raw = msgspec.json.Decoder(msgspec.Raw).decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
# In a line of tensors; it has one for each name, and is kept from having millions of them.
MOST_COLONS = 10_000
# Of a value that is wrong.
SHOWN_CHARS = 60
_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxdict = 30
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 2 * SHOWN_CHARS
_ESCAPED = re.compile(r'["\\\x00-\x1f]')
# What an item for a pipeline may be made of, beside the pipeline's input; and what it may be called.
SOURCES, NAME = ("file", "bytes", "unreadable"), "name"

# A line, with what is in it read or still as text.
Line = str | msgspec.Raw | Mapping[str, str | msgspec.Raw]


class BadItemError(ValueError):
    """An item that cannot be run; the message says why."""


def parse_line(line: bytes) -> msgspec.Raw | dict[str, msgspec.Raw]:
    """No objects are made of lists, however many it holds. Raises BadItemError."""
    if line.lstrip()[:1] != b"{":
        return msgspec.Raw(_decoded(line, _decode_raw))
    if line.count(b":") > MOST_COLONS:
        raise BadItemError(f"the line has more than {MOST_COLONS} colons, and too many names")
    return dict(_decoded(line, _decode_object))


def _decoded(line: bytes | msgspec.Raw, decode: Callable[[bytes | msgspec.Raw], Any]) -> Any:
    """Raises BadItemError."""
    try:
        return decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        lost = "; one value a line: curl -d loses the line ends, --data-binary keeps them"
        hint = lost if "trailing characters" in str(error) else ""
        raise BadItemError(f"the line is not JSON: {error}{hint}") from None


class PipelineLines:
    """Reads lines for a pipeline. They may be long: no objects are made of lists, however many these hold."""

    def __init__(self, pipeline_input: str, signature: Signature) -> None:
        self._sources = {pipeline_input, *SOURCES}
        self._inputs = {spec.name for spec in signature.inputs}
        # Those that cannot be meant for something else. A field of msgspec's has no name that JSON escapes.
        self._ready = [name for name in self._inputs - self._sources - {NAME} if not _ESCAPED.search(name)]
        self._keys = [*self._sources, *{NAME} - self._sources, *self._ready]
        fields = [(f"key_{n}", msgspec.Raw, msgspec.field(name=key, default=None)) for n, key in enumerate(self._keys)]
        self._decode: Callable[[Any], Any] = msgspec.json.Decoder(msgspec.defstruct("Line", fields)).decode

    def read(self, line: bytes) -> str | dict[str, str | msgspec.Raw] | None:
        """What an item is made of, values that are no texts as Raw; None: nothing here is. Raises BadItemError."""
        begin = line.lstrip()[:1]
        if begin == b'"':
            return str(_decoded(line, _decode_any))
        if begin != b"{":
            return None
        raw = zip(self._keys, msgspec.structs.astuple(_decoded(line, self._decode)), strict=True)
        found = {key: _text_or_raw(value) for key, value in raw if value is not None}
        sources = self._sources & found.keys()
        # An input of the model may be called as one of them.
        if not any(isinstance(found[key], str) or key not in self._inputs for key in sources):
            return None
        if ready := sorted(found.keys() & set(self._ready)):
            raise BadItemError(both_given(", ".join(sorted(sources)), ready))
        return found


def _text_or_raw(raw: msgspec.Raw) -> str | msgspec.Raw:
    return str(_decoded(raw, _decode_any)) if _begin_of(raw)[:1] == '"' else raw


def tensors_of(
    value: msgspec.Raw | dict[str, msgspec.Raw], signature: Signature, lengths: Lengths | None = None
) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
    """The bytes of each input, and the sizes of the varying axes. Raises BadItemError.

    Inputs that tell which part of an item is none may be left out, as in requests: all is there.
    """
    specs, may_lack = signature.inputs, told(lengths)
    if not isinstance(value, dict):
        own = [spec.name for spec in specs if spec.name not in may_lack]
        if len(own) != 1:
            raise BadItemError(f"the line must be an object with {', '.join(spec.name for spec in specs)}")
        value = {own[0]: value}
    names = {spec.name for spec in specs}
    if not set(value) <= names <= {*value, *may_lack}:
        raise BadItemError(f"expected {', '.join(spec.name for spec in specs)}; the line has {names_of(value)}")
    found = {spec.name: _tensor(value[spec.name], spec) for spec in specs if spec.name in value}
    length = next((varying[0] for _, varying in found.values() if varying), 1)
    if lengths is not None and lengths.length in found:
        _check_told(lengths.length, found[lengths.length][0], length)
    for spec in specs:
        if spec.name not in found:
            dims = [length if dim == -1 else dim for dim in spec.dims]
            of_all = length if lengths is not None and spec.name == lengths.length else 1
            found[spec.name] = np.full(dims, of_all, np.int64).tobytes(), [length] * spec.dims.count(-1)
    made = [found[spec.name] for spec in specs]
    return tuple(data for data, _ in made), tuple(size for _, varying in made for size in varying)


def told(lengths: Lengths | None) -> set[str]:
    """Inputs that say how long an item is."""
    return {lengths.length, lengths.mask} - {""} if lengths is not None else set()


def _check_told(name: str, data: bytes, length: int) -> None:
    """As of requests: with more than is there a model would take padding for content. Raises BadItemError."""
    told_length = int.from_bytes(data, "little", signed=True)
    if not 1 <= told_length <= length:
        raise BadItemError(
            f"input {name} is {told_length}, and the item has a length of {length}; expected 1 to {length}"
        )


def _tensor(raw: msgspec.Raw, spec: TensorSpec) -> tuple[bytes, list[int]]:
    """Its bytes, and the sizes of its -1 axes; what fits is as in requests. Raises BadItemError."""
    if spec.datatype == "BF16":
        raise BadItemError(f"input {spec.name} is BF16, which JSON cannot carry; send a tensor file")
    text = bytes(raw)
    if b'"' in text or b"{" in text or text == b"null":
        raise BadItemError(f"input {spec.name} must hold {spec.datatype}, not {shortly(raw)}")
    shape = None if b"[]" in text else shape_of(text)
    if shape is None:
        raise BadItemError(f"input {spec.name} is not an array: its lists differ in length or depth, or are empty")
    varying = _varying(shape, spec)
    data = bytearray(math.prod(shape) * DATATYPES[spec.datatype].itemsize)
    try:
        write_pieces(text, spec, memoryview(data))
    except ServeError as error:
        raise BadItemError(f"{error.message}; it is {shortly(raw)}") from None
    return bytes(data), varying


def _varying(shape: tuple[int, ...], spec: TensorSpec) -> list[int]:
    """The sizes of its -1 axes. A flat list will do where nothing varies."""
    if -1 not in spec.dims:
        if shape == spec.dims or shape == (math.prod(spec.dims),):
            return []
    elif len(shape) == len(spec.dims):
        pairs = list(zip(spec.dims, shape, strict=True))
        if all(want in (size, -1) for want, size in pairs):
            return [size for want, size in pairs if want == -1]
    raise BadItemError(f"input {spec.name} has shape {list(shape)}, expected {list(spec.dims)}")


def names_of(value: Mapping[str, object]) -> str:
    shown = ", ".join(str(name)[:40] for name in itertools.islice(value, 8))
    return shown or "nothing"


def shortly(value: object) -> str:
    """The begin of it: neither a text nor a number of elements that is large is looked at to its end."""
    text = _begin_of(value) if isinstance(value, msgspec.Raw) else _SHORT.repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def _begin_of(raw: msgspec.Raw) -> str:
    return bytes(memoryview(raw)[: SHOWN_CHARS + 1]).decode(errors="replace")
