"""`migserve plan`, from the command line to what it prints and writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import parse_layout
from partitioner.plans import DemandError, plan_from_json
from server.__main__ import app
from server.plan_command import UsageError, read_demand

DEMAND = "model,rate_per_s,slo_ms\nresnet50,300,100\nbert,20,2000\n"


def plan(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


@pytest.fixture
def demand(tmp_path: Path) -> Path:
    path = tmp_path / "demand.csv"
    path.write_text(DEMAND)
    return path


def test_json_is_as_documented(demand: Path) -> None:
    result = plan("--demand", demand, "--json", "--max-processes", "5")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert list(data) == ["gpus", "gpcs", "layout", "bound_gpus", "solve_seconds", "explanation", "warnings"]
    assert data["warnings"] == []
    assert data["gpus"] == len(data["layout"]) == 1
    assert list(data["layout"][0][0]) == ["mig_profile", "start", "models"]
    models = [model for each in data["layout"][0] for model in each["models"]]
    assert list(models[0]) == ["model", "batch", "processes", "rate_per_s", "share"]
    assert sum(model["rate_per_s"] for model in models if model["model"] == "bert") == pytest.approx(20, abs=0.1)
    assert 0 < data["bound_gpus"] <= 1
    assert data["solve_seconds"] > 0
    parse_layout(plan_from_json(data).layouts()[0], GPU_MODELS["A100-80GB"])


def test_nothing_but_json_on_stdout() -> None:
    """In a process of its own: the solver writes lines of its own past Python's stdout."""
    command = [
        sys.executable,
        "-m",
        "server",
        "plan",
        "--scenario",
        "S3",
        "--json",
        "--exclusive",
        "--slo-share",
        "0.45",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=dict(os.environ))
    assert json.loads(done.stdout)["gpus"] >= 5


def test_drawn_as_text(demand: Path) -> None:
    result = plan("--demand", demand, "--gpus", "2", "--planner", "paris")
    assert result.exit_code == 0, result.output
    for expected in ("GPU 0", "GPU 1", "1g.10gb", "resnet50", "bert", "PARIS asks for", "2 x A100-80GB"):
        assert expected in result.stdout


def test_drawn_as_svg_and_png(demand: Path, tmp_path: Path) -> None:
    for name in ("plan.svg", "plan.png"):
        assert plan("--demand", demand, "--out", tmp_path / name).exit_code == 0
    root = ElementTree.parse(tmp_path / "plan.svg").getroot()
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(text.startswith("resnet50") for text in texts)
    with Image.open(tmp_path / "plan.png") as image:
        assert image.width == int(root.attrib["width"])
        assert len(image.getcolors(1 << 24) or []) > 3
    assert "must end in .svg or .png" in plan("--demand", demand, "--out", tmp_path / "plan.pdf").stderr


def test_scenarios_come_along_and_can_be_picked() -> None:
    result = plan("--scenario", "S1", "--max-processes", "5", "--json")
    assert json.loads(result.stdout)["gpus"] == 1


def test_a_latency_table_of_ones_own(tmp_path: Path, demand: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("model,mig_profile,batch,latency_ms\nresnet50,1g.10gb,1,2\nbert,1g.10gb,1,50\n")
    result = plan("--demand", demand, "--latency-table", table, "--json", "--gpu", "H100-80GB")
    assert result.exit_code == 0, result.output
    shares = [model for each in json.loads(result.stdout)["layout"][0] for model in each["models"]]
    assert {share["batch"] for share in shares} == {1}
    shipped = plan("--demand", demand, "--json", "--gpu", "H100-80GB")
    (warning,) = json.loads(shipped.stdout)["warnings"]
    assert "not measured on slices of H100-80GB, but on A100-80GB:" in warning


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ("cpu-1,CPU Some,measured", "CPU Some"),
        ("cpu-1,,measured", "a CPU"),
        ("1g.10gb,A100-80GB,emulated", "an emulated A100-80GB"),
        ("1g.10gb,A100-80GB,sm-shares", "shares of the SMs of a whole A100-80GB"),
        ("1g.10gb,A100-80GB,predicted from sm-shares", "shares of the SMs of a whole A100-80GB"),
        ("1g.10gb,A100-80GB,measured", ""),
        ("1g.10gb,A100-80GB,predicted", ""),
        ("1g.10gb,,", ""),
    ],
)
def test_a_plan_of_latencies_that_are_no_slices_warns(row: str, where: str, demand: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    models = "\n".join(f"{model},1,1,2,{row}" for model in ("resnet50", "bert"))
    table.write_text(f"model,gpcs,batch,latency_ms,mig_profile,gpu,source\n{models}\nother,1,1,2,cpu-1,CPU,measured\n")
    asked = ("--demand", demand, "--latency-table", table)
    shown, data = plan(*asked, "--out", tmp_path / "plan.svg").stdout, json.loads(plan(*asked, "--json").stdout)
    if not where:
        assert (data["warnings"], "WARNING" in shown) == ([], False)
        return
    (warning,) = data["warnings"]
    assert warning.startswith(f"2 of 2 latencies were not measured on slices of A100-80GB, but on {where}:")
    assert "migserve profile MODEL --device cuda" in warning
    assert f"WARNING: {warning}" in " ".join(shown.split("╭")[0].split())
    assert warning[:60] in (tmp_path / "plan.svg").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected CSV with the columns model,rate_per_s,slo_ms"),
        ("model,rate_per_s\nm,1\n", "slo_ms is missing"),
        ("model,rate_per_s,slo_ms\nm,1,100\nn,fast,100\n", "line 3: rate_per_s is 'fast', not a number"),
        ("model,rate_per_s,slo_ms\nm,-1,100\n", "line 2: m: rate_per_s must be a positive number"),
        ("model,rate_per_s,slo_ms\nm,1\n", "line 2: 3 or more values expected"),
        ("model,rate_per_s,slo_ms\nm,1,2,3\n", "line 2: 3 or more values expected"),
        ("model,rate_per_s,slo_ms\n,1,2\n", "line 2"),
        ("model,rate_per_s,slo_ms\nm,1,2\nm,1,2\n", "m is there twice"),
        ("model,rate_per_s,slo_ms,items\nm,1,2,1:x\n", "line 2: items is '1:x', not of the form"),
        ("model,rate_per_s,slo_ms,items\nm,1,2,0:1\n", "line 2: m: items per query must be at least 1"),
    ],
)
def test_broken_demands_are_refused_naming_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "demand.csv"
    path.write_text(text)
    with pytest.raises(DemandError, match=message):
        read_demand(path, None)


