"""Inputs of jobs: what can be read, and what is said of what cannot."""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import tracemalloc
import zipfile
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn
from msgspec import Raw
from safetensors.numpy import save_file

from preprocess.pipeline import PipelineFile
from preprocess.steps import ImageSteps, TextSteps
from scheduler.lengths import Lengths
from scheduler.tensors import DATATYPES, Signature, TensorSpec
from server import job_inputs, job_tensors, jobs_command, jobs_sending
from server.codec import Tensor, write_tensor
from server.errors import ServeError
from server.job_inputs import Item, LineReader, element_of
from server.job_intake import read_terms
from server.job_store import Position
from server.job_tensors import TensorReader
from server.job_values import BadItemError, PipelineLines, parse_line, shortly, tensors_of

ONE = Signature((TensorSpec("x", "FP32", (2, 2)),), (), 8)
TWO = Signature((TensorSpec("ids", "INT64", (-1,)), TensorSpec("mask", "BOOL", (-1,))), (), 8)
PICTURE = PipelineFile(input="image", output="x", image=ImageSteps(mode="L", size=(1, 1)))
TEXT = PipelineFile(input="text", output="ids", text=TextSteps(tokenizer="t.json", max_tokens=6))


def of_line(value: object, signature: Signature, lengths: Lengths | None = None) -> tuple[tuple[bytes, ...], Any]:
    return tensors_of(parse_line(json.dumps(value).encode()), signature, lengths)


def of_pipeline(line: bytes, pipeline: PipelineFile, folder: Path | None) -> bytes:
    """What a line has for it. Raises BadItemError."""
    read = PipelineLines(pipeline.input, ONE).read(line)
    return element_of(parse_line(line) if read is None else read, pipeline, folder)


def all_of(reader: LineReader) -> list[Item]:
    items: list[Item] = []
    while some := reader.read(9):
        items += some
    reader.close()
    return items


def test_a_line_is_one_item_flat_or_nested_named_or_not() -> None:
    wanted = np.array([1, 2, 3, 4], np.float32).tobytes()
    for line in (b"[1,2,3,4]", b"[[1,2],[3,4]]", b'{"x": [1.0,2,3,4]}'):
        assert tensors_of(parse_line(line), ONE) == ((wanted,), ())
    parts, bucket = of_line({"mask": [True, False, True], "ids": [7, 8, 9]}, TWO)
    assert (parts[0], parts[1], bucket) == (np.array([7, 8, 9]).tobytes(), b"\1\0\1", (3, 3))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"[1,2,3]", r"shape \[3\], expected \[2, 2\]"),
        (b"[[1,2],[3]]", "not an array"),
        (b'{"y": 1}', "expected x; the line has y"),
        (b"{}", "the line has nothing"),
        (b'{"y":0' + b',"y":0' * 10_000 + b"}", "more than 10000 colons"),
        (b'{"x": null}', "must hold FP32, not null"),
        (b'{"x": {"a": 1}}', "must hold FP32, not {"),
        (b"[[1,2],[]]", "not an array"),
        (b"[[],[],[],[]]", "not an array"),
        (b"[[1,2],[3, ]]", "not JSON"),
        (b"[[1,2,3,[ ]]]", "not an array"),
        (b"[ ]", r"shape \[1\]"),
        (b"[" * 40 + b"]" * 40, "not an array"),
        (b"5", r"shape \[\], expected \[2, 2\]"),
        (b'["a","b","c","d"]', "must hold FP32"),
        (b"[null,1,2,3]", "must hold FP32"),
    ],
)
def test_what_is_wrong_with_a_line(line: bytes, said: str) -> None:
    with pytest.raises(BadItemError, match=said):
        tensors_of(parse_line(line), ONE)


def test_a_text_among_numbers_takes_no_more_room_than_it_has() -> None:
    """An array of texts gives each the room of the longest: here 20 GB, of a line of 200 KB."""
    line = json.dumps([["a" * 50_000], *([""] for _ in range(100_000))]).encode()
    with pytest.raises(BadItemError, match="must hold FP32"):
        tensors_of(parse_line(line), ONE)


