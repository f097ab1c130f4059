"""What a request costs: the daemon beside a bare uvicorn echo, in one run, interleaved, medians of several rounds.

    make bench-overhead                     prints the table
    make bench-overhead ARGS="--write"      also keeps it, in benchmarks/results/overhead.md

wrk (Debian) is the client, on the same machine. The daemon runs with metrics, deadlines and cancellation on, as always;
`deadlines` cells send a deadline_ms with each request. One slice, so one worker: more workers than cores only disturb.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.breakdown import Part, breakdown
from tests.harness import running

RESULTS = Path(__file__).parent / "results" / "overhead.md"
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass
class Cell:
    """One thing that is measured: a request, and how many connections send it."""

    name: str
    path: str
    body: bytes
    headers: dict[str, str]
    connections: int
    rates: list[float] = field(default_factory=list)
    p50s_us: list[float] = field(default_factory=list)
    p99s_us: list[float] = field(default_factory=list)
    server_us: list[float] = field(default_factory=list)  # CPU time a request, of the daemon or the echo
    worker_us: list[float] = field(default_factory=list)


def cells() -> list[Cell]:
    """The echo answers the same bytes as the cell after it."""
    affine = json_body(16)
    mlp = json_body(256)
    x = np.ones((1, 256), np.float32)
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 256], "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    binary = {"Inference-Header-Content-Length": str(len(head))}
    deadline = json_body(16, deadline_ms=10_000)
    return [
        Cell("echo", "/", affine, {}, 1),
        Cell("affine JSON", "/v2/models/affine/infer", affine, {}, 1),
        Cell("echo", "/", affine, {}, 64),
        Cell("affine JSON", "/v2/models/affine/infer", affine, {}, 64),
        Cell("affine JSON, deadlines", "/v2/models/affine/infer", deadline, {}, 64),
        Cell("mlp JSON", "/v2/models/mlp/infer", mlp, {}, 64),
        Cell("mlp binary", "/v2/models/mlp/infer", head + x.tobytes(), binary, 64),
    ]


def json_body(width: int, **parameters: float) -> bytes:
    values = [round(0.1 + number / width, 6) for number in range(width)]
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, width], "data": values}]}
    return json.dumps(body | ({"parameters": parameters} if parameters else {})).encode()


@contextmanager
def echo() -> Iterator[tuple[int, int]]:
    """Process id and port of a running echo."""
    with subprocess.Popen([sys.executable, "-m", "benchmarks.echo"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.pid, int(process.stdout.readline())
        finally:
            process.terminate()


def measure(cell: Cell, address: str, seconds: int, server: int, workers: list[int]) -> None:
    """One run of wrk; adds to the cell's figures. Any answer but 200 ends the benchmark."""
    before = cpu_seconds(server), sum(map(cpu_seconds, workers))
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(lua(cell))
        script.flush()
        command = ["wrk", "-t1", f"-c{cell.connections}", f"-d{seconds}", "--latency", "-s", script.name]
        output = subprocess.run(
            [*command, f"http://{address}{cell.path}"], capture_output=True, text=True, check=True
        ).stdout
    if "Non-2xx" in output or "Socket errors" in output:
        raise SystemExit(f"{cell.name}: some requests failed:\n{output}")
    requests = int(found(r"(\d+) requests in", output))
    cell.rates.append(float(found(r"Requests/sec:\s+([\d.]+)", output)))
    cell.p50s_us.append(microseconds(found(r"\s50%\s+(\S+)", output)))
    cell.p99s_us.append(microseconds(found(r"\s99%\s+(\S+)", output)))
    cell.server_us.append(1e6 * (cpu_seconds(server) - before[0]) / requests)
    cell.worker_us.append(1e6 * (sum(map(cpu_seconds, workers)) - before[1]) / requests)


def lua(cell: Cell) -> str:
    body = "".join(f"\\{byte:03d}" for byte in cell.body)
    headers = "".join(f'wrk.headers["{name}"] = "{value}"\n' for name, value in cell.headers.items())
    return f'wrk.method = "POST"\n{headers}wrk.body = "{body}"\n'


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise SystemExit(f"wrk printed no {pattern!r}:\n{text}")
    return match[1]


