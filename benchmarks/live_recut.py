"""A daemon on two simulated A100s under traffic that swings between small and large queries: fixed layouts beside
one that re-cuts itself. Timing is emulated (BERT as measured on A100 slices); processes, sockets and clients are real.

    python -m benchmarks.live_recut --write     about a quarter of an hour; tables and picture in benchmarks/results

Open loop: queries are sent at their Poisson times whatever comes back, by the stock client (tritonclient.grpc.aio).
Every query counts: one that was answered late, refused, or not at all was not within its SLO.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import tritonclient.grpc.aio as grpcclient
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tritonclient.utils import InferenceServerException

from partitioner.catalog import GPU_MODELS
from partitioner.cuts import cuts
from partitioner.latency import per_batch, shipped
from scheduler.simulator import EXACT, SimSlice, simulate
from scheduler.workload import Arrival
from tests.harness import RunningDaemon, running

RESULTS = Path(__file__).parent / "results"
SLO_MS = 198.0
ONES = "+".join(["1g.10gb"] * 7)
FIXED = [
    ONES,
    "2g.20gb+2g.20gb+2g.20gb+1g.10gb",
    "4g.40gb+3g.40gb",
    "7g.80gb",
    "1g.10gb+1g.10gb+1g.10gb+1g.10gb+3g.40gb",
    "4g.40gb+1g.10gb+1g.10gb+1g.10gb",
    f"{ONES} / 4g.40gb+3g.40gb",
]
# The swings here take seconds, in production they take hours: it must look often and forget fast.
FOLLOW = "--replan auto --replan-interval-secs 1 --replan-half-life-secs 2 --replan-dwell-secs 5"
CONFIG = """
backend: "emulated" max_batch_size: 64
input { name: "x" data_type: TYPE_FP32 dims: [4] }
output { name: "y" data_type: TYPE_FP32 dims: [1] }
"""


@dataclass(frozen=True)
class Phase:
    """So many queries a second of so many items, for so long."""

    name: str
    seconds: float
    rate_per_s: float
    items: int


@dataclass
class Outcome:
    """One query. `latency_ms` is None where there was no answer, `error` says why."""

    phase: int
    at_s: float
    items: int
    latency_ms: float | None = None
    right: bool = False
    error: str = ""

    @property
    def in_time(self) -> bool:
        return self.right and self.latency_ms is not None and self.latency_ms <= SLO_MS


@dataclass
class Run:
    """What one daemon did under the whole traffic. `recuts`: when its layout changed, and to what."""

    name: str
    outcomes: list[Outcome] = field(default_factory=list)
    recuts: list[tuple[float, str]] = field(default_factory=list)

    def share(self, phases: Sequence[int] | None = None, *, by_items: bool = False) -> float:
        """Of queries, or of items, that were answered rightly within the SLO."""
        chosen = [each for each in self.outcomes if phases is None or each.phase in phases]
        weights = [each.items if by_items else 1 for each in chosen]
        return sum(w for w, each in zip(weights, chosen, strict=True) if each.in_time) / sum(weights)

    def count(self, error: str) -> int:
        return sum(each.error == error for each in self.outcomes)


def phases(seconds: float) -> list[Phase]:
    """Small, large, small, large; large lasts twice as long, as it has a tenth of the queries."""
    unit = seconds / 6
    small, large = Phase("small", unit, 140.0, 8), Phase("large", 2 * unit, 10.0, 32)
    return [small, large, small, large]


def arrivals(plan: Sequence[Phase], seed: int) -> list[tuple[float, int, int]]:
    """(seconds, phase, items) of every query, the same for every run."""
    chance = random.Random(seed)
    found, begin = [], 0.0
    for number, phase in enumerate(plan):
        at = begin + chance.expovariate(phase.rate_per_s)
        while at < begin + phase.seconds:
            found.append((at, number, phase.items))
            at += chance.expovariate(phase.rate_per_s)
        begin += phase.seconds
    return found


async def drive(url: str, queries: Sequence[tuple[float, int, int]], progress: Progress, task: object) -> list[Outcome]:
    """Sends every query at its time; returns when each has ended."""
    async with grpcclient.InferenceServerClient(url) as client:
        await _ask(client, 1, Outcome(0, 0.0, 1))  # the connection is made before the clock runs
        start = time.monotonic()
        outcomes, asking = [], []
        for at_s, phase, items in queries:
            delay = start + at_s - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            outcome = Outcome(phase, at_s, items)
            outcomes.append(outcome)
            asking.append(asyncio.create_task(_ask(client, len(outcomes), outcome)))
            progress.update(task, completed=at_s)  # type: ignore[arg-type]
        await asyncio.gather(*asking)
        return outcomes


async def _ask(client: grpcclient.InferenceServerClient, number: int, outcome: Outcome) -> None:
    x = np.full((outcome.items, 4), number % 1000, np.float32)
    tensor = grpcclient.InferInput("x", x.shape, "FP32")
    tensor.set_data_from_numpy(x)
    began = time.monotonic()
    try:
        result = await client.infer("bert", [tensor], client_timeout=30)
    except InferenceServerException as error:
        outcome.error = str(error.status()).removeprefix("StatusCode.")
        return
    outcome.latency_ms = 1e3 * (time.monotonic() - began)
    answer = result.as_numpy("y")
    outcome.right = answer is not None and bool((answer == x.sum(axis=1, keepdims=True)).all())
    outcome.error = "" if outcome.right else "WRONG"


def run(
    name: str, flags: Sequence[str], repository: Path, queries: Sequence[tuple[float, int, int]], bar: Progress
) -> Run:
    """One daemon under the whole traffic."""
    seconds = queries[-1][0]
    task = bar.add_task(name, total=seconds)
    with running("--model-repository", str(repository), "--gpu", "sim:A100-80GBx2", *flags) as daemon:
        if "/" in name:
            _cut(daemon, name)
        started_s = time.time()
        outcomes = asyncio.run(drive(daemon.grpc, queries, bar, task))
        recuts = [
            (_seconds_since(started_s, line["timestamp"]), " / ".join(line["layouts"].values()))
            for line in daemon.events("re-cut done")
        ]
    return Run(name, outcomes, [each for each in recuts if each[0] > 0])


def _cut(daemon: RunningDaemon, layouts: str) -> None:
    body = {"gpus": {str(gpu): layout for gpu, layout in enumerate(layouts.split(" / "))}}
    headers = {"Authorization": f"Bearer {daemon.admin_token}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{daemon.admin}/admin/layout", json.dumps(body).encode(), headers)
    urllib.request.urlopen(request, timeout=60).close()


def _seconds_since(started_s: float, timestamp: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(timestamp).timestamp() - started_s


def repository(folder: Path) -> Path:
    """BERT, as measured on A100 slices, emulated."""
    model = folder / "bert"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(CONFIG)
    # Strict and whole, so that a layout shows what it can do in time.
    (model / "serving.yaml").write_text(
        f"slo_ms: {SLO_MS}\nstrict: true\nsplit: false\nlatency_table: {{measured: a100, model: bert}}\n"
    )
    return folder


def screen(queries: Sequence[tuple[float, int, int]]) -> list[tuple[float, str]]:
    """Share within the SLO of every pair of maximal layouts, best first: simulated, by the daemon's own core."""
    gpu, table = GPU_MODELS["A100-80GB"], shipped("bert")
    sent = [Arrival(int(at_s * 1e9), "bert", items) for at_s, _, items in queries]
    found = []
    for pair in combinations_with_replacement(cuts(gpu), 2):
        sizes = [placed.profile.gpcs for layout in pair for placed in layout]
        slices = [
            SimSlice(str(index), gpcs, {"bert": per_batch(table.points(gpcs), 64)}) for index, gpcs in enumerate(sizes)
        ]
        report = simulate(slices, sent, slo_ms={"bert": SLO_MS}, noise=EXACT).models["bert"]
        names = " / ".join("+".join(placed.profile.name for placed in layout) for layout in pair)
        found.append((report.within_slo, names))
    return sorted(found, reverse=True)


