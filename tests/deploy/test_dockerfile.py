from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest

from server.settings import Settings
from tests.deploy.tools import installed_here, run
from tests.harness import REPOSITORY, RunningDaemon

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    code, output = run(installed_here("hadolint"), REPOSITORY / "Dockerfile")
    assert (code, output) == (0, "")


def test_the_rules_that_hadolint_ignores_are_explained() -> None:
    ignored = re.findall(r"^# hadolint ignore=.*$", DOCKERFILE, re.MULTILINE)
    assert ignored
    for line in ignored:
        assert re.fullmatch(r"# hadolint ignore=DL\d+  # .+", line), line


def test_its_variables_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = re.findall(r"(MIGSERVE_\w+)=(\S+)", DOCKERFILE)
    for name, value in variables:
        assert name.removeprefix("MIGSERVE_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert [str(path) for path in settings.model_repository] == ["/models"]
    assert {settings.http_address, settings.grpc_address, settings.metrics_address} == {"0.0.0.0"}
    assert settings.log_format == "json"


def test_it_exposes_the_ports_that_are_the_defaults() -> None:
    defaults = [Settings.model_fields[f"{name}_port"].default for name in ("http", "grpc", "metrics")]
    assert f"EXPOSE {' '.join(map(str, defaults))}\n" in DOCKERFILE
    assert f"'MIGSERVE_HTTP_PORT', {defaults[0]}" in DOCKERFILE


def test_its_health_check_asks_the_port_that_is_set(daemon: RunningDaemon) -> None:
    found = re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
    assert found is not None
    _, *arguments = json.loads(found[1])
    for port, code in ((daemon.http.split(":")[1], 0), ("1", 1)):
        done = subprocess.run([sys.executable, *arguments], env=os.environ | {"MIGSERVE_HTTP_PORT": port}, stderr=-1)
        assert done.returncode == code, done.stderr


def test_every_package_gets_into_the_image() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    packages = {name.removesuffix("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    let_in = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == packages | {"pyproject.toml", "README.md", "constraints-cpu.txt"}
