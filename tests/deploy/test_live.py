"""Every expression of the dashboard and the alerts, asked of a real Prometheus that scrapes a real daemon."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.tools import PROMETHEUS, needs_prometheus, read_alerts, read_dashboard, read_yaml, run
from tests.harness import MODELS, RunningDaemon, until

pytestmark = needs_prometheus

DASHBOARD = read_dashboard()
EXPRESSIONS = [
    pytest.param(panel["title"], target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
]
VARIABLES = [variable for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]

# A simulated GPU has no power, utilization, memory in use, or XID; and no slice is out.
MAY_BE_EMPTY = {"Power", "Utilization", "Memory", "Slices that are out, and why", "XID errors"}

# Triton's own names, which its dashboards read.
LINT_OF_TRITONS_NAMES = {
    "nv_inference_request_duration_us metric names should not contain abbreviated units",
    "nv_inference_queue_duration_us metric names should not contain abbreviated units",
    "nv_inference_compute_input_duration_us metric names should not contain abbreviated units",
    "nv_inference_compute_infer_duration_us metric names should not contain abbreviated units",
    "nv_inference_compute_output_duration_us metric names should not contain abbreviated units",
    'nv_inference_pending_request_count non-histogram and non-summary metrics should not have "_count" suffix',
}


class Prometheus:
    """The HTTP API of a running one."""

    def __init__(self, address: str) -> None:
        self._client = httpx.Client(base_url=f"http://{address}/api/v1", timeout=10.0)

    def close(self) -> None:
        self._client.close()

    def get(self, path: str, **parameters: str) -> Any:
        reply = self._client.get(path, params=parameters).json()
        assert reply["status"] == "success", reply
        return reply["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """An instant vector, its dashboard variables set to everything."""
        for variable, value in (("$__rate_interval", "1m"), ("$instance", ".*"), ("$model", ".*")):
            expression = expression.replace(variable, value)
        result: list[dict[str, Any]] = self.get("/query", query=expression)["result"]
        return result

    def values(self, expression: str) -> list[float]:
        return [float(sample["value"][1]) for sample in self.query(expression)]


def send_requests(daemon: RunningDaemon) -> None:
    """Some that are answered, refused, expired, and wrong."""
    with httpx.Client(base_url=f"http://{daemon.http}/v2/models", timeout=10.0) as client:

        def infer(items: int = 1, width: int = 16, **parameters: float | bool) -> int:
            tensor = {"name": "x", "datatype": "FP32", "shape": [items, width], "data": [1.0] * (items * width)}
            body = {"inputs": [tensor], "parameters": parameters}
            return client.post("/affine/infer", json=body).status_code

        for items in (1, 2, 8):
            assert infer(items) == 200
        assert client.post("/digits/infer", content=(MODELS / "digits" / "three.png").read_bytes()).status_code == 200
        assert infer(slo_ms=0.001, strict=True) == 429
        assert infer(timeout=1) == 504
        assert infer(width=15) == 400


@contextmanager
def a_job(daemon: RunningDaemon) -> Iterator[None]:
    """One that goes on until it is cancelled; with an item that has an error."""
    with httpx.Client(base_url=f"http://{daemon.http}/v2", timeout=60.0) as client:
        lines = ["nonsense", *[json.dumps([1.0] * 16)] * 300_000]
        job = client.post("/jobs", params={"model": "affine", "deadline": "1h"}, content="\n".join(lines)).json()["id"]
        yield
        assert client.post(f"/jobs/{job}/cancel").status_code == 200
        assert client.delete(f"/jobs/{job}").status_code == 200


@pytest.fixture(scope="module")
def prometheus(daemon: RunningDaemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Our configuration, but for the daemon's address and a shorter wait; has seen requests come in."""
    folder = tmp_path_factory.mktemp("prometheus")
    write_configuration(folder, daemon.metrics)
    log = folder / "log"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with log.open("w") as stderr:
        process = subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stderr=stderr)
    try:
        until(lambda: "Server is ready" in log.read_text(), "Prometheus is ready")
        listening = re.search(r'"Listening on" address=(\S+)', log.read_text())
        assert listening is not None, log.read_text()
        server = Prometheus(listening[1])
        with a_job(daemon):
            see_requests(server, daemon)
            until(lambda: server.query("rate(migserve_job_items_finished_total[1m]) > 0"), "the job is seen to go on")
            yield server
        server.close()
    finally:
        process.terminate()
        process.wait(10.0)


def write_configuration(folder: Path, target: str) -> None:
    configuration = read_yaml(PROMETHEUS / "prometheus.yml")
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(PROMETHEUS / name) for name in configuration["rule_files"]]
    configuration["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))


def see_requests(server: Prometheus, daemon: RunningDaemon) -> None:
    """A counter has a rate once it was scraped, has grown, and was scraped again."""
    expired = 'migserve_requests_not_answered_total{model="affine", reason="expired"}'
    send_requests(daemon)
    until(lambda: server.query(expired), "the first requests are scraped")
    send_requests(daemon)
    until(lambda: server.query(f"rate({expired}[1m]) > 0"), "the next requests are scraped")
    until(lambda: server.query('instance_model:migserve_requests_ended:rate2m{model="affine"} > 0'), "it is recorded")


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_each_panel_has_data(prometheus: Prometheus, title: str, expression: str) -> None:
    values = prometheus.values(expression)
    if title not in MAY_BE_EMPTY:
        assert any(math.isfinite(value) for value in values)


def test_the_header_tells_what_is_simulated(prometheus: Prometheus) -> None:
    stats = [panel for panel in DASHBOARD["panels"] if panel["type"] == "stat"]
    assert {panel["title"]: prometheus.values(panel["targets"][0]["expr"]) for panel in stats} == {
        "Daemons down": [0],
        "Alerts firing": [0],
        "Slices not ready": [0],
        "Models not ready": [0],
        "Simulated GPUs": [1],
        "Emulated models": [1],
    }


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable["name"])
def test_each_variable_has_choices(prometheus: Prometheus, variable: dict[str, Any]) -> None:
    found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
    assert found is not None
    assert all(found[2] in sample["metric"] for sample in prometheus.query(found[1]))


def test_each_rule_can_be_evaluated(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("/rules")["groups"] for rule in group["rules"]]

    until(lambda: all(rule["health"] != "unknown" for rule in rules()), "every rule was evaluated")
    assert {rule["name"]: rule.get("lastError", "") for rule in rules() if rule["health"] != "ok"} == {}


def test_alerts_see_what_was_sent(prometheus: Prometheus) -> None:
    seen = {alert["alert"] for alert in read_alerts() if prometheus.query(alert["expr"])}
    assert seen == {"MigserveRequestsRefused", "MigserveDeadlinesMissed", "MigserveGpusSimulated"}


def test_promtool_minds_only_tritons_names(prometheus: Prometheus, daemon: RunningDaemon) -> None:
    metrics = httpx.get(f"http://{daemon.metrics}/metrics").text
    _, output = run("promtool", "check", "metrics", stdin=metrics)
    assert set(output.splitlines()) == LINT_OF_TRITONS_NAMES
