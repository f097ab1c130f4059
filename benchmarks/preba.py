"""What preprocessing costs seven slices: PREBA's figure (arXiv 2411.19114), in shape.

    make bench-preba ARGS="--write"     some minutes; table and picture in benchmarks/results/preba.md and .svg

Real: 640 x 480 JPEGs of 100 kB, the preprocessing pool of the daemon (a process a core), its arena, driver, scheduler
and policy. Emulated: the slices, seven 1g.10gb of an A100 with the measured latencies of ResNet-50 that W-slo has (SLO
138 ms, its scenario S3), which take their time on the clock and nothing else. Three ways of preprocessing:

    CPU           the real pool, on this machine's cores, which also run the rest
    accelerator   emulated: nothing is decoded; pictures pass one after the other at 7,800 a second, which is what
                  torchvision's authors report of an A100's JPEG engine on pictures of about 550 x 676 (decoding; that
                  resizing goes on beside it is assumed), and 2 ms pass from beginning to end
    free          emulated: nothing is decoded, and it takes no time

Poisson arrivals, one picture each, open loop. p95 counts every request: one that was refused took for ever. The rates
are shares of what the slices can do at best; for the CPU they rise by a fifth until its p95 is above the SLO twice.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.preprocess import PIPELINE, SIZES, photograph
from partitioner.geometry import Slice
from partitioner.latency import per_batch, shipped
from preprocess.pool import PoolFullError, PreprocessPool
from scheduler.answers import Answered
from scheduler.arena import Arena, ArenaFullError
from scheduler.channel import Done, RunBatch
from scheduler.core import SchedulerCore
from scheduler.driver import Driver, RefusedError, now_ns
from scheduler.messages import Request
from server import charts
from server.charts import Series

RESULTS = Path(__file__).parent / "results"
SLICES, MAX_BATCH, DEPTH = 7, 32, 2
SLO_MS = 138.0
MODEL = "resnet50/1#1"
ITEM_BYTES = 3 * 224 * 224 * 4
ACCELERATOR_PER_S, ACCELERATOR_MS = 7800.0, 2.0
LOADS = (0.1, 0.2, 0.4, 0.6, 0.8, 0.85, 0.9, 0.95, 1.0)
CPU_FROM_PER_S, CPU_STEP, CPU_TRIES = 100.0, 1.2, 2


class EmulatedSlices:
    """What a driver takes for its fleet: batches end after the time of the table, one after the other on each slice."""

    def __init__(self, table_ms: Sequence[float]) -> None:
        self._table_ms = table_ms
        self._free_s = [0.0] * SLICES
        self._outbox = memoryview(bytes(4 * MAX_BATCH))
        self.driver: Driver | None = None

    def send(self, worker_id: int, batch: RunBatch) -> None:
        loop = asyncio.get_running_loop()
        items = sum(batch.items)
        begin_s = max(loop.time(), self._free_s[worker_id])
        end_s = self._free_s[worker_id] = begin_s + self._table_ms[items - 1] / 1e3
        infer_ns = int(1e6 * self._table_ms[items - 1])
        done = Done(batch.batch_id, [0], [4 * items], [(items, 1)], 0, infer_ns, 0)
        assert self.driver is not None
        loop.call_at(end_s, self.driver.batch_done, worker_id, done, self._outbox)


class Unobserved:
    """Counts nothing."""

    def batch_done(self, record: Any) -> None: ...
    def cancelled(self, model: str, *, before_compute: bool) -> None: ...


@dataclass
class Run:
    """One rate. `latency_ms`: of each request from its arrival to its answer; infinite where it was refused.

    `answered_per_s`: from the first arrival to the last one.
    """

    offered_per_s: float
    begun_s: float
    latency_ms: list[float] = field(default_factory=list)
    answered_per_s: float = 0.0

    def percentile_ms(self, share: float) -> float:
        return sorted(self.latency_ms)[min(int(share * len(self.latency_ms)), len(self.latency_ms) - 1)]

    @property
    def in_time(self) -> float:
        return sum(ms <= SLO_MS for ms in self.latency_ms) / len(self.latency_ms)


Prepare = Callable[[memoryview, Callable[[], None]], None]  # raises PoolFullError


def by_pool(pool: PreprocessPool, picture: bytes) -> Prepare:
    """The real one: into the request's slot."""

    def prepare(slot: memoryview, then: Callable[[], None]) -> None:
        job = pool.write(PIPELINE, [picture], {"x": slot})
        job.future.add_done_callback(lambda future: (future.result(), then()))

    return prepare


