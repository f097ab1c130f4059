"""Batch jobs in the real daemon: through real workers, kills and restarts, to the answers there should be."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from server.__main__ import app
from server.demo import digits_split, picture_of
from server.job_tensors import read_safetensors
from tests import repositories
from tests.harness import MODELS, REPOSITORY, RunningDaemon, running, until
from tests.preprocess.pictures import encoded
from tests.server.raw_http import request
from tests.system.asking import metric, post, x_of

JOBS = "/v2/jobs"
REPLACED = "the model's file was replaced and not loaded anew"


def ask(daemon: RunningDaemon, method: str, path: str, body: bytes = b"") -> Any:
    reply = request(daemon.http, method, path, body)
    assert reply.status < 300, (reply.status, reply.body)
    return reply.json


def results(daemon: RunningDaemon, job: str) -> list[dict[str, Any]]:
    body = request(daemon.http, "GET", f"{JOBS}/{job}/results").body
    return [json.loads(line) for line in body.splitlines()]


def show(daemon: RunningDaemon, job: str) -> Any:
    return ask(daemon, "GET", f"{JOBS}/{job}")


def until_state(daemon: RunningDaemon, job: str, state: str, seconds: float = 60.0) -> Any:
    def there() -> Any:
        found = show(daemon, job)
        return found if found["state"] == state else None

    return until(there, f"job {job} is {state}", seconds)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def digits_offline(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores, by the model's file alone."""
    module = torch.export.load(MODELS / "digits" / "1" / "model.pt2").module()
    with torch.no_grad():
        found = [module(torch.from_numpy(images[at : at + 50])) for at in range(0, len(images), 50)]
    labels, scores = ([each[name].numpy() for each in found] for name in ("label", "scores"))
    return np.concatenate(labels), np.concatenate(scores)


def lines_of_digits(count: int, size: int) -> tuple[bytes, np.ndarray]:
    """So many digits as pictures, `size` times as large, as JSON lines; and as tensors."""
    _, _, images, _ = digits_split()
    texts = []
    images = images[:200]
    for image in images:
        large = picture_of(image).resize((8 * size, 8 * size), resample=0)
        texts.append(json.dumps({"image": base64.b64encode(encoded(large)).decode()}))
    chosen = [number % len(images) for number in range(count)]
    return "\n".join(texts[number] for number in chosen).encode(), images[chosen]


def test_kill_9_of_every_worker_and_of_the_daemon_loses_nothing_and_doubles_nothing(
    demo_models: None, tmp_path: Path
) -> None:
    body, images = lines_of_digits(2000, 60)
    models = tmp_path / "models"
    models.mkdir()
    (models / "digits").symlink_to(MODELS / "digits")
    # One thread for pictures of 480 x 480, so that it takes long enough to be killed.
    flags = ("--drain-delay-secs", "0", "--model-repository", str(models), "--state-dir", str(tmp_path / "state"))
    with running(*flags, "--preprocess-threads", "1") as daemon:
        # Late from the beginning on, so that it holds every slice.
        job = ask(daemon, "POST", f"{JOBS}?model=digits&deadline=0.1s", body)["id"]
        for worker in list(daemon.workers()):
            before = show(daemon, job)
            assert before["state"] == "running"
            daemon.kill_worker(worker)
            until(lambda done=before["done"]: show(daemon, job)["done"] > done, "it goes on")  # type: ignore[misc]
        before = show(daemon, job)
        assert 0 < before["done"] < 2000, "the daemon is killed while it runs"
        kill(daemon.process.pid)
        daemon.process.wait()
    with running(*flags) as daemon:
        assert show(daemon, job)["done"] >= before["done"], "what was finished stays finished"
        found = until_state(daemon, job, "done")
        assert (found["done"], found["errors"]) == (2000, 0)
        rows = results(daemon, job)
    assert [row["item"] for row in rows] == list(range(2000))
    labels, scores = digits_offline(images)
    assert [row["outputs"]["label"] for row in rows] == labels.tolist()
    assert np.allclose([row["outputs"]["scores"] for row in rows], scores, atol=1e-5)
    assert not list((tmp_path / "state" / "jobs" / job).glob("*.unfinished"))


def picky_lines(count: int, *poison: int) -> bytes:
    return b"\n".join(b"[%g]" % (repositories.STUCK if n in poison else n / 100) for n in range(count))


