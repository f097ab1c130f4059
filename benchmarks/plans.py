"""The planners on ParvaGPU's six scenarios and on 100 random ones: GPUs needed, time to solve, and whether plans hold.

    python -m benchmarks.plans              prints the tables
    python -m benchmarks.plans --write      also keeps them, in benchmarks/results/plans.md

Every plan is simulated: Poisson arrivals at the stated rates, the scheduler's own core with late binding, service times
drawn around the table (3 %, and 1 % of the batches a quarter longer in the mean).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import parvagpu
from partitioner import capacity, gangs, latency, optimal
from partitioner.catalog import GPU_MODELS
from partitioner.cuts import slice_profiles
from partitioner.gangs import GangTable
from partitioner.optimal import Choices
from partitioner.plans import ModelDemand, Plan
from scheduler import workload
from scheduler.report import Report
from scheduler.simulator import simulate
from server.plan_command import read_demand
from server.simulate_setup import planned_slices

RESULTS = Path(__file__).parent / "results" / "plans.md"
GPU = GPU_MODELS["A100-80GB"]
SIZES = [profile.gpcs for profile in slice_profiles(GPU)]
PROCESSES = 5
SCENARIOS = ("S1", "S2", "S3", "S4", "S5", "S6")
PUBLISHED = (2, 3, 5, 7, 13, 16)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A plan, how long it took, and the share of its worst model's requests that were within the SLO."""

    plan: Plan
    seconds: float
    worst_share: float


def outcome(demands: Sequence[ModelDemand], tables: Mapping[str, GangTable], choices: Choices, queries: int) -> Outcome:
    """Plans, and simulates about so many queries."""
    begin = time.perf_counter()
    plan = optimal.plan(demands, tables, GPU, choices)
    seconds = time.perf_counter() - begin
    return Outcome(plan, seconds, simulated(plan, demands, tables, queries).worst_within_slo)


def simulated(plan: Plan, demands: Sequence[ModelDemand], tables: Mapping[str, GangTable], queries: int) -> Report:
    """About so many queries; up to four times as many where the rarest model would have less than 300."""
    total = sum(demand.rate_per_s for demand in demands)
    rarest = min(demand.rate_per_s for demand in demands)
    seconds = min(max(queries / total, 300 / rarest), 4 * queries / total)
    arrivals = workload.merge(
        *(workload.poisson(each.model, each.rate_per_s, seconds, seed) for seed, each in enumerate(demands))
    )
    return simulate(planned_slices(plan, tables), arrivals, slo_ms={demand.model: demand.slo_ms for demand in demands})


def bound(demands: Sequence[ModelDemand], tables: Mapping[str, GangTable], slo_share: float) -> float:
    """The fluid bound with batches within that share of the SLO."""
    classes = capacity.query_classes(demands)
    return capacity.fluid_bound(capacity.capacities(classes, tables, SIZES, PROCESSES, slo_share), GPU)


def scenario_table(queries: int) -> Table:
    measured = latency.shipped_measurements()
    tables = gangs.gang_tables(measured)
    kept = gangs.gang_tables(latency.without_suspects(measured)[0])
    shown = Table("scenario", *SCENARIOS, title=f"A100-80GB needed, up to {PROCESSES} processes of a model in a slice")
    demands = [read_demand(None, name) for name in SCENARIOS]
    shown.add_row(
        "ParvaGPU's rule, run by us", *(str(parvagpu.gpus_needed(each, tables, PROCESSES)) for each in demands)
    )
    shown.add_row("ParvaGPU, as published", *map(str, PUBLISHED))
    for name, share in (("fluid bound, batches within 45 % of the SLO", 0.45), ("fluid bound, the whole SLO", 1.0)):
        shown.add_row(name, *(f"{bound(each, tables, share):.2f}" for each in demands))
    ways = (
        ("a slice for one model, 45 %", tables, Choices(PROCESSES, exclusive=True, slo_share=0.45)),
        ("a slice for one model, share chosen", tables, Choices(PROCESSES, exclusive=True)),
        ("slices shared", tables, Choices(PROCESSES)),
        ("slices shared, no suspect points", kept, Choices(PROCESSES)),
    )
    for name, table, choices in ways:
        found = [outcome(each, table, choices, queries) for each in track(demands, description=name, transient=True)]
        shown.add_section()
        shown.add_row(name, *(f"[bold]{len(each.plan.gpus)}[/bold]" for each in found))
        shown.add_row("  worst model within its SLO", *(f"{each.worst_share:.2%}" for each in found))
        shown.add_row("  seconds to solve", *(f"{each.seconds:.2f}" for each in found))
    return shown


