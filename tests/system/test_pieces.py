"""Requests that are cut, through the whole daemon: in time only because slices share them, and answered as one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from tests import repositories
from tests.harness import RunningDaemon, running, until
from tests.system.asking import metric, post

ITEMS = 8
# An item takes 50 ms, so all of them take 400 ms on one slice, and half of that on two.
SLO_MS = 320


def linear(folder: Path, serving: str = "") -> None:
    repositories.emulated(folder, 0, items=1, max_batch=ITEMS, serving=serving)
    rows = "\n".join(f"{folder.name},1g.10gb,{batch},{50 * batch}" for batch in (1, ITEMS))
    (folder / "table.csv").write_text(f"model,mig_profile,batch,latency_ms\n{rows}\n")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    folder = tmp_path_factory.mktemp("models")
    linear(folder / "cut", f"slo_ms: {SLO_MS}\n")
    linear(folder / "whole", f"slo_ms: {SLO_MS}\nsplit: false\n")
    with running("--model-repository", str(folder), "--layout", "1g.10gb+1g.10gb") as started:
        yield started


def numbers() -> dict[str, Any]:
    tensor = {"name": "x", "datatype": "FP32", "shape": [ITEMS, 1], "data": list(range(ITEMS))}
    return {"inputs": [tensor]}


def counts(daemon: RunningDaemon, model: str) -> tuple[float, ...]:
    names = ("nv_inference_request_success", "nv_inference_count")
    return tuple(metric(daemon, name, model=model) for name in names)


def test_a_cut_request_is_in_time_and_one_that_must_not_be_is_late(daemon: RunningDaemon) -> None:
    status, _, body = post(daemon.http, "cut", numbers())
    assert (status, body["outputs"][0]["data"]) == (200, list(range(ITEMS)))
    assert "parameters" not in body, "in time"
    assert counts(daemon, "cut") == (1, ITEMS)
    assert metric(daemon, "nv_inference_exec_count", model="cut") >= 2
    status, _, body = post(daemon.http, "whole", numbers())
    assert (status, body["outputs"][0]["data"]) == (200, list(range(ITEMS)))
    assert body["parameters"]["late_ms"] > 0
    assert counts(daemon, "whole") == (1, ITEMS)
    assert metric(daemon, "nv_inference_exec_count", model="whole") == 1


def test_a_worker_that_dies_costs_a_cut_request_only_time(daemon: RunningDaemon) -> None:
    x = np.arange(ITEMS, dtype=np.float32).reshape(-1, 1)
    tensor = grpcclient.InferInput("x", x.shape, "FP32")
    tensor.set_data_from_numpy(x)
    answers: list[Any] = []

    def ask() -> None:
        with grpcclient.InferenceServerClient(daemon.grpc) as client:
            answers.append(client.infer("cut", [tensor]).as_numpy("y"))

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: metric(daemon, "nv_inference_pending_request_count", model="cut") == 1, "it runs")
    os.kill(next(iter(daemon.workers().values())), signal.SIGKILL)
    asking.join()
    assert np.array_equal(answers[0], x)
    assert metric(daemon, "migserve_arena_used_bytes") == 0
