"""Batch jobs in a real daemon on the CPU: killed in the middle, and with a million items.

    python -m benchmarks.jobs_real             prints what came out; exit code 1 where a goal is missed
    python -m benchmarks.jobs_real --write     also keeps it, in benchmarks/results/jobs_real.md

Killed: pictures of handwritten digits, 320 x 320 pixels, for the demo model `digits` on a simulated A100 cut 4g+2g+1g.
Each worker in turn, and then the daemon, gets a kill -9, at a fifth, two, three and four fifths of the items;
the daemon is started again. The answers are compared with those of the model's file alone. A million: lines of 16
numbers for the demo model `affine`, sent as they are made; the daemon's memory is VmRSS of its process, which includes
the shared memory that it has touched.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from tests.harness import RunningDaemon, running, until
from tests.system.test_jobs import JOBS, ask, digits_offline, lines_of_digits, results, show

RESULTS = Path(__file__).parent / "results" / "jobs_real.md"
KILLED_ITEMS, MANY_ITEMS = 20_000, 1_000_000
MOST_MIB = 200
SIZE = 40
FLAGS = ("--drain-delay-secs", "0")


@dataclass(frozen=True, slots=True)
class Killed:
    """`right`: items whose label and scores are those of the model's file alone."""

    items: int
    kills: int
    seconds: float
    right: int
    once: bool


@dataclass(frozen=True, slots=True)
class Many:
    """Memory in MiB."""

    items: int
    seconds: float
    idle_mib: float
    most_mib: float
    right: bool


def killed(count: int, say: Console) -> Killed:
    body, images = lines_of_digits(count, SIZE)
    kills = 0
    with tempfile.TemporaryDirectory() as folder:
        flags = (*FLAGS, "--state-dir", folder)
        begin = time.monotonic()
        with running(*flags) as daemon:
            # Late from the beginning on, so that it holds every slice.
            job = ask(daemon, "POST", f"{JOBS}?model=digits&deadline=0.1s", body)["id"]
            workers = list(daemon.workers())
            for part, worker in enumerate(workers, start=1):
                _until_done(daemon, job, part * count // (len(workers) + 2))
                daemon.kill_worker(worker)
                kills += 1
                say.print(f"killed {worker} at {show(daemon, job)['done']} items")
            _until_done(daemon, job, (len(workers) + 1) * count // (len(workers) + 2))
            found = show(daemon, job)
            assert found["state"] == "running", "the daemon is to be killed while the job runs"
            os.kill(daemon.process.pid, signal.SIGKILL)
            daemon.process.wait()
            kills += 1
            say.print(f"killed the daemon at {found['done']} items")
        with running(*flags) as daemon:
            until(lambda: show(daemon, job)["state"] == "done", "it is done", 600)
            seconds = time.monotonic() - begin
            rows = results(daemon, job)
    labels, scores = digits_offline(images)
    right = sum(
        row["outputs"]["label"] == label and np.allclose(row["outputs"]["scores"], wanted, atol=1e-5)
        for row, label, wanted in zip(rows, labels, scores, strict=True)
    )
    return Killed(count, kills, seconds, int(right), [row["item"] for row in rows] == list(range(count)))


def _until_done(daemon: RunningDaemon, job: str, items: int) -> None:
    until(lambda: show(daemon, job)["done"] >= items, f"{items} items are done", 300)


class Memory:
    """VmRSS of a process, looked at twenty times a second."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self.most_mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def now_mib(self) -> float:
        line = next(line for line in self._status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.most_mib = max(self.most_mib, self.now_mib())

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def lines(count: int) -> Iterator[bytes]:
    """Item n is n, n + 1, ..., n + 15; a thousand lines at a time."""
    for begin in range(0, count, 1000):
        numbers = range(begin, min(begin + 1000, count))
        yield b"".join(b"%s\n" % json.dumps(list(range(n, n + 16))).encode() for n in numbers)


def many(count: int, say: Console) -> Many:
    with running(*FLAGS) as daemon:
        ask(daemon, "GET", "/v2/models/affine")
        memory = Memory(daemon.process.pid)
        idle = memory.now_mib()
        begin = time.monotonic()
        with memory:
            job = _sent(daemon, count)
            say.print(
                f"sent after {time.monotonic() - begin:.0f} s; most so far {memory.most_mib - idle:.0f} MiB above idle"
            )
            until(lambda: show(daemon, job)["state"] not in ("running", "paused"), "it is done", 900)
            seconds = time.monotonic() - begin
            found = show(daemon, job)
            right = (found["state"], found["errors"]) == ("done", 0) and _right(daemon, job, count)
        return Many(count, seconds, idle, memory.most_mib, right)


def _sent(daemon: RunningDaemon, count: int) -> str:
    connection = http.client.HTTPConnection(daemon.http, timeout=300)
    connection.request("POST", f"{JOBS}?model=affine", lines(count))
    job: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return str(job["id"])


def _right(daemon: RunningDaemon, job: str, count: int) -> bool:
    """Every line in its place, y = 2 x + 1; as it comes."""
    connection = http.client.HTTPConnection(daemon.http, timeout=300)
    connection.request("GET", f"{JOBS}/{job}/results")
    response = connection.getresponse()
    for item in range(count):
        row = json.loads(response.readline())
        if row != {"item": item, "outputs": {"y": [2.0 * n + 1 for n in range(item, item + 16)]}}:
            return False
    return response.readline() == b""


def text(first: Killed, second: Many) -> str:
    about = "\n\n".join((__doc__ or "").split("\n\n")[2:]).strip()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    return f"""# Batch jobs in a real daemon

{about} Machine: {machine}, shared with others.

| | |
| --- | --- |
| items of the job that was killed | {first.items} |
| kill -9 | {first.kills}: every worker in turn, then the daemon |
| each result exactly once, in order | {"yes" if first.once else "NO"} |
| equal to the offline answers | {first.right} of {first.items} |
| from the first start to the end | {first.seconds:.0f} s |
| items of the large job | {second.items} |
| all right | {"yes" if second.right else "NO"} |
| seconds, with sending | {second.seconds:.0f} ({second.items / second.seconds:.0f} items a second) |
| memory, idle | {second.idle_mib:.0f} MiB |
| memory, most | {second.most_mib:.0f} MiB: {second.most_mib - second.idle_mib:.0f} above idle (at most {MOST_MIB}) |
"""


def main(
    killed_items: int = KILLED_ITEMS,
    many_items: int = MANY_ITEMS,
    write: Annotated[bool, typer.Option("--write", help="Keep it in benchmarks/results/jobs_real.md.")] = False,
) -> None:
    """Exit code 1 where a goal is missed."""
    say = Console(stderr=True, highlight=False)
    first = killed(killed_items, say)
    second = many(many_items, say)
    page = text(first, second)
    print(page)
    if write:
        RESULTS.write_text(page)
    if not (first.once and first.right == first.items and second.right):
        raise typer.Exit(1)
    if second.most_mib - second.idle_mib > MOST_MIB:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