def microseconds(text: str) -> float:
    """wrk's 92.00us, 1.05ms, 2.00s."""
    unit = text.lstrip("0123456789.")
    return float(text.removesuffix(unit)) * {"us": 1.0, "ms": 1e3, "s": 1e6}[unit]


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def private_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def cell_table(measured: list[Cell]) -> Table:
    table = Table(title="Requests/s and latency; CPU time a request; medians of the rounds")
    for column in (
        "request",
        "connections",
        "requests/s",
        "of echo",
        "p50 us",
        "of echo",
        "p99 us",
        "daemon us",
        "worker us",
    ):
        table.add_column(column, justify="left" if column == "request" else "right")
    echoes = {cell.connections: cell for cell in measured if cell.name == "echo"}
    for cell in measured:
        reference = echoes[cell.connections]
        rate, p50 = statistics.median(cell.rates), statistics.median(cell.p50s_us)
        # Round by round, side by side: what else the machine does then falls on both.
        rate_ratio = statistics.median(a / b for a, b in zip(cell.rates, reference.rates, strict=True))
        p50_ratio = statistics.median(a / b for a, b in zip(cell.p50s_us, reference.p50s_us, strict=True))
        own = cell is not reference
        table.add_row(
            cell.name,
            str(cell.connections),
            f"{rate:,.0f}",
            f"{rate_ratio:.2f}" if own else "",
            f"{p50:,.0f}",
            f"{p50_ratio:.2f}" if own else "",
            f"{statistics.median(cell.p99s_us):,.0f}",
            f"{statistics.median(cell.server_us):.1f}",
            f"{statistics.median(cell.worker_us):.1f}" if own else "",
        )
    return table


def part_table(parts: list[Part]) -> Table:
    table = Table(title="Where a request's microseconds go (affine JSON), each part by itself, warm, in one process")
    for column in ("part", "where", "us alone", "us in a batch of 32"):
        table.add_column(column, justify="right" if column.startswith("us") else "left")
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for part in parts:
        table.add_row(part.name, part.where, f"{part.alone_us:.1f}", f"{part.batched_us:.1f}")
        sums[part.process][0] += part.alone_us
        sums[part.process][1] += part.batched_us
    table.add_section()
    for process, (alone, batched) in sums.items():
        table.add_row(f"sum of the {process}", "", f"{alone:.1f}", f"{batched:.1f}")
    return table


def main(
    rounds: Annotated[int, typer.Option(help="How often each cell is measured.")] = 5,
    seconds: Annotated[int, typer.Option(help="Of each measurement.")] = 3,
    write: Annotated[bool, typer.Option("--write", help="Keep the tables in benchmarks/results/overhead.md.")] = False,
) -> None:
    """Measures, and prints the tables."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is missing; install it with: sudo make system-tools")
    measured = cells()
    with running("--layout", "7g.80gb") as daemon, echo() as (echo_pid, echo_port):
        workers = list(daemon.workers().values())
        for _ in track(range(rounds), description="measuring"):
            for cell in measured:
                if cell.name == "echo":
                    measure(cell, f"127.0.0.1:{echo_port}", seconds, echo_pid, [])
                else:
                    measure(cell, daemon.http, seconds, daemon.process.pid, workers)
        memory = [private_mib(pid) for pid in workers]
    cores = len(os.sched_getaffinity(0))
    machine = f"{cores} cores, {platform.processor() or platform.machine()}, Python {platform.python_version()}"
    console = Console(record=True, width=140)
    console.print(f"{machine}; {rounds} rounds of {seconds} s; one worker, wrk on the same cores")
    console.print(cell_table(measured))
    console.print(f"Private memory of the worker: {max(memory):.0f} MiB")
    console.print(part_table(breakdown()))
    console.print(
        "Not listed: sockets, waiting, waking the other process, and caches that went cold meanwhile. The echo's "
        "own column\nshows what those cost without us; a request that comes alone pays for them most."
    )
    if write:
        RESULTS.write_text(f"# Overhead of a request\n\n`make bench-overhead`\n\n```\n{console.export_text()}```\n")


if __name__ == "__main__":
    typer.run(main)
