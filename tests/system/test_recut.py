"""The running daemon's layout changed under load, by the admin endpoint: what stays serves on, nothing is lost."""

from __future__ import annotations

import json
import signal
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import repositories
from tests.harness import RunningDaemon, running, until
from tests.server.raw_http import request
from tests.system.asking import Load, metric, post, x_of

ONES = "+".join(["1g.10gb"] * 7)


def admin(daemon: RunningDaemon, path: str, body: Any = None, token: str | None = None) -> tuple[int, Any]:
    """Status and JSON of an admin request."""
    headers = {"Authorization": f"Bearer {daemon.admin_token if token is None else token}"}
    data = None if body is None else json.dumps(body).encode()
    if data is not None:
        headers["Content-Type"] = "application/json"
    request = urllib.request.Request(f"http://{daemon.admin}/admin/{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def cut(daemon: RunningDaemon, *layouts: str) -> Any:
    status, answer = admin(daemon, "layout", {"gpus": {str(index): layout for index, layout in enumerate(layouts)}})
    assert (status, answer.get("result")) == (200, "applied"), answer
    return answer


def test_layouts_change_under_load_and_no_request_is_lost(demo_models: None, tmp_path: Path) -> None:
    repository = repositories.some_of_the_demo(tmp_path, "affine")
    with running("--model-repository", str(repository)) as daemon, Load(daemon.http, clients=16) as load:
        for layout in (
            ONES,
            "7g.80gb",
            "3g.40gb+3g.40gb",
            "4g.40gb+1g.10gb+1g.10gb+1g.10gb",
            "4g.40gb+2g.20gb+1g.10gb",
        ):
            load.wait_for_answers(200)
            answer = cut(daemon, layout)
            assert sorted(answer["gpus"][0]["layout"].split("+")) == sorted(layout.split("+"))
            assert all("affine" in each["serves"] for each in answer["gpus"][0]["slices"])
        load.wait_for_answers(200)
        assert load.errors == []
        assert metric(daemon, "migserve_recuts_total", result="applied") == 5
        lost = daemon.events("worker lost")
    print(f"{load.sent.total()} sent, {load.right.total()} right, through 5 re-cuts")
    assert load.right == load.sent
    assert lost == [], "a drained worker ends by itself"


def test_what_stays_is_not_touched(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "model", 1)
    flags = ("--model-repository", str(tmp_path), "--gpu", "sim:A100-80GBx2", "--layout", "4g.40gb+2g.20gb+1g.10gb")
    with running(*flags) as daemon:
        before = daemon.workers()
        status, answer = admin(daemon, "layout", {"gpus": {"1": "4g.40gb+1g.10gb+1g.10gb+1g.10gb"}, "dry_run": True})
        assert (status, answer) == (
            200,
            {
                "result": "dry run",
                "steps": [
                    "GPU 1: keeps 4g.40gb@0, 1g.10gb@6",
                    "GPU 1: drain and destroy 2g.20gb@4; 5 GPCs serve on",
                    "GPU 1: create and admit 1g.10gb@4, 1g.10gb@5",
                ],
            },
        )
        assert daemon.workers() == before
        status, answer = admin(daemon, "layout", {"gpus": {"1": "4g.40gb+1g.10gb+1g.10gb+1g.10gb"}})
        assert status == 200
        now = daemon.workers()
        assert {name: pid for name, pid in now.items() if name in before} == before
        assert set(now) - set(before) == {"gpu1/1g.10gb@4", "gpu1/1g.10gb@5"}
        assert [line["worker"] for line in daemon.events("worker gone")] == ["gpu1/2g.20gb@4"]


def pending(daemon: RunningDaemon, count: int) -> bool:
    return metric(daemon, "nv_inference_pending_request_count", model="slow") == count


def test_what_runs_on_a_slice_that_goes_is_finished_and_the_rest_waits(tmp_path: Path) -> None:
    """Also where the worker is killed while it drains: then what it ran runs again elsewhere."""
    repositories.emulated(tmp_path / "slow", milliseconds=700, items=1)
    with running("--model-repository", str(tmp_path), "--layout", "7g.80gb") as daemon:
        # As many run as there are slices, so that each is busy.
        for busy, killed, layout in ((1, False, "3g.40gb+3g.40gb"), (2, True, "7g.80gb")):
            answers: list[int] = []

            def ask(answers: list[int] = answers) -> None:
                answers.append(post(daemon.http, "slow", x_of(1))[0])

            threads = [threading.Thread(target=ask) for _ in range(3)]
            for thread in threads[:busy]:
                thread.start()
            until(partial(pending, daemon, busy), "they run")
            changer = threading.Thread(target=cut, args=(daemon, layout))
            changer.start()
            until(lambda: metric(daemon, "migserve_slice_state", state="draining") >= 1, "it drains")
            for thread in threads[busy:]:
                thread.start()
            if killed:
                daemon.kill_worker("gpu0/3g.40gb@0")
            for thread in [*threads, changer]:
                thread.join()
            assert answers == [200, 200, 200]


def test_a_model_that_fits_no_new_slice_keeps_the_old_layout(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "picky", milliseconds=1, items=1, serving="mig_profiles: [7g.80gb]\n")
    with running("--model-repository", str(tmp_path), "--layout", "7g.80gb") as daemon:
        status, answer = admin(daemon, "layout", {"gpus": {"0": "3g.40gb+3g.40gb"}})
        assert status == 500
        assert answer["error"] == ("the change failed; the old layout is back: no slice of the new layout serves picky")
        assert post(daemon.http, "picky", x_of(1))[0] == 200
        assert admin(daemon, "layout")[1]["gpus"][0]["layout"] == "7g.80gb"


def test_a_daemon_killed_in_the_middle_of_a_change_is_put_right_by_the_next(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "models" / "slow", milliseconds=3000, items=1)
    flags = ("--model-repository", str(tmp_path / "models"), "--gpu", "sim:A100-80GB", "--state-dir", str(tmp_path))
    flags += ("--simulation-state", str(tmp_path / "gpu.json"), "--layout", "4g.40gb+2g.20gb+1g.10gb")
    token = "0123456789"
    with running(*flags, "--admin-token", token) as daemon:
        asking = threading.Thread(target=_ignoring_errors, args=(post, daemon.http, "slow", x_of(1)))
        asking.start()
        until(lambda: metric(daemon, "nv_inference_pending_request_count", model="slow") == 1, "it runs")
        body = {"gpus": {"0": "3g.40gb+3g.40gb"}}
        changing = threading.Thread(target=_ignoring_errors, args=(admin, daemon, "layout", body, token))
        changing.start()
        daemon.wait_for("re-cut", step="GPU 0: creating 3g.40gb@4")
        daemon.process.send_signal(signal.SIGKILL)
        daemon.process.wait()
        asking.join()
        changing.join()
    with running(*flags, "--admin-token", token) as daemon:
        (line,) = daemon.events("a re-cut had been cut off")
        assert line["result"] in ("applied", "restored")
        layout = admin(daemon, "layout", token=token)[1]["gpus"][0]["layout"]
        assert layout == ("3g.40gb+3g.40gb" if line["result"] == "applied" else "4g.40gb+2g.20gb+1g.10gb")
        assert not (tmp_path / "recut.json").exists()


def test_sigterm_in_the_middle_of_a_change_waits_for_its_end(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "models" / "slow", milliseconds=1, items=1)
    flags = ("--model-repository", str(tmp_path / "models"), "--layout", "4g.40gb+2g.20gb+1g.10gb")
    flags += ("--state-dir", str(tmp_path), "--simulation-state", str(tmp_path / "gpu.json"), "--drain-delay-secs", "0")
    with running(*flags, "--admin-token", "0123456789") as daemon:
        body = {"gpus": {"0": "3g.40gb+3g.40gb"}}
        changing = threading.Thread(target=_ignoring_errors, args=(admin, daemon, "layout", body, "0123456789"))
        changing.start()
        daemon.wait_for("re-cut", step="GPU 0: creating 3g.40gb@4")
        daemon.terminate()
        assert daemon.wait() == 0
        changing.join()
        assert [line["result"] for line in daemon.events("re-cut done")] == ["applied"]
    assert not (tmp_path / "recut.json").exists()


def _ignoring_errors(function: Any, *arguments: Any) -> None:
    with suppress(OSError):  # its server was killed
        function(*arguments)


BERT = """
backend: "emulated" max_batch_size: 64
input { name: "x" data_type: TYPE_FP32 dims: [1] }
output { name: "y" data_type: TYPE_FP32 dims: [1] }
"""


def bert(folder: Path) -> None:
    """Emulated with the timing of BERT on A100 slices; 32 items take a 1g slice 310 ms, a 3g slice 166 ms."""
    (folder / "bert" / "1").mkdir(parents=True)
    (folder / "bert" / "config.pbtxt").write_text(BERT)
    (folder / "bert" / "serving.yaml").write_text(
        "slo_ms: 198\nsplit: false\nlatency_table: {measured: a100, model: bert}\n"
    )


@pytest.mark.parametrize("replan", ["auto", "propose"])
def test_the_layout_follows_the_traffic_where_it_may(tmp_path: Path, replan: str) -> None:
    bert(tmp_path)
    often = ("--replan-interval-secs", "0.2", "--replan-half-life-secs", "2", "--replan-dwell-secs", "1")
    with running("--model-repository", str(tmp_path), "--layout", ONES, "--replan", replan, *often) as daemon:
        large = x_of(*range(32), strict=True)
        for _ in range(3):  # no more: the two slices that it proposes serve about ten a second
            assert post(daemon.http, "bert", large)[0] == 429, "no 1g slice can do it in time"

        def plan() -> Any:
            return admin(daemon, "plan")[1]

        if replan == "propose":
            found = until(lambda: (seen := plan())["proposal"] and seen["worthwhile"] and seen, "a proposal")
            assert list(found["proposal"].values()) == ["4g.40gb+3g.40gb"]
            assert (found["served_now"], found["served_then"]) == (0.0, 1.0)
            assert found["traffic"]["bert"]["items"] == {"32": 1.0}
            assert admin(daemon, "layout")[1]["gpus"][0]["layout"] == ONES
        else:
            until(lambda: plan() and daemon.events("re-cut done"), "a re-cut by itself")
            (line,) = daemon.events("re-cutting by itself")
            assert line["reason"] == "it serves 100% of the queries in time, the present one 0%"
            assert post(daemon.http, "bert", large)[0] == 200


def test_the_admin_endpoints_need_their_token(daemon: RunningDaemon) -> None:
    status, answer = admin(daemon, "layout", token="guessed")
    assert status == 401
    assert "Authorization: Bearer TOKEN" in answer["error"]
    assert admin(daemon, "plan")[1]["proposal"] is None
    answer = request(daemon.admin, "GET", "/openapi.json")
    assert answer.status == 401


def chunked(size: int) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (size, b" " * size)


TOO_LONG = 64 * 1024 + 1


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b"{", 401),
        # None of the body that is announced here ever comes.
        ({"Content-Length": "200000000"}, b"", 401),
        ({"Content-Length": "200000000", "Origin": "https://example.org", "Authorization": "Bearer {token}"}, b"", 403),
        ({"Content-Length": "200000000", "Authorization": "Bearer {token}"}, b"", 413),
        ({"Transfer-Encoding": "chunked", "Authorization": "Bearer {token}"}, chunked(TOO_LONG), 413),
        ({"Transfer-Encoding": "chunked", "Authorization": "Bearer {token}"}, chunked(TOO_LONG - 1), 400),
    ],
)
def test_a_stranger_is_refused_before_the_body_is_read(
    daemon: RunningDaemon, headers: dict[str, str], body: bytes, status: int
) -> None:
    given = {name: value.format(token=daemon.admin_token) for name, value in headers.items()}
    answer = request(daemon.admin, "POST", "/admin/layout", body, given)
    assert answer.status == status
    assert answer.error


