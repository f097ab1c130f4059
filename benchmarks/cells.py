"""What one cell of the table of policies is, and how it is measured: a policy on a layout with a model's queries.

W-paper (PARIS and ELSA, arXiv 2202.13481): Poisson queries of one model, log-normal items (ln-median 6, sigma 0.9,
clipped to 1..32); the SLO is a multiple of the time of 32 items on a whole GPU. Tables: `data/mig_latency_a100.csv`,
one process.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks.kept import Row
from partitioner import gangs, latency, optimal, paris
from partitioner.catalog import GPU_MODELS
from partitioner.optimal import Choices
from partitioner.plans import ModelDemand
from scheduler import search, workload
from scheduler.mix import Mix, Stream
from scheduler.policies.named import POLICIES
from scheduler.report import Report
from scheduler.search import Scene
from scheduler.simulator import EXACT, Noise, SimSlice
from server.plan_command import quiet

GPU = GPU_MODELS["A100-80GB"]
MODELS = ("mobilenetv2", "resnet50", "bert", "vgg16", "densenet121")
LAYOUTS = ("1+1+1+1+1+1+1", "4+3", "3+3", "3+2+1+1", "4+2+1", "7")
LARGEST_BATCH, MOST_ITEMS = 64, 32
NOISE = Noise(0.05, 0.01, 0.25)
SHARES = {"p95": 0.95, "p99": 0.99}
# Up to this share of the fluid bound, and from this on: less is 0.
HIGHEST, LEAST = 1.2, 0.1
# How finely the highest rate is looked for, as shares of the fluid bound: ours to the half per cent, and so is ELSA's,
# of which ours is to be a multiple.
STEPS = {"pool": 0.005, "elsa": 0.005}
STEP = 0.02
# The first guess is made with runs that are shorter by this.
SHORTER = 5
# The optimal planner gives a batch at most 55 % of the SLO, and a query is a batch: with a factor below 3 it finds that
# the largest queries do not fit, and no plan. So its layout is that for this factor.
PLANNED_FACTOR = 3.0
PLANNED_LOAD = 0.8


@dataclass(frozen=True, slots=True)
class Cell:
    """`layout`: "2x4+3" is two GPUs of 4g + 3g each, "1x7/1x4+3" one of each. `what`: p95, p99: the highest rate at
    which so many queries are in time; 0.8: what becomes of the queries at that share of the fluid bound."""

    model: str
    gpus: int
    factor: float
    layout: str
    policy: str
    noisy: bool
    what: str
    seed: int


@dataclass(frozen=True, slots=True)
class Length:
    """A run has at least so many queries, and lasts for at least so many SLOs at the fluid bound.

    Short runs flatter: what still waits at the end is worked off by slices that are idle then.
    """

    queries: int
    slos: int


FULL, QUICK = Length(15_000, 300), Length(3_000, 60)


# ---- layouts ----


def layout_text(per_gpu: Sequence[Sequence[int]]) -> str:
    """GPUs with the same slices are counted together, those with the largest slices first."""
    alike = Counter("+".join(map(str, sorted(slices, reverse=True))) for slices in per_gpu)
    return "/".join(f"{count}x{text}" for text, count in sorted(alike.items(), reverse=True))


def gpcs_of(layout: str) -> list[list[int]]:
    """Of each GPU, what `layout_text` wrote."""
    found = []
    for part in layout.split("/"):
        count, _, slices = part.partition("x")
        found += [[int(gpcs) for gpcs in slices.split("+")]] * int(count)
    return found


@cache
def layouts(model: str, gpus: int) -> dict[str, list[str]]:
    """Layouts to the names that they go by: a planner may choose one that is there anyway."""
    names: dict[str, list[str]] = {f"{gpus}x{each}": [] for each in LAYOUTS}
    for name, plan in (("PARIS", _paris(model, gpus)), ("optimal", _optimal(model, gpus))):
        names.setdefault(plan, []).append(name)
    return names


def _demand(model: str, gpus: int) -> ModelDemand:
    drawn = Counter(workload.W_PAPER(np.random.default_rng(0), 100_000).tolist())
    bound_per_s = _bound_per_s(model, PLANNED_FACTOR, f"{gpus}x{LAYOUTS[0]}")
    items = {int(count): float(times) for count, times in sorted(drawn.items())}
    return ModelDemand(model, PLANNED_LOAD * bound_per_s, slo_ms(model, PLANNED_FACTOR), items)


def _paris(model: str, gpus: int) -> str:
    return _planned(paris.plan([_demand(model, gpus)], {model: _table(model)}, GPU, gpus).layouts())


def _optimal(model: str, gpus: int) -> str:
    tables = gangs.gang_tables(latency.shipped_measurements())
    with quiet():
        plan = optimal.plan([_demand(model, gpus)], tables, GPU, Choices(1, gpus=gpus, overload=True))
    return _planned(plan.layouts())


def _planned(texts: Sequence[str]) -> str:
    return layout_text([[int(gpcs) for gpcs in re.findall(r"(\d)g\.", text)] for text in texts])


# ---- scenes ----


@cache
def _table(model: str) -> latency.LatencyTable:
    return latency.shipped(model)


@cache
def _times_ms(model: str, gpcs: int) -> list[float]:
    return latency.per_batch(_table(model).points(gpcs), LARGEST_BATCH)


def slo_ms(model: str, factor: float) -> float:
    return factor * _times_ms(model, GPU.compute_slices)[MOST_ITEMS - 1]


def slices_of(model: str, layout: str) -> list[SimSlice]:
    return [
        SimSlice(f"gpu{gpu}/{index}", gpcs, {model: _times_ms(model, gpcs)})
        for gpu, of_gpu in enumerate(gpcs_of(layout))
        for index, gpcs in enumerate(of_gpu)
    ]


@cache
def _bound_per_s(model: str, factor: float, layout: str) -> float:
    return search.fluid_bound_per_s(slices_of(model, layout), _load(model), {model: slo_ms(model, factor)})


@cache
def _load(model: str) -> Mix:
    return Mix([Stream(model, 1.0, workload.W_PAPER)])


def queries_of(cell: Cell, length: Length) -> int:
    bound_per_s = _bound_per_s(cell.model, cell.factor, cell.layout)
    return max(length.queries, int(length.slos * bound_per_s * slo_ms(cell.model, cell.factor) / 1e3))


def _scene(cell: Cell, queries: int) -> Scene:
    slo = {cell.model: slo_ms(cell.model, cell.factor)}
    noise = NOISE if cell.noisy else EXACT
    return Scene(slices_of(cell.model, cell.layout), _load(cell.model), slo, queries, noise)


# ---- measuring ----


def measure(cell: Cell, length: Length, hint: float | None) -> Row:
    """The cell's figures. `hint`: a ratio that is probably near, such as another seed's."""
    begin = time.perf_counter()
    queries = queries_of(cell, length)
    scene, bound_per_s = _scene(cell, queries), _bound_per_s(cell.model, cell.factor, cell.layout)
    if cell.what in SHARES:
        found = _highest(cell, queries, hint)
    else:
        ratio = float(cell.what)
        found = ratio, scene.probe(POLICIES[cell.policy], ratio * bound_per_s, cell.seed, 0.0)
    return {
        "ratio": round(found[0], 4),
        "per_s": round(found[0] * bound_per_s, 2),
        "queries": queries,
        **_figures(scene, found[1]),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def _figures(scene: Scene, report: Report | None) -> Row:
    if report is None:
        return {}
    (model,) = report.models.values()
    return {
        "within": round(model.within_slo, 5),
        "worst": round(search.max_lateness(report, scene.slo_ms), 2),
        "large_late": round(search.late_share_large([report]), 4),
    }


def _highest(cell: Cell, queries: int, hint: float | None) -> tuple[float, Report | None]:
    """The highest rate as a share of the bound, and its report."""
    step, share = STEPS.get(cell.policy, STEP), SHARES[cell.what]
    bound_per_s = _bound_per_s(cell.model, cell.factor, cell.layout)
    most, least = round(HIGHEST / step), round(LEAST / step)
    reports: dict[int, Report] = {}

    def holds(level: int, of_queries: int = queries) -> bool:
        scene = _scene(cell, of_queries)
        report = scene.probe(POLICIES[cell.policy], level * step * bound_per_s, cell.seed, share)
        if not search.holds(report, scene.slo_ms, share):
            return False
        reports[level] = report
        return True

    start = round(hint / step) if hint else _bisected(lambda level: holds(level, queries // SHORTER), least, most)
    level = 0 if start <= least and not holds(least) else gallop(holds, start, max(round(0.02 / step), 1), most)
    return (level * step, reports[level]) if level >= least else (0.0, None)


def _bisected(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Roughly the highest level that holds, `low` if none does."""
    while high - low > 3:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def gallop(holds: Callable[[int], bool], start: int, stride: int, most: int) -> int:
    """The highest level of 1..most that holds, 0 if none does, looked for from `start` outwards; then it is halved."""
    if holds(start):
        low, high = start, most + 1
        while low + stride <= most:
            if not holds(low + stride):
                high = low + stride
                break
            low, stride = low + stride, 2 * stride
    else:
        low, high = 0, start
        while high - stride > 0:
            if holds(high - stride):
                low = high - stride
                break
            high, stride = high - stride, 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
