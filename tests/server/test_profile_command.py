"""`migserve profile`, from the command line to the table that it writes."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from partitioner.latency import LatencyTableError, Measurement, read_csv, read_measurements
from scheduler.measuring import Device, Effort
from server.__main__ import app
from server.model_files import read_model
from server.profile_command import Request, measure_on
from server.profile_file import TableFile
from server.profile_places import Machine, Place
from tests.harness import until

MODELS = Path("build/demo-models")
QUICK = ("--model-repository", MODELS, "--seconds", "0.02", "--within", "0.5")


def profile(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_torch_model_on_the_cpu(tmp_path: Path) -> None:
    out, plot = tmp_path / "mlp.csv", tmp_path / "mlp.svg"
    result = profile("mlp", *QUICK, "--device", "cpu", "--batches", "1,16,64", "--out", out, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "3 points measured, 0 predicted" in result.output
    found = rows(out)
    assert [row["batch"] for row in found] == ["1", "16", "64"]
    assert all(float(row["latency_ms"]) > 0 and float(row["memory_mib"]) > 0 for row in found)
    assert {row["source"] for row in found} == {"measured"}
    assert found[0]["gpu"].startswith("CPU")
    assert found[0]["versions"].startswith("torch ")
    assert len(read_csv(out, "mlp").points(1)) == 3
    ElementTree.parse(plot)


def test_a_budget_measures_some_and_predicts_the_rest_and_can_be_raised(tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    asked = ("resnet50", *QUICK, "--slices", "4g.40gb,7g.80gb", "--out", out)
    result = profile(*asked, "--budget", "10%")
    assert "made from fewer than 3 points" in result.output
    result = profile(*asked, "--budget", "25%")
    assert result.exit_code == 0, result.output
    assert "made from fewer" not in result.output
    first = rows(out)
    assert [row["source"] for row in first].count("emulated") == 3
    assert [row["source"] for row in first].count("predicted from emulated") == 9
    result = profile(*asked, "--budget", "5")
    assert result.exit_code == 0, result.output
    second = rows(out)
    assert second[:3] == first[:3]  # what was measured is kept
    assert "2 points measured, 3 kept from an earlier run, 7 predicted" in result.output
    assert len({(row["mig_profile"], row["batch"]) for row in second}) == len(second) == 12
    assert [row["source"] for row in second].count("emulated") == 5
    for row in second:
        if (row["mig_profile"], row["batch"]) == ("7g.80gb", "32"):
            assert float(row["latency_ms"]) > 13.3  # what it emulates; more where the machine is busy


def test_an_interrupted_run_is_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    command = [
        sys.executable,
        "-m",
        "server",
        "profile",
        "resnet50",
        "--model-repository",
        str(MODELS),
        "--out",
        str(out),
    ]
    process = subprocess.Popen([*command, "--slices", "1g.10gb", "--within", "0.001"], stderr=subprocess.PIPE)
    until(lambda: out.exists() and rows(out), "a row is written", seconds=60)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"the same command goes on" in said
    before = out.read_text()
    assert 1 <= len(rows(out)) < 6
    out.write_text(before + "resnet50,1g.10gb,1,3")  # cut short, as by a power cut
    result = profile("resnet50", *QUICK, "--slices", "1g.10gb", "--out", out)
    assert result.exit_code == 0, result.output
    assert out.read_text().startswith(before)
    assert sorted(int(row["batch"]) for row in rows(out)) == [1, 2, 4, 8, 16, 32]


def test_what_does_not_fit_into_memory_is_told_and_left_out(tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    result = profile("mlp", *QUICK, "--device", "cpu", "--memory-mib", "16", "--batches", "1", "--out", out)
    assert result.exit_code == 1
    assert "cannot be loaded" in result.output
    assert not out.exists()


def test_a_place_that_is_too_small_for_the_model_is_left_out_and_the_others_measured(tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    small, large = Place("1g.5gb", 1, Device(None, 1, None, 16)), Place("7g.40gb", 7, Device(None, 1, None, None))
    machine = Machine("A100-40GB", "measured", "", {"1g": small, "7g": large})
    effort = Effort(seconds=0.02, within=0.5)
    request = Request(
        str(MODELS / "mlp"), MODELS, "cpu", "", (), (1,), (), (), None, None, 0.1, effort, None, out, None
    )
    source, *_ = read_model(MODELS / "mlp", 1, 0)
    assert measure_on(machine, request, source) == 0
    assert [row["mig_profile"] for row in rows(out)] == ["7g.40gb"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["resnet5"], "did you mean resnet50?"),
        (["mlp", "--slices", "many"], "numbers of threads"),
        (["resnet50", "--slices", "9g.10gb"], "no slice '9g.10gb'"),
        (["resnet50", "--gpu", "A1000"], "no GPU is called"),
        (["resnet50", "--device", "cpu"], "emulated"),
        (["mlp", "--device", "tpu"], "there are cpu, cuda, shares, emulated"),
        (["mlp", "--device", "cpu", "--batches", "65"], "at most 64 items"),
        (["mlp", "--batches", "1,x"], "--batches takes numbers"),
        (["mlp", "--device", "cpu", "--lengths", "8"], "no axis that varies"),
        (["mlp", "--device", "cpu", "--budget", "some"], "--budget is a number"),
        (["mlp", "--device", "cpu", "--budget", "200%"], "--budget is a number"),
        (["mlp", "--device", "cpu", "--plot", "x.pdf"], "cannot draw to x.pdf: the name must end in .svg or .png"),
        (["mlp", "--device", "cpu", "--plot", "nowhere/x.svg"], "No such folder: nowhere"),
    ],
)
def test_what_cannot_be_is_said(arguments: list[str], says: str, tmp_path: Path) -> None:
    result = profile(*arguments, "--model-repository", MODELS, "--out", tmp_path / "out.csv")
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert not (tmp_path / "out.csv").exists()


def test_where_there_is_no_model_the_option_is_named_that_says_where_to_look(tmp_path: Path) -> None:
    result = profile("mlp", "--model-repository", tmp_path, "--out", tmp_path / "out.csv")
    assert (result.exit_code, "see --model-repository" in " ".join(result.output.split())) == (2, True)


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("nowhere/t.csv", "No such folder"),
        (".", "Is a folder"),
        ("/proc/t.csv", "cannot write /proc/t.csv: no file can be made in /proc: "),  # as root, too
    ],
)
def test_a_table_that_cannot_be_written_is_said_before_anything_is_measured(out: str, says: str) -> None:
    result = profile("mlp", *QUICK, "--device", "cpu", "--out", out)
    assert (result.exit_code, says in result.output) == (2, True)


def test_a_row_that_cannot_be_written_any_more_ends_in_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    command = [sys.executable, "-m", "server", "profile", "resnet50", *map(str, QUICK), "--out", str(out)]
    ended = subprocess.run(["bash", "-c", 'ulimit -f 1; exec "$@"', "-", *command], capture_output=True, text=True)
    assert (ended.returncode, f"cannot write {out}: File too large" in " ".join(ended.stderr.split())) == (2, True)
    assert "Traceback" not in ended.stderr
    assert out.stat().st_size == 1024


def test_another_model_file_under_the_same_name_is_not_taken_for_the_one_that_was_measured(tmp_path: Path) -> None:
    model, out = Path(shutil.copytree(MODELS / "mlp", tmp_path / "m")), tmp_path / "table.csv"
    asked = (model, *QUICK, "--device", "cpu", "--out", out, "--batches")
    assert profile(*asked, "1,2").exit_code == 0
    assert "0 points measured, 2 kept from an earlier run, 0 predicted" in profile(*asked, "1,2").output
    before = out.read_text()
    shutil.copyfile(MODELS / "affine" / "1" / "model.pt2", model / "1" / "model.pt2")
    result = profile(*asked, "1,2")
    said = " ".join(result.output.split())
    assert (result.exit_code, out.read_text()) == (2, before)
    assert "another model file than the one that is there now: name another --out, or give --anew" in said
    assert profile(*asked, "65", "--anew").exit_code == 2
    assert out.read_text() == before, "what nothing comes of drops nothing"
    result = profile(*asked, "1", "--anew")
    assert result.exit_code == 0, result.output
    assert "1 point measured, 0 predicted" in result.output
    assert [row["batch"] for row in rows(out)] == ["1"]
    assert rows(out)[0]["model_file"] not in before


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a driver")
def test_without_a_driver_it_says_what_to_look_at(tmp_path: Path) -> None:
    result = profile("mlp", *QUICK, "--device", "cuda", "--out", tmp_path / "out.csv")
    said = " ".join(result.output.split())
    assert result.exit_code == 2
    for expected in ("no usable NVIDIA driver here (", "nvidia-smi must list it", "--gpus all", "--device cpu"):
        assert expected in said
    assert "sim:" not in said, "which measures nothing"


def varying(folder: Path, serving: str) -> Path:
    (folder / "config.pbtxt").parent.mkdir()
    (folder / "config.pbtxt").write_text(
        'backend: "emulated" max_batch_size: 2 input { name: "x" data_type: TYPE_FP32 dims: [-1] } '
        'output { name: "y" data_type: TYPE_FP32 dims: [1] }'
    )
    (folder / "table.csv").write_text("model,mig_profile,batch,latency_ms\nm,1g.10gb,1,1\nm,1g.10gb,2,1\n")
    (folder / "serving.yaml").write_text(f"latency_table: {{file: table.csv}}\n{serving}")
    return folder


def test_a_model_with_lengths_is_measured_at_those_that_a_daemon_measures(tmp_path: Path) -> None:
    model = varying(tmp_path / "m", "lengths: {longest: 64, buckets: [16, 64]}")
    out = tmp_path / "out.csv"
    result = profile(model, *QUICK, "--slices", "1g.10gb", "--out", out)
    assert result.exit_code == 0, result.output
    assert [(row["seq_len"], row["batch"]) for row in rows(out)] == [("16", "1"), ("16", "2"), ("64", "1"), ("64", "2")]
    result = profile(model, "--lengths", "65", "--out", out)
    assert (result.exit_code, "the longest is 64" in result.output) == (2, True)


def test_a_model_whose_inputs_vary_is_not_measured_at_no_length(tmp_path: Path) -> None:
    result = profile(varying(tmp_path / "m", ""), "--out", tmp_path / "out.csv")
    assert (result.exit_code, "such as --lengths 32,128,512" in " ".join(result.output.split())) == (2, True)


# ---- the file ----

ROW = Measurement("m", "1g.10gb", 1, 8, 1, 5.0, 100.0, "A100", "measured", 64)


def test_other_models_rows_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    TableFile(path, "other", "A100", "measured").add(ROW, {"runs": 9})
    file = TableFile(path, "m", "A100", "measured")
    file.add(ROW, {"runs": 7})
    file.finish([Measurement("m", "1g.10gb", 1, 16, 1, 9.0, None, "A100", "predicted", 64)], {})
    file.finish([Measurement("m", "1g.10gb", 1, 32, 1, 9.0, None, "A100", "predicted", 64)], {})
    assert [(each.batch, each.source) for each in read_measurements(path)] == [
        (8, "measured"),
        (8, "measured"),
        (32, "predicted"),
    ]
    assert list(file.known().values()) == [5.0]


@pytest.mark.parametrize("columns", [1, 3])
def test_a_table_with_fewer_columns_of_an_older_release_is_gone_on_with(columns: int, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    TableFile(path, "m", "A100", "measured").add(ROW, {"runs": 9, "versions": "torch"})
    path.write_text("\n".join(line.rsplit(",", columns)[0] for line in path.read_text().splitlines()) + "\n")
    file = TableFile(path, "m", "A100", "measured", "1a2b3c4d5e6f")
    file.add(ROW, {"runs": 7, "energy_j": 2.5})
    assert [(row["runs"], row["energy_j"] or "") for row in rows(path)] == [("9", ""), ("7", "2.5")]
    assert [row["model_file"] or "" for row in rows(path)] == ["", "1a2b3c4d5e6f"]
    assert list(file.known().values()) == [5.0]


def test_what_does_not_count_any_more_is_dropped_and_other_rows_stay(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    for model, gpu, model_file in (("m", "A100", "old"), ("m", "H100", "old"), ("n", "A100", "old")):
        file = TableFile(path, model, gpu, "measured", model_file)
        file.add(replace(ROW, model=model, gpu=gpu), {})
        file.finish([replace(ROW, model=model, gpu=gpu, batch=16, source="predicted")], {})
    with pytest.raises(LatencyTableError, match="another model file"):
        TableFile(path, "m", "A100", "measured", "new")
    file = TableFile(path, "m", "A100", "measured", "new", anew=True)
    assert not file.known()
    assert len(read_measurements(path)) == 6, "nothing is dropped before it is asked for"
    file.forget()
    file.add(ROW, {})
    found = [(each.model, each.gpu, each.batch) for each in read_measurements(path)]
    assert found == [("m", "H100", 8), ("m", "H100", 16), ("n", "A100", 8), ("n", "A100", 16), ("m", "A100", 8)]
    assert list(TableFile(path, "m", "A100", "measured", "new").known().values()) == [5.0]


def test_what_was_measured_in_one_way_is_not_gone_on_with_in_another(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    TableFile(path, "m", "A100", "measured").add(ROW, {"runs": 9})
    with pytest.raises(LatencyTableError, match="that are measured, not sm-shares: name another --out"):
        TableFile(path, "m", "A100", "sm-shares")
    shares = TableFile(path, "m", "H100", "sm-shares")
    shares.finish([Measurement("m", "1g.10gb", 1, 8, 1, 5.0, None, "H100", "predicted from sm-shares")], {})
    with pytest.raises(LatencyTableError, match="that are sm-shares, not measured"):
        TableFile(path, "m", "H100", "measured")
    assert not shares.known()
    shares.finish([], {})
    assert [each.gpu for each in read_measurements(path)] == ["A100"]


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("what,ever")
    with pytest.raises(LatencyTableError, match="not written by migserve profile"):
        TableFile(path, "m", "A100", "measured")
    assert path.read_text() == "what,ever"
    path.write_bytes(b"\x89PNG")
    for foreign in (path, Path("/dev/zero")):
        with pytest.raises(LatencyTableError, match="not written by migserve profile"):
            TableFile(foreign, "m", "A100", "measured")
