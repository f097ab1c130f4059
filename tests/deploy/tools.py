"""What the tests of the deployment files share: the files, and the tools that judge them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
PROMETHEUS = DEPLOY / "prometheus"

# `make test` says loudly what is missing.
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None, reason="Prometheus is not installed"
)


def run(*command: str | Path, stdin: str | None = None) -> tuple[int, str]:
    """Exit code and all output of a command."""
    done = subprocess.run(
        command, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30.0
    )
    return done.returncode, done.stdout


def installed_here(tool: str) -> Path:
    """A tool of this virtual environment, which need not be activated."""
    return Path(sys.executable).parent / tool


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def read_dashboard() -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/migserve.json").read_text())
    return dashboard


def read_alerts() -> list[dict[str, Any]]:
    """The alerts among the rules."""
    groups = read_yaml(PROMETHEUS / "alerts.yml")["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]
