"""Pictures over HTTP: 640 x 480 JPEGs of 100 kB through decode, resize, crop, normalise and a small CNN, beside peers.

    python -m benchmarks.pictures                prints the table
    python -m benchmarks.pictures --write        also keeps it, in benchmarks/results/pictures.md

wrk (Debian) sends, on the same cores. The servers take turns, round by round ("idle": what of a core each uses when
nothing is asked of it); one that uses much then is stopped (SIGSTOP) while others are measured, to whom it would be
missing. Peers that are not installed (make peers), or that fail, are left out, and said so. Each runs the same exported
CNN on what torchvision's evaluation transform makes of a Pillow image, in two processes or more where it has such, and
in batches where it has those. The daemon has one slice, so one worker, and the pool of its defaults.

Beside the best server, and beside a plain FastAPI endpoint, which has neither batches nor a process of its own for the
model: by the ratios of each round, so that a slow moment of the machine counts for both; and by processor time, which
what else runs on the machine falsifies less.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.overhead import TICKS_PER_SECOND, found, microseconds
from benchmarks.peers import PEERS, Post, is_there, raw, started
from benchmarks.preprocess import SIZES, photograph
from tests.harness import running

RESULTS = Path(__file__).parent / "results" / "pictures.md"
CONNECTIONS = (8, 64)
IDLE_S = 5.0
# Cores.
MOST_IDLE = 0.05
MOST_SETTLED = 0.4  # no less than what LitServe takes when nothing is asked of it
SETTLING_S = 0.1
MOST_SETTLING_S = 5.0
ENDPOINT = "fastapi"


class Small(nn.Module):
    """A CNN of 30 million multiplications."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 7, 4, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.last = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.last(self.layers(x).flatten(1)).softmax(1)}


