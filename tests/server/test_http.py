"""The infer route over HTTP: every form of request and reply that the protocol knows, on both its ways."""

from __future__ import annotations

import gzip
import http.client
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from tests import repositories
from tests.harness import MODELS, RunningDaemon, running
from tests.server.raw_http import Answer, connect, infer, read_answers, request

X = np.arange(32, dtype=np.float32).reshape(2, 16)
HEADER = "inference-header-content-length"


def json_request(x: Any = X, **more: Any) -> dict[str, Any]:
    data = x.ravel().tolist()
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": x.shape, "data": data}], **more}


def binary_request(x: Any = X, **more: Any) -> tuple[bytes, dict[str, str]]:
    tensor = {"name": "x", "datatype": "FP32", "shape": x.shape, "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], **more}).encode()
    return head + x.tobytes(), {HEADER: str(len(head))}


def binary_output(answer: Answer) -> Any:
    head = json.loads(answer.body[: int(answer.headers[HEADER])])
    (output,) = head["outputs"]
    data = answer.body[int(answer.headers[HEADER]) :]
    assert output["parameters"]["binary_data_size"] == len(data)
    return np.frombuffer(data, np.float32).reshape(output["shape"])


def test_json_flat_and_nested_give_the_same(daemon: RunningDaemon) -> None:
    flat = infer(daemon.http, "affine", json_request(id="a"))
    nested = json_request(id="a")
    nested["inputs"][0]["data"] = X.tolist()
    assert flat.status == 200
    assert flat.headers["content-type"] == "application/json"
    assert HEADER not in flat.headers
    assert flat.json == infer(daemon.http, "affine", nested).json
    expected = {"name": "y", "datatype": "FP32", "shape": [2, 16], "data": (2 * X + 1).ravel().tolist()}
    assert flat.json == {"model_name": "affine", "model_version": "1", "outputs": [expected], "id": "a"}


def test_an_empty_id_is_not_echoed(daemon: RunningDaemon) -> None:
    assert "id" not in infer(daemon.http, "affine", json_request(id="")).json


def test_the_content_type_does_not_matter(daemon: RunningDaemon) -> None:
    body = json.dumps(json_request()).encode()
    for content_type in ("application/x-www-form-urlencoded", "text/plain", ""):
        headers = {"Content-Type": content_type}
        assert request(daemon.http, "POST", "/v2/models/affine/infer", body, headers).status == 200


@pytest.mark.parametrize("version", [b"1.1", b"1.0"], ids=["the short way", "ASGI"])
def test_parameters_in_the_url_are_looked_at_on_both_ways(version: bytes, daemon: RunningDaemon) -> None:
    body = json.dumps(json_request()).encode()
    for query, status in ((b"?slo_ms=60000&strict=true", 200), (b"?a=b", 200), (b"?strict=maybe", 400)):
        with connect(daemon.http) as sock:
            sock.sendall(raw(body, path=b"/v2/models/affine/infer" + query, version=version))
            (answer,) = read_answers(sock, 1)
        assert answer.status == status
    assert answer.error == "parameter strict must be true or false, not 'maybe'"


def test_binary_outputs_may_be_asked_for_in_the_url(daemon: RunningDaemon) -> None:
    body = json.dumps(json_request()).encode()
    for wanted, kind in (("true", "application/octet-stream"), ("false", "application/json")):
        answer = request(daemon.http, "POST", f"/v2/models/affine/infer?binary_data_output={wanted}", body)
        assert (answer.status, answer.headers["content-type"]) == (200, kind)


def test_binary_in_and_out(daemon: RunningDaemon) -> None:
    body, headers = binary_request(parameters={"binary_data_output": True})
    answer = infer(daemon.http, "affine", body, headers)
    assert answer.headers["content-type"] == "application/octet-stream"
    np.testing.assert_array_equal(binary_output(answer), 2 * X + 1)


@pytest.mark.parametrize(("default", "own", "binary"), [(True, None, True), (True, False, False), (False, True, True)])
def test_an_outputs_own_wish_wins_over_the_requests(
    default: bool, own: bool | None, binary: bool, daemon: RunningDaemon
) -> None:
    output = {"name": "y"} if own is None else {"name": "y", "parameters": {"binary_data": own}}
    answer = infer(daemon.http, "affine", json_request(outputs=[output], parameters={"binary_data_output": default}))
    assert (HEADER in answer.headers) is binary


def test_json_with_its_whole_length_in_the_header(daemon: RunningDaemon) -> None:
    """As perf_analyzer always sends it."""
    body = json.dumps(json_request()).encode()
    assert infer(daemon.http, "affine", body, {HEADER: str(len(body))}).status == 200


def test_a_raw_body_is_one_item_and_answered_in_binary(daemon: RunningDaemon) -> None:
    answer = infer(daemon.http, "affine", X[:1].tobytes(), {HEADER: "0"})
    np.testing.assert_array_equal(binary_output(answer), 2 * X[:1] + 1)


def test_a_picture_as_curl_sends_it_is_answered_in_json(daemon: RunningDaemon) -> None:
    picture = (MODELS / "digits" / "three.png").read_bytes()
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = infer(daemon.http, "digits", picture, headers)
    assert answer.json["outputs"][0] == {"name": "label", "datatype": "INT64", "shape": [1], "data": [3]}


def test_a_version_can_be_named(daemon: RunningDaemon) -> None:
    assert infer(daemon.http, "affine/versions/1", json_request()).json["model_version"] == "1"


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_in_and_out(encoding: str, compress: Any, daemon: RunningDaemon) -> None:
    x = np.zeros((64, 16), np.float32)
    body, headers = binary_request(x, parameters={"binary_data_output": True})
    headers |= {"Content-Encoding": encoding.upper(), "Accept-Encoding": f"br, {encoding};q=0.5"}
    answer = infer(daemon.http, "affine", compress(body), headers)
    assert answer.headers["content-encoding"] == encoding
    plain = gzip.decompress(answer.body) if encoding == "gzip" else zlib.decompress(answer.body)
    assert len(plain) > len(answer.body)
    np.testing.assert_array_equal(binary_output(answer._replace(body=plain)), 2 * x + 1)


def test_small_replies_are_not_compressed(daemon: RunningDaemon) -> None:
    answer = infer(daemon.http, "affine", json_request(X[:1]), {"Accept-Encoding": "gzip"})
    assert "content-encoding" not in answer.headers


def test_one_connection_is_kept_for_many_requests(daemon: RunningDaemon) -> None:
    connection = http.client.HTTPConnection(daemon.http, timeout=30)
    for _ in range(3):
        for method, path, body in (
            ("POST", "/v2/models/affine/infer", json.dumps(json_request())),
            ("GET", "/v2/health/live", None),
            ("POST", "/v2/models/nope/infer", "{}"),
        ):
            connection.request(method, path, body)
            connection.getresponse().read()
            sock = connection.sock
        assert connection.sock is sock
    connection.close()


def raw(body: bytes, *headers: bytes, path: bytes = b"/v2/models/affine/infer", version: bytes = b"1.1") -> bytes:
    lines = [b"POST " + path + b" HTTP/" + version, b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def test_pipelined_requests_are_answered_in_order(daemon: RunningDaemon) -> None:
    bodies = [json.dumps(json_request(id=f"n{number}")).encode() for number in range(8)]
    with connect(daemon.http) as sock:
        sock.sendall(b"".join(map(raw, bodies)))
        answers = read_answers(sock, 8)
    assert [answer.json["id"] for answer in answers] == [f"n{number}" for number in range(8)]


def test_pipelined_with_other_routes_between(daemon: RunningDaemon) -> None:
    body = json.dumps(json_request()).encode()
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(daemon.http) as sock:
        sock.sendall(raw(body) + live + raw(b"{") + live + raw(body))
        statuses = [answer.status for answer in read_answers(sock, 5)]
    assert statuses == [200, 200, 400, 200, 200]


def test_a_body_in_many_pieces(daemon: RunningDaemon) -> None:
    """A tensor that comes byte by byte, cut across the JSON and across elements."""
    body, headers = binary_request(parameters={"binary_data_output": True})
    message = raw(body, *(f"{name}: {value}".encode() for name, value in headers.items()))
    with connect(daemon.http) as sock:
        for begin in range(0, len(message), 7):
            sock.sendall(message[begin : begin + 7])
        (answer,) = read_answers(sock, 1)
    np.testing.assert_array_equal(binary_output(answer), 2 * X + 1)


def test_a_chunked_body(daemon: RunningDaemon) -> None:
    body = json.dumps(json_request()).encode()
    pieces = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:50], body[50:])) + b"0\r\n\r\n"
    with connect(daemon.http) as sock:
        sock.sendall(b"POST /v2/models/affine/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces)
        (answer,) = read_answers(sock, 1)
    assert answer.status == 200


def test_expect_100_continue(daemon: RunningDaemon) -> None:
    """As curl asks for bodies of more than 1 MiB."""
    body = json.dumps(json_request()).encode()
    message = raw(body, b"Expect: 100-continue")
    head = message[: -len(body)]
    with connect(daemon.http) as sock:
        sock.sendall(head)
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        sock.sendall(body)
        (answer,) = read_answers(sock, 1)
    assert answer.status == 200


@pytest.mark.parametrize("message", [raw(b"{}", version=b"1.0"), raw(b"{}", b"Connection: close")])
def test_a_connection_that_is_not_to_be_kept_is_closed(message: bytes, daemon: RunningDaemon) -> None:
    with connect(daemon.http) as sock:
        sock.sendall(message)
        (answer,) = read_answers(sock, 1)
        assert answer.headers["connection"] == "close"
        assert sock.recv(1) == b""


def test_health_metadata_config_and_statistics(daemon: RunningDaemon) -> None:
    def get(path: str) -> Any:
        answer = request(daemon.http, "GET", path)
        assert answer.status == 200
        return answer.json if answer.body else None

    assert get("/v2/health/live") == {"live": True}
    assert get("/v2/health/ready") == {"ready": True}
    assert get("/v2/models/affine/ready") is None
    assert get("/v2")["name"] == "migserve"
    assert "statistics" in get("/v2")["extensions"]
    assert get("/v2/models/affine") == {
        "name": "affine",
        "versions": ["1"],
        "platform": "torch_export",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 16]}],
    }
    config = get("/v2/models/digits/versions/1/config")
    assert (config["max_batch_size"], config["input"][1]["optional"]) == (64, True)
    infer(daemon.http, "affine", json_request())
    (stats,) = get("/v2/models/affine/stats")["model_stats"]
    keys = {"success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss"}
    assert set(stats["inference_stats"]) == keys
    assert stats["inference_count"] >= stats["execution_count"] > 0
    assert {each["name"] for each in get("/v2/models/stats")["model_stats"]} == {"affine", "digits", "mlp", "resnet50"}


