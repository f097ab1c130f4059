"""What goes wrong in production: dead workers, and what kills them. Nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import repositories
from tests.harness import RunningDaemon, ended, running, until
from tests.system.asking import Load, metric, post, ready, sixteen, x_of


def test_every_worker_killed_in_turn_under_load_and_sigterm_at_the_end_lose_nothing(
    demo_models: None, tmp_path: Path
) -> None:
    flags = ("--model-repository", str(repositories.some_of_the_demo(tmp_path, "affine")), "--drain-delay-secs", "1")
    with running(*flags) as daemon, Load(daemon.http, clients=16) as load:
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


@pytest.fixture(scope="module")
def picky(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """A daemon with one slice, and a model that some requests hang, and some make raise."""
    root = tmp_path_factory.mktemp("models")
    repositories.picky(root / "picky")
    with running("--model-repository", str(root), "--batch-timeout-secs", "1", "--layout", "7g.80gb") as daemon:
        yield daemon


def test_a_request_that_hangs_its_worker_twice_is_refused_alone(picky: RunningDaemon) -> None:
    assert post(picky.http, "picky", x_of(1, 2))[2]["outputs"][0]["data"] == [2, 4]
    outcomes: dict[str, Any] = {}
    poison = threading.Thread(target=lambda: outcomes.update(poison=post(picky.http, "picky", x_of(13))))
    poison.start()
    until(lambda: metric(picky, "nv_inference_pending_request_count", model="picky") == 1, "the poison runs")
    # These wait behind the poison, and run in one batch with it when it is tried again, if anything is wrong.
    for status, _, body in [post(picky.http, "picky", x_of(value)) for value in (3, 4, 5)]:
        assert (status, len(body["outputs"])) == (200, 1)
    poison.join()
    status, _, body = outcomes["poison"]
    assert status == 500
    assert "the worker died twice while running this request (a batch took more than 1 s)" in body["error"]
    assert metric(picky, "migserve_requests_not_answered_total", model="picky", reason="crashed") == 1
    assert metric(picky, "migserve_worker_restarts_total") == 2


def test_what_a_model_raises_fails_one_request_and_not_its_batch(picky: RunningDaemon) -> None:
    results: dict[float, Any] = {}
    values = [1.0, repositories.RAISES, 2.0, 3.0, repositories.RAISES + 0.5, 4.0] * 4
    keys = list(enumerate(values))
    threads = [
        threading.Thread(target=lambda key=key: results.update({key[0]: post(picky.http, "picky", x_of(key[1]))}))
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


def test_a_worker_that_keeps_dying_stays_out_with_the_reason_everywhere(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "affine", 1)
    flags = ("--model-repository", str(tmp_path), "--layout", "4g.40gb+2g.20gb", "--drain-delay-secs", "0")
    with running(*flags) as daemon:
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
    until(lambda: all(map(ended, pids)), "its workers have ended")