def test_inputs_that_tell_lengths_may_be_left_out() -> None:
    lengths = Lengths(10, length="n", mask="mask")
    signature = Signature((TensorSpec("n", "INT64", ()), *TWO.inputs[:1], TensorSpec("mask", "INT64", (-1,))), (), 8)
    wanted = np.int64(3).tobytes(), np.array([7, 8, 9]).tobytes(), np.ones(3, np.int64).tobytes()
    for value in ([7, 8, 9], {"ids": [7, 8, 9]}, {"ids": [7, 8, 9], "mask": [1, 1, 1]}):
        assert of_line(value, signature, lengths) == (wanted, (3, 3))
    for missing in ({"mask": [1, 1, 1]}, {}, {"ids": [7], "idz": [7]}):
        with pytest.raises(BadItemError, match="expected n, ids, mask"):
            of_line(missing, signature, lengths)


@pytest.mark.parametrize("told", [0, 4, -1])
def test_a_length_that_is_not_within_its_own_item_is_an_error(told: int) -> None:
    """In a batch with longer ones it would be within the padding."""
    signature = Signature((TensorSpec("n", "INT64", ()), *TWO.inputs[:1]), (), 8)
    lengths = Lengths(10, length="n")
    assert of_line({"n": 2, "ids": [7, 8, 9]}, signature, lengths)[1] == (3,)
    with pytest.raises(BadItemError, match=f"input n is {told}, and the item has a length of 3; expected 1 to 3"):
        of_line({"n": told, "ids": [7, 8, 9]}, signature, lengths)


@pytest.mark.parametrize(
    ("datatype", "values", "fits"),
    [
        ("UINT64", [2**64 - 1, 1], True),
        ("UINT64", [2**64, 1], False),
        ("INT64", [-(2**63), 2**63 - 1], True),
        ("FP64", [2**64, 1], True),
        ("FP32", [1e300, 1], False),
        ("FP32", [16777217, 1], True),
        ("FP32", [True, 2.5], False),
        ("INT64", [1, True], False),
        ("INT8", [1, True], False),
        ("INT8", [1, -129], False),
        ("INT64", [1.0, 2.0], False),
        ("BOOL", [True, False], True),
        ("BOOL", [1, 0], False),
    ],
)
def test_values_are_read_as_a_requests_are(datatype: str, values: list[Any], fits: bool) -> None:
    spec = TensorSpec("x", datatype, (2,))
    asked = memoryview(bytearray(2 * DATATYPES[datatype].itemsize))
    tensor = Tensor("x", datatype, (2,), Raw(json.dumps(values).encode()))
    with nullcontext() if fits else pytest.raises(ServeError):
        write_tensor(tensor, spec, (2,), asked)
    with nullcontext() if fits else pytest.raises(BadItemError):
        assert of_line(values, Signature((spec,), (), 8)) == ((bytes(asked),), ())


def test_half_precision_that_would_become_infinite_does_not_fit() -> None:
    half = Signature((TensorSpec("x", "FP16", (2,)),), (), 8)
    assert of_line([65504, 1], half)[0] == (np.array([65504, 1], np.float16).tobytes(),)
    with pytest.raises(BadItemError, match="does not fit FP16"):
        of_line([1e6, 1], half)


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4).flatmap(
        lambda shape: drawn.arrays(np.int64, tuple(shape), elements=st.integers(-9, 9))
    ),
    st.sampled_from([None, 2]),
)
def test_the_shape_of_nested_lists_is_that_of_the_array(array: np.ndarray, indent: int | None) -> None:
    spec = TensorSpec("x", "INT64", (-1,) * array.ndim)
    line = json.dumps(array.tolist(), indent=indent).encode()
    assert tensors_of(parse_line(line), Signature((spec,), (), 8)) == ((array.tobytes(),), array.shape)


ragged = st.recursive(st.integers(0, 9), lambda inner: st.lists(inner, max_size=3), max_leaves=12)


@given(ragged, st.integers(1, 4))
def test_lists_that_are_no_array_are_refused(value: Any, rank: int) -> None:
    try:
        array = np.array(value, np.int64)
    except ValueError:
        array = np.zeros(0)
    signature = Signature((TensorSpec("x", "INT64", (-1,) * rank),), (), 8)
    if array.size and array.ndim == rank:
        assert of_line(value, signature) == ((array.tobytes(),), array.shape)
    else:
        with pytest.raises(BadItemError):
            of_line(value, signature)


