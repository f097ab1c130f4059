"""How far a long verb is, where there is no terminal."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from rich.progress import BarColumn
from typer.testing import CliRunner

from server import progress
from server.__main__ import app
from server.progress import Far, clock, line, pause_s
from tests.harness import until

MODELS = Path("build/demo-models")


def test_lines_are_ten_seconds_apart_then_a_tenth_of_the_time_then_five_minutes() -> None:
    assert [pause_s(elapsed_s) for elapsed_s in (0.0, 99.0, 600.0, 86400.0)] == [10.0, 10.0, 60.0, 300.0]
    elapsed_s, said = 0.0, 0
    while elapsed_s < 8 * 3600:
        elapsed_s += pause_s(elapsed_s)
        said += 1
    assert said < 150, "a night of it does not fill a log"


@pytest.mark.parametrize(
    ("far", "said"),
    [
        (Far("1g.10gb: 1 x 8", 3, 12, 20.4, 61.0), "1g.10gb: 1 x 8: 3 of 12, 0:20 so far, about 1:01 left"),
        (Far("a1", 5, 9, 3605, None, "2/s on 3 slices"), "a1: 5 of 9, 2/s on 3 slices, 1:00:05 so far"),
        (Far("planning: [exact]", 0, None, 10, None), "planning: [exact], 0:10 so far"),
    ],
)
def test_what_a_line_says(far: Far, said: str) -> None:
    assert line(far) == said


def test_minutes_and_hours() -> None:
    assert [clock(seconds) for seconds in (0.4, 59.6, 3599, 36000)] == ["0:00", "1:00", "59:59", "10:00:00"]


def test_lines_come_while_nothing_comes_back_and_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "OFTEN_S", 0.001)
    told = threading.Semaphore(0)
    with progress.lines(told.release):
        assert told.acquire(timeout=30)
        assert told.acquire(timeout=30)
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_bar_is_lines_with_what_it_knows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "OFTEN_S", 0.001)
    said: list[str] = []

    def heard() -> bool:
        said.append(capsys.readouterr().err)
        return "job 7: 2 of 3, paused: a[b], 0:00 so far" in "".join(said)

    with progress.bar(BarColumn()) as bar:
        bar.update(bar.add_task("job 7", total=3, note="paused: a[b]"), completed=2)
        until(heard, "a line is said", seconds=30)


def test_what_ends_soon_says_nothing_or_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    for transient, expected in ((True, ""), (False, "job: 3 of 3, 0:00 so far\n")):
        with progress.bar(BarColumn(), transient=transient) as bar:
            bar.update(bar.add_task("job", total=3), completed=3)
        assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["simulate", "--queries", "20000", "--json"], "0 of 1, "),
        (["plan", "--scenario", "S3", "--exclusive", "--json"], "planning"),
        (["profile", "resnet50", "--model-repository", str(MODELS), "--slices", "1g.10gb", "--batches", "1,2",
          "--seconds", "0.1", "--out", "OUT"], "1g.10gb: 1 x 1: 0 of 2, "),
    ],
)  # fmt: skip
def test_long_verbs_say_how_far_they_are(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(progress, "OFTEN_S", 0.02)
    arguments = [str(tmp_path / "out.csv") if each == "OUT" else each for each in arguments]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert expected in result.stderr
    assert " so far" in result.stderr
    assert " so far" not in result.stdout
