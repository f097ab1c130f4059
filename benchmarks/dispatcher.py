"""What a decision costs: the scheduler's core and a policy alone, at 56 and 64 slices, with 1,000 requests queued.

    python -m benchmarks.dispatcher             prints the table
    python -m benchmarks.dispatcher --write     also keeps it, in benchmarks/results/dispatcher.md

ResNet-50 on A100s. A request comes, another one is done: the queue stays as long as it is. `timely`: SLOs are so
long that all of it is to be in time. `overload`: SLO factor 2, twice what the slices can do, most is put back or
refused. Microseconds of processor time a request (one Arrived and its share of BatchDone), and the part of it that is
spent in the policy. The last column is the simulator's: requests a second at load 0.9, arrivals and slices included.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from partitioner import latency
from scheduler import workload
from scheduler.core import SchedulerCore
from scheduler.domain import Pool
from scheduler.messages import Answer, AnyCommand, Arrived, BatchDone, Refuse, Request, Run, Serves, WorkerUp
from scheduler.policies import Policy
from scheduler.policies.named import POLICIES
from scheduler.simulator import SimSlice, simulate

RESULTS = Path(__file__).parent / "results" / "dispatcher.md"
MODEL, GPUS, QUEUED, LARGEST_BATCH = "resnet50", 8, 1000, 64
LAYOUTS = {"7x1g": (1,) * 7, "3g+2g+1g+1g, 16 GPUs": (3, 2, 1, 1) * 2}
SLO_MS = {"timely": 60_000.0, "overload": 26.7}


class Timed:
    """A policy whose methods are timed."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.seconds: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._policy, name)

        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self.seconds[name] += time.perf_counter() - begin

        return timed


class Stage:
    """A core whose slices end their batches as their tables say, and a queue that is kept filled."""

    def __init__(self, policy: Callable[[Pool], Policy], layout: tuple[int, ...], slo_ms: float) -> None:
        self.core = SchedulerCore(100_000, policy)
        self.tables = {g: latency.per_batch(latency.shipped(MODEL).points(g), LARGEST_BATCH) for g in set(layout)}
        self.gpcs = dict(enumerate(layout * GPUS))
        self.slo_ns = int(slo_ms * 1e6)
        self.now_ns = 0
        self.unfinished = 0
        self.running: list[tuple[int, int, int]] = []  # until, worker, batch
        self.items = workload.W_PAPER
        for worker_id, gpcs in self.gpcs.items():
            self.core.handle(0, WorkerUp(worker_id, gpcs, 1))
            table = tuple(int(ms * 1e6) for ms in self.tables[gpcs])
            self.obey(self.core.handle(0, Serves(worker_id, MODEL, table)))

    def obey(self, commands: list[AnyCommand]) -> None:
        for command in commands:
            if isinstance(command, Run):
                items = sum(piece.items for piece in command.pieces)
                took_ns = int(self.tables[self.gpcs[command.worker_id]][items - 1] * 1e6)
                self.running.append((self.now_ns + took_ns, command.worker_id, command.batch_id))
            elif isinstance(command, Answer):
                self.unfinished -= len(command.request_ids)
            elif isinstance(command, Refuse):
                self.unfinished -= 1

    def arrive(self, number: int, items: int) -> float:
        self.unfinished += 1
        event = Arrived(Request(number, MODEL, items, due_ns=self.now_ns + self.slo_ns))
        begin = time.process_time()
        commands = self.core.handle(self.now_ns, event)
        took = time.process_time() - begin
        self.obey(commands)
        return took

    def end_one(self) -> float:
        self.running.sort(reverse=True)
        self.now_ns, worker_id, batch_id = self.running.pop()
        begin = time.process_time()
        commands = self.core.handle(self.now_ns, BatchDone(worker_id, batch_id))
        took = time.process_time() - begin
        self.obey(commands)
        return took


def microseconds(policy: Callable[[Pool], Policy], layout: tuple[int, ...], case: str, requests: int) -> float:
    """Processor time a request, in steady state."""
    sizes = [each.items for each in workload.poisson(MODEL, 1000.0, 2 * requests / 1000.0, 0, workload.W_PAPER)]
    stage = Stage(policy, layout, SLO_MS[case])
    spent = 0.0
    for number, items in enumerate(sizes[: QUEUED + requests]):
        taken = stage.arrive(number, items)
        while stage.running and (stage.unfinished > QUEUED if case == "timely" else number % 2):
            taken += stage.end_one()
            if case == "overload":
                break
        spent += taken
    return 1e6 * spent / (QUEUED + requests)


def policy_share(policy: Callable[[Pool], Policy], layout: tuple[int, ...], requests: int) -> float:
    """Of a run that is timed call by call, the part in the policy."""
    made: list[Timed] = []

    def timed(pool: Pool) -> Any:
        made.append(Timed(policy(pool)))
        return made[0]

    total = microseconds(timed, layout, "timely", requests) * (QUEUED + requests) / 1e6
    return sum(made[0].seconds.values()) / total


def simulated_per_s(policy: Callable[[Pool], Policy], queries: int) -> float:
    """Requests a second of processor time, 56 slices of 1g at load 0.9."""
    table = latency.per_batch(latency.shipped(MODEL).points(1), LARGEST_BATCH)
    slices = [SimSlice(f"slice {index}", 1, {MODEL: table}) for index in range(7 * GPUS)]
    arrivals = list(workload.poisson(MODEL, 2160.0, queries / 2160.0, 0, workload.W_PAPER))
    begin = time.process_time()
    simulate(slices, arrivals, policy, slo_ms={MODEL: SLO_MS["overload"]}, bounded=False)
    return len(arrivals) / (time.process_time() - begin)


def main(write: Annotated[bool, typer.Option("--write")] = False, requests: int = 4000) -> None:
    """Prints the table; --write keeps it."""
    shown = Table(
        "policy", *(f"{name}, {case}" for name in LAYOUTS for case in SLO_MS), "in the policy", "simulated /s"
    )
    for name in ("pool", "elsa", "preba", "jsq", "fifs"):
        policy = POLICIES[name]
        cells = [
            f"{microseconds(policy, layout, case, requests):.1f}" for layout in LAYOUTS.values() for case in SLO_MS
        ]
        share = policy_share(policy, LAYOUTS["7x1g"], requests)
        shown.add_row(name, *cells, f"{share:.0%}", f"{simulated_per_s(policy, 5 * requests):,.0f}")
    console = Console(record=True, width=120)
    console.print(shown)
    if write:
        where = f"Python {platform.python_version()}, {platform.machine()}, {requests} requests."
        RESULTS.write_text(f"# Dispatcher\n\n{__doc__ or ''}\n{where}\n\n```\n{console.export_text()}```\n")


if __name__ == "__main__":
    typer.run(main)