@pytest.fixture(scope="module")
def one_slice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """With a model that hangs on some items, and is then killed with its worker; and one that pads."""
    root = tmp_path_factory.mktemp("models")
    repositories.picky(root / "picky")
    repositories.masked(root / "masked", "{buckets: [8, 24, 64], length: n}\nlatency_table: {file: table.csv}")
    rows = [f"masked,7g.80gb,{batch},1,{length}" for length in (8, 24, 64) for batch in (1, 8)]
    (root / "masked" / "table.csv").write_text("\n".join(["model,mig_profile,batch,latency_ms,seq_len", *rows]))
    with running("--model-repository", str(root), "--batch-timeout-secs", "0.5", "--layout", "7g.80gb") as daemon:
        yield daemon


def test_items_of_all_lengths_have_the_answers_that_they_have_alone(one_slice: RunningDaemon) -> None:
    lengths = [2 + 5 * n % 63 for n in range(120)]
    values = [[float(n + k) for k in range(length)] for n, length in enumerate(lengths)]
    body = "\n".join(json.dumps({"x": each}) for each in values).encode()
    before = metric(one_slice, "migserve_batch_items_count", model="masked")
    job = ask(one_slice, "POST", f"{JOBS}?model=masked", body)["id"]
    assert until_state(one_slice, job, "done")["errors"] == 0
    found = [row["outputs"] for row in results(one_slice, job)]
    assert [each["twice"] for each in found] == [[2 * value for value in each] for each in values]
    assert [each["mean"][0] for each in found] == pytest.approx([sum(each) / len(each) for each in values], rel=1e-5)
    batches = metric(one_slice, "migserve_batch_items_count", model="masked") - before
    assert batches < 40, "of 8 items each but for a few: not one for each of 63 lengths"


def put(model_file: Path, there: Path) -> None:
    """In one step, as who replaces a file should."""
    shutil.copyfile(model_file, there.with_suffix(".new"))
    there.with_suffix(".new").replace(there)


def test_a_file_that_is_replaced_pauses_jobs_until_the_one_that_they_are_for_is_loaded(tmp_path: Path) -> None:
    former, other = MODELS / "affine" / "1" / "model.pt2", tmp_path / "other.pt2"
    shutil.copyfile(former, other)
    with zipfile.ZipFile(other, "a") as archive:
        archive.writestr("model/extra/note", "another one")
    shutil.copytree(MODELS / "affine", tmp_path / "models" / "affine")
    there = tmp_path / "models" / "affine" / "1" / "model.pt2"
    load = "/v2/repository/models/affine/load"
    flags = ("--model-repository", str(tmp_path / "models"), "--layout", "7g.80gb", "--drain-delay-secs", "0")
    body = b"\n".join(b"[" + b",".join([b"%d" % n] * 16) + b"]" for n in range(8))
    with running(*flags, "--state-dir", str(tmp_path / "state")) as daemon:
        put(other, there)
        (name,) = daemon.workers()
        daemon.kill_worker(name)
        daemon.wait_for(REPLACED, model="affine")
        job = ask(daemon, "POST", f"{JOBS}?model=affine", body)["id"]
        assert "slices that came later serve the new one" in until_state(daemon, job, "paused")["reason"]
        assert request(daemon.http, "POST", load).status == 200
        until(lambda: "another one than when the job was made" in show(daemon, job)["reason"], "it is another model")
        assert show(daemon, job)["done"] == 0
        put(former, there)
        assert request(daemon.http, "POST", load).status == 200
        until_state(daemon, job, "done")
        assert [row["item"] for row in results(daemon, job) if "outputs" in row] == list(range(8))