@pytest.mark.parametrize("path", ["/v2", "/v2/health/live", "/v2/models/affine", "/metrics", "/docs"])
def test_head_is_answered_as_get_without_the_body(path: str, daemon: RunningDaemon) -> None:
    got, head = request(daemon.http, "GET", path), request(daemon.http, "HEAD", path)
    assert (head.status, head.body) == (got.status, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


def test_statistics_of_all_models_leave_out_what_is_not_ready(tmp_path: Path) -> None:
    for name in ("kept", "unloaded"):
        repositories.emulated(tmp_path / name, 1)
    flags = ("--model-repository", str(tmp_path), "--layout", "1g.10gb", "--http-read-timeout-secs", "0.5")
    with running(*flags) as daemon, grpcclient.InferenceServerClient(daemon.grpc) as client:
        client.unload_model("unloaded")
        over_http = request(daemon.http, "GET", "/v2/models/stats").json["model_stats"]
        over_grpc = client.get_inference_statistics().model_stats
        assert [each["name"] for each in over_http] == [each.name for each in over_grpc] == ["kept"]
        # And while it is there: a body that does not come is not waited for, on any route.
        with connect(daemon.http) as sock:
            sock.sendall(b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            (answer,) = read_answers(sock, 1)
        assert (answer.status, answer.error) == (400, "the body did not arrive within 0.5 s")


def test_a_client_that_offers_http_2_is_answered_in_http_1_1(daemon: RunningDaemon) -> None:
    """As curl --http2 and Java's client ask."""
    offer = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__")
    body = json.dumps(json_request()).encode()
    with connect(daemon.http) as sock:
        for message in (raw(body, *offer), raw(b"{}", *offer, path=b"/v2/repository/index"), raw(body)):
            sock.sendall(message[:-5])
            sock.sendall(message[-5:])
            (answer,) = read_answers(sock, 1)
            assert answer.status == 200
        sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n" + b"\r\n".join(offer) + b"\r\n\r\n")
        (answer,) = read_answers(sock, 1)
        assert answer.json == {"live": True}


def test_values_that_json_cannot_carry_are_refused_and_come_in_binary(daemon: RunningDaemon) -> None:
    x = np.full((1, 16), 3e38, np.float32)
    answer = infer(daemon.http, "affine", json_request(x))
    assert (answer.status, "infinite or not a number" in answer.error) == (400, True)
    body, headers = binary_request(x, parameters={"binary_data_output": True})
    assert np.isinf(binary_output(infer(daemon.http, "affine", body, headers))).all()


def test_the_metrics_port_has_metrics_and_nothing_else(daemon: RunningDaemon) -> None:
    assert request(daemon.metrics, "GET", "/metrics").status == 200
    for path in ("/v2", "/docs", "/openapi.json", "/v2/health/live"):
        assert request(daemon.metrics, "GET", path).status == 404
    assert request(daemon.http, "GET", "/metrics").status == 200


def test_an_emulated_model_says_so_everywhere(daemon: RunningDaemon) -> None:
    assert request(daemon.http, "GET", "/v2/models/resnet50").json["platform"] == "emulated"
    config = request(daemon.http, "GET", "/v2/models/resnet50/config").json
    assert config["parameters"] == {"emulated": {"string_value": "true"}}
    metrics = request(daemon.metrics, "GET", "/metrics").body.decode()
    assert 'migserve_model_ready{emulated="true",model="resnet50",version="1"} 1.0' in metrics
    assert 'simulated="true"' in metrics
    assert daemon.events("model ready", model="resnet50", backend="emulated")
    assert daemon.events("gpu", simulated=True)


def test_an_emulated_model_answers_its_function_after_its_time(daemon: RunningDaemon) -> None:
    """Output j of an item is the sum of its inputs, plus j; a ResNet-50 takes at least 4 ms on any slice."""
    x = np.stack([np.full((3, 224, 224), value, np.float32) for value in (0.0, 1.0)])
    tensor = {"name": "image", "datatype": "FP32", "shape": x.shape, "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    answer = infer(daemon.http, "resnet50", head + x.tobytes(), {HEADER: str(len(head))})
    np.testing.assert_array_equal(binary_output(answer), np.array([[0], [3 * 224 * 224]]) + np.arange(1000))
    (stats,) = request(daemon.http, "GET", "/v2/models/resnet50/stats").json["model_stats"]
    infer_stats = stats["inference_stats"]["compute_infer"]
    assert infer_stats["ns"] / infer_stats["count"] >= 4e6
