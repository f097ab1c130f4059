"""`migserve simulate`, from the command line to its figures and its report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from scheduler.policies.named import POLICIES
from server.__main__ import app
from server.simulate_outcome import Outcome, above_bound

OURS = next(iter(POLICIES))
FEW = ("--queries", "1000")
DOCUMENTED = ["policy", "layout", "slo_ms", "max_rate_per_s", "bound_per_s", "ratio_to_bound", "p50_ms", "p95_ms",
              "p99_ms", "max_lateness_slo", "late_share_large", "seeds"]  # fmt: skip
TRACE = "seconds,model,items,length\n0.0,resnet50,4,\n0.2,bert,1,\n0.5,resnet50,2,\n1.0,bert,,\n"


def simulate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def found(*arguments: str | Path) -> Any:
    result = simulate(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def test_with_no_options_it_shows_something() -> None:
    result = simulate()
    assert result.exit_code == 0, result.output
    for expected in ("w-paper: Poisson queries of resnet50", "3g.40gb+2g.20gb", OURS, "p99", "gpu1/3g.40gb@4", "busy"):
        assert expected in result.stdout


def test_the_highest_rate_has_the_documented_fields_and_keeps_its_word() -> None:
    data = found("--find-max", "p95", "--layout", "4g.40gb+3g.40gb", "--gpus", "1", "--seeds", "2", "--seed", "5", *FEW)
    assert list(data)[: len(DOCUMENTED)] == DOCUMENTED
    assert (data["policy"], data["layout"], data["seeds"]) == (OURS, "1 x 4g.40gb+3g.40gb", [5, 6])
    assert data["slo_ms"] == pytest.approx(26.707, abs=0.001)
    assert data["ratio_to_bound"] == pytest.approx(data["max_rate_per_s"] / data["bound_per_s"], abs=1e-3)
    assert 0.3 < data["ratio_to_bound"] < 1.1
    assert data["p50_ms"] <= data["p95_ms"] <= data["slo_ms"]
    assert data["p95_ms"] <= data["p99_ms"] <= data["max_lateness_slo"] * data["slo_ms"]
    assert data["max_lateness_slo"] <= 10
    assert 0 <= data["late_share_large"] <= 1
    assert data == found(
        "--find-max", "p95", "--layout", "4g.40gb+3g.40gb", "--gpus", "1", "--seeds", "2", "--seed", "5", *FEW
    )


def test_p99_is_the_stricter_goal() -> None:
    p95, p99 = (found("--find-max", goal, "--seeds", "1", *FEW)["max_rate_per_s"] for goal in ("p95", "p99"))
    assert p99 < p95


def test_a_rate_above_the_bound_is_explained() -> None:
    def outcome(rate_per_s: float, goal: str | None) -> Outcome:
        return Outcome(OURS, rate_per_s, [0], [rate_per_s], [], goal)

    said = above_bound([outcome(90.0, "p95"), outcome(101.0, "p95")], 100.0)
    assert "p95 asks for 95 % of the queries in time only" in said
    assert above_bound([outcome(99.0, "p99")], 100.0) == ""
    assert above_bound([outcome(200.0, None)], 100.0) == "", "that it was asked for does not make it count"


def test_where_no_rate_counts_figures_are_null() -> None:
    """Queries of 32 items, 3 % of all, take longer than the SLO on every slice; elsa cuts none of them."""
    data = found("--find-max", "p99", "--model", "vgg19", "--slo-factor", "0.3", "--policy", "elsa", *FEW)
    assert (data["max_rate_per_s"], data["p95_ms"], data["max_lateness_slo"]) == (0.0, None, None)


def test_a_rate_is_simulated_and_a_seed_repeats() -> None:
    data = found("--rate", "200", "--seed", "3", *FEW)
    assert data["rate_per_s"] == 200.0
    assert len(data["utilisation"]) == 8
    assert data == found("--rate", "200", "--seed", "3", *FEW)
    assert data != found("--rate", "200", "--seed", "4", *FEW)


def test_no_figure_is_cut_off_on_a_narrow_terminal() -> None:
    arguments = ["simulate", "--workload", "w-slo", "--scenario", "S1", *FEW]
    assert "…" not in CliRunner().invoke(app, arguments, env={"COLUMNS": "80"}).stdout


def test_several_policies_come_as_a_list() -> None:
    data = found("--policy", OURS, "--policy", "elsa", *FEW)
    assert [each["policy"] for each in data] == [OURS, "elsa"]


def test_strict_refuses_what_would_be_late() -> None:
    lax, strict = (found("--rate", "900", "--policy", "elsa", *FEW, *flag) for flag in ((), ("--strict",)))
    assert "slo_unreachable" not in lax["refused"]
    assert strict["refused"]["slo_unreachable"] > 0
    assert strict["within_slo"] > lax["within_slo"]
    assert strict["max_lateness_slo"] < lax["max_lateness_slo"]


@pytest.mark.parametrize("arrivals", ["bursty", "diurnal"])
def test_other_arrivals(arrivals: str) -> None:
    assert found("--arrivals", arrivals, "--rate", "100", *FEW) != found("--rate", "100", *FEW)


def test_other_gpus_have_layouts_of_their_own() -> None:
    assert found("--gpu", "A30-24GB", "--gpus", "1", *FEW)["layout"] == "1 x 2g.12gb+1g.6gb+1g.6gb"
    assert "but on A100-80GB: on A30-24GB they will be others" in " ".join(
        simulate("--gpu", "A30-24GB", *FEW).stdout.split()
    )


def test_a_trace_is_replayed_at_its_own_rate_or_another(trace: Path) -> None:
    data = found("--workload", trace)
    assert data["rate_per_s"] == 3.0
    assert sorted(data["p50_ms"]) == sorted(data["slo_ms"]) == ["bert", "resnet50"]
    assert found("--workload", trace, "--rate", "30")["rate_per_s"] == 30.0


def test_lengths_that_no_latency_depends_on_are_told(trace: Path, tmp_path: Path) -> None:
    assert "The trace has lengths" not in simulate("--workload", trace).stdout
    with_lengths = tmp_path / "lengths.csv"
    with_lengths.write_text(TRACE.replace("bert,1,", "bert,1,128"))
    said = " ".join(simulate("--workload", with_lengths).stdout.split())
    assert "only queries of the same one share a batch, but no latency depends on it" in said


def test_w_slo_plans_and_tries_the_plan() -> None:
    data = found("--workload", "w-slo", "--scenario", "S1", *FEW)
    assert data["rate_per_s"] == pytest.approx(2692)
    assert len(data["within_slo"]) == 6
    assert min(data["within_slo"].values()) > 0.95
    assert found("--workload", "w-slo", "--scenario", "S1", "--layout", "7g.80gb", *FEW)["layout"] == "2 x 7g.80gb"


def test_w_length_batches_by_padded_length() -> None:
    data = found("--workload", "w-length", "--find-max", "p95", "--seeds", "1", *FEW)
    assert data["slo_ms"] == pytest.approx(2 * 82.4, abs=0.1)
    assert data["ratio_to_bound"] > 0.5
    assert data["late_share_large"] is None


def test_a_short_run_is_told() -> None:
    assert "queries last for" in simulate("--workload", "w-length", *FEW).stdout
    assert "queries last for" not in simulate("--queries", "4000").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "resnet5"), "no latency table for 'resnet5'; did you mean resnet50"),
        (("--model", "zzz"), "there are bert, densenet121"),
        (("--gpu", "A100"), "no GPU is called 'A100'; did you mean A100-"),
        (("--layout", "4g.40gb+4g.40gb"), "the layout takes 8 compute slices; A100-80GB has 7"),
        (("--layout", "3g.20gb"), "A100-80GB has no MIG profile '3g.20gb'; did you mean 3g.40gb"),
        (("--policy", "best"), f"no policy is called 'best'; there are {', '.join(POLICIES)}"),
        (("--find-max", "p90"), "--find-max takes p95 or p99, not 'p90'"),
        (("--find-max", "p95", "--rate", "5"), "leave out one of them"),
        (("--find-max", "p95", "--strict"), "leave out --strict"),
        (
            ("--workload", "w-papers"),
            "no workload and no file is called 'w-papers'; there are w-paper, w-length, w-slo",
        ),
        (("--workload", "w-slo"), "pick one with --scenario, of S1"),
        (("--workload", "w-slo", "--scenario", "S9"), "no scenario 'S9'"),
        (("--workload", "w-slo", "--scenario", "S1", "--model", "bert"), "leave out --model"),
        (("--scenario", "S1"), "--scenario is for --workload w-slo"),
        (
            ("--workload", "w-length", "--model", "bert"),
            "no latencies by length for 'bert'; there are those of bert-base",
        ),
        (("--arrivals", "steady"), "there are poisson, bursty, diurnal"),
        (("--slo-factor", "0.1", "--layout", "1g.10gb"), "no slice ends even one item within its SLO"),
        (("--latency-table", "nowhere.csv"), "latency table nowhere.csv: No such file"),
        (("--out", "report.pdf"), "its name must end in .html"),
        (("--out", "nowhere/report.html"), "cannot write the report nowhere/report.html: No such folder: nowhere"),
    ],
)
def test_what_cannot_be_simulated_is_refused_with_what_to_do(arguments: tuple[str, ...], says: str) -> None:
    result = simulate(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seconds,model\n0,bert\nsoon,bert\n", "line 3: seconds is 'soon', not a number"),
        ("seconds,model\n0,bart\n", "no latency table for 'bart'; did you mean bert"),
        ("seconds,model\n", "has no queries; a line is such as"),
        ("\xff\xfe", "codec can't decode"),
    ],
)
def test_a_trace_that_cannot_be_read_is_refused_with_the_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(text.encode("latin-1"))
    result = simulate("--workload", path)
    assert result.exit_code == 2
    assert says in result.stderr


def test_a_plan_that_nothing_meets_is_told_apart() -> None:
    result = simulate("--workload", "w-slo", "--scenario", "S6", "--gpus", "1")
    assert result.exit_code == 1
    assert "GPU" in result.stderr


def test_the_report_has_its_plots_and_needs_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    result = simulate("--out", path, "--rate", "300", "--queries", "500", "--gpus", "1")
    assert result.exit_code == 0, result.output
    page = path.read_text()
    titles = [ElementTree.fromstring(svg).findtext("{*}title") for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert titles == [
        "p50 against load", "p95 against load", "p99 against load", "Utilisation of each slice",
        "Late queries by size", f"Batches of {OURS}", "Batches of elsa",
    ]  # fmt: skip
    for expected in ("queries/s", "p95 latency, ms", "SLO 26.7 ms", "gpu0/3g.40gb@4", "20 or more", "Nothing here ran"):
        assert expected in page
    assert not re.search(r'(src|href)="|@import|<script', page)


def test_the_report_of_several_models_measures_by_their_slos(tmp_path: Path, trace: Path) -> None:
    path = tmp_path / "report.html"
    assert simulate("--workload", trace, "--out", path, "--policy", OURS).exit_code == 0
    page = path.read_text()
    assert "latency / SLO, worst model" in page
    assert ">bert<" in page