def test_items_that_kill_their_worker_are_given_up_and_never_cost_the_slice(one_slice: RunningDaemon) -> None:
    daemon = one_slice
    job = ask(daemon, "POST", f"{JOBS}?model=picky", picky_lines(200, 77))["id"]
    assert until_state(daemon, job, "done")["errors"] == 1
    found = results(daemon, job)
    assert "3 workers died of batches with it" in found.pop(77)["error"]
    assert [row["outputs"]["y"][0] for row in found] == pytest.approx([n / 50 for n in range(200) if n != 77])
    assert len(daemon.events("worker lost")) == 3
    # One death more is what a job may cost a worker within two minutes: with the fifth it would stay out.
    job = ask(daemon, "POST", f"{JOBS}?model=picky", picky_lines(200, 1, 50, 99, 120, 150))["id"]
    found = until(lambda: show(daemon, job).get("warning"), "it waits")
    assert "it leaves alone gpu0/7g.80gb@0 for" in found
    daemon.wait_for("worker up", count=5)
    until(lambda: metric(daemon, "migserve_slice_state", state="ready") == 1, "the slice is back")
    assert post(daemon.http, "picky", x_of(4))[2]["outputs"][0]["data"] == [8]
    assert len(daemon.events("worker lost")) == 4
    assert ask(daemon, "POST", f"{JOBS}/{job}/cancel")["state"] == "cancelled"


