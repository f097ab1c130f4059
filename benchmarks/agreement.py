"""The daemon beside the simulator: the same recorded queries through both, and how far their latencies are apart.

    python -m benchmarks.agreement              about four minutes
    python -m benchmarks.agreement --write      also keeps the table, in benchmarks/results/agreement.md

The daemon is a real one: HTTP, worker processes, shared memory. Its GPUs are simulated and its model is emulated, that
is, a worker sleeps for as long as the latency table says. The simulator gets the same table without noise. Queries are
sent at their recorded times, whatever comes back; a latency counts from the recorded time: a late sender shows.
What is expected to be late is refused, by both. Where the sender itself is late by many milliseconds, the machine is
too slow for the rate, and the figures say nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from scheduler import workload
from scheduler.policies.named import POLICIES
from scheduler.report import ModelReport
from scheduler.simulator import EXACT, simulate
from scheduler.workload import Arrival
from server.simulate_setup import Asked, Setup, prepare, read_trace
from tests.harness import running

RESULTS = Path(__file__).parent / "results" / "agreement.md"
CONFIG = """
backend: "emulated" max_batch_size: 64
input { name: "x" data_type: TYPE_FP32 dims: [1] }
output { name: "y" data_type: TYPE_FP32 dims: [1] }
"""
# Between the daemon's start and the first query: connections are made, caches are warm.
WARM_UP = 64
END_SECONDS = 30.0
WANTED = 0.10
LOADS = (0.6, 0.85)


@dataclass(slots=True)
class Sent:
    """What became of the queries. `lag_ms`: how much later than recorded each was written."""

    latencies_ms: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0
    lag_ms: list[float] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """One request at a time over HTTP/1.1; `reply` is its status."""

    def __init__(self) -> None:
        self.reply: asyncio.Future[int] | None = None
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[int]:
        self.reply = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.reply

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        end = received.find(b"\r\n\r\n")
        if end < 0 or self.reply is None:
            return
        head = bytes(received[:end]).lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        if len(received) >= end + 4 + length:
            del received[: end + 4 + length]
            self.reply.set_result(int(head.split()[1]))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.reply is not None and not self.reply.done():
            self.reply.set_result(0)


def request(host: str, model: str, items: int) -> bytes:
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [items, 1], "data": [1.0] * items}]})
    head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


async def drive(host: str, arrivals: Sequence[Arrival]) -> Sent:
    """Sends every query at its time, over as many connections as it takes; returns when each has ended."""
    loop = asyncio.get_running_loop()
    name, port = host.split(":")
    idle: list[Connection] = [(await loop.create_connection(Connection, name, int(port)))[1] for _ in range(WARM_UP)]
    await asyncio.gather(*(each.ask(request(host, arrivals[0].model, 1)) for each in idle))
    bodies = {(each.model, each.items): request(host, each.model, each.items) for each in arrivals}
    sent = Sent()
    start = time.monotonic() + 0.1

    async def ask(arrival: Arrival, due: float) -> None:
        connection = idle.pop() if idle else (await loop.create_connection(Connection, name, int(port)))[1]
        sent.lag_ms.append(1e3 * (time.monotonic() - due))
        status = await connection.ask(bodies[arrival.model, arrival.items])
        if status == 200:
            sent.latencies_ms.append(1e3 * (time.monotonic() - due))
        elif status == 429:
            sent.refused += 1
        else:
            sent.failed += 1
        if status:
            idle.append(connection)

    asking = []
    for arrival in arrivals:
        due = start + arrival.at_ns / 1e9
        delay = due - time.monotonic()
        if delay > 0:
            await asyncio.sleep(delay)
        asking.append(asyncio.create_task(ask(arrival, due)))
    async with asyncio.timeout(END_SECONDS):
        await asyncio.gather(*asking)
    return sent


@dataclass(frozen=True, slots=True)
class Case:
    """One recorded workload under one policy, through both."""

    policy: str
    load: float
    sent: Sent
    simulated: ModelReport

    def quantiles_ms(self) -> list[tuple[float, float]]:
        """p50, p95 and p99: (daemon, simulator)."""
        real = np.quantile(self.sent.latencies_ms, [0.5, 0.95, 0.99])
        return list(
            zip(real.tolist(), (self.simulated.p50_ms, self.simulated.p95_ms, self.simulated.p99_ms), strict=True)
        )

    def worst(self) -> float:
        """The larger deviation of p50 and p95."""
        return max(abs(real / simulated - 1) for real, simulated in self.quantiles_ms()[:2])


def case(setup: Setup, asked: Asked, policy: str, load: float, arrivals: Sequence[Arrival]) -> Case:
    slo_ms = setup.scene.slo_ms
    with tempfile.TemporaryDirectory() as folder:
        for model in slo_ms:
            (Path(folder) / model / "1").mkdir(parents=True)
            (Path(folder) / model / "config.pbtxt").write_text(CONFIG)
            table = f"{{measured: a100, model: {model}}}"
            (Path(folder) / model / "serving.yaml").write_text(f"slo_ms: {slo_ms[model]}\nlatency_table: {table}\n")
        layout = setup.layout.split(" x ")[1]
        gpus = ("--gpu", f"sim:{asked.gpu}x{asked.gpus}", "--layout", layout)
        with running("--model-repository", folder, *gpus, "--policy", policy) as daemon:
            sent = asyncio.run(drive(daemon.http, arrivals))
    report = simulate(setup.scene.slices, arrivals, POLICIES[policy], slo_ms=slo_ms, noise=EXACT)
    (simulated,) = report.models.values()
    return Case(policy, load, sent, simulated)


def table(cases: Sequence[Case]) -> Table:
    shown = Table(
        "policy", "load", "", "p50 ms", "p95 ms", "p99 ms", "answered", "refused", "failed", "sent late, p99 ms"
    )
    for each in cases:
        real, simulated = zip(*each.quantiles_ms(), strict=True)
        sent, model = each.sent, each.simulated
        lag_ms = f"{np.quantile(sent.lag_ms, 0.99):.1f}"
        counts = (str(len(sent.latencies_ms)), str(sent.refused), str(sent.failed), lag_ms)
        shown.add_row(each.policy, f"{each.load:.0%}", "daemon", *(f"{ms:.1f}" for ms in real), *counts)
        counts = (str(model.answered), str(sum(model.refused.values())), "", "")
        shown.add_row("", "", "simulator", *(f"{ms:.1f}" for ms in simulated), *counts)
        ratios = (f"{one / other:.3f}" for one, other in zip(real, simulated, strict=True))
        shown.add_row("", "", "ratio", *ratios, f"{len(sent.latencies_ms) / model.answered:.3f}", end_section=True)
    return shown


def main(
    model: str = "bert",
    policy: Annotated[list[str] | None, typer.Option(help="By default ours and elsa.")] = None,
    load: Annotated[list[float] | None, typer.Option(help="Share of the fluid bound; by default 0.6 and 0.85.")] = None,
    seconds: float = 45.0,
    gpus: int = 2,
    seed: int = 0,
    write: Annotated[bool, typer.Option("--write", help="Keep the table.")] = False,
) -> None:
    """Records queries, sends them through both, prints the table; exit code 1 if a p50 or p95 is more than 10 % off."""
    bound_per_s = prepare(Asked(model=model, gpus=gpus)).bound_per_s
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for share in load or LOADS:
            trace = Path(folder) / f"{share}.csv"
            drawn = workload.poisson(model, share * bound_per_s, seconds, seed, workload.W_PAPER)
            trace.write_text("\n".join(workload.write_trace(drawn)))
            asked = Asked(workload=str(trace), gpus=gpus)
            setup, arrivals = prepare(asked), read_trace(str(trace)).arrivals
            cases += [case(setup, asked, name, share, arrivals) for name in policy or (next(iter(POLICIES)), "elsa")]
    console = Console(record=True, width=110)
    slo_ms = setup.scene.slo_ms[model]
    about = f"{model}, {seconds:.0f} s of W-paper, SLO {slo_ms:.1f} ms; {setup.layout} of {asked.gpu}"
    console.print(about, soft_wrap=True)
    console.print(table(cases))
    if write:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        machine += f"; niceness {os.nice(0)}, load average at the end {os.getloadavg()[0]:.1f}"
        RESULTS.write_text(
            f"# The daemon beside the simulator\n\n{__doc__ or ''}\n{machine}.\n\n```\n{console.export_text()}```\n"
        )
    raise typer.Exit(max(each.worst() for each in cases) > WANTED)


if __name__ == "__main__":
    typer.run(main)
