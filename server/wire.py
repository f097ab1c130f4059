"""The Open Inference Protocol's messages, as they travel over HTTP. Pure.

Spec: KServe open-inference-protocol, with Triton's binary tensor extension.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

Parameters = dict[str, Any]

_MAGIC = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG"}

# Half of the pair by which JSON escapes a character beyond U+FFFF (RFC 8259, section 7).
_LONE_SURROGATE = re.compile(
    rb"(?<!\\)\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\)(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_ESCAPE_BYTES = len(r"\ud800")

HEADER_LENGTH = b"inference-header-content-length"

# What is implemented, by the names that Triton uses. perf_analyzer turns on server statistics by "statistics".
EXTENSIONS = [
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
]


class InferInput(msgspec.Struct):
    """`data` is kept as JSON text until the datatype says what must be in it; empty if absent."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: Parameters | None = None
    data: msgspec.Raw = msgspec.Raw()


class RequestedOutput(msgspec.Struct):
    name: str
    parameters: Parameters | None = None


class InferRequest(msgspec.Struct):
    inputs: list[InferInput]
    outputs: list[RequestedOutput] | None = None
    parameters: Parameters | None = None
    id: str | None = None


class InferOutput(msgspec.Struct, omit_defaults=True):
    """Either `data` or `parameters` with binary_data_size."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: Parameters | None = None
    data: list[Any] | None = None


class InferReply(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[InferOutput]
    id: str | None = None
    parameters: Parameters | None = None


def unreadable(body: bytes, error: Exception) -> str:
    """Why a body, or the JSON part of one, is no infer request."""
    if not body.strip():
        return 'the body is empty; expected JSON such as {"inputs": [{"name": ..., "datatype": ..., "shape": ...}]}'
    for magic, what in _MAGIC.items():
        if body.startswith(magic):
            return f"the body is a {what} image; only a model with `preprocess` in its serving.yaml takes images"
    if body.startswith(b"--"):
        return "the body seems to be a form; only a model with `preprocess` in its serving.yaml takes forms"
    if lone := _lone_surrogate(body, str(error)):
        what = f"{lone[0].decode()} at byte {lone.start()} is half of a surrogate pair, which stands for no character"
        return f"the request's JSON cannot be read: {what}"
    return f"the request's JSON cannot be read: {error}"


def _lone_surrogate(body: bytes, error: str) -> re.Match[bytes] | None:
    """Looked for only where msgspec stopped: all of a body of 64 MiB takes seconds. A half that is less than another
    escape before the end is `truncated` to it."""
    stopped = re.fullmatch(r".*surrogate.* \(byte (\d+)\)", error)
    if stopped is None and "truncated" not in error:
        return None
    place = int(stopped[1]) if stopped is not None else len(body)
    return _LONE_SURROGATE.search(body, max(place - 2 * _ESCAPE_BYTES, 0), place + _ESCAPE_BYTES)


decode_infer_request = msgspec.json.Decoder(InferRequest).decode
encode_json = msgspec.json.Encoder().encode
decode_json = msgspec.json.Decoder().decode
