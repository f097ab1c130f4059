"""The real daemon, as tests run it: a process of its own, on ports of its own, told about by its own log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
# The tests' own: what a user puts into models/ is none of their business.
MODELS = REPOSITORY / "build" / "demo-models"
START_SECONDS = 90.0


class RunningDaemon:
    """One `migserve serve`. `log` holds its log lines, parsed, as they come."""

    def __init__(self, flags: tuple[str, ...]) -> None:
        command = [sys.executable, "-m", "server", "serve", "--log-format", "json"]
        for name in ("http", "grpc", "metrics", "admin"):
            if f"--{name}-port" not in flags:
                command += [f"--{name}-port", "0"]
        if "--gpu" not in flags:
            command += ["--gpu", "sim:A100-80GB"]
        if "--model-repository" not in flags:
            command += ["--model-repository", str(MODELS)]
        self._state = tempfile.TemporaryDirectory(prefix="migserve-test-")
        if "--state-dir" not in flags:
            command += ["--state-dir", self._state.name]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MIGSERVE_")}
        self.process = subprocess.Popen(
            [*command, *flags],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.log: list[dict[str, Any]] = []
        self.text: list[str] = []
        self._ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.text.append(line)
                if line.startswith("{"):
                    self.log.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def events(self, name: str, **fields: Any) -> list[dict[str, Any]]:
        """Log lines of one event whose fields are these."""
        wanted = {"event": name, **fields}
        return [line for line in list(self.log) if wanted.items() <= line.items()]

    def wait_for(self, name: str, count: int = 1, seconds: float = START_SECONDS, **fields: Any) -> dict[str, Any]:
        """The `count`-th such log line, once there is one. Fails with the whole log if the daemon ends before."""

        def enough() -> bool:
            return len(self.events(name, **fields)) >= count or self._ended

        with self._changed:
            self._changed.wait_for(enough, seconds)
        found = self.events(name, **fields)
        assert len(found) >= count, f"the daemon has not said {name!r} {fields}:\n{''.join(self.text)}"
        return found[count - 1]

    def _port(self, protocol: str) -> int:
        return int(self.wait_for("serving")[f"{protocol}_port"])

    @property
    def http(self) -> str:
        """host:port, as tritonclient wants it."""
        return f"127.0.0.1:{self._port('http')}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self._port('grpc')}"

    @property
    def metrics(self) -> str:
        return f"127.0.0.1:{self._port('metrics')}"

    @property
    def admin(self) -> str:
        return f"127.0.0.1:{self._port('admin')}"

    @property
    def admin_token(self) -> str:
        return (Path(self._state.name) / "admin-token").read_text()

    def workers(self) -> dict[str, int]:
        """Process ids of the workers that came up last, by name."""
        return {line["worker"]: line["pid"] for line in self.events("worker up")}

    def kill_worker(self, name: str) -> None:
        os.kill(self.workers()[name], signal.SIGKILL)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = 30.0) -> int:
        """The exit code."""
        code = self.process.wait(seconds)
        self._reader.join(5.0)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._state.cleanup()
        return code


@contextmanager
def running(*flags: str, ready: bool = True) -> Iterator[RunningDaemon]:
    """A daemon that serves, and is gone afterwards."""
    daemon = RunningDaemon(flags)
    try:
        if ready:
            daemon.wait_for("serving")
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.process.kill()
        daemon.wait()


def ended(pid: int) -> bool:
    """Also of a process that nobody has waited for yet, where that is left to an init that does not do it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """Polls until `condition` gives something true, which is returned."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        pause.wait(0.02)
    return result
