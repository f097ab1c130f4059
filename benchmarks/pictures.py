"""Pictures over HTTP: 640 x 480 JPEGs of 100 kB through decode, resize, crop, normalise and a small CNN, beside peers.

    python -m benchmarks.pictures                prints the table
    python -m benchmarks.pictures --write        also keeps it, in benchmarks/results/pictures.md

wrk (Debian) sends, on the same cores. All servers are up at once, and take turns; those that are not installed are left
out: pip install mosec. The daemon has one slice, so one worker, and the pool of its defaults.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.overhead import TICKS_PER_SECOND, found, microseconds
from benchmarks.preprocess import SIZES, photograph
from tests.harness import running, until

RESULTS = Path(__file__).parent / "results" / "pictures.md"
CONNECTIONS = (8, 64)
PEERS = ("fastapi", "mosec")


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


@contextmanager
def peer(name: str, model: Path) -> Iterator[tuple[str, int]]:
    """Its URL, once it answers, and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", f"benchmarks.peer_{name}", str(port), str(model)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    url = f"http://127.0.0.1:{port}/" + ("inference" if name == "mosec" else "")
    try:
        until(lambda: answers(url), f"{name} answers", 30)
        yield url, process.pid
    finally:
        os.killpg(process.pid, 15)
        process.wait(20)


def answers(url: str) -> bool:
    request = urllib.request.Request(url, data=photograph(640, 480, 88), method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


class Window(NamedTuple):
    """`cpu_ms`: processor time of all of the server's processes for a picture; what else runs weighs little in it."""

    per_s: float
    p99_ms: float
    cpu_ms: float


def cpu_of_tree_s(root: int) -> float:
    """Of a process and all that it has started, those included that have ended and were waited for."""
    parents, own = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                parents[int(entry.name)], own[int(entry.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return sum(own.get(pid, 0) for pid in tree) / TICKS_PER_SECOND


def load(url: str, pid: int, script: str, connections: int, seconds: int) -> Window:
    """One window of wrk."""
    before_s = cpu_of_tree_s(pid)
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--latency", "--timeout", "20", "-s", script, url]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in output or "Socket errors" in output:
        raise SystemExit(f"{url}: some requests failed:\n{output}")
    pictures = int(found(r"(\d+) requests in", output))
    return Window(
        float(found(r"Requests/sec:\s+([\d.]+)", output)),
        microseconds(found(r"\s99%\s+(\S+)", output)) / 1e3,
        1e3 * (cpu_of_tree_s(pid) - before_s) / pictures,
    )


def main(
    write: Annotated[bool, typer.Option("--write", help="Keep the table.")] = False,
    rounds: Annotated[int, typer.Option(help="Of each cell.")] = 5,
    seconds: Annotated[int, typer.Option(help="Of one cell in a round.")] = 4,
) -> None:
    """Measures, and prints the table."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is missing; install it with: sudo make system-tools")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        model = make_model(Path(folder))
        script = Path(folder) / "post.lua"
        body = "".join(f"\\{byte:03d}" for byte in photograph(640, 480, SIZES[640, 480]))
        script.write_text(f'wrk.method = "POST"\nwrk.body = "{body}"\n')
        flags = ("--model-repository", folder, "--layout", "7g.80gb", "--drain-delay-secs", "0")
        urls = {}
        for name, more in (("migserve", ()), ("migserve, threads", ("--no-isolate-decoders",))):
            daemon = servers.enter_context(running(*flags, *more))
            urls[name] = f"http://{daemon.http}/v2/models/small/infer", daemon.process.pid
        for name in PEERS:
            if find_spec(name) is not None:
                urls[name] = servers.enter_context(peer(name, model))
        seen: dict[tuple[str, int], list[Window]] = {}
        for round_number in range(rounds + 1):
            for connections in CONNECTIONS:
                for name, (url, pid) in urls.items():
                    measured = load(url, pid, str(script), connections, seconds if round_number else 1)
                    if round_number:  # the first one warms up
                        seen.setdefault((name, connections), []).append(measured)
    console = Console(record=True, width=100)
    console.print(f"{os.cpu_count()} cores, wrk on the same; {rounds} rounds of {seconds} s; medians")
    console.print(table(seen))
    if write:
        RESULTS.write_text(
            f"# Pictures over HTTP\n\n`python -m benchmarks.pictures`\n\n```\n{console.export_text()}```\n"
        )


def table(seen: dict[tuple[str, int], list[Window]]) -> Table:
    made = Table(title="640 x 480 JPEGs of 100 kB through preprocessing and a small CNN")
    for column in ("server", "connections", "pictures/s", "p99 ms", "CPU ms a picture"):
        made.add_column(column, justify="left" if column == "server" else "right")
    for (name, connections), windows in sorted(seen.items(), key=lambda entry: entry[0][1]):
        rate, p99_ms, cpu_ms = (statistics.median(column) for column in zip(*windows, strict=True))
        made.add_row(name, str(connections), f"{rate:.0f}", f"{p99_ms:.0f}", f"{cpu_ms:.2f}")
    return made


if __name__ == "__main__":
    typer.run(main)