def test_values_of_a_long_line_stay_in_their_order() -> None:
    array = np.arange(300_000).reshape(100, 3, 1000)
    signature = Signature((TensorSpec("x", "INT32", array.shape),), (), 8)
    assert of_line(array.tolist(), signature)[0] == (array.astype(np.int32).tobytes(),)


def test_values_that_do_not_fit() -> None:
    small = Signature((TensorSpec("x", "UINT8", (2,)),), (), 8)
    with pytest.raises(BadItemError, match="does not fit UINT8"):
        of_line([1, 256], small)
    with pytest.raises(BadItemError, match="must hold UINT8"):
        of_line([1, 1.5], small)
    with pytest.raises(BadItemError, match="must be an object"):
        of_line([1, 2], TWO)


def test_elements_of_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    encoded = base64.b64encode(b"png")
    for line in (b'"' + encoded + b'"', b'{"image": "' + encoded + b'"}', b'{"file": "a.png"}', b'{"bytes":"cG5n"}'):
        assert of_pipeline(line, PICTURE, tmp_path) == b"png"
    assert of_pipeline('"häuser"'.encode(), TEXT, None) == "häuser".encode()
    bad = {
        '{"file": "../x"}': "not below",
        '{"file": "b.png"}': "b.png cannot be read: No such file",
        '{"file": 3}': "must be a path",
        '{"picture": ""}': "has no 'image'",
        '"?"': "must be base64",
        "3": "must be a string",
        '{"unreadable": "c.png cannot be read"}': "c.png cannot be read",
        '{"unreadable": ""}': "it could not be read",
        '{"unreadable": 3}': "unreadable must be a string, not 3",
    }
    for line, said in bad.items():
        with pytest.raises(BadItemError, match=said):
            of_pipeline(line.encode(), PICTURE, tmp_path)
    with pytest.raises(BadItemError, match="--jobs-input-dir"):
        of_pipeline(b'{"file": "a.png"}', PICTURE, None)


