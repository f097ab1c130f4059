"""What goes wrong in production: dead workers, poison, overload, impatient clients, SIGTERM. Nothing is lost."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import repositories
from tests.clients import http_binary
from tests.harness import RunningDaemon, running, until


def post(url: str, model: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], Any]:
    """(status, headers, decoded body) of one infer request with http.client."""
    connection = http.client.HTTPConnection(url, timeout=30)
    connection.request(
        "POST", f"/v2/models/{model}/infer", body if isinstance(body, bytes) else json.dumps(body), headers or {}
    )
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, {k.lower(): v for k, v in response.getheaders()}, json.loads(text) if text else None


def x_of(*values: float, **parameters: Any) -> dict[str, Any]:
    """A request of one item a value, as `picky` takes it."""
    data = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [len(values), 1], "data": list(values)}]}
    return {**data, "parameters": parameters} if parameters else data


def sixteen(**parameters: Any) -> dict[str, Any]:
    """A request of 16 ones, as the emulated models take it."""
    data = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1] * 16}]}
    return {**data, "parameters": parameters} if parameters else data


def metric(daemon: RunningDaemon, name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry these labels."""
    connection = http.client.HTTPConnection(daemon.metrics, timeout=10)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    found = [line for line in lines if line.startswith((name + "{", name + " "))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found if all(f'{k}="{v}"' in line for k, v in labels.items()))


def ready(daemon: RunningDaemon) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(daemon.http, timeout=10)
    connection.request("GET", "/v2/health/ready")
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


class Load:
    """Clients that send one request after the other until told to stop, or to an error, and check every answer."""

    def __init__(self, url: str, clients: int) -> None:
        self._url = url
        self._stop = threading.Event()
        self.sent: Counter[int] = Counter()
        self.right: Counter[int] = Counter()
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        infer = http_binary(self._url)
        try:
            while not self._stop.is_set():
                self.sent[number] += 1
                x = np.full((1, 16), self.sent[number] * 100 + number, np.float32)
                y = infer("affine", x).as_numpy("y")
                self.right[number] += bool((y == 2 * x + 1).all())
        except Exception as error:
            self.errors.append(repr(error))

    def wait_for_answers(self, more: int) -> None:
        start = self.right.total()
        until(lambda: self.right.total() >= start + more, f"{more} more answers; errors: {self.errors[:3]}")

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_every_worker_killed_in_turn_under_load_and_sigterm_at_the_end_lose_nothing(demo_models: None) -> None:
    with running("--drain-delay-secs", "1") as daemon, Load(daemon.http, clients=16) as load:
        load.wait_for_answers(200)
        for number, (name, pid) in enumerate(sorted(daemon.workers().items()), start=1):
            os.kill(pid, signal.SIGKILL)
            daemon.wait_for("worker lost", count=number, reason="killed by SIGKILL")
            daemon.wait_for("worker up", count=2, worker=name)
            load.wait_for_answers(200)
        until(lambda: metric(daemon, "migserve_slice_state", state="ready") == 3, "every slice is back")
        restarts = metric(daemon, "migserve_worker_restarts_total")
        assert load.errors == []
        daemon.terminate()
        assert daemon.wait() == 0
    sent, right, closed = load.sent.total(), load.right.total(), len(load.errors)
    print(f"{sent} sent, {right} right, {closed} met the closed server at the end; {restarts:.0f} workers restarted")
    assert restarts == 3
    assert right + closed == sent, "every request is accounted for, and every answer right"
    assert closed <= 16, "each client at most once"
    assert all("Connection" in error or "response" in error for error in load.errors), load.errors[:3]


def test_a_request_that_hangs_its_worker_twice_is_refused_alone(tmp_path: Path) -> None:
    repositories.picky(tmp_path / "picky")
    with running("--model-repository", str(tmp_path), "--batch-timeout-secs", "1", "--layout", "7g.80gb") as daemon:
        assert post(daemon.http, "picky", x_of(1, 2))[2]["outputs"][0]["data"] == [2, 4]
        outcomes: dict[str, Any] = {}
        poison = threading.Thread(target=lambda: outcomes.update(poison=post(daemon.http, "picky", x_of(13))))
        poison.start()
        until(lambda: metric(daemon, "nv_inference_pending_request_count", model="picky") == 1, "the poison runs")
        # These wait behind the poison, and run in one batch with it when it is tried again, if anything is wrong.
        for status, _, body in [post(daemon.http, "picky", x_of(value)) for value in (3, 4, 5)]:
            assert (status, len(body["outputs"])) == (200, 1)
        poison.join()
        status, _, body = outcomes["poison"]
        assert status == 500
        assert "the worker died twice while running this request (a batch took more than 1 s)" in body["error"]
        assert metric(daemon, "migserve_requests_not_answered_total", model="picky", reason="crashed") == 1
        assert metric(daemon, "migserve_worker_restarts_total") == 2