def test_a_demand_without_scenarios_has_none_to_pick(tmp_path: Path) -> None:
    path = tmp_path / "demand.csv"
    path.write_text("model,rate_per_s,slo_ms\nm,1,100\n")
    with pytest.raises(UsageError, match="has no column scenario: leave out --scenario"):
        read_demand(path, "S9")


def test_items_of_queries_are_read(tmp_path: Path) -> None:
    path = tmp_path / "demand.csv"
    path.write_text("model,rate_per_s,slo_ms,items\nm,1,2,1:3 4:1\nn,1,2,\n")
    assert [demand.items for demand in read_demand(path, None)] == [{1: 0.75, 4: 0.25}, {1: 1.0}]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--demand", "nowhere.csv"], 2, "No such file"),
        (["--gpu", "A100-80"], 2, "no GPU is called 'A100-80'; did you mean A100-80GB"),
        (["--gpu", "zzz"], 2, "there are A30-24GB"),
        (["--planner", "best"], 2, "there are optimal and paris"),
        ([], 2, "several scenarios: pick one with --scenario, of S1, S2"),
        (["--scenario", "S9"], 2, "no scenario 'S9'; did you mean"),
        (["--scenario", "S1", "--latency-table", "nowhere.csv"], 2, "No such file"),
        (["--scenario", "S1", "--out", "plan.pdf"], 2, "cannot draw to plan.pdf: the name must end in .svg or .png"),
        (["--scenario", "S1", "--out", "nowhere/plan.svg"], 2, "cannot draw to .*: No such folder: nowhere"),
        (["--scenario", "S5", "--gpus", "3"], 1, "3 GPUs of A100-80GB serve .* would do. What binds is"),
    ],
)
def test_errors_say_what_would_be_right(arguments: list[str], code: int, message: str) -> None:
    result = plan(*arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    assert re.search(message, result.stderr), result.stderr


def test_a_model_without_a_table_and_an_slo_out_of_reach(tmp_path: Path) -> None:
    path = tmp_path / "demand.csv"
    path.write_text("model,rate_per_s,slo_ms\nresnet5,1,100\n")
    assert "no latency table for 'resnet5'; did you mean resnet50" in plan("--demand", path).stderr
    path.write_text("model,rate_per_s,slo_ms\nresnet50,1,2\n")
    result = plan("--demand", path)
    assert result.exit_code == 1
    assert "resnet50 needs at least" in result.stderr


def test_a_plan_on_predicted_latencies_says_so(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    rows = [f"resnet50,{gpcs}g.{gpcs}0gb,8,{40 / gpcs},{'predicted' if gpcs < 7 else ''}" for gpcs in (1, 2, 3, 4, 7)]
    table.write_text("\n".join(["model,mig_profile,batch,latency_ms,source", *rows]))
    path = tmp_path / "demand.csv"
    path.write_text("model,rate_per_s,slo_ms\nresnet50,100,200\n")
    result = plan("--demand", path, "--latency-table", table)
    assert result.exit_code == 0, result.output
    assert "4 of 5 points of the latency table are predicted" in " ".join(result.stdout.split())


def test_jobs_are_planned_for_beside_online_demand(demand: Path) -> None:
    def served(*jobs: str) -> tuple[int, float]:
        result = plan("--demand", demand, "--json", *(word for job in jobs for word in ("--job", job)))
        assert result.exit_code == 0, result.output
        data = json.loads(result.stdout)
        shares = [share for gpu in data["layout"] for each in gpu for share in each["models"]]
        of_job = sum(share["rate_per_s"] * 16 for share in shares if share["model"] == "bert (job)")
        return data["gpus"], of_job

    alone, nothing = served()
    beside, items_per_s = served("bert,3600000,1h")
    assert nothing == 0
    assert beside > alone
    assert items_per_s == pytest.approx(1000, rel=1e-3)
    assert "such as bert,200000,8h" in plan("--demand", demand, "--job", "bert,9").output
    assert "did you mean" in plan("--demand", demand, "--job", "brt,9,1h").output
    assert "PARIS" in plan("--demand", demand, "--planner", "paris", "--job", "bert,9,1h").output