def test_a_model_with_a_pipeline_takes_ready_tensors_too(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_text('{"x": [[1,2],[3,4]]}\n"cG5n"\n')
    reader = LineReader(path, Position(), ONE, PICTURE, None)
    ready, encoded = reader.read(2)
    assert (ready.bucket, ready.parts) == ((), (np.array([1, 2, 3, 4], np.float32).tobytes(),))
    assert (encoded.bucket, encoded.parts) == (job_inputs.ENCODED, (b"png",))
    reader.close()


def test_a_mark_of_utf_8_before_the_first_line_is_none_of_it(tmp_path: Path) -> None:
    """As Windows writes it."""
    path = tmp_path / "input"
    path.write_text("[1,2,3,4]\n[1,2,3,4]\n", encoding="utf-8-sig")
    first, second = all_of(LineReader(path, Position(), ONE, None, None))
    assert (first.error, first.parts) == ("", second.parts)


@pytest.mark.parametrize("source", ["image", "bytes", "file"])
def test_a_line_with_something_for_the_pipeline_and_ready_tensors_is_an_error(source: str, tmp_path: Path) -> None:
    """As of requests: nobody can tell which of the two is meant."""
    path = tmp_path / "input"
    path.write_text(
        f'{{"{source}": "cG5n", "x": [1,2,3,4], "name": "a"}}\n{{"bytes": "cG5n", "name": "x", "y": [1]}}\n'
    )
    both, one = all_of(LineReader(path, Position(), ONE, PICTURE, None))
    assert both.error == f"got both input {source}, encoded, and the ready tensors [x]; expected one or the other"
    assert (one.error, one.parts, one.name) == ("", (b"png",), "x")


def test_a_model_may_call_its_inputs_as_json_must_escape_them(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_text('{"\\"x\\\\": [1,2,3,4]}\n"cG5n"\n')
    signature = Signature((TensorSpec('"x\\', "FP32", (2, 2)),), (), 8)
    ready, encoded = all_of(LineReader(path, Position(), signature, PICTURE, None))
    assert (ready.error, ready.bucket, encoded.parts) == ("", (), (b"png",))


def test_a_long_line_for_a_pipeline_makes_nothing_of_lists_and_says_what_it_lacks(tmp_path: Path) -> None:
    """Of 12 MiB of {} the process had 317 MiB, and stood still for 0.3 s."""
    path = tmp_path / "input"
    many = b"[" + b"{}," * (1 << 20) + b"{}]"
    picture = b'{"image": "' + b"cG5n" * (1 << 19) + b'", "name": "p", "more": ' + many + b"}"
    lines = [b'{"image":' + many + b"}", b'{"file":' + many + b"}", b'{"x":' + many + b"}", many, picture]
    path.write_bytes(b"\n".join(lines) + b'\n{"image": nonsense}\n{"image": "\xff"}\n{"image": null}')
    reader = LineReader(path, Position(), ONE, PICTURE, None)
    tracemalloc.start()
    items = all_of(reader)
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [item.error for item in items] == [
        f"image must be a string, not [{'{},' * 19}{{}}...",
        f"file must be a path, not [{'{},' * 19}{{}}...",
        "the line is longer than 1048576 bytes, and has no 'image'",
        "the line is longer than 1048576 bytes, and has no 'image'",
        "",
        "the line is not JSON: JSON is malformed: invalid character (byte 11)",
        "the line is not JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        "image must be a string, not null",
    ]
    assert (items[4].name, items[4].parts) == ("p", (b"png" * (1 << 19),))
    assert most_bytes < 32 << 20


def test_tensors_are_known_from_a_text_where_a_model_calls_its_input_bytes(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_text('{"bytes": [1,2,3,4]}\n{"bytes": "cG5n"}\n')
    reader = LineReader(path, Position(), Signature((TensorSpec("bytes", "FP32", (4,)),), (), 8), PICTURE, None)
    ready, encoded = reader.read(2)
    reader.close()
    assert (ready.parts, encoded.parts) == ((np.array([1, 2, 3, 4], np.float32).tobytes(),), (b"png",))


def test_of_a_large_value_only_the_begin_is_told() -> None:
    for large in ([1] * 1_000_000, [[1] * 1_000_000], "a" * 1_000_000, {str(key): 1 for key in range(1000)}):
        tracemalloc.start()
        said = shortly(large)
        _, most_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(said) == 63
        assert most_bytes < 100_000


def test_a_link_that_leads_out_of_the_folder_is_outside(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "secret").write_text("s")
    (inside / "link").symlink_to(tmp_path / "secret")
    assert job_inputs.below(inside, "link") is None
    assert job_inputs.below(inside, "/etc/passwd") is None
    assert job_inputs.below(inside, "a\0b") is None
    assert job_inputs.below(inside, ".") == inside


def test_reading_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_text("[1,2,3,4]\n\n  \n[2,2,2,2]\nrubbish\n[3,3,3,3]")
    assert job_inputs.count_lines(path) == 4
    reader = LineReader(path, Position(), ONE, None, None)
    first = reader.read(2)
    assert [(item.number, item.error) for item in first] == [(0, ""), (1, "")]
    rest = reader.read(100)
    assert [item.number for item in rest] == [2, 3]
    assert "not JSON" in rest[0].error
    assert reader.read(100) == []
    reader.close()
    again = LineReader(path, Position(1, first[1].offset), ONE, None, None)
    assert [item.parts for item in again.read(1)] == [first[1].parts]
    assert again.position == Position(2, rest[0].offset)
    again.close()


def test_a_line_that_is_too_long_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_inputs, "MAX_ITEM_BYTES", 20)
    path = tmp_path / "input"
    path.write_text("[1,2,3,4]\n[1,2,3," + "4" * 70_000 + "]\n[5,6,7,8]\n")
    assert job_inputs.count_lines(path) == 3
    reader = LineReader(path, Position(), ONE, None, None)
    items = reader.read(10)
    assert [item.number for item in items] == [0, 1, 2]
    assert [bool(item.error) for item in items] == [False, True, False]
    reader.close()


def test_a_line_is_no_longer_than_what_the_model_takes_may_be(tmp_path: Path) -> None:
    """Of 60 MiB of [], the process had 2 GB, and stood still for four seconds."""
    path = tmp_path / "input"
    path.write_bytes(b"[" + b"[]," * (6 << 20) + b"[]]\n[1,2,3,4]\n")
    varying = Signature((TensorSpec("x", "FP32", (-1,)),), (), 8)
    for signature, lengths, most in (
        (ONE, None, 1 << 20),
        (varying, Lengths(50_000), 1_600_000),
        (varying, None, 1 << 23),
    ):
        reader = LineReader(path, Position(), signature, None, None, lengths)
        assert [item.error for item in all_of(reader)] == [f"the line is longer than {most} bytes", ""]
    assert (
        job_inputs.most_line_bytes(Signature((TensorSpec("x", "FP32", (3, 512, 512)),), (), 8), None) == 32 * 3 * 512**2
    )


@pytest.mark.parametrize("one", [b"[[]]", b"[1]", b"1", b'""', b"{}"])
def test_a_line_of_lists_takes_little_more_than_its_own_room(one: bytes, tmp_path: Path) -> None:
    """Of 16 MiB of [[]], the process had 745 MiB, and stood still for seconds."""
    path = tmp_path / "input"
    path.write_bytes((b'{"x": [' + (one + b",") * ((4 << 20) // (len(one) + 1)) + one + b"]}\n") * 3)
    signature = Signature((TensorSpec("x", "FP32", (-1,)),), (), 8)
    reader = LineReader(path, Position(), signature, None, None)
    tracemalloc.start()
    items = reader.read(512)
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [bool(item.error) for item in items] == [one != b"1"]
    assert most_bytes < 48 << 20
    assert len(all_of(reader)) == 2


def test_how_much_is_read_at_once_does_not_depend_on_whether_it_is_right(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes((b" " * (1 << 20) + b"rubbish\n") * 12)
    reader = LineReader(path, Position(), ONE, None, None)
    assert len(reader.read(512)) == 4
    assert len(all_of(reader)) == 8


def test_as_many_items_are_counted_as_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_inputs, "MAX_ITEM_BYTES", 200_000)
    path = tmp_path / "input"
    blank = b" " * 100_000
    path.write_bytes(blank + b"[1,2,3,4]\n" + blank + b"\n\n" + b" " * 300_000 + b"[1,2,3,4]\n[1,2,3,4]")
    reader = LineReader(path, Position(), ONE, None, None)
    read = reader.read(100)
    reader.close()
    assert ["longer than" in item.error for item in read] == [False, True, False]
    assert job_inputs.count_lines(path) == len(read)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadItemError, match="pipe is not a file"):
        of_pipeline(b'{"file": "pipe"}', PICTURE, tmp_path)


def test_the_files_of_a_folder_by_name(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for name in ("b/2.png", "b/1.png", "a.png", "c.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    assert job_inputs.list_folder(root, root, tmp_path / "input") == 4
    listed = [json.loads(line)["file"] for line in (tmp_path / "input").read_text().splitlines()]
    assert listed == ["a.png", "b/1.png", "b/2.png", "c.png"]
    assert job_inputs.list_folder(root / "b", root, tmp_path / "input") == 2
    assert '"b/1.png"' in (tmp_path / "input").read_text(), "named as --jobs-input-dir sees them"


def test_a_file_whose_name_is_not_utf_8_costs_itself_only(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    for name in (b"a.png", b"\xff.png"):
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(b"x")
    assert job_inputs.list_folder(root, root, tmp_path / "input") == 2
    first, second = (tmp_path / "input").read_bytes().splitlines()
    assert of_pipeline(first, PICTURE, root) == b"x"
    with pytest.raises(BadItemError, match="its name is not UTF-8"):
        of_pipeline(second, PICTURE, root)
    sent = [of_pipeline(line, PICTURE, None) for line in jobs_sending.folder_lines(root)]
    assert sent == [b"x", b"x"]


# ---- tensor files ----


@pytest.mark.parametrize("form", ["npz", "compressed", "safetensors"])
def test_rows_of_a_tensor_file(form: str, tmp_path: Path) -> None:
    arrays = {"ids": np.arange(30).reshape(10, 3), "mask": np.ones((10, 3), bool)}
    path = tmp_path / "input"
    if form == "safetensors":
        save_file(arrays, path, {"by": "test"})
        found = job_tensors.read_safetensors(path)
    else:
        with path.open("wb") as file:
            (np.savez if form == "npz" else np.savez_compressed)(file, **arrays)
        found = job_tensors.unpack_npz(path, 1 << 20)
    tensors, items = job_tensors.check_tensors(found, TWO)
    assert items == 10
    reader = TensorReader(tmp_path, tensors, Position(4), TWO)
    read = reader.read(3)
    assert [(item.number, item.bucket) for item in read] == [(n, (3, 3)) for n in (4, 5, 6)]
    assert read[0].parts == (arrays["ids"][4].tobytes(), arrays["mask"][4].tobytes())
    assert len(reader.read(100)) == 3
    assert reader.read(100) == []
    reader.close()


def test_tensor_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "input"

    def npz(**arrays: np.ndarray) -> None:
        with path.open("wb") as file:
            np.savez(file, **arrays)

    npz(x=np.asfortranarray(np.ones((3, 2, 2), np.float32)))
    with pytest.raises(ServeError, match="Fortran"):
        job_tensors.unpack_npz(path, 1 << 20)
    npz(x=np.array(["a"]))
    with pytest.raises(ServeError, match="expected little-endian numbers"):
        job_tensors.unpack_npz(path, 1 << 20)
    npz(x=np.ones((3, 2, 2), np.float32))
    with pytest.raises(ServeError, match="holds more than"):
        job_tensors.unpack_npz(path, 10)
    path.write_bytes(b"PK\3\4 rubbish")
    with pytest.raises(ServeError, match="cannot be read"):
        job_tensors.unpack_npz(path, 1 << 20)
    deep = b'{"x":' + b"[" * 5000
    for broken in (
        b"\xff" * 8 + b"{}", (5).to_bytes(8, "little") + b"{    ", b"{", len(deep).to_bytes(8, "little") + deep,
    ):  # fmt: skip
        path.write_bytes(broken)
        with pytest.raises(ServeError, match="safetensors file"):
            job_tensors.read_safetensors(path)


@pytest.mark.parametrize(
    ("shape", "offsets", "said"),
    [
        ([4], [0, 12], "which 12 bytes are not"),
        ([4], [4, 20], "not where they should be"),
        ([4], [-4, 12], "not where they should be"),
        ([-2, -2], [0, 16], "which 16 bytes are not"),
        ([4.5], [0, 16], "header cannot be read"),
        (4, [0, 16], "header cannot be read"),
        ([4], [0], "header cannot be read"),
    ],
)
def test_safetensors_that_contradict_themselves(shape: object, offsets: list[int], said: str, tmp_path: Path) -> None:
    path = tmp_path / "input"
    text = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ServeError, match=said):
        job_tensors.read_safetensors(path)


def test_an_array_that_is_shorter_than_its_shape_is_refused_when_it_comes(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.ones((9, 2, 2), np.float32))
    for data, said in ((array.getvalue()[:-16], "which 128 bytes are not"), (array.getvalue() + b"1", "145 bytes")):
        with zipfile.ZipFile(tmp_path / "input", "w") as archive:
            archive.writestr("x.npy", data)
        with pytest.raises(ServeError, match=said):
            job_tensors.unpack_npz(tmp_path / "input", 1 << 20)


def test_items_of_no_length_are_refused_since_no_bytes_bound_their_number(tmp_path: Path) -> None:
    text = json.dumps({"x": {"dtype": "F32", "shape": [10**15, 0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "input").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ServeError, match="expected FP32"):
        job_tensors.check_tensors(
            job_tensors.read_safetensors(tmp_path / "input"), Signature((TensorSpec("x", "FP32", (-1,)),), (), 8)
        )


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_LZMA], ids=["header", "lzma"])
def test_an_npz_that_numpy_has_no_error_of_its_own_for_is_the_senders_error(how: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "input", "w", how) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\1\0\5\0(((((" + bytes(range(256)) * 20)
    if how == zipfile.ZIP_LZMA:
        data = bytearray((tmp_path / "input").read_bytes())
        data[50:80] = bytes(each ^ 0xFF for each in data[50:80])
        (tmp_path / "input").write_bytes(data)
    with pytest.raises(ServeError, match="cannot be read"):
        job_tensors.unpack_npz(tmp_path / "input", 1 << 20)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("{1: 2, 'a': 3}", "x.npy of the npz file cannot be read: its header is not as numpy writes it"),
        ("{[]: 1}", "x.npy of the npz file cannot be read: its header is not as numpy writes it"),
        ("-" * 9000 + "1", "x.npy of the npz file cannot be read: its header is not as numpy writes it"),
        ("(" * 5000, "x.npy of the npz file cannot be read: its header is not as numpy writes it"),
    ],
    ids=["odd keys", "no keys", "nested", "open"],
)
def test_an_npz_whose_header_is_no_literal_is_the_senders_error(header: str, said: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "input", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode())
    with pytest.raises(ServeError, match=said):
        job_tensors.unpack_npz(tmp_path / "input", 1 << 20)


def test_what_is_broken_in_an_npz_is_the_senders_error(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.savez_compressed(whole, x=np.random.default_rng(0).standard_normal((50, 2, 2)).astype(np.float32))
    for place in range(len(whole.getvalue())):
        data = bytearray(whole.getvalue())
        data[place] ^= 0xFF
        (tmp_path / "input").write_bytes(data)
        with suppress(ServeError):
            job_tensors.unpack_npz(tmp_path / "input", 1 << 20)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"y": np.ones((3, 2, 2), np.float32)}, "expected arrays x; the file has y"),
        ({"x": np.ones((3, 2, 2))}, "is FP64"),
        ({"x": np.ones((3, 4), np.float32)}, r"\[3, 4\], expected FP32 \[3, 2, 2\]"),
        ({"x": np.float32(3)}, "expected FP32"),
    ],
)
def test_arrays_that_are_not_the_models_inputs(arrays: dict[str, np.ndarray], said: str, tmp_path: Path) -> None:
    with (tmp_path / "input").open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ServeError, match=said):
        job_tensors.check_tensors(job_tensors.unpack_npz(tmp_path / "input", 1 << 20), ONE)


# ---- the client ----


class CutOff(BaseHTTPRequestHandler):
    """Says that there are ten bytes more than it sends."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "19")
        self.end_headers()
        self.wfile.write(b'{"item":0')

    def log_message(self, format: str, *args: object) -> None: ...


def test_results_that_are_cut_off_are_not_taken_for_all(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), CutOff) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        client = jobs_command.Client(f"127.0.0.1:{server.server_port}")
        with (tmp_path / "out").open("wb") as file, pytest.raises(jobs_command.AwayError, match="10 bytes are missing"):
            client.copy(client.open("GET", "/v2/jobs/a/results"), file)
        with pytest.raises(jobs_command.AwayError, match="broke off its answer"):
            client.ask("GET", "/v2/jobs/a")
        server.shutdown()
        thread.join()


# ---- terms ----


def test_terms_of_a_job() -> None:
    terms = read_terms({"model": "m", "deadline": "90", "max_errors": "3", "output": "npz"}, 1000.0)
    assert (terms.deadline_s, terms.max_errors, terms.output, terms.strict) == (1090.0, 3, "npz", False)
    for text, seconds in (("15m", 900), ("1.5h", 5400), ("2d", 172800), ("7s", 7)):
        assert read_terms({"model": "m", "deadline": text}, 0.0).deadline_s == seconds
    assert read_terms({"model": "m", "deadline": "2026-11-21T06:00:00Z"}, 0.0).deadline_s == 1795240800.0
    assert read_terms({"model": "m", "deadline": "2026-11-21T06:00:00 01:00"}, 0.0).deadline_s == 1795237200.0
    assert read_terms({"model": "m"}, 0.0).deadline_s is None


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({}, "which model"),
        ({"model": "m", "deadine": "8h"}, "did you mean deadline"),
        ({"model": "m", "deadline": "soon"}, "neither a time"),
        ({"model": "m", "deadline": "99999999999999d"}, "neither a time"),
        ({"model": "m", "deadline": "9" * 400}, "neither a time"),
        ({"model": "m", "deadline": "9999-12-31T23:59:59-12:00"}, "neither a time"),
        ({"model": "m", "deadline": "1969-12-31T22:59:00Z"}, "was 1:01:00 ago"),
        ({"model": "m", "max_errors": "-1"}, "whole number"),
        ({"model": "m", "output": "csv"}, "jsonl or npz or safetensors"),
        ({"model": "m", "format": "csv"}, "safetensors"),
        ({"model": "m", "strict": "yes"}, "true or false"),
    ],
)
def test_terms_that_make_no_sense(parameters: dict[str, str], said: str) -> None:
    with pytest.raises(ServeError, match=said):
        read_terms(parameters, 0.0)