def test_what_a_model_raises_fails_one_request_and_not_its_batch(tmp_path: Path) -> None:
    repositories.picky(tmp_path / "picky")
    with running("--model-repository", str(tmp_path), "--layout", "7g.80gb") as daemon:
        results: dict[float, Any] = {}
        values = [1.0, repositories.RAISES, 2.0, 3.0, repositories.RAISES + 0.5, 4.0] * 4
        keys = list(enumerate(values))
        threads = [
            threading.Thread(target=lambda key=key: results.update({key[0]: post(daemon.http, "picky", x_of(key[1]))}))
            for key in keys
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, value in keys:
            status, _, body = results[number]
            if value == repositories.RAISES:
                assert status == 500
                assert "no such item" in body["error"]
                assert "Traceback" not in body["error"]
            else:
                assert (status, body["outputs"][0]["data"]) == (200, [2 * value])


def test_a_worker_that_keeps_dying_stays_out_with_the_reason_everywhere(demo_models: None) -> None:
    with running("--layout", "4g.40gb+2g.20gb", "--drain-delay-secs", "0") as daemon:
        name = "gpu0/2g.20gb@4"
        for count in range(1, 6):
            daemon.wait_for("worker up", count=count, worker=name)
            os.kill(daemon.workers()[name], signal.SIGKILL)
            daemon.wait_for("worker lost", count=count, worker=name)
        lost = daemon.events("worker lost", worker=name)[-1]
        assert lost["stays_out"] is True
        assert "died 5 times within 120 s, last: killed by SIGKILL" in lost["reason"]
        status, body = ready(daemon)
        assert status == 200, "the other slice serves everything"
        assert body["slices_out"] == [f"{name}: {lost['reason']}"]
        assert metric(daemon, "migserve_slice_state", GPU_I_PROFILE="2g.20gb", state="out") == 1
        assert metric(daemon, "migserve_slice_out", GPU_I_PROFILE="2g.20gb", reason=lost["reason"]) == 1
        assert post(daemon.http, "affine", sixteen())[0] == 200
        # And with the last slice out nothing is served, which is said, and not waited for.
        name = "gpu0/4g.40gb@0"
        for count in range(1, 6):
            daemon.wait_for("worker up", count=count, worker=name)
            os.kill(daemon.workers()[name], signal.SIGKILL)
            daemon.wait_for("worker lost", count=count, worker=name)
        status, body = ready(daemon)
        assert status == 503
        assert "every slice is out" in body["error"]
        status, _, body = post(daemon.http, "affine", sixteen())
        assert (status, body["error"]) == (503, "no slice serves model affine now")
        daemon.terminate()
        assert daemon.wait() == 0


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A daemon with one slice, and a model that takes 300 ms for a batch, which is one item."""
    repository = tmp_path_factory.mktemp("slow")
    repositories.emulated(repository / "slow", 300, max_batch=1)
    flags = ("--model-repository", str(repository), "--layout", "7g.80gb", "--max-queue-size", "3")
    with running(*flags) as daemon:
        yield daemon


class Occupied:
    """Requests under way that keep the slice of `slow` busy; their answers are awaited at the end."""

    def __init__(self, daemon: RunningDaemon, count: int) -> None:
        self.statuses: list[int] = []
        before = metric(daemon, "nv_inference_pending_request_count")
        self._threads = [
            threading.Thread(target=lambda: self.statuses.append(post(daemon.http, "slow", sixteen())[0]))
            for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()
        until(
            lambda: metric(daemon, "nv_inference_pending_request_count") >= before + count,
            f"{count} requests under way",
        )

    def __enter__(self) -> Occupied:
        return self

    def __exit__(self, *exception: object) -> None:
        for thread in self._threads:
            thread.join()
        assert self.statuses == [200] * len(self._threads)


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
    assert (status, headers["retry-after"]) == (429, "1")
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


def test_sigterm_serves_on_briefly_then_finishes_what_is_under_way(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "slow", 1000, max_batch=1)
    flags = ("--model-repository", str(tmp_path), "--layout", "7g.80gb", "--drain-delay-secs", "0.5")
    with running(*flags) as daemon:
        assert ready(daemon) == (200, {"ready": True})
        with Occupied(daemon, 1):
            daemon.terminate()
            daemon.wait_for("draining", unfinished=1)
            status, body = ready(daemon)
            assert (status, body["error"]) == (503, "the server is shutting down")
            assert post(daemon.http, "slow", sixteen())[0] == 200, "requests that still come are still served"
        assert daemon.wait() == 0
        assert daemon.events("stopped")


def test_a_second_signal_hurries_and_tells_those_it_cuts_off(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "slow", 20_000, max_batch=1)
    with running("--model-repository", str(tmp_path), "--layout", "7g.80gb", "--drain-delay-secs", "30") as daemon:
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(post(daemon.http, "slow", sixteen())))
        thread.start()
        until(lambda: metric(daemon, "nv_inference_pending_request_count") == 1, "it is under way")
        begin = time.monotonic()
        daemon.terminate()
        daemon.wait_for("draining")
        daemon.terminate()
        thread.join()
        assert daemon.wait() == 1, "what was cut off shows in the exit code"
        assert time.monotonic() - begin < 10
    status, _, body = answers[0]
    assert (status, body["error"]) == (503, "the server is shutting down")


@pytest.mark.parametrize("delay_s", ["0", "50"])
def test_exit_timeout_is_kept(delay_s: str, tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "slow", 60_000, max_batch=1)
    flags = ("--model-repository", str(tmp_path), "--layout", "7g.80gb", "--drain-delay-secs", delay_s)
    with running(*flags, "--exit-timeout-secs", "1") as daemon:
        thread = threading.Thread(target=lambda: post(daemon.http, "slow", sixteen()))
        thread.start()
        until(lambda: metric(daemon, "nv_inference_pending_request_count") == 1, "it is under way")
        begin = time.monotonic()
        daemon.terminate()
        thread.join()
        assert daemon.wait() == 1
        assert time.monotonic() - begin < 8


def test_pictures_under_way_are_waited_for_and_cut_off_in_time(tmp_path: Path) -> None:
    pipeline = "preprocess: {input: image, output: x, image: {mode: L, size: [8, 8]}}\n"
    config = repositories.emulated(tmp_path / "model", 1, max_batch=64, serving=pipeline) / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: [16]", "dims: [1, 8, 8]"))
    out = io.BytesIO()
    Image.new("L", (3500, 3500)).save(out, "PNG", compress_level=1)
    encoded = base64.b64encode(out.getvalue()).decode()
    pictures = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [64], "data": [encoded] * 64}]}
    flags = ("--model-repository", str(tmp_path), "--layout", "7g.80gb", "--drain-delay-secs", "0")
    with running(*flags, "--exit-timeout-secs", "0.5") as daemon:
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(post(daemon.http, "model", pictures)))
        thread.start()
        until(lambda: metric(daemon, "nv_inference_pending_request_count", model="model") == 1, "they are decoded")
        daemon.terminate()
        daemon.wait_for("draining", unfinished=1)
        thread.join()
        assert daemon.wait() == 1, "what was cut off shows in the exit code"
    status, _, body = answers[0]
    assert (status, body["error"]) == (503, "the server is shutting down")
    assert "Traceback" not in "".join(daemon.text)


def test_sigterm_while_starting_ends_it(demo_models: None) -> None:
    with running(ready=False) as daemon:
        daemon.wait_for("gpu")
        daemon.terminate()
        assert daemon.wait() == 0


def test_a_killed_daemon_leaves_no_worker_behind_not_even_one_that_hangs(tmp_path: Path) -> None:
    repositories.picky(tmp_path / "picky")
    with running("--model-repository", str(tmp_path), "--layout", "1g.10gb+1g.10gb") as daemon:
        pids = list(daemon.workers().values())
        body = json.dumps(x_of(repositories.STUCK)).encode()
        with socket.create_connection(("127.0.0.1", int(daemon.http.split(":")[1]))) as client:
            client.sendall(
                b"POST /v2/models/picky/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            until(lambda: metric(daemon, "nv_inference_pending_request_count", model="picky") == 1, "it hangs")
        assert len(pids) == 2
        daemon.process.kill()
        daemon.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "its workers have ended")
