"""What the dispatcher costs a request: the core and a policy, without simulator and daemon, many slices, long queues.

    python -m benchmarks.dispatcher             prints the tables
    python -m benchmarks.dispatcher --write     also keeps them, in benchmarks/results/dispatcher.md

Eight A100s serve ResNet-50 (tables measured by ParvaGPU), queries of W-paper. A loop ends every batch when its table
says, and hands in arrivals: as many as keep 1,000 queries waiting (SLOs of 100 times 32 items on a whole GPU, so that
nothing is refused), or twice the fluid bound at SLO factor 2 (so that much is refused). Only the core's time counts.
The parts are timed in a run of their own, since that costs time too; `core` is what is left.
"""

from __future__ import annotations

import heapq
import itertools
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from partitioner import latency
from scheduler import search, workload
from scheduler.core import SchedulerCore
from scheduler.domain import Part, Pool, Worker
from scheduler.messages import AnyEvent, Arrived, BatchDone, Request, Run, Serves, Tick, Wake, WorkerUp
from scheduler.mix import Mix, Stream
from scheduler.policies import Policy, Start, named
from scheduler.simulator import SimSlice, simulate

RESULTS = Path(__file__).parent / "results" / "dispatcher.md"
MODEL = "resnet50"
GPUS = 8
LAYOUTS = {"7x1g": (1, 1, 1, 1, 1, 1, 1), "mixed": (3, 2, 1, 1)}
LARGEST_BATCH = 64
MOST_ITEMS = 32
QUEUED = 1000
LONG_SLO, SLO, OVERLOAD = 100.0, 2.0, 2.0
PARTS = ("offer", "next", "learn")
NS_PER_MS = 1_000_000


@dataclass
class Loop:
    """Workers in virtual time. `core_ns`: real time in the core, by the number of requests that came in it."""

    core: SchedulerCore
    slices: Sequence[SimSlice]
    slo_ns: int
    strict: bool
    items: Iterator[int]
    now_ns: int = 0
    sent: int = 0
    open: int = 0
    core_ns: int = 0
    ends: list[tuple[int, int, AnyEvent]] = field(default_factory=list)
    tables_ns: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for worker, where in enumerate(self.slices):
            table_ns = [int(ms * NS_PER_MS) for ms in where.tables[MODEL]]
            self.tables_ns.append(table_ns)
            self.core.handle(0, WorkerUp(worker, where.gpcs, 1))
            self.core.handle(0, Serves(worker, MODEL, tuple(table_ns)))

    def tell(self, event: AnyEvent) -> None:
        began_ns = time.perf_counter_ns()
        commands = self.core.handle(self.now_ns, event)
        self.core_ns += time.perf_counter_ns() - began_ns
        for command in commands:
            if isinstance(command, Run):
                items = sum(piece.items for piece in command.pieces)
                table_ns = self.tables_ns[command.worker_id]
                end_ns = self.now_ns + table_ns[min(items, len(table_ns)) - 1]
                done = BatchDone(command.worker_id, command.batch_id)
                heapq.heappush(self.ends, (end_ns, command.batch_id, done))
            elif isinstance(command, Wake):
                heapq.heappush(self.ends, (command.at_ns, -1, Tick()))
            else:
                self.open -= len(getattr(command, "request_ids", (0,)))

    def arrive(self) -> None:
        self.sent += 1
        self.open += 1
        due_ns = self.now_ns + self.slo_ns
        self.tell(Arrived(Request(self.sent, MODEL, next(self.items), due_ns=due_ns, strict=self.strict)))

    def keep_waiting(self, requests: int) -> None:
        """As many as there are slices run, and QUEUED wait."""
        enough = QUEUED + len(self.slices)
        for _ in range(requests):
            while self.open >= enough:
                self.now_ns, _, event = heapq.heappop(self.ends)
                self.tell(event)
            self.arrive()

    def at_times(self, requests: int, gap_ns: Iterator[float]) -> None:
        for at_ns in itertools.islice(itertools.accumulate(gap_ns, initial=self.now_ns), 1, requests + 1):
            while self.ends and self.ends[0][0] <= at_ns:
                self.now_ns, _, event = heapq.heappop(self.ends)
                self.tell(event)
            self.now_ns = int(at_ns)
            self.arrive()


class Timed:
    """A policy, and the time of its parts."""

    def __init__(self, pool: Pool, policy: Callable[[Pool], Policy], spent_ns: dict[str, int]) -> None:
        self._policy = policy(pool)
        self._spent_ns = spent_ns

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def offer(self, now_ns: int, part: Part, bound_ns: int | None) -> int:
        began_ns = time.perf_counter_ns()
        retry_ns = self._policy.offer(now_ns, part, bound_ns)
        self._spent_ns["offer"] += time.perf_counter_ns() - began_ns
        return retry_ns

    def next(self, now_ns: int) -> Start | None:
        began_ns = time.perf_counter_ns()
        start = self._policy.next(now_ns)
        self._spent_ns["next"] += time.perf_counter_ns() - began_ns
        return start


def slices_of(layout: Sequence[int]) -> list[SimSlice]:
    measured = latency.shipped(MODEL)
    tables = {gpcs: latency.per_batch(measured.points(gpcs), LARGEST_BATCH) for gpcs in set(layout)}
    return [
        SimSlice(f"gpu{gpu}/{index}", gpcs, {MODEL: tables[gpcs]})
        for gpu in range(GPUS)
        for index, gpcs in enumerate(layout)
    ]


