"""Whatever a client sends wrong gets a clear error that names what was wrong, and harms nobody."""

from __future__ import annotations

import base64
import gzip
import json
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import MODELS, RunningDaemon
from tests.server.raw_http import connect, infer, read_answers, request

SIXTEEN = [float(value) for value in range(16)]
HEADER = "Inference-Header-Content-Length"


def affine(**changes: Any) -> dict[str, Any]:
    """A good request, but for these entries of its one input."""
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": SIXTEEN} | changes]}


def binary(size: int, data: bytes, shape: tuple[int, ...] = (1, 16)) -> tuple[bytes, dict[str, str]]:
    """A binary request that announces `size` bytes and carries `data`."""
    tensor = {"name": "x", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + data, {HEADER: str(len(head))}


def image(value: Any, shape: tuple[int, ...] = (1,), datatype: str = "BYTES") -> dict[str, Any]:
    return {"inputs": [{"name": "image", "datatype": datatype, "shape": shape, "data": value}]}


GOOD = affine()
FORM = "application/x-www-form-urlencoded"
DAMAGED = b"\x89PNG\r\n\x1a\n\0\0".translate(None, b"\r\n\0")
CASES: list[tuple[str, str, Any, dict[str, str], int, str]] = [
    # what, model, body, headers, status, part of the error
    ("no JSON", "affine", b"{", {}, 400, "the request's JSON cannot be read"),
    ("empty body", "affine", b"", {}, 400, "the body is empty; expected JSON"),
    ("a picture for a model of numbers", "affine", b"\x89PNG\r\n\x1a\n", {}, 400, "the body is a PNG image"),
    ("a parameter's name", "affine", GOOD | {"parameters": {"slo": 5}}, {}, 400, "unknown parameter slo; did you mean slo_ms?"),
    ("an array", "affine", b"[]", {}, 400, "Expected `object`, got `array`"),
    ("no inputs", "affine", {}, {}, 400, "missing required field `inputs`"),
    ("empty inputs", "affine", {"inputs": []}, {}, 400, "the request has no inputs"),
    ("not UTF-8", "affine", b'{"inputs":"\xff"}', {}, 400, "the request's JSON cannot be read"),
    ("nested too deep", "affine", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", {}, 400, "cannot be read"),
    ("wrong type of shape", "affine", affine(shape="16"), {}, 400, "Expected `array`, got `str` - at `$.inputs[0].shape`"),
    ("wrong name", "affine", affine(name="y"), {}, 400, "expected inputs [x], got [y]"),
    ("an input too many", "affine", {"inputs": GOOD["inputs"] * 2}, {}, 400, "expected inputs [x], got [x, x]"),
    ("wrong datatype", "affine", affine(datatype="FP64"), {}, 400, "input x has datatype FP64, expected FP32"),
    ("unknown datatype", "affine", affine(datatype="float"), {}, 400, "input x has datatype float, expected FP32"),
    ("wrong dims", "affine", affine(shape=[1, 15]), {}, 400, "input x has shape [1, 15], expected [1, 16]"),
    ("wrong rank", "affine", affine(shape=[16]), {}, 400, "input x has shape [16], expected [-1, 16]; the batch dimension is missing"),
    ("no shape", "affine", affine(shape=[]), {}, 400, "input x has shape [], expected [-1, 16]"),
    ("no items", "affine", affine(shape=[0, 16], data=[]), {}, 400, "a batch of 0 items; expected 1 to 64"),
    ("negative items", "affine", affine(shape=[-1, 16]), {}, 400, "a batch of -1 items"),
    ("too many items", "affine", affine(shape=[65, 16], data=SIXTEEN * 65), {}, 400, "a batch of 65 items; expected 1 to 64"),
    ("an astronomic shape", "affine", affine(shape=[2**62, 16]), {}, 400, "expected 1 to 64"),
    ("too few values", "affine", affine(data=SIXTEEN[1:]), {}, 400, "input x has 15 values in data, shape [1, 16] takes 16"),
    ("too many values", "affine", affine(data=[*SIXTEEN, 1]), {}, 400, "input x has 17 values in data"),
    ("far too many values, not even numbers", "affine", affine(data=[1] * 40_000 + ["x"]), {}, 400, "input x has 40001 values"),
    ("nested otherwise", "affine", affine(data=[SIXTEEN[:8], SIXTEEN[8:]]), {}, 400, "nested in another shape than [1, 16]"),
    ("nested unevenly", "affine", affine(data=[[1.0] * 15]), {}, 400, "nested in another shape than [1, 16]"),
    ("a string among numbers", "affine", affine(data=[*SIXTEEN[1:], "1"]), {}, 400, "Expected `float`, got `str`"),
    ("null", "affine", affine(data=None), {}, 400, "Expected `array`, got `null`"),
    ("no data", "affine", {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16]}]}, {}, 400, "neither data nor"),
    ("NaN as text", "affine", json.dumps(affine(data=[float("nan")] * 16)).encode(), {}, 400, "JSON is malformed"),
    ("out of range", "affine", affine(data=[1e300] * 16), {}, 400, "a value does not fit FP32"),
    ("unknown output", "affine", GOOD | {"outputs": [{"name": "z"}]}, {}, 400, "unknown output z; model affine has y"),
    ("classification", "affine", GOOD | {"outputs": [{"name": "y", "parameters": {"classification": 1}}]}, {}, 501, "not supp"),
    ("shared memory", "affine", affine(data=[], parameters={"shared_memory_region": "r"}), {}, 501, "shared memory"),
    ("a flag that is none", "affine", GOOD | {"parameters": {"binary_data_output": 1}}, {}, 400, "must be true or false"),
    ("priority", "affine", GOOD | {"parameters": {"priority": "high"}}, {}, 400, "priority must be a whole number"),
    ("timeout", "affine", GOOD | {"parameters": {"timeout": -1}}, {}, 400, "timeout must be a whole number"),
    ("slo_ms", "affine", GOOD | {"parameters": {"slo_ms": 0}}, {}, 400, "slo_ms must be a positive number"),
    ("deadline_ms", "affine", GOOD | {"parameters": {"deadline_ms": True}}, {}, 400, "deadline_ms must be a positive"),
    ("sequence", "affine", GOOD | {"parameters": {"sequence_id": 7}}, {}, 501, "sequences are not supported"),
    ("reserved", "affine", GOOD | {"parameters": {"triton_x": 7}}, {}, 400, "parameter triton_x is reserved"),
    ("truncated binary", "affine", *binary(64, b"1" * 63), 400, "64 bytes are announced, 63 are in the body"),
    ("trailing bytes", "affine", *binary(64, b"1" * 65), 400, "unexpected additional input data"),
    ("binary of another size", "affine", *binary(60, b"1" * 60), 400, "60 bytes were sent, FP32 of shape [1, 16] takes 64"),
    ("negative binary size", "affine", *binary(-1, b""), 400, "binary_data_size must be a number of bytes"),
    ("header length too large", "affine", b"{}", {HEADER: "3"}, 400, "Inference-Header-Content-Length is 3, but the body has 2"),
    ("header length astronomic", "affine", b"{}", {HEADER: "9" * 5000}, 400, "must be a number"),
    ("header length no number", "affine", b"{}", {HEADER: "two"}, 400, "must be a number"),
    ("raw of another size", "affine", b"1234", {HEADER: "0"}, 400, "4 bytes were sent"),
    ("unknown encoding", "affine", b"{}", {"Content-Encoding": "br"}, 501, "use gzip, deflate or none"),
    ("not gzip", "affine", b"{}", {"Content-Encoding": "gzip"}, 400, "not valid gzip"),
    ("half of a gzip", "affine", gzip.compress(b"{}" * 99)[:-9], {"Content-Encoding": "gzip"}, 400, "not one whole gzip"),
    ("more than a gzip", "affine", gzip.compress(b"{}") + b"x", {"Content-Encoding": "gzip"}, 400, "not one whole gzip"),
    ("unknown model", "nope", GOOD, {}, 404, "unknown model 'nope'; there are: affine, digits, mlp, resnet50"),
    ("astronomic version", "affine/versions/" + "9" * 5000, GOOD, {}, 404, "model affine has no version '9"),
    ("unknown version", "affine/versions/7", GOOD, {}, 404, "model affine has no version '7'; served: 1"),
    ("an image that is text", "digits", b"not an image", {}, 400, "element 0: 12 bytes that are not a JPEG, PNG, WebP or GIF image"),
    ("an empty image", "digits", image([""]), {}, 400, "element 0: no bytes; expected a JPEG"),
    ("not base64", "digits", image(["***"]), {}, 400, "BYTES in JSON must be base64"),
    ("one of several not base64", "digits", image(["AAAA", "AAA"], (2,)), {}, 400, "input image, element 1: BYTES in JSON must be base64: Incorrect padding"),
    ("base64 with a prefix", "digits", image(["data:image/png;base64,AAAA"]), {}, 400, "element 0: BYTES in JSON must be base64: it begins with a data: prefix; send what follows"),
    ("base64 in lines", "digits", image(["AAAA\nAAAA"]), {}, 400, "it has line breaks; leave them out, as base64 -w 0 does"),
    ("base64 for URLs", "digits", image(["AA-_"]), {}, 400, "it is base64 for URLs; expected + and /"),
    ("a name, not base64", "digits", image(["my-cat.png"]), {}, 400, "BYTES in JSON must be base64: Only base64 data is allowed"),
    ("base64 beyond ASCII", "digits", image(["é"]), {}, 400, "element 0: BYTES in JSON must be base64: "),
    ("half of a surrogate pair", "digits", b'{"inputs": [{"name": "\\ud800"}]}', {}, 400, "\\ud800 at byte 22 is half of a surrogate pair"),
    ("the other half", "digits", b'{"inputs": [{"name": "a\\udc00"}]}', {}, 400, "\\udc00 at byte 23 is half of a surrogate pair"),
    ("no JSON before half of a pair", "digits", b'{"inputs": [x], "id": "............\\ud800"}', {}, 400, "invalid character (byte 12)"),
    ("nothing as a file", "digits", b"", {}, 400, "input image, element 0: no bytes; expected a JPEG"),
    ("a file that curl -d has damaged", "digits", DAMAGED, {"Content-Type": FORM}, 400, "WebP or GIF image; curl -d drops line breaks and zero bytes, send files with --data-binary"),
    ("a sound that curl -d has cut off", "digits", b"RIFF$", {"Content-Type": FORM}, 400, "send files with --data-binary"),
    ("images too few", "digits", image([""], (2,)), {}, 400, "input image has 1 elements, shape [2] takes 2"),
    ("images too many", "digits", image([""] * 3), {}, 400, "input image has more than 1 elements, shape [1] takes 1"),
    ("images too many for the model", "digits", image(["***"], (65,)), {}, 400, "input image has 65 elements, a batch of 65 items; expected 1 to 64"),
    ("an image by another name", "digits", affine(name="picture"), {}, 400, "expected input image, encoded, or the ready tensors [x], got [picture]"),
    ("images as numbers", "digits", image([1]), {}, 400, "Expected `str`, got `int`"),
    ("image of another datatype", "digits", image([1], datatype="UINT8"), {}, 400, "input image has datatype UINT8"),
    ("image of another shape", "digits", image([""], (1, 2)), {}, 400, "expected [batch] or [batch, 1]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "body", "headers", "status", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_bad_input_is_refused_saying_what_is_wrong(
    model: str, body: Any, headers: dict[str, str], status: int, message: str, daemon: RunningDaemon
) -> None:
    answer = infer(daemon.http, model, body, headers)
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert message in answer.error
    assert "Traceback" not in answer.error
    assert infer(daemon.http, "affine", GOOD).json["outputs"][0]["data"] == [2 * value + 1 for value in SIXTEEN]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(b"RIFF$\0\0\0WAVEfmt ", FORM), (b"BM\r", FORM), (b"BM\n", FORM), (b"BM", "application/octet-stream")],
    ids=["zero bytes", "carriage return", "line feed", "another type"],
)
def test_what_curl_d_cannot_have_damaged_is_not_laid_at_its_door(
    body: bytes, content_type: str, daemon: RunningDaemon
) -> None:
    answer = infer(daemon.http, "digits", body, {"Content-Type": content_type})
    assert (answer.status, "curl -d" in answer.error) == (400, False)