# ---- what is shown ----


def table(runs: Sequence[Run], plan: Sequence[Phase]) -> Table:
    shown = Table(
        "layout of both GPUs", "within SLO", "of items", "small", "large", "refused", "lost", "wrong", "re-cuts"
    )
    small = [number for number, phase in enumerate(plan) if phase.name == "small"]
    large = [number for number, phase in enumerate(plan) if phase.name == "large"]
    for each in runs:
        refused = each.count("RESOURCE_EXHAUSTED")
        wrong = each.count("WRONG")
        lost = sum(bool(one.error) for one in each.outcomes) - refused - wrong
        shares = [each.share(), each.share(by_items=True), each.share(small), each.share(large)]
        shown.add_row(
            short(each.name), *(f"{share:.1%}" for share in shares), *map(str, (refused, lost, wrong, len(each.recuts)))
        )
    return shown


def short(layouts: str) -> str:
    return " / ".join(
        each.replace(ONES, "7 x 1g.10gb").replace("2g.20gb+2g.20gb+2g.20gb", "3 x 2g.20gb")
        for each in layouts.split(" / ")
    )


def picture(runs: Sequence[Run], plan: Sequence[Phase], path: Path) -> None:
    """Share within the SLO over time, each layout a line; the phases shaded, the re-cuts marked."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4.5))
    begin = 0.0
    for phase in plan:
        if phase.name == "large":
            axes.axvspan(begin, begin + phase.seconds, color="0.93")
        label = f"{phase.name}: {phase.rate_per_s:.0f}/s of {phase.items} items"
        axes.text(begin + phase.seconds / 2, 1.03, label, ha="center", fontsize=8)
        begin += phase.seconds
    width = begin / 60
    for each in runs:
        by_time: dict[int, list[bool]] = {}
        for one in each.outcomes:
            by_time.setdefault(int(one.at_s / width), []).append(one.in_time)
        points = sorted(by_time.items())
        itself = bool(each.recuts)
        axes.plot(
            [(slot + 0.5) * width for slot, _ in points],
            [sum(inside) / len(inside) for _, inside in points],
            label=f"{short(each.name)}: {each.share():.1%}",
            linewidth=2.5 if itself else 1.0,
            color="black" if itself else None,
        )
        for at, _ in each.recuts:
            axes.axvline(at, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="seconds", ylabel=f"share of queries within {SLO_MS:.0f} ms", ylim=(-0.02, 1.1))
    axes.legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path)


def report(runs: Sequence[Run], plan: Sequence[Phase], screened: Sequence[tuple[float, str]]) -> str:
    console = Console(width=118, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(runs, plan))
    recuts = [f"- {at:.1f} s: {short(layouts)}" for each in runs for at, layouts in each.recuts]
    return "\n".join(
        [
            "# A layout that follows the traffic, beside fixed ones",
            "",
            "Two simulated A100-80GB, timing emulated (BERT as measured on A100 slices), real processes and clients.",
            f"{platform.machine()}, Python {platform.python_version()}. SLO {SLO_MS:.0f} ms; "
            + ", ".join(f"{p.seconds:.0f} s of {p.rate_per_s:.0f}/s with {p.items} items" for p in plan)
            + ". Made by `python -m benchmarks.live_recut --write`.",
            "",
            "```",
            console.export_text().rstrip(),
            "```",
            "",
            "Re-cuts of the layout that follows the traffic:",
            "",
            *recuts,
            "",
            f"Of all {len(screened)} fixed layouts of the two GPUs, simulated with exact timing, the best ones:",
            "",
            *(f"- {share:.1%}: {short(layouts)}" for share, layouts in screened[:5]),
            "",
            "![share within the SLO over time](live_recut.svg)",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0, help="of traffic for each run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=["auto", "fixed"], help="leave out the others")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    parser.add_argument("--layouts", nargs="*", default=FIXED, help="the fixed ones")
    chosen = parser.parse_args()
    plan = phases(chosen.seconds)
    queries = arrivals(plan, chosen.seed)
    runs = []
    with tempfile.TemporaryDirectory() as folder, Progress() as bar:
        models = repository(Path(folder))
        if chosen.only != "fixed":
            runs.append(run("follows the traffic", ("--layout", ONES, *FOLLOW.split()), models, queries, bar))
        if chosen.only != "auto":
            runs += [run(each, ("--layout", each.split(" / ")[0]), models, queries, bar) for each in chosen.layouts]
    Console().print(table(runs, plan))
    if chosen.write:
        picture(runs, plan, RESULTS / "live_recut.svg")
        (RESULTS / "live_recut.md").write_text(report(runs, plan, screen(queries)))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