def _sizes() -> Iterator[int]:
    return (arrival.items for arrival in workload.poisson(MODEL, 1e6, 1e6, 1, workload.W_PAPER))


def run(
    policy: Callable[[Pool], Policy], slices: Sequence[SimSlice], case: str, requests: int
) -> tuple[float, Callable[[], float]]:
    """Microseconds a request; and a function that measures it once more, for the median."""
    unit_ms = latency.per_batch(latency.shipped(MODEL).points(7), MOST_ITEMS)[-1]
    long = case == "1,000 wait"
    slo_ns = int((LONG_SLO if long else SLO) * unit_ms * NS_PER_MS)
    core = SchedulerCore(10**9, policy)
    loop = Loop(core, slices, slo_ns, case.endswith("strict"), _sizes())
    load = Mix([Stream(MODEL, 1.0, workload.W_PAPER)])
    rate_per_s = OVERLOAD * search.fluid_bound_per_s(slices, load, {MODEL: SLO * unit_ms})
    gaps_ns = (1e9 / rate_per_s for _ in itertools.count())

    def again() -> float:
        before_ns = loop.core_ns
        if long:
            loop.keep_waiting(requests)
        else:
            loop.at_times(requests, gaps_ns)
        return (loop.core_ns - before_ns) / requests / 1e3

    return again(), again


def parts_of(
    policy: Callable[[Pool], Policy], slices: Sequence[SimSlice], case: str, requests: int
) -> dict[str, float]:
    """The share of each part."""
    spent_ns: dict[str, int] = defaultdict(int)
    _, again = run(lambda pool: Timed(pool, policy, spent_ns), slices, case, requests)
    real_learn = Worker.learn

    def learn(worker: Worker, now_ns: int, batch: Any) -> bool:
        began_ns = time.perf_counter_ns()
        changed = real_learn(worker, now_ns, batch)
        spent_ns["learn"] += time.perf_counter_ns() - began_ns
        return changed

    spent_ns.clear()
    Worker.learn = learn  # type: ignore[method-assign]
    try:
        total_ns = again() * requests * 1e3
    finally:
        Worker.learn = real_learn  # type: ignore[method-assign]
    shares = {part: spent_ns[part] / total_ns for part in PARTS}
    return {"core": 1 - sum(shares.values()), **shares}


CASES = ("1,000 wait", "2x overload", "2x overload, strict")


def dispatcher_table(requests: int, rounds: int, policies: Sequence[str]) -> Table:
    shown = Table(title="Microseconds a request, medians; shares of the parts")
    for column in ("policy", "layout", "case", "us", "core", *PARTS):
        shown.add_column(column, justify="left" if column in ("policy", "layout", "case") else "right")
    for name in track(policies, transient=True):
        policy = named.POLICIES[name]
        for layout, gpcs in LAYOUTS.items():
            slices = slices_of(gpcs)
            for case in CASES:
                _, again = run(policy, slices, case, requests)  # the first one fills the queues
                cost_us = statistics.median(again() for _ in range(rounds))
                shares = parts_of(policy, slices, case, requests)
                row = [f"{shares[part]:.0%}" for part in ("core", *PARTS)]
                shown.add_row(name, f"8 x {layout}", case, f"{cost_us:.1f}", *row)
        shown.add_section()
    return shown


def simulator_table(queries: int, policies: Sequence[str]) -> Table:
    shown = Table("policy", "load", "requests a second", title="The simulator, 8 GPUs of 7x1g (goal: 20,000)")
    slices = slices_of(LAYOUTS["7x1g"])
    unit_ms = latency.per_batch(latency.shipped(MODEL).points(7), MOST_ITEMS)[-1]
    load, slo_ms = Mix([Stream(MODEL, 1.0, workload.W_PAPER)]), {MODEL: SLO * unit_ms}
    bound_per_s = search.fluid_bound_per_s(slices, load, slo_ms)
    for name in policies:
        for share in (0.8, 0.95):
            arrivals = load.draw(share * bound_per_s, queries, 1)
            began_s = time.process_time()
            simulate(slices, arrivals, named.POLICIES[name], slo_ms=slo_ms)
            rate = len(arrivals) / (time.process_time() - began_s)
            shown.add_row(name, f"{share}", f"{rate:,.0f}")
    return shown


def main(
    requests: Annotated[int, typer.Option(help="Of each measurement.")] = 5_000,
    rounds: Annotated[int, typer.Option(help="How often each is measured.")] = 5,
    policy: Annotated[list[str] | None, typer.Option(help="Measure these only.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Keep it in benchmarks/results/dispatcher.md.")] = False,
) -> None:
    """Measures, and prints the tables."""
    policies = policy or list(named.POLICIES)
    console = Console(record=True, width=110)
    console.print(f"{_processor()}, Python {platform.python_version()}; {requests} requests, {rounds} rounds, one core")
    console.print(dispatcher_table(requests, rounds, policies))
    console.print(simulator_table(4 * requests, policies))
    if write:
        RESULTS.write_text(f"# The dispatcher\n\n{__doc__ or ''}\n```\n{console.export_text()}```\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    typer.run(main)