def random_demands(count: int, seed: int, tables: Mapping[str, GangTable]) -> Iterator[list[ModelDemand]]:
    """1 to 11 models, 0.5 to 60 GPUs of work divided among them at random, SLOs of 4 to 60 times the quickest batch."""
    generator = np.random.default_rng(seed)
    models = sorted(tables)
    for _ in range(count):
        chosen = generator.choice(models, int(generator.integers(1, 12)), replace=False)
        gpus = float(generator.uniform(0.5, 60))
        parts = generator.dirichlet(np.ones(len(chosen)))
        yield [
            _random_demand(generator, str(model), gpus * part, tables)
            for model, part in zip(chosen, parts, strict=True)
        ]


def _random_demand(
    generator: np.random.Generator, model: str, gpus: float, tables: Mapping[str, GangTable]
) -> ModelDemand:
    """So many GPUs' worth of a model, where it is cheapest, with batches within 45 % of its SLO."""
    quickest_ms = min(gang.latency_ms for of_size in tables[model].by_gpcs.values() for gang in of_size)
    slo_ms = round(quickest_ms * float(np.exp(generator.uniform(np.log(4), np.log(60)))), 1)
    (query_class,) = capacity.query_classes([ModelDemand(model, 1, slo_ms)])
    can = capacity.capacities([query_class], tables, SIZES, PROCESSES, 0.45)
    per_gpu = GPU.compute_slices * max(can.rate_per_s(query_class, gpcs) / gpcs for gpcs in SIZES)
    return ModelDemand(model, max(1.0, round(per_gpu * gpus, 1)), slo_ms)


def random_table(count: int, seed: int, queries: int) -> Table:
    tables = gangs.gang_tables(latency.shipped_measurements())
    ours, rule, bounds, whole = [], [], [], []
    for demands in track(list(random_demands(count, seed, tables)), description="random scenarios", transient=True):
        ours.append(outcome(demands, tables, Choices(PROCESSES), queries))
        rule.append(parvagpu.gpus_needed(demands, tables, PROCESSES))
        bounds.append(bound(demands, tables, 0.45))
        whole.append(bound(demands, tables, 1.0))
    gpus = [len(each.plan.gpus) for each in ours]
    pairs = list(zip(gpus, rule, strict=True))
    held = [each.worst_share for each in ours]
    shown = Table(
        "", "", title=f"{count} random scenarios, seed {seed}: {min(gpus)} to {max(gpus)} GPUs, slices shared"
    )
    shown.add_row("fewer GPUs than ParvaGPU's rule", str(sum(us < them for us, them in pairs)))
    shown.add_row("as many", str(sum(us == them for us, them in pairs)))
    shown.add_row("more", str(sum(us > them for us, them in pairs)))
    shown.add_row("GPUs in all: ours, the rule's", f"{sum(gpus)}, {sum(rule)}")
    for name, found in (("within 45 % of the SLO", bounds), ("the whole SLO", whole)):
        ratios = [us / least for us, least in zip(gpus, found, strict=True)]
        shown.add_row(f"GPUs over the fluid bound, {name}: median", f"{statistics.median(ratios):.3f}")
    shown.add_row("the rule's over the bound within 45 %: median", _median_ratio(rule, bounds))
    shown.add_row("worst model within its SLO: least, median", f"{min(held):.2%}, {statistics.median(held):.2%}")
    shown.add_row("plans with at least 99 % for every model", str(sum(share >= 0.99 for share in held)))
    seconds = [each.seconds for each in ours]
    shown.add_row("seconds to solve: median, most", f"{statistics.median(seconds):.2f}, {max(seconds):.2f}")
    for number, (us, them) in enumerate(pairs):
        if us > them or held[number] < 0.99:
            shown.add_row(f"scenario {number}", f"{us} GPUs, the rule {them}; worst model {held[number]:.2%}")
    return shown


def _median_ratio(values: Sequence[int], bounds: Sequence[float]) -> str:
    return f"{statistics.median(value / least for value, least in zip(values, bounds, strict=True)):.3f}"


def main(
    count: Annotated[int, typer.Option(help="Random scenarios.")] = 100,
    seed: int = 2024,
    queries: Annotated[
        int, typer.Option(help="About how many are simulated for a plan; of S1 to S6 ten times.")
    ] = 20_000,
    write: Annotated[bool, typer.Option("--write", help="Keep the tables in benchmarks/results/plans.md.")] = False,
) -> None:
    """Plans, simulates, and prints the tables."""
    console = Console(record=True, width=120)
    console.print(scenario_table(10 * queries))
    console.print(random_table(count, seed, queries))
    if write:
        RESULTS.write_text(f"# Plans\n\n`python -m benchmarks.plans --write`\n\n```\n{console.export_text()}```\n")


if __name__ == "__main__":
    typer.run(main)
