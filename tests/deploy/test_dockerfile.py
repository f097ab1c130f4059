from __future__ import annotations

import re
import tomllib

import pytest

from server.settings import Settings
from tests.deploy.tools import installed_here, run
from tests.harness import REPOSITORY

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
    assert f"http://127.0.0.1:{defaults[0]}/v2/health/live" in DOCKERFILE


def test_every_package_gets_into_the_image() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    packages = {name.removesuffix("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    let_in = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == packages | {"pyproject.toml", "README.md", "constraints-cpu.txt"}
