from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from tests.deploy.tools import read_dashboard

DASHBOARD = read_dashboard()
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
WITH_DATA = [panel for panel in PANELS if panel["type"] != "row"]
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24


def of_title(panel: dict[str, Any]) -> str:
    return str(panel["title"])


def test_the_dashboard_has_a_lasting_identity() -> None:
    assert DASHBOARD["uid"] == "migserve"
    assert DASHBOARD["id"] is None  # the database's, not ours
    assert DASHBOARD["schemaVersion"] >= 36


def test_panels_are_told_apart() -> None:
    for key in ("id", "title"):
        values = [panel[key] for panel in PANELS]
        assert len(set(values)) == len(values)


def test_panels_do_not_overlap() -> None:
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= COLUMNS, panel["title"]
    for one, other in combinations(PANELS, 2):
        assert not overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return (
        one["x"] < other["x"] + other["w"]
        and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"]
        and other["y"] < one["y"] + one["h"]
    )


@pytest.mark.parametrize("panel", WITH_DATA, ids=of_title)
def test_each_panel_asks_the_chosen_source(panel: dict[str, Any]) -> None:
    assert panel["datasource"] == SOURCE
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["datasource"] == SOURCE
        assert target["expr"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@pytest.mark.parametrize("panel", WITH_DATA, ids=of_title)
def test_each_panel_has_a_unit_and_readable_legends(panel: dict[str, Any]) -> None:
    assert panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] in ("timeseries", "state-timeline"):
        assert all("{{" in target["legendFormat"] for target in panel["targets"])


def test_variables() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "instance", "model"]
    assert variables["datasource"]["type"] == "datasource"
    for name in ("instance", "model"):
        assert variables[name]["datasource"] == SOURCE
