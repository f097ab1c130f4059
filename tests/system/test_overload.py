"""More than can be done in time: full queues, missed SLOs, passed deadlines, impatient clients."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import repositories
from tests.harness import RunningDaemon, running, until
from tests.system.asking import Occupied, metric, post, sixteen


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A daemon with one slice, and a model that takes 300 ms for a batch, which is one item."""
    repository = tmp_path_factory.mktemp("slow")
    repositories.emulated(repository / "slow", 300, max_batch=1)
    flags = ("--model-repository", str(repository), "--layout", "7g.80gb", "--max-queue-size", "3")
    with running(*flags) as daemon:
        yield daemon


def test_a_full_queue_is_refused_with_the_time_to_retry(slow: RunningDaemon) -> None:
    with Occupied(slow, 4):  # one runs, three wait
        status, headers, body = post(slow.http, "slow", sixteen())
        assert (status, body["error"]) == (429, "the queue of model slow is full")
        assert 1 <= int(headers["retry-after"]) <= 2


def test_a_strict_slo_out_of_reach_is_refused_and_one_within_reach_is_not(slow: RunningDaemon) -> None:
    status, headers, body = post(slow.http, "slow", sixteen(slo_ms=100, strict=True))
    assert status == 429
    assert "cannot answer in time" in body["error"]
    assert headers["retry-after"] == "1"
    assert post(slow.http, "slow", sixteen(slo_ms=5000, strict=True))[0] == 200
    with Occupied(slow, 1):  # what runs is not interrupted
        assert post(slow.http, "slow", sixteen(deadline_ms=320))[0] == 429


def test_an_slo_out_of_reach_is_missed_and_the_answer_says_by_how_much(slow: RunningDaemon) -> None:
    import tritonclient.grpc as grpcclient

    before = metric(slow, "migserve_late_requests_total")
    status, _, body = post(slow.http, "slow", sixteen(slo_ms=100))
    assert (status, body["parameters"]["late_ms"] >= 200) == (200, True)
    tensor = grpcclient.InferInput("x", [1, 16], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 16), np.float32))
    with grpcclient.InferenceServerClient(slow.grpc) as client:
        reply = client.infer("slow", [tensor], parameters={"slo_ms": 100}).get_response()
        assert reply.parameters["late_ms"].double_param >= 200
        assert not client.infer("slow", [tensor], parameters={"slo_ms": 5000}).get_response().parameters
    assert metric(slow, "migserve_late_requests_total") == before + 2


def test_what_would_take_more_than_ten_slos_is_refused(slow: RunningDaemon) -> None:
    status, headers, body = post(slow.http, "slow", sixteen(slo_ms=20))
    assert status == 429
    assert 1 <= int(headers["retry-after"]) <= 3
    assert "even in ten times what it may take: slo_ms of the request is 20 ms" in body["error"]
    assert metric(slow, "migserve_requests_not_answered_total", reason="overloaded") == 1


def test_a_deadline_that_passes_in_the_queue_ends_the_request_before_compute(slow: RunningDaemon) -> None:
    batches = metric(slow, "nv_inference_exec_count")
    with Occupied(slow, 2):
        begin = time.monotonic()
        status, _, body = post(slow.http, "slow", sixteen(timeout=50_000))
        assert status == 504
        assert "before it was started" in body["error"]
        assert time.monotonic() - begin < 0.25, "told when the time was up, not when its turn came"
    assert metric(slow, "nv_inference_exec_count") == batches + 2
    assert metric(slow, "migserve_requests_not_answered_total", reason="expired") == 1


@pytest.mark.parametrize("header", [b"", b"Expect: 100-continue\r\n"])
def test_a_client_that_leaves_the_queue_is_not_computed_for(header: bytes, slow: RunningDaemon) -> None:
    batches = metric(slow, "nv_inference_exec_count")
    before = metric(slow, "migserve_requests_cancelled_before_compute_total")
    with Occupied(slow, 2):
        body = json.dumps(sixteen()).encode()
        with socket.create_connection(("127.0.0.1", int(slow.http.split(":")[1]))) as client:
            client.sendall(
                b"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n" % (header, len(body))
                + body
            )
            until(lambda: metric(slow, "nv_inference_pending_request_count") == 3, "it waits")
        cancelled = "migserve_requests_cancelled_before_compute_total"
        until(lambda: metric(slow, cancelled) == before + 1, "its leaving is counted")
    assert metric(slow, "nv_inference_exec_count") == batches + 2


def test_a_grpc_client_that_cancels_in_the_queue_is_not_computed_for(slow: RunningDaemon) -> None:
    import tritonclient.grpc as grpcclient

    before = metric(slow, "migserve_requests_cancelled_before_compute_total")
    tensor = grpcclient.InferInput("x", [1, 16], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 16), np.float32))
    with Occupied(slow, 1), grpcclient.InferenceServerClient(slow.grpc) as client:
        call = client.async_infer("slow", [tensor], lambda result, error: None)
        until(lambda: metric(slow, "nv_inference_pending_request_count") == 2, "it waits")
        call.cancel()
        cancelled = "migserve_requests_cancelled_before_compute_total"
        until(lambda: metric(slow, cancelled) == before + 1, "its leaving is counted")


def test_a_full_arena_is_refused_and_recovers(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "slow", 300, items=100_000, max_batch=1)
    with running("--model-repository", str(tmp_path), "--layout", "7g.80gb", "--arena-mib", "1") as daemon:
        body = np.ones(100_000, np.float32).tobytes()
        raw = {"Inference-Header-Content-Length": "0"}
        statuses: list[tuple[int, Any]] = []

        def send() -> None:
            connection = http.client.HTTPConnection(daemon.http, timeout=30)
            connection.request("POST", "/v2/models/slow/infer", body, raw)
            response = connection.getresponse()
            statuses.append((response.status, response.read()))
            connection.close()

        threads = [threading.Thread(target=send) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = Counter(status for status, _ in statuses)
        assert counts == {200: 2, 429: 4}, "1 MiB holds two slots of half a MiB"
        assert b"the arena is full" in next(text for status, text in statuses if status == 429)
        assert metric(daemon, "migserve_arena_used_bytes") == 0
        statuses.clear()
        send()
        assert statuses[0][0] == 200