@pytest.fixture(scope="module")
def damaged_images() -> dict[str, bytes]:
    picture = (MODELS / "digits" / "three.png").read_bytes()
    return {
        "truncated": picture[:-40],
        "corrupt": picture[:60] + b"\xff" * 40 + picture[100:],
        "header only": picture[:33],
    }


@pytest.mark.parametrize("kind", ["truncated", "corrupt", "header only"])
def test_a_damaged_image_fails_and_its_neighbours_do_not(
    kind: str, damaged_images: dict[str, bytes], daemon: RunningDaemon
) -> None:
    good = (MODELS / "digits" / "three.png").read_bytes()
    answers: dict[int, Any] = {}

    def send(number: int) -> None:
        answers[number] = infer(daemon.http, "digits", damaged_images[kind] if number == 3 else good)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers.pop(3).status == 400
    assert all(answer.json["outputs"][0]["data"] == [3] for answer in answers.values())


@pytest.mark.parametrize("content_type", [FORM, "image/png"])
def test_a_damaged_file_that_curl_d_cannot_have_damaged_gets_no_hint(
    content_type: str, damaged_images: dict[str, bytes], daemon: RunningDaemon
) -> None:
    """It has line breaks still, or came as what it is."""
    damaged = damaged_images["truncated"] if content_type == FORM else DAMAGED
    answer = infer(daemon.http, "digits", damaged, {"Content-Type": content_type})
    assert answer.status == 400
    assert "--data-binary" not in answer.error


