"""Tensors in and out of bytes: what is written is what was sent, whatever the form and however it was cut."""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.tensors import DATATYPES, Signature, TensorSpec
from server import codec, compression
from server.codec import Tensor
from server.errors import ServeError

NUMBERS = {
    "BOOL": st.booleans(),
    "UINT8": st.integers(0, 2**8 - 1),
    "UINT16": st.integers(0, 2**16 - 1),
    "UINT32": st.integers(0, 2**32 - 1),
    "UINT64": st.integers(0, 2**64 - 1),
    "INT8": st.integers(-(2**7), 2**7 - 1),
    "INT16": st.integers(-(2**15), 2**15 - 1),
    "INT32": st.integers(-(2**31), 2**31 - 1),
    "INT64": st.integers(-(2**63), 2**63 - 1),
    "FP32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "FP64": st.floats(allow_nan=False, allow_infinity=False),
}


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, Any]:
    """A datatype, and an array of it."""
    datatype = draw(st.sampled_from(sorted(NUMBERS)))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    count = int(np.prod(shape))
    values = draw(st.lists(NUMBERS[datatype], min_size=count, max_size=count))
    return datatype, np.array(values, DATATYPES[datatype].numpy).reshape(shape)


def written(body: bytes, header_length: int | None, cuts: list[int]) -> bytes:
    """What `write_tensor` puts into memory for the one input of a body that comes in pieces."""
    edges = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    chunks = [body[begin:end] for begin, end in itertools.pairwise(edges)]
    (tensor,) = codec.decode_request(chunks, header_length).tensors
    nbytes = int(np.prod(tensor.shape)) * DATATYPES[tensor.datatype].itemsize
    target = memoryview(bytearray(nbytes))
    codec.write_tensor(tensor, TensorSpec("x", tensor.datatype, tensor.shape), tensor.shape, target)
    return bytes(target)


@given(tensors(), st.lists(st.integers(0, 10_000), max_size=5), st.booleans())
def test_json_arrives_exactly(tensor: tuple[str, Any], cuts: list[int], nested: bool) -> None:
    datatype, array = tensor
    data = array.tolist() if nested else array.ravel().tolist()
    entry = {"name": "x", "datatype": datatype, "shape": array.shape, "data": data}
    assert written(json.dumps({"inputs": [entry]}).encode(), None, cuts) == array.tobytes()


@given(tensors(), st.lists(st.integers(0, 10_000), max_size=5))
def test_binary_arrives_exactly_however_it_was_cut(tensor: tuple[str, Any], cuts: list[int]) -> None:
    datatype, array = tensor
    entry = {"name": "x", "datatype": datatype, "shape": array.shape, "parameters": {"binary_data_size": array.nbytes}}
    head = json.dumps({"inputs": [entry]}).encode()
    assert written(head + array.tobytes(), len(head), cuts) == array.tobytes()


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_comes_in_binary_only(datatype: str) -> None:
    with pytest.raises(ServeError, match="cannot be sent as JSON"):
        written(
            json.dumps({"inputs": [{"name": "x", "datatype": datatype, "shape": [1], "data": [1]}]}).encode(), None, []
        )


@pytest.mark.parametrize(
    ("datatype", "value"), [("UINT8", 256), ("UINT8", -1), ("INT8", 128), ("INT64", 2**63), ("INT32", 1.5)]
)
def test_values_that_do_not_fit_are_refused(datatype: str, value: Any) -> None:
    with pytest.raises(ServeError, match="input x"):
        written(
            json.dumps({"inputs": [{"name": "x", "datatype": datatype, "shape": [1], "data": [value]}]}).encode(),
            None,
            [],
        )


@given(st.lists(st.binary(max_size=20), max_size=5), st.lists(st.integers(0, 100), max_size=4))
def test_bytes_elements_arrive_exactly(elements: list[bytes], cuts: list[int]) -> None:
    body = b"".join(struct.pack("<I", len(element)) + element for element in elements)
    edges = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    pieces = [memoryview(body)[begin:end] for begin, end in itertools.pairwise(edges)]
    assert codec.byte_elements(Tensor("x", "BYTES", (len(elements),), pieces)) == elements


@pytest.mark.parametrize("body", [b"\x01", b"\x05\0\0\0abc", b"\x01\0\0\0a\0"])
def test_bytes_elements_that_do_not_add_up_are_refused(body: bytes) -> None:
    with pytest.raises(ServeError, match="input x"):
        codec.byte_elements(Tensor("x", "BYTES", (1,), [memoryview(body)]))


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-1, 210)))
def test_any_bytes_at_all_are_decoded_or_refused(body: bytes, header_length: int | None) -> None:
    with contextlib.suppress(ServeError):
        codec.decode_request([body], header_length)


BATCHED = Signature((TensorSpec("a", "FP32", (2,)), TensorSpec("b", "INT32", (-1, 3))), (), 8)


def tensor(name: str, datatype: str, *shape: int) -> Tensor:
    return Tensor(name, datatype, shape, [])


def test_inputs_are_put_in_order_and_their_varying_axes_found() -> None:
    checked = codec.check_inputs(BATCHED, [tensor("b", "INT32", 4, 7, 3), tensor("a", "FP32", 4, 2)])
    assert [each.name for each in checked.tensors] == ["a", "b"]
    assert (checked.items, checked.dims) == (4, (7,))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((4, 2), (5, 7, 3), r"input b has shape \[5, 7, 3\], expected \[4, -1, 3\] \(-1: any size from 1 on\)"),
        ((4, 2), (4, 0, 3), "input b has shape"),
        ((4, 2), (4, 7, 4), "input b has shape"),
        ((4, 2), (4, 7), "input b has shape"),
        ((4, 3), (4, 7, 3), r"input a has shape \[4, 3\], expected \[4, 2\]"),
        ((9, 2), (9, 7, 3), "a batch of 9 items; expected 1 to 8"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(a: tuple[int, ...], b: tuple[int, ...], message: str) -> None:
    with pytest.raises(ServeError, match=message):
        codec.check_inputs(BATCHED, [tensor("a", "FP32", *a), tensor("b", "INT32", *b)])


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("gzip", "gzip"),
        ("deflate, gzip", "deflate"),
        ("br;q=1.0, gzip;q=0.8", "gzip"),
        ("gzip;q=0", None),
        ("gzip; q=0.00, deflate;q=0.01", "deflate"),
        ("GZIP", "gzip"),
        ("identity", None),
        ("", None),
    ],
)
def test_accepted_encoding(header: str, expected: str | None) -> None:
    assert compression.accepted_encoding(header) == expected
