"""SIGTERM and Ctrl-C: what is under way is finished, or told that it is cut off."""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from server.gpus import StartError
from server.job_store import UNFINISHED
from server.state_folder import hold
from tests import repositories
from tests.harness import ended, running, until
from tests.server.raw_http import request
from tests.system.asking import Occupied, metric, post, ready, sixteen


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


def test_results_that_never_get_written_hold_it_up_no_longer_and_the_state_folder_is_its_own_to_the_end(
    tmp_path: Path,
) -> None:
    state = tmp_path / "state"
    repositories.emulated(tmp_path / "models" / "slow", 500)

    def free() -> bool:
        try:
            lock = hold(state, 0.0)
        except StartError:
            return False
        assert lock is not None
        os.close(lock)
        return True

    flags = ("--model-repository", str(tmp_path / "models"), "--layout", "7g.80gb", "--state-dir", str(state))
    with running(*flags, "--drain-delay-secs", "0", "--exit-timeout-secs", "1") as daemon:
        job = json.loads(request(daemon.http, "POST", "/v2/jobs?model=slow", json.dumps([0] * 16).encode()).body)["id"]
        os.mkfifo(state / "jobs" / job / f"results.jsonl{UNFINISHED}")  # as a disk that does not answer
        until(lambda: json.loads(request(daemon.http, "GET", f"/v2/jobs/{job}").body)["done"], "all is computed")
        begin = time.monotonic()
        daemon.terminate()
        daemon.wait_for("stopped")
        assert ended(daemon.process.pid) or not free()
        assert daemon.wait() == 0
        assert time.monotonic() - begin < 8
        assert free()


def test_sigterm_while_starting_ends_it(demo_models: None) -> None:
    with running(ready=False) as daemon:
        daemon.wait_for("gpu")
        daemon.terminate()
        assert daemon.wait() == 0