def test_one_bad_element_of_a_batch_is_named(daemon: RunningDaemon) -> None:
    good = base64.b64encode((MODELS / "digits" / "three.png").read_bytes()).decode()
    answer = infer(daemon.http, "digits", image([good, base64.b64encode(b"x").decode(), good], (3,)))
    assert answer.status == 400
    assert "input image, element 1: 1 bytes" in answer.error


def test_a_zip_bomb_is_not_inflated(daemon: RunningDaemon) -> None:
    """1 GiB of zeros in 1 MiB: refused at the limit of a body."""
    deflater = zlib.compressobj(9)
    bomb = b"".join(deflater.compress(bytes(1 << 20)) for _ in range(1024)) + deflater.flush()
    answer = infer(daemon.http, "affine", bomb, {"Content-Encoding": "deflate"})
    assert (answer.status, answer.error) == (413, f"the body inflates to more than {64 << 20} bytes")


def test_a_body_that_is_too_long_is_refused_before_it_is_read(daemon: RunningDaemon) -> None:
    with connect(daemon.http) as sock:
        sock.sendall(b"POST /v2/models/affine/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        (answer,) = read_answers(sock, 1)
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert answer.error == f"the body is longer than {64 << 20} bytes"
        assert sock.recv(1) == b""


def chunked(total: int) -> Iterator[bytes]:
    for _ in range(total >> 20):
        yield b"100000\r\n" + bytes(1 << 20) + b"\r\n"


def test_a_chunked_body_that_grows_too_long_is_refused(daemon: RunningDaemon) -> None:
    with connect(daemon.http) as sock:
        sock.sendall(b"POST /v2/models/affine/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            for chunk in chunked(80 << 20):
                sock.sendall(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it stopped reading
        assert b"413" in sock.recv(20)


def test_a_client_that_sends_all_of_a_body_that_is_too_long_sees_why(daemon: RunningDaemon) -> None:
    """It reads the answer only after it has written the whole of the body; closing before would reset its connection."""
    for _ in range(3):
        answer = infer(daemon.http, "affine", b"x" * (70 << 20))
        assert (answer.status, answer.error) == (413, f"the body is longer than {64 << 20} bytes")


def test_requests_to_the_repository_are_small(daemon: RunningDaemon) -> None:
    answer = request(daemon.http, "POST", "/v2/repository/index", b" " * 100_000)
    assert (answer.status, answer.error) == (413, "the body is longer than 65536 bytes")


@pytest.mark.parametrize("path", ["index", "models/affine/load", "models/affine/unload"])
def test_web_pages_cannot_change_the_repository(path: str, daemon: RunningDaemon) -> None:
    """A browser lets any page POST here, and tells whose page it is."""
    answer = request(daemon.http, "POST", f"/v2/repository/{path}", b"", {"Origin": "https://example.org"})
    assert answer.status == 403
    assert "Origin" in answer.error
    answer = request(daemon.admin, "GET", "/admin/layout", headers={"Origin": "https://example.org"})
    assert answer.status == 403


def test_what_is_not_http_gets_a_400(daemon: RunningDaemon) -> None:
    with connect(daemon.http) as sock:
        sock.sendall(b"\x16\x03\x01 this is TLS, or something\r\n\r\n")
        assert sock.recv(12) == b"HTTP/1.1 400"


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/v2/models/affine/infer", 405, "GET /v2/models/affine/infer is not allowed, but POST"),
        ("DELETE", "/v2", 405, "DELETE /v2 is not allowed, but GET"),
        ("GET", "/v3", 404, "there is nothing at GET /v3; there are /v2, /v2/health/live, "),
        ("POST", "/v2/systemsharedmemory/region/a/register", 404, "there is nothing at POST"),
        ("POST", "/v2/models/affine/versions/abc/infer", 404, "model affine has no version 'abc'; served: 1"),
        ("POST", "/v2/models//infer", 404, "there is nothing at"),
        ("POST", "/v2/models/a/b/infer", 404, "there is nothing at"),
        ("GET", "/v2/models/nope", 404, "unknown model 'nope'"),
        ("GET", "/v2/models/nope/ready", 404, "unknown model 'nope'"),
        ("GET", "/v2/models/affine/versions/9/config", 404, "no version '9'"),
        ("POST", "/v2/repository/models/nope/load", 404, "model 'nope' is not in"),
        ("POST", "/v2/repository/models/nope/unload", 404, "unknown model 'nope'"),
        ("POST", "/v2/repository/models/..%2f..%2fetc/load", 404, "there is nothing at"),
    ],
)
def test_wrong_paths_and_methods_are_told_as_json(
    method: str, path: str, status: int, error: str, daemon: RunningDaemon
) -> None:
    answer = request(daemon.http, method, path)
    assert answer.status == status
    assert error in answer.error


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff"])
def test_a_repository_request_that_is_no_json_object(body: bytes, daemon: RunningDaemon) -> None:
    assert request(daemon.http, "POST", "/v2/repository/index", body).status == 400
