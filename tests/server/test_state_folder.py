"""Who has the state folder, over processes that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from server.gpus import StartError
from server.settings import Settings
from server.state_folder import hold
from tests.harness import REPOSITORY, ended

# Holds it as a daemon does, with a process of the fork server's and one of its own, until it is killed.
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from scheduler import spawn
from server.state_folder import hold

if __name__ == "__main__":
    spawn.leave_torch_out()
    hold(Path(sys.argv[1]))
    own = subprocess.Popen(["sleep", "60"])
    print(own.pid, spawn.start_other(time.sleep, 60).pid, flush=True)
    time.sleep(60)
"""


def test_it_has_one_daemon_and_is_free_at_once_where_that_is_killed_though_its_workers_live(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        left = [int(pid) for pid in holder.stdout.readline().split()]
        try:
            taken = f"{folder} is in use by process {holder.pid}, a daemon too; --state-dir names another one"
            with pytest.raises(StartError, match=taken):
                hold(folder, 0.0)
            holder.kill()
            holder.wait()
            lock = hold(folder, 0.0)
            assert lock is not None
            assert [ended(pid) for pid in left] == [False, False]
            assert (folder / "lock").read_text() == str(os.getpid())
            os.close(lock)
        finally:
            holder.kill()
            for pid in left:
                os.kill(pid, signal.SIGKILL)


def test_one_that_is_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "state"):
        with pytest.raises(StartError, match=f"cannot be {folder}: {file} is not a folder; --state-dir names another"):
            hold(folder)


def test_one_that_cannot_be_written_keeps_nobody_from_serving() -> None:
    with capture_logs() as logs:
        assert hold(Path("/proc/state")) is None
    assert [line["event"] for line in logs] == ["the state folder cannot be written"]


@pytest.mark.parametrize(
    ("given", "home", "wanted"),
    [
        (None, None, "/home/me/.local/state/migserve"),
        (None, "/xdg", "/xdg/migserve"),
        (None, "relative", "/home/me/.local/state/migserve"),
        (None, "", "/home/me/.local/state/migserve"),
        ("~/mine", "/xdg", "/home/me/mine"),
    ],
)
def test_where_it_is(given: str | None, home: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("XDG_STATE_HOME", home)
    assert Settings(state_dir=given and Path(given)).state_folder == Path(wanted)
