"""Preprocessing in the real daemon, in processes of its own."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import tritonclient.http as httpclient

from server.demo import digits_split, picture_of
from tests import repositories
from tests.harness import MODELS, ended, running
from tests.preprocess.pictures import encoded
from tests.server.raw_http import request

PICTURE = MODELS / "digits" / "three.png"


def digits(folder: Path) -> tuple[str, ...]:
    """The flags for a daemon that serves one model, on one slice."""
    repository = repositories.some_of_the_demo(folder, "digits")
    return ("--model-repository", str(repository), "--layout", "7g.80gb", "--drain-delay-secs", "0")


def test_a_decoder_that_dies_costs_a_process_and_no_request(demo_models: None, tmp_path: Path) -> None:
    with running("--preprocess-threads", "2", *digits(tmp_path)) as daemon:
        before = [line["pid"] for line in daemon.events("preprocessing process started")]
        assert len(before) == 2
        path, picture = "/v2/models/digits/infer", PICTURE.read_bytes()
        assert request(daemon.http, "POST", path, picture).status == 200
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        for _ in before:
            assert request(daemon.http, "POST", path, picture).status == 200
        assert {line["pid"] for line in daemon.events("a preprocessing process died")} == set(before)
        daemon.terminate()
        assert daemon.wait() == 0
        started = [line["pid"] for line in daemon.events("preprocessing process started")]
        assert all(map(ended, started))


def test_a_slice_may_be_kept_for_preprocessing_but_a_simulated_one_decodes_nothing(
    demo_models: None, tmp_path: Path
) -> None:
    """Who asks for it by name is told; with `auto` the CPU does it."""
    for device in ("dedicated", "slice"):
        shutil.copytree(MODELS / "digits", tmp_path / device)
        serving = tmp_path / device / "serving.yaml"
        serving.write_text(serving.read_text().replace("preprocess:\n", f"preprocess:\n  device: {device}\n"))
    flags = ("--model-repository", str(tmp_path), "--model-repository", str(MODELS), "--drain-delay-secs", "0")
    kept = ("--layout", "4g.40gb+3g.40gb", "--preprocess-slice", "gpu0/3g.40gb@4")
    with running(*flags, *kept, "--no-strict-readiness") as daemon:
        assert list(daemon.workers()) == ["gpu0/4g.40gb@0"]
        assert [line["decoder"] for line in daemon.events("preprocessing", model="digits")] == ["cpu"]
        index = request(daemon.http, "POST", "/v2/repository/index").json
        reasons = {entry["name"]: entry["reason"] for entry in index if entry["state"] == "UNAVAILABLE"}
        assert set(reasons) == {"dedicated", "slice"}
        assert "no GPU behind it (simulated: gpu0/4g.40gb@0)" in reasons["slice"]
        assert "device: dedicated" in reasons["dedicated"]
        assert request(daemon.http, "POST", "/v2/models/digits/infer", PICTURE.read_bytes()).status == 200
        metrics = request(daemon.metrics, "GET", "/metrics").body.decode()
        assert 'migserve_preprocess_elements_total{model="digits",version="1"} 1.0' in metrics


def test_digits_sent_as_a_form_are_answered_as_their_tensors_are(demo_models: None, tmp_path: Path) -> None:
    _, _, images, _ = digits_split()
    chosen = images[:20]
    with running("--no-isolate-decoders", *digits(tmp_path)) as daemon:
        parts = [
            b'--b\r\nContent-Disposition: form-data; name="image"; filename="d.png"\r\n\r\n'
            + encoded(picture_of(each))
            + b"\r\n"
            for each in chosen
        ]
        reply = request(daemon.http, "POST", "/v2/models/digits/infer", b"".join(parts) + b"--b--\r\n")
        labels = next(output["data"] for output in reply.json["outputs"] if output["name"] == "label")
        with httpclient.InferenceServerClient(daemon.http) as client:
            tensor = httpclient.InferInput("x", list(chosen.shape), "FP32")
            tensor.set_data_from_numpy(chosen)
            expected = client.infer("digits", [tensor]).as_numpy("label")
        assert np.array_equal(labels, expected)