def make_model(folder: Path) -> Path:
    torch.manual_seed(0)
    (folder / "small" / "1").mkdir(parents=True)
    batch = torch.export.Dim("batch", min=1, max=32)
    program = torch.export.export(Small().eval(), (torch.zeros(2, 3, 224, 224),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "small" / "1" / "model.pt2")
    (folder / "small" / "serving.yaml").write_text(
        "preprocess: {input: image, output: x, image: {preset: imagenet-eval}}\n"
    )
    return folder / "small" / "1" / "model.pt2"


class Window(NamedTuple):
    """`cpu_ms`: processor time of all of the server's processes for a picture; what else runs weighs little in it."""

    per_s: float
    p99_ms: float
    cpu_ms: float


def tree(root: int) -> dict[int, int]:
    """A process and all that it has started: their processor time in ticks, of those included that have ended."""
    parents, own = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                parents[int(entry.name)], own[int(entry.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: own.get(pid, 0) for pid in found}


def cpu_of_tree_s(root: int) -> float:
    return sum(tree(root).values()) / TICKS_PER_SECOND


@contextmanager
def stopped(sides: Sequence[Side]) -> Iterator[None]:
    """These are, meanwhile."""
    pids = [pid for side in sides for pid in tree(side.pid)]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


class Side(NamedTuple):
    """A server, and what wrk sends to it."""

    name: str
    url: str
    pid: int
    script: str


class FailedError(Exception):
    """Not every request was answered."""


Seen = dict[tuple[str, int], list[Window]]


def load(side: Side, connections: int, seconds: int) -> Window:
    """One window of wrk."""
    before_s = cpu_of_tree_s(side.pid)
    options = [f"-c{connections}", f"-d{seconds}", "--latency", "--timeout", "20", "-s", side.script]
    command = ["wrk", "-t1", *options, side.url]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after_s = cpu_of_tree_s(side.pid)
    settle(side.pid)
    if "Non-2xx" in output or "Socket errors" in output:
        lines = [line.strip() for line in output.splitlines() if "Non-2xx" in line or "Socket errors" in line]
        raise FailedError("; ".join(lines))
    pictures = int(found(r"(\d+) requests in", output))
    if not pictures:
        raise FailedError(f"no answer in {seconds} s")
    return Window(
        float(found(r"Requests/sec:\s+([\d.]+)", output)),
        microseconds(found(r"\s99%\s+(\S+)", output)) / 1e3,
        1e3 * (after_s - before_s) / pictures,
    )


def settle(root: int) -> None:
    """Waits until what wrk has left behind, a request a connection, is done: who comes next would have less of the
    cores.
    """
    now_s = cpu_of_tree_s(root)
    for _ in range(int(MOST_SETTLING_S / SETTLING_S)):
        time.sleep(SETTLING_S)
        before_s, now_s = now_s, cpu_of_tree_s(root)
        if now_s - before_s < MOST_SETTLED * SETTLING_S:
            return


def main(
    write: Annotated[bool, typer.Option("--write", help="Keep the table.")] = False,
    rounds: Annotated[int, typer.Option(help="Of each cell.")] = 5,
    seconds: Annotated[int, typer.Option(help="Of one cell in a round.")] = 4,
) -> None:
    """Measures, and prints the table."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is missing; install it with: sudo make system-tools")
    picture = photograph(640, 480, SIZES[640, 480])
    loaded = os.getloadavg()[2]
    missing = [name for name in PEERS if not is_there(name)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        model = make_model(Path(folder))
        flags = ("--model-repository", folder, "--layout", "7g.80gb", "--drain-delay-secs", "0")
        sides = []
        for name, more in (("migserve", ()), ("migserve, threads", ("--no-isolate-decoders",))):
            daemon = servers.enter_context(running(*flags, *more))
            url = f"http://{daemon.http}/v2/models/small/infer"
            sides.append(Side(name, url, daemon.process.pid, script(folder, name, raw(picture))))
        failed: dict[str, str] = {}
        for name in [each for each in PEERS if each not in missing]:
            try:
                peer = servers.enter_context(started(name, model, picture))
            except AssertionError as error:
                failed[name] = f"{error} (python -m benchmarks.peer_{name} says why; make peers, in the Makefile, too)"
                continue
            sides.append(Side(name, peer.url, peer.pid, script(folder, name, PEERS[name].post(picture))))
        idle = idle_cores(sides)
        busy = [side for side in sides if idle[side.name] > MOST_IDLE]
        seen = measure(sides, busy, rounds, seconds, failed)
    console = Console(record=True, width=110)
    console.print(f"{os.cpu_count()} cores, wrk on the same; {rounds} rounds of {seconds} s; medians")
    console.print(f"load average of 15 min before: {loaded:.1f}: what is more than 0 was other work on these cores")
    console.print(table(seen, idle))
    for connections in CONNECTIONS:
        console.print(verdict(seen, connections))
    for name, why in failed.items():
        console.print(f"{name} failed, and was left out: {why}")
    if missing:
        console.print(f"not installed, so left out: {', '.join(missing)} (make peers)")
    if write:
        command = f"python -m benchmarks.pictures --rounds {rounds} --seconds {seconds}"
        RESULTS.write_text(
            f"# Pictures over HTTP\n\n`{command}`, {time.strftime('%Y-%m-%d')}\n\n```\n{console.export_text()}```\n"
        )


def idle_cores(sides: list[Side]) -> dict[str, float]:
    """Of each, while nothing is asked of any."""
    before = [cpu_of_tree_s(side.pid) for side in sides]
    time.sleep(IDLE_S)
    return {side.name: (cpu_of_tree_s(side.pid) - then) / IDLE_S for side, then in zip(sides, before, strict=True)}


def measure(sides: list[Side], busy: list[Side], rounds: int, seconds: int, failed: dict[str, str]) -> Seen:
    """All windows. `busy`: sides that are so when nothing is asked of them. Puts into `failed` which fails, and how."""
    seen: Seen = {}
    for round_number in range(rounds + 1):
        for connections in CONNECTIONS:
            for side in sides:
                if side.name in failed:
                    continue
                try:
                    with stopped([each for each in busy if each is not side]):
                        measured = load(side, connections, seconds if round_number else 1)
                except FailedError as error:
                    failed[side.name] = f"at {connections} connections: {error}"
                    continue
                if round_number:  # the first one warms up
                    seen.setdefault((side.name, connections), []).append(measured)
    return {key: windows for key, windows in seen.items() if key[0] not in failed}


def script(folder: str, name: str, post: Post) -> str:
    """For wrk."""
    body = "".join(f"\\{byte:03d}" for byte in post.body)
    headers = "".join(f'wrk.headers["{key}"] = "{value}"\n' for key, value in post.headers.items())
    path = Path(folder) / f"{name.replace(', ', '-')}.lua"
    path.write_text(f'wrk.method = "POST"\n{headers}wrk.body = "{body}"\n')
    return str(path)


def verdict(seen: Seen, connections: int) -> str:
    """How many times the best server, and how many times a plain endpoint."""
    there = [name for name in PEERS if (name, connections) in seen]
    if not there:
        return f"{connections} connections: no peer to compare with"
    servers = [name for name in there if name != ENDPOINT]
    said = []
    if servers:
        best = max(servers, key=lambda name: statistics.median(window.per_s for window in seen[name, connections]))
        said.append(f"{best}, the best server: {beside(seen, connections, best)}")
    if ENDPOINT in there:
        said.append(f"{ENDPOINT}, a plain endpoint: {beside(seen, connections, ENDPOINT)}")
    return f"{connections} connections, migserve beside " + "; beside ".join(said)


def beside(seen: Seen, connections: int, peer: str) -> str:
    """By the median of the ratios of all rounds, and by processor time."""
    ours, theirs = seen["migserve", connections], seen[peer, connections]
    ratios = sorted(our.per_s / their.per_s for our, their in zip(ours, theirs, strict=True))
    cpu = statistics.median(window.cpu_ms for window in theirs) / statistics.median(window.cpu_ms for window in ours)
    return (
        f"{statistics.median(ratios):.2f} times its pictures a second ({ratios[0]:.2f} to {ratios[-1]:.2f} in "
        f"{len(ratios)} rounds), {cpu:.2f} times with a second of a core"
    )


def table(seen: Seen, idle: dict[str, float]) -> Table:
    made = Table(title="640 x 480 JPEGs of 100 kB through preprocessing and a small CNN")
    for column in ("server", "connections", "pictures/s", "p99 ms", "CPU ms a picture", "idle, cores"):
        made.add_column(column, justify="left" if column == "server" else "right")
    for (name, connections), windows in sorted(seen.items(), key=lambda entry: entry[0][1]):
        rate, p99_ms, cpu_ms = (statistics.median(column) for column in zip(*windows, strict=True))
        made.add_row(name, str(connections), f"{rate:.0f}", f"{p99_ms:.0f}", f"{cpu_ms:.2f}", f"{idle[name]:.2f}")
    return made


if __name__ == "__main__":
    typer.run(main)