def test_the_life_of_a_job(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "models" / "slow", 60, max_batch=1)
    flags = ("--model-repository", str(tmp_path / "models"), "--layout", "3g.40gb+3g.40gb", "--drain-delay-secs", "0")
    body = b"\n".join(b"[" + b",".join([b"%d" % n] * 16) + b"]" for n in range(60))
    right = [{"item": n, "outputs": {"y": [16.0 * n]}} for n in range(60)]
    with running(*flags, "--state-dir", str(tmp_path / "state")) as daemon:
        # Cancelled and resumed.
        job = ask(daemon, "POST", f"{JOBS}?model=slow&name=mine", body)["id"]
        until(lambda: show(daemon, job)["done"], "it has begun")
        found = ask(daemon, "POST", f"{JOBS}/{job}/cancel")
        assert (found["state"], 0 < found["done"] < 60) == ("cancelled", True)
        assert request(daemon.http, "GET", f"{JOBS}/{job}/results").status == 409
        assert ask(daemon, "POST", f"{JOBS}/{job}/resume")["state"] == "running"
        # Its model is unloaded under it, and comes back.
        until(lambda: show(daemon, job)["done"] > found["done"], "it goes on")
        request(daemon.http, "POST", "/v2/repository/models/slow/unload")
        assert "unloaded" in until_state(daemon, job, "paused")["reason"]
        series = request(daemon.metrics, "GET", "/metrics").body.decode()
        assert 'migserve_jobs{state="paused"} 1.0' in series
        assert f'migserve_job_items{{job_id="{job}",model="slow"}} 60.0' in series
        # Nobody else takes it on meanwhile, nor the token.
        other = RunningDaemon((*flags, "--state-dir", str(tmp_path / "state")))
        assert other.wait() == 1
        assert f"is in use by process {daemon.process.pid}, a daemon too" in "".join(other.text)
        request(daemon.http, "POST", "/v2/repository/models/slow/load")
        until_state(daemon, job, "running")
        # A drain lets it be gone on with after a restart; who waits for it sees its end all the same.
        url = f"http://{daemon.http}"
        daemon.terminate()
        assert daemon.wait() == 0
    command = [sys.executable, "-m", "server", "jobs", "wait", job, "--out", str(tmp_path / "waited.jsonl")]
    waiting = subprocess.Popen([*command, "--url", url], stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert waiting.stderr is not None
    said = waiting.stderr.readline()
    assert "cannot be reached" in said
    assert "it is tried again for 300 s" in said
    with running(*flags, "--state-dir", str(tmp_path / "state"), "--http-port", url.rpartition(":")[2]) as daemon:
        done = show(daemon, job)["done"]
        assert done > 0
        # Another one beside it, which cannot be in time.
        reply = request(daemon.http, "POST", f"{JOBS}?model=slow&deadline=1s&strict=true", body)
        assert (reply.status, "the earliest end is in" in reply.json["error"]) == (409, True)
        late = ask(daemon, "POST", f"{JOBS}?model=slow&deadline=1s", body)["id"]
        until(lambda: "warning" in show(daemon, late), "it says so")
        assert [each["id"] for each in ask(daemon, "GET", JOBS)["jobs"]] == [job, late]
        until_state(daemon, job, "done")
        assert results(daemon, job) == right
        _, said = waiting.communicate(timeout=30)
        assert waiting.returncode == 0, said
        assert [json.loads(line) for line in (tmp_path / "waited.jsonl").read_text().splitlines()] == right
        assert daemon.events("job will be late", job=late)
        until_state(daemon, late, "done")

        # The command line.
        def command(*arguments: str) -> Result:
            return CliRunner().invoke(app, ["jobs", *arguments], env={"MIGSERVE_URL": f"http://{daemon.http}"})

        array = tmp_path / "x.npz"
        np.savez(array, x=np.ones((4, 16), np.float32))
        out = tmp_path / "y.npz"
        told = command("submit", "slow", str(array), "--deadline", "1m", "--output", "npz", "--out", str(out))
        assert told.exit_code == 0, told.stderr
        with np.load(out) as arrays:
            assert arrays["y"].tolist() == [[16.0]] * 4
        tensors, out = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
        head = json.dumps({"x": {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 256]}}).encode()
        tensors.write_bytes(len(head).to_bytes(8, "little") + head + np.ones((4, 16), np.float32).tobytes())
        told = command("submit", "slow", str(tensors), "--output", "safetensors", "--out", str(out))
        assert told.exit_code == 0, told.stderr
        at = read_safetensors(out)["y"].offset
        assert np.frombuffer(out.read_bytes()[at : at + 16], np.float32).tolist() == [16.0] * 4
        rubbish = tmp_path / "rubbish.npz"
        rubbish.write_text("rubbish")
        assert "the npz file cannot be read" in command("submit", "slow", str(rubbish)).stderr
        out = tmp_path / "called_so.npz"
        assert command("submit", "slow", str(array), "--out", str(out)).exit_code == 0
        with np.load(out) as arrays:
            assert arrays["y"].tolist() == [[16.0]] * 4
        told = command("submit", "slow", str(array), "--out", str(out), "--output", "jsonl")
        assert (told.exit_code, "as if it were npz" in told.stderr) == (2, True)
        there = len(ask(daemon, "GET", JOBS)["jobs"])
        told = command("submit", "slow", str(array), "--out", str(tmp_path / "none" / "y.npz"))
        assert (told.exit_code, "No such folder" in told.stderr) == (2, True)
        told = command("submit", "slow", str(tmp_path / "models"))
        assert (told.exit_code, "takes tensors, not files" in told.stderr) == (1, True)
        assert len(ask(daemon, "GET", JOBS)["jobs"]) == there, "neither was sent"
        lines = tmp_path / "x.jsonl"
        lines.write_bytes(body.split(b"\n")[0] + b"\n[1][2]\n")
        told = command("submit", "slow", str(lines), "--wait", "--json")
        found = json.loads(told.stdout)
        assert (told.exit_code, found["state"], found["done"], found["errors"]) == (0, "done", 2, 1)
        assert "item 1: the line is not JSON" in told.stderr
        assert "--data-binary" in found["first_errors"][0]["error"]
        told = command("submit", "slow", str(array), "--deadline", "0.01s")
        assert "it cannot end by its deadline" in told.stderr
        array.with_suffix(".npy").write_bytes(b"\x93NUMPY\1\0")
        assert "numpy.savez" in command("submit", "slow", str(array.with_suffix(".npy"))).stderr
        assert job in command("list").stdout
        assert "state        done" in command("show", job[:6]).stdout
        assert command("results", job).stdout.splitlines() == [json.dumps(row, separators=(",", ":")) for row in right]
        assert command("remove", late).exit_code == 0
        assert "unknown job" in command("show", late).stderr
        assert "neither a time" in command("submit", "slow", str(array), "--deadline", "soon").stderr
        assert request(daemon.http, "POST", f"{JOBS}?model=slow&deadine=1s", b"[1]").status == 400
        assert request(daemon.http, "POST", f"{JOBS}?model=none", b"[1]").status == 404
        assert request(daemon.http, "POST", f"{JOBS}?model=slow", b"[1]", {"Content-Encoding": "gzip"}).status == 400
        assert request(daemon.http, "POST", f"{JOBS}?model=slow", b"[1]", {"Origin": "http://evil"}).status == 403
        # A client that leaves in the middle leaves nothing behind.
        folders = tmp_path / "state" / "jobs"
        there = len(list(folders.glob("*/")))
        host, port = daemon.http.split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"POST /v2/jobs?model=slow HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n[1")
            until(lambda: len(list(folders.glob("*/"))) == there + 1, "it has begun")
        until(lambda: len(list(folders.glob("*/"))) == there, "nothing is left of it")
        assert "Traceback" not in "".join(daemon.text)
