from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from server.settings import Settings
from tests.deploy.tools import DEPLOY, PROMETHEUS, installed_here, read_dashboard, read_yaml, run
from tests.harness import REPOSITORY

FILES = [DEPLOY / "docker-compose.yml", DEPLOY / "docker-compose.gpu.yml"]
SERVICES: dict[str, Any] = read_yaml(FILES[0])["services"]
GRAFANA_FOLDERS = dict(volume.split(":")[1::-1] for volume in SERVICES["grafana"]["volumes"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_compose_schema(file: Path) -> None:
    code, output = run(installed_here("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", file)
    assert code == 0, output


def test_docker_waits_longer_than_the_daemon_drains() -> None:
    defaults = Settings.model_fields
    drain_s = defaults["exit_timeout_secs"].default + defaults["drain_delay_secs"].default
    assert float(SERVICES["migserve"]["stop_grace_period"].removesuffix("s")) > drain_s


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_exists(name: str) -> None:
    sources = [volume.split(":")[0] for volume in SERVICES[name].get("volumes", [])]
    volumes = read_yaml(FILES[0])["volumes"]
    for source in sources:
        assert source in volumes or (DEPLOY / source).is_dir(), source


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_build_targets_are_stages_of_the_dockerfile(file: Path) -> None:
    build = read_yaml(file)["services"]["migserve"]["build"]
    assert (DEPLOY / build.get("context", "..")).resolve() == REPOSITORY
    assert f" AS {build['target']}\n" in (REPOSITORY / "Dockerfile").read_text()


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback_unless_told_otherwise(name: str) -> None:
    for port in SERVICES[name]["ports"]:
        assert re.fullmatch(r"\$\{PUBLISH_ADDRESS:-127\.0\.0\.1\}:(\d+):\1", port), port


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_foreign_images_are_pinned(name: str) -> None:
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


def test_services_start_once_those_before_are_healthy() -> None:
    assert SERVICES["prometheus"]["depends_on"] == {"migserve": {"condition": "service_healthy"}}
    assert SERVICES["grafana"]["depends_on"] == {"prometheus": {"condition": "service_healthy"}}
    assert "healthcheck" in SERVICES["prometheus"]
    assert "HEALTHCHECK" in (REPOSITORY / "Dockerfile").read_text()


def test_prometheus_scrapes_the_service() -> None:
    (scraped,) = read_yaml(PROMETHEUS / "prometheus.yml")["scrape_configs"]
    assert scraped["static_configs"] == [{"targets": [f"migserve:{Settings.model_fields['metrics_port'].default}"]}]
    assert "migserve" in SERVICES


def test_grafana_finds_its_dashboard() -> None:
    (provider,) = read_yaml(DEPLOY / "grafana/provisioning/dashboards/migserve.yml")["providers"]
    assert GRAFANA_FOLDERS[provider["options"]["path"]] == "./grafana/dashboards"
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (DEPLOY / GRAFANA_FOLDERS[str(home.parent)] / home.name).is_file()


def test_grafana_finds_its_data() -> None:
    (source,) = read_yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == read_yaml(PROMETHEUS / "prometheus.yml")["global"]["scrape_interval"]
    assert read_dashboard()["templating"]["list"][0]["current"]["value"] == source["uid"]