class Accelerator:
    """An emulated one."""

    def __init__(self) -> None:
        self._free_s = 0.0

    def prepare(self, slot: memoryview, then: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self._free_s = max(self._free_s, loop.time()) + 1 / ACCELERATOR_PER_S
        loop.call_at(self._free_s + ACCELERATOR_MS / 1e3, then)


def free(slot: memoryview, then: Callable[[], None]) -> None:
    then()


class Server:
    """All of the daemon between preprocessing and the slices."""

    def __init__(self, table_ms: Sequence[float]) -> None:
        self._arena = Arena(2 << 30)
        slices = EmulatedSlices(table_ms)
        fleet: Any = slices
        self._driver = slices.driver = Driver(SchedulerCore(), fleet, self._arena, Unobserved())
        for index in range(SLICES):
            where = Slice(0, "GPU-0", "A100", f"MIG-{index}", "1g.10gb", 1, 9728, index, 0, index, 1, 8, True)
            self._driver.worker_up(index, where, DEPTH)
            self._driver.serves(index, MODEL, tuple(int(1e6 * ms) for ms in table_ms), 1.0)
        self._ids = 0

    def close(self) -> None:
        self._arena.close()

    async def run(self, prepare: Prepare, rate_per_s: float, seconds: float, seed: int) -> Run:
        """Poisson arrivals for so long; returns when all have ended."""
        rng, loop = random.Random(seed), asyncio.get_running_loop()
        run = Run(rate_per_s, loop.time())
        due_s = run.begun_s
        while True:
            due_s += rng.expovariate(rate_per_s)
            if due_s > run.begun_s + seconds:
                break
            if (wait_s := due_s - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            self._ask(run, prepare)
        run.answered_per_s = sum(ms < np.inf for ms in run.latency_ms) / (loop.time() - run.begun_s)
        await self._driver.idle()
        return run

    def _ask(self, run: Run, prepare: Prepare) -> None:
        arrived_ns = now_ns()
        self._ids += 1
        due_ns = arrived_ns + int(1e6 * SLO_MS)
        request = Request(self._ids, MODEL, 1, due_ns=due_ns, arrived_ns=arrived_ns)

        def on_end(end: Answered | RefusedError) -> None:
            run.latency_ms.append((now_ns() - arrived_ns) / 1e6 if isinstance(end, Answered) else np.inf)

        try:
            offset = self._arena.allocate(ITEM_BYTES)
        except ArenaFullError:
            run.latency_ms.append(np.inf)
            return
        slot = self._arena.memory[offset : offset + ITEM_BYTES]
        pending = self._driver.accept(request, arrived_ns, on_end)
        try:
            prepare(slot, partial(self._driver.start, pending, offset))
        except PoolFullError:
            self._driver.withdraw(pending)
            self._arena.free(offset)
            run.latency_ms.append(np.inf)


async def capacity(prepare: Prepare, seconds: float) -> float:
    """Pictures a second where eight requests always wait, and nothing else is done."""
    loop = asyncio.get_running_loop()
    slots = [memoryview(bytearray(ITEM_BYTES)) for _ in range(8)]
    end_s = loop.time() + seconds
    done = 0

    async def client(slot: memoryview) -> None:
        nonlocal done
        while loop.time() < end_s:
            prepared: asyncio.Future[None] = loop.create_future()
            prepare(slot, partial(prepared.set_result, None))
            await prepared
            done += 1

    await asyncio.gather(*(client(slot) for slot in slots))
    return done / seconds


async def measure(seconds: float, report: Callable[[str, Run], None]) -> dict[str, list[Run]]:
    """By way, in order of the rates."""
    table_ms = per_batch(shipped("resnet50").points(1), MAX_BATCH)
    bound_per_s = SLICES * max(1e3 * batch / ms for batch, ms in enumerate(table_ms, start=1) if ms <= SLO_MS)
    pool = PreprocessPool(None, isolated=True)
    await pool.prepare(PIPELINE)
    server = Server(table_ms)
    found: dict[str, list[Run]] = {}
    try:
        by_cpu = by_pool(pool, photograph(640, 480, SIZES[640, 480]))
        await server.run(by_cpu, 50, 1.0, 0)  # warms up
        gc.freeze()
        runs, rate_per_s, over = found.setdefault("CPU", []), CPU_FROM_PER_S, 0
        while over < CPU_TRIES and rate_per_s < bound_per_s:
            runs.append(await server.run(by_cpu, rate_per_s, seconds, len(runs)))
            report("CPU", runs[-1])
            over += runs[-1].percentile_ms(0.95) > SLO_MS
            rate_per_s *= CPU_STEP
        ways: dict[str, Callable[[], Prepare]] = {"accelerator": lambda: Accelerator().prepare, "free": lambda: free}
        for seed, load in enumerate(LOADS):
            for name, make in ways.items():
                run = await server.run(make(), load * bound_per_s, seconds, seed)
                report(name, run)
                found.setdefault(name, []).append(run)
    finally:
        server.close()
        pool.close()
    return found


def best_per_s(runs: Sequence[Run]) -> float:
    """The highest rate of answers with a p95 within the SLO."""
    return max((run.answered_per_s for run in runs if run.percentile_ms(0.95) <= SLO_MS), default=0.0)


def drawing(found: dict[str, list[Run]]) -> str:
    """p95 against throughput."""
    curves = [
        Series(name, hue, [(run.answered_per_s, run.percentile_ms(0.95)) for run in runs])
        for hue, (name, runs) in enumerate(found.items())
    ]
    plot = charts.lines(
        "p95", "pictures a second", "p95, ms, by preprocessing", curves, [(SLO_MS, "SLO, 138 ms")], 2 * SLO_MS
    )
    keys = "".join(
        f'<rect x="{12 + 125 * hue}" y="292" width="12" height="12" fill="var(--hue{hue})"/>'
        f'<text x="{29 + 125 * hue}" y="302">{name}{"" if name == "CPU" else " (emulated)"}</text>'
        for hue, name in enumerate(found)
    )
    style = re.sub(r"svg \{[^}]*\}", "svg { font: 12px system-ui, sans-serif; }", charts.STYLE, count=1)
    paper = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 380 315">'
    plot = plot.replace("<svg ", '<svg x="0" y="0" width="380" height="280" ', 1)
    return "\n".join([head, f"<style>{style}</style>", paper, plot, keys, "</svg>\n"])


def main(
    write: Annotated[bool, typer.Option("--write", help="Keep table and picture.")] = False,
    seconds: Annotated[float, typer.Option(help="Of each rate.")] = 8.0,
) -> None:
    """Measures, and prints the table."""
    console = Console(record=True, width=110)
    table = Table(title="640 x 480 JPEGs for seven emulated 1g.10gb slices, ResNet-50 as on A100, SLO 138 ms")
    for column in ("preprocessing", "offered/s", "answered/s", "p50 ms", "p95 ms", "within the SLO"):
        table.add_column(column, justify="left" if column == "preprocessing" else "right")

    def report(name: str, run: Run) -> None:
        print(f"{name}: {run.offered_per_s:.0f}/s done", flush=True)

    def row(name: str, run: Run) -> None:
        figures = (run.offered_per_s, run.answered_per_s, run.percentile_ms(0.5), run.percentile_ms(0.95))
        cells = [f"{figure:.0f}" if figure < np.inf else "refused" for figure in figures]
        table.add_row(name if name.startswith("CPU") else f"{name} (emulated)", *cells, f"{run.in_time:.1%}")

    found = asyncio.run(measure(seconds, report))
    for name, runs in found.items():
        for run in runs:
            row(name, run)
    console.print(f"{os.cpu_count()} cores; {seconds:g} s of each rate; {time.strftime('%Y-%m-%d')}")
    console.print(table)
    best = {name: best_per_s(runs) for name, runs in found.items()}
    for name, per_s in best.items():
        share = per_s / best["free"] if best["free"] else 0.0
        console.print(f"{name}: {per_s:.0f} pictures/s with a p95 within the SLO, {share:.1%} of free preprocessing")
    console.print("PREBA, on its machine and FPGA: 91.6 % of free with it, 77 % lost without.")
    if write:
        about = (__doc__ or "").replace("\n\n    make bench", "\n\n`make bench", 1)
        text = f"# Preprocessing beside seven slices\n\n![p95 against throughput](preba.svg)\n\n```\n{about}\n"
        (RESULTS / "preba.md").write_text(f"{text}\n{console.export_text()}```\n")
        (RESULTS / "preba.svg").write_text(drawing(found))


if __name__ == "__main__":
    typer.run(main)
