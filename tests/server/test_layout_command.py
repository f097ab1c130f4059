"""`migserve layout`: GPUs shown, cut, checked and exported, on simulated ones that live on in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from partitioner.simulated_nvml import SimulatedNvml, parse_gpus
from server.__main__ import app

Run = Callable[..., Result]


@pytest.fixture
def layout(tmp_path: Path) -> Run:
    """`migserve layout ...` on an A100 and an H100."""

    def run(*arguments: str, gpus: str = "sim:A100-80GB,H100-80GB") -> Result:
        machine = ["--gpu", gpus, "--simulation-state", str(tmp_path / "gpus.json")]
        return CliRunner().invoke(app, ["layout", *arguments, *machine])

    return run


def now(layout: Run) -> list[str]:
    return [gpu["layout"] for gpu in json.loads(layout("show", "--json").stdout)["gpus"]]


def test_every_gpu_or_one_is_cut(layout: Run) -> None:
    assert layout("apply", "7g.80gb").exit_code == 0
    assert now(layout) == ["7g.80gb", "7g.80gb"]
    done = layout("apply", "1=3g.40gb+4g.40gb")
    assert done.stdout.splitlines() == [
        "GPU 1: destroying 7g.80gb@0",
        "GPU 1: creating 4g.40gb@0",
        "GPU 1: creating 3g.40gb@4",
        "applied",
    ]
    assert now(layout) == ["7g.80gb", "4g.40gb+3g.40gb"]
    assert layout("apply", "1=3g.40gb+4g.40gb").stdout == "unchanged\n"


def test_a_dry_run_says_what_would_be_done_and_does_nothing(layout: Run) -> None:
    before = now(layout)
    shown = layout("apply", "0=4g.40gb+1g.10gb+1g.10gb+1g.10gb", "1=off", "--dry-run")
    assert shown.stdout.splitlines() == [
        "GPU 0: keeps 4g.40gb@0, 1g.10gb@6",
        "GPU 0: drain and destroy 2g.20gb@4; 5 GPCs serve on",
        "GPU 0: create and admit 1g.10gb@4, 1g.10gb@5",
        "GPU 1: switch MIG off, after destroying all",
    ]
    assert now(layout) == before


def test_what_is_exported_can_be_checked_and_applied(layout: Run, tmp_path: Path) -> None:
    layout("apply", "0=7g.80gb")
    file = tmp_path / "layouts.yaml"
    file.write_text(layout("export", "--name", "monday").stdout)
    assert "monday:" in file.read_text()
    assert layout("assert", "--file", str(file)).stdout == "as wished\n"
    layout("apply", "0=3g.40gb")
    different = layout("assert", "--file", str(file))
    assert (different.exit_code, different.stdout) == (1, "GPU 0: is 3g.40gb, should be 7g.80gb\n")
    assert layout("apply", "--file", str(file), "--config", "monday").exit_code == 0
    assert layout("assert", "--file", str(file)).exit_code == 0


def test_a_filter_may_name_the_board(layout: Run, tmp_path: Path) -> None:
    file = tmp_path / "layouts.yaml"
    entry = "{{device-filter: '{}', devices: all, mig-enabled: true, mig-devices: {{7g.80gb: 1}}}}"
    file.write_text(f"version: v1\nmig-configs: {{x: [{entry.format('0x20B210DE:0x147F10DE')}]}}")
    assert layout("apply", "--file", str(file)).exit_code == 0
    assert now(layout) == ["7g.80gb", "4g.40gb+2g.20gb+1g.10gb"]
    file.write_text(f"version: v1\nmig-configs: {{x: [{entry.format('0x20B210DE:0x146310DE')}]}}")
    assert "GPU 0: the wish says nothing of it" in layout("assert", "--file", str(file)).stdout


def test_mig_goes_off_and_on_where_that_needs_no_reset(layout: Run) -> None:
    assert layout("apply", "1=off").exit_code == 0
    assert now(layout)[1] == "MIG off"
    assert layout("apply", "1=7g.80gb").exit_code == 0
    assert now(layout)[1] == "7g.80gb"


def test_an_ampere_gpu_whose_mode_waits_for_a_reset_says_so(layout: Run) -> None:
    done = layout("apply", "0=off")
    assert done.exit_code == 1
    assert "MIG off is pending (RESET_REQUIRED): the GPU needs a reset: nvidia-smi --gpu-reset -i GPU-" in done.stderr
    assert layout("apply", "0=7g.80gb").exit_code == 0, "wanted on again"


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_layout_is_drawn_into_a_file(layout: Run, tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"layout.{suffix}"
    assert layout("show", "--out", str(picture)).exit_code == 0
    if suffix == "svg":
        assert picture.read_text().count(">4g.40gb<") == 2
    else:
        with Image.open(picture) as image:
            assert image.width > 800
    assert layout("show", "--out", str(tmp_path / "layout.gif")).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say what you wish"),
        (("7g.80gb", "--file", "x.yaml"), "say what you wish"),
        (("--file", "none.yaml"), "No such file"),
        (("5g.50gb",), "A100-80GB has no MIG profile '5g.50gb'; did you mean "),
        (("0=4g.40gb+4g.40gb",), "the layout takes 8 compute slices; A100-80GB has 7"),
        (("9=7g.80gb",), "there is no GPU '9'; there are 0, 1"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_touched(
    layout: Run, arguments: tuple[str, ...], message: str
) -> None:
    before = now(layout)
    done = layout("apply", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert now(layout) == before


def test_split_compute_instances_are_shown_and_are_no_layout(layout: Run, tmp_path: Path) -> None:
    sim = SimulatedNvml(parse_gpus("A100-80GB,H100-80GB", "empty"), state_file=tmp_path / "gpus.json")
    sim.nvmlInit()
    instance = sim.nvmlDeviceCreateGpuInstance(sim.nvmlDeviceGetHandleByIndex(0), 9)
    for _ in range(2):
        sim.nvmlGpuInstanceCreateComputeInstance(instance, 0)
    sim.nvmlShutdown()
    assert now(layout) == ["1c.3g.40gb+1c.3g.40gb", "MIG on, without slices"]
    different = layout("assert", "0=3g.40gb")
    assert different.exit_code == 1
    assert different.stdout.splitlines()[0] == "GPU 0: is 1c.3g.40gb+1c.3g.40gb, should be 3g.40gb"
    exported = layout("export")
    assert (exported.exit_code, exported.stdout) == (1, "")
    assert exported.stderr == "GPU 0 has split compute instances, which a layout file cannot say\n"


def test_a_file_of_other_gpus_is_no_layout_of_these(layout: Run) -> None:
    layout("show")
    other = layout("show", gpus="sim:H200-141GB")
    assert other.exit_code == 1
    assert "has other GPUs (A100-80GB, H100-80GB)" in other.stderr
