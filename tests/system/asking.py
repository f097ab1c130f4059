"""What the system's stories ask of a daemon, and the load that they put on it."""

from __future__ import annotations

import http.client
import json
import threading
from collections import Counter
from typing import Any

import numpy as np

from tests.clients import http_binary
from tests.harness import RunningDaemon, until


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
