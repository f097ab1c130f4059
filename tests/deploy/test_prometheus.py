from __future__ import annotations

import re
from typing import Any

import pytest

from tests.deploy.tools import PROMETHEUS, needs_prometheus, read_alerts, read_yaml, run

ALERTS = read_alerts()
TESTS: list[dict[str, Any]] = read_yaml(PROMETHEUS / "alerts_test.yml")["tests"]


@needs_prometheus
@pytest.mark.parametrize(
    "arguments", ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"]
)
def test_promtool(arguments: str) -> None:
    *verb, file = arguments.split()
    code, output = run("promtool", *verb, PROMETHEUS / file)
    assert code == 0, output


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_each_alert_says_how_bad_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["for"]
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert alert["annotations"].keys() == {"summary", "description"}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_each_alert_is_tested_firing_and_not(alert: dict[str, Any]) -> None:
    (test,) = [test for test in TESTS if test["name"] == alert["alert"]]
    silent, fires = test["promql_expr_test"]
    assert silent["expr"] == fires["expr"] == f'ALERTS{{alertname="{alert["alert"]}", alertstate="firing"}}'
    assert silent["exp_samples"] == []
    (fired,) = fires["exp_samples"]
    for label in re.findall(r"\$labels\.(\w+)", str(alert["annotations"])):
        assert f'{label}="' in fired["labels"], f"its text names {label}, which it has not"