def test_what_is_wrong_with_a_change_is_said_by_its_settings(daemon: RunningDaemon) -> None:
    headers = {"Authorization": f"Bearer {daemon.admin_token}", "Content-Type": "application/json"}
    answer = request(daemon.admin, "POST", "/admin/layout", b'{"dry_run": "perhaps", "layout": 1}', headers)
    said = "gpus: is missing; dry_run: expected true or false; layout: is not known here"
    assert (answer.status, answer.error) == (400, said)


def test_a_change_that_is_not_sent_as_json_is_told_the_header(daemon: RunningDaemon) -> None:
    token = {"Authorization": f"Bearer {daemon.admin_token}"}
    form = token | {"Content-Type": "application/x-www-form-urlencoded"}  # curl -d, left alone
    answer = request(daemon.admin, "POST", "/admin/layout", b'{"gpus": {"0": "7g.80gb"}}', form)
    assert (answer.status, "Content-Type: application/json" in answer.error) == (400, True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"gpus": {"0": "4g.40gb+4g.40gb"}}, "the layout takes 8 compute slices; A100-80GB has 7"),
        ({"gpus": {"0": "5g.50gb"}}, "A100-80GB has no MIG profile '5g.50gb'; did you mean "),
        ({"gpus": {"3": "7g.80gb"}}, "there is no GPU '3'; there are 0 (GPU-"),
        ({"gpus": {}}, "gpus"),
        ({"gpu": {"0": "7g.80gb"}}, "gpu"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(daemon: RunningDaemon, body: Any, message: str) -> None:
    before = admin(daemon, "layout")[1]
    status, answer = admin(daemon, "layout", body)
    assert status == 400, answer
    assert message in answer["error"]
    assert admin(daemon, "layout")[1] == before
