"""The daemon beside the simulator: the same recorded queries through both, and how far their latencies are apart.

    python -m benchmarks.agreement              about a minute and a half
    python -m benchmarks.agreement --write      also keeps the table, in benchmarks/results/agreement.md

The daemon is a real one: HTTP, worker processes, shared memory. Its GPUs are simulated and its model is emulated, that
is, a worker sleeps for as long as the latency table says. The simulator gets the same table without noise. Queries are
sent at their recorded times, whatever comes back; a latency counts from the recorded time, so that a late sender shows.
"""

from __future__ import annotations

import asyncio
import json
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
from scheduler.simulator import simulate
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


def through_daemon(setup: Setup, asked: Asked, policy: str, folder: Path, arrivals: Sequence[Arrival]) -> Sent:
    for model, slo_ms in setup.scene.slo_ms.items():
        (folder / model / "1").mkdir(parents=True)
        (folder / model / "config.pbtxt").write_text(CONFIG)
        table = f"{{measured: a100, model: {model}}}"
        (folder / model / "serving.yaml").write_text(f"slo_ms: {slo_ms}\nlatency_table: {table}\n")
    layout = setup.layout.split(" x ")[1]
    gpu = f"sim:{asked.gpu}x{asked.gpus or 1}"
    with running("--model-repository", str(folder), "--gpu", gpu, "--layout", layout, "--policy", policy) as daemon:
        return asyncio.run(drive(daemon.http, arrivals))


def compared(setup: Setup, sent: Sent, policy: str, arrivals: Sequence[Arrival]) -> tuple[Table, float]:
    """The table, and the larger deviation of p50 and p95."""
    report = simulate(
        setup.scene.slices, arrivals, POLICIES[policy], slo_ms=setup.scene.slo_ms, noise=setup.scene.noise
    )
    (model,) = report.models.values()
    real = [float(each) for each in np.quantile(sent.latencies_ms, [0.5, 0.95, 0.99])]
    rows = list(zip(("p50, ms", "p95, ms", "p99, ms"), real, (model.p50_ms, model.p95_ms, model.p99_ms), strict=True))
    table = Table("", "daemon", "simulator", "ratio")
    for name, of_daemon, simulated in rows:
        table.add_row(name, f"{of_daemon:.1f}", f"{simulated:.1f}", f"{of_daemon / simulated:.3f}")
    answered = len(sent.latencies_ms)
    table.add_row("answered", str(answered), str(model.answered), f"{answered / model.answered:.3f}")
    table.add_row("refused, failed", f"{sent.refused}, {sent.failed}", f"{sum(model.refused.values())}, 0", "")
    lag = np.quantile(sent.lag_ms, [0.5, 0.99])
    table.add_row("sent late, p50 and p99, ms", f"{lag[0]:.2f}, {lag[1]:.2f}", "", "")
    return table, max(abs(of_daemon / simulated - 1) for _, of_daemon, simulated in rows[:2])


def main(
    model: str = "bert",
    policy: str = next(iter(POLICIES)),
    load: Annotated[float, typer.Option(help="Share of the fluid bound.")] = 0.6,
    seconds: float = 60.0,
    gpus: int = 2,
    seed: int = 0,
    write: Annotated[bool, typer.Option("--write", help="Keep the table.")] = False,
) -> None:
    """Records queries, sends them through both, prints the table; exit code 1 if p50 or p95 is more than 10 % off."""
    first = prepare(Asked(model=model, gpus=gpus))
    rate_per_s = load * first.bound_per_s
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.csv"
        drawn = workload.poisson(model, rate_per_s, seconds, seed, workload.W_PAPER)
        trace.write_text("\n".join(workload.write_trace(drawn)))
        asked = Asked(workload=str(trace), gpus=gpus, noise=0.0)
        setup, arrivals = prepare(asked), read_trace(str(trace)).arrivals
        repository = Path(folder) / "models"
        repository.mkdir()
        sent = through_daemon(setup, asked, policy, repository, arrivals)
    table, worst = compared(setup, sent, policy, arrivals)
    console = Console(record=True, width=100)
    console.print(
        f"{len(arrivals)} queries of {model} in {seconds:.0f} s, {load:.0%} of the fluid bound, {setup.layout} of "
        f"{asked.gpu}, policy {policy}, SLO {setup.scene.slo_ms[model]:.1f} ms",
        soft_wrap=True,
    )
    console.print(table)
    if write:
        machine = f"{platform.machine()}, Python {platform.python_version()}"
        text = f"# The daemon beside the simulator\n\n{__doc__ or ''}\n{machine}.\n\n```\n{console.export_text()}```\n"
        RESULTS.write_text(text)
    raise typer.Exit(worst > WANTED)


if __name__ == "__main__":
    typer.run(main)
