"""Latency-bounded throughput of the scheduling policies on W-paper: all policies, layouts, models, SLO factors, GPUs.

    make bench-policies                          prints the table, and whether the goals are reached
    make bench-policies ARGS="--write"           also keeps it, in benchmarks/results/policies.md and policies.jsonl
    make bench-policies ARGS="--quick"           short runs, one seed: a few minutes, for a rough idea
    make bench-policies ARGS="--policy pool --gpus 2 --factor 2"       measures only these, and prints all that is known

What was measured is kept in build/, cell by cell, and not measured again unless the code that it depends on has
changed: it may be stopped at any time. It takes hours of one core, and all cores unless --jobs says otherwise. What
was kept with --write in policies.jsonl counts as measured too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import cells
from benchmarks.cells import FULL, MODELS, QUICK, SHARES, Cell, measure
from benchmarks.kept import Kept, measure_all
from benchmarks.policies_text import GOAL_FACTOR, OURS, Figures, text
from scheduler.policies.named import POLICIES

KEPT = Path("build/bench-policies.jsonl")
RESULTS = Path(__file__).parent / "results"
RAW = RESULTS / "policies.jsonl"
FACTORS, GPUS = (2.0, 1.5, 3.0), (2, 8)
# Seeds; marginal takes several times as long as the others.
SEEDS, SEEDS_ELSEWHERE, SEEDS_OF_SLOW = 3, 2, 1
SLOW = ("marginal",)
# More than one seed, and noise, only on so many layouts of each model, the best ones.
BEST = 3
LATE_LOADS = ("0.7", "0.8", "0.9")
ABOUT = """`make bench-policies ARGS=--write`; each figure's run, its seeds and how long it took are in policies.jsonl.

Queries of one model, Poisson, 1 to 32 items each (log-normal, ln-median 6, sigma 0.9), on A100s as measured
(one process a slice). The SLO is the factor times the time of 32 items on a whole GPU. A figure is the highest
rate at which 95 % of the queries (of those with p99: 99 %) are in time *and every one ends within ten SLOs*,
nothing refused, as a share of the layout's fluid bound: every slice always at its best batch within the SLO. It
can be above 1: late queries may take larger batches. Found in steps of 0.005 of the bound for pool and elsa, of
0.02 for the others, rounded down; ".1" is the least that was tried. A run has {length.queries} queries or more
and lasts for {length.slos} SLOs or more. Service times are exact but where noise is said: log-normal, 5 %, and
1 % of the batches a quarter longer in the mean. Medians over the seeds, ± half of what lies between the highest
and the lowest; without ± there was one seed. More than one seed, noise, p99 and loads were measured on the best
layouts only, those of the first seed. static has its defaults: batches of up to half an SLO on the smallest
slice, a delay of a tenth. The optimal planner's layout is that for SLO factor 3: with less it finds no plan,
since it gives a batch at most 55 % of the SLO.
"""
NOTES = (
    """What is known of why goals are missed:

- Noise costs more than two points with densenet121 and mobilenetv2 on 2 GPUs: one item alone takes a third of the SLO
  there, so after a batch that took longer than it should little can be saved.
- ELSA is nearer to the bound with bert than with the other models: an item takes a twentieth of the SLO, and small
  batches are nearly as good as large ones. 1.4 times ELSA would be above the bound there.
- Large queries: 2 GPUs do 15 to 20 queries within an SLO, so at load 0.8 Poisson arrivals often bring more than they
  can do; somebody must be late, and a large query late makes room for several small ones. Fewer are late in all.
- No goal, but weak: p99 with noise on small slices (8 GPUs of 7x1g: resnet50, densenet121, vgg16), where it fails at
  any load. Probably this: a large query is cut into several batches that each take most of the SLO, as those make
  the most items per time, also where nothing else waits; 1 % of the batches take a quarter longer, and one is enough.
""",
)


def hint(cell: Cell, kept: Kept[Cell]) -> float | None:
    """What another seed has found, or the same with or without noise."""
    if cell.what not in SHARES:
        return None
    near = [
        row["ratio"]
        for known, row in kept.by_case.items()
        if row["ratio"] and replace(known, noisy=cell.noisy, seed=cell.seed) == cell
    ]
    return sum(near) / len(near) if near else None


# ---- what is measured, in this order ----


@dataclass(frozen=True, slots=True)
class Selection:
    """`seeds`: at most so many; `thorough`: all of them on all layouts, and not only on the best ones."""

    models: Sequence[str]
    gpus: Sequence[int]
    factors: Sequence[float]
    policies: Sequence[str]
    seeds: int
    thorough: bool

    def places(self, policies: Sequence[str]) -> Iterator[tuple[str, str, int]]:
        """Of these policies, those selected, each with every model and number of GPUs."""
        return (
            (policy, model, gpus)
            for policy in policies
            if policy in self.policies
            for gpus in self.gpus
            for model in self.models
        )

    def seeds_of(self, policy: str, factor: float) -> int:
        return min(self.seeds, SEEDS_OF_SLOW if policy in SLOW else SEEDS if factor == GOAL_FACTOR else SEEDS_ELSEWHERE)


def groups(selection: Selection, kept: Kept[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """What is measured, in this order; each group is made when those before it are there."""
    for factor in selection.factors:
        yield f"SLO factor {factor:g}, all layouts", everywhere(selection, factor, 0)
        for seed in range(selection.seeds if factor == GOAL_FACTOR else 0):
            yield f"seed {seed}, the best layouts", on_the_best(selection, Figures(kept.rows()), seed)
        for seed in range(selection.seeds if factor == GOAL_FACTOR else 0):
            yield f"seed {seed}, p99 and loads", at_the_best(selection, Figures(kept.rows()), seed)
    for seed in range(1, selection.seeds if selection.thorough else 1):
        for factor in selection.factors:
            yield f"SLO factor {factor:g}, seed {seed}", everywhere(selection, factor, seed)


def everywhere(selection: Selection, factor: float, seed: int) -> list[Cell]:
    """The highest rate at p95 on every layout."""
    return [
        Cell(model, gpus, factor, layout, policy, False, "p95", seed)
        for policy, model, gpus in selection.places(list(POLICIES))
        if seed < selection.seeds_of(policy, factor)
        for layout in cells.layouts(model, gpus)
    ]


def _best(figures: Figures, model: str, gpus: int, policy: str, count: int) -> list[str]:
    return [each.layout for each in figures.best_layouts(model, gpus, GOAL_FACTOR, policy)[:count]]


def on_the_best(selection: Selection, figures: Figures, seed: int) -> list[Cell]:
    """Further seeds, with noise: where the first seed was highest."""
    found = []
    for policy, model, gpus in selection.places((OURS, "elsa")):
        for layout in _best(figures, model, gpus, policy, BEST):
            found += [
                Cell(model, gpus, GOAL_FACTOR, layout, policy, noisy, "p95", seed)
                for noisy in (False, True)
                if policy == OURS or not noisy
            ]
    return found


def at_the_best(selection: Selection, figures: Figures, seed: int) -> list[Cell]:
    """p99, and who is late at what load, on the best layout of each."""
    found = []
    for policy, model, gpus in selection.places((OURS, "elsa")):
        for layout in _best(figures, model, gpus, policy, 1):
            whats = ("p99", *LATE_LOADS)
            found += [Cell(model, gpus, GOAL_FACTOR, layout, policy, False, what, seed) for what in whats]
            if policy == OURS:
                found.append(Cell(model, gpus, GOAL_FACTOR, layout, policy, True, "p99", seed))
    return found


def main(
    model: Annotated[list[str] | None, typer.Option(help="Of these only.")] = None,
    gpus: Annotated[list[int] | None, typer.Option(help="2, 8, or any number, of these only.")] = None,
    factor: Annotated[list[float] | None, typer.Option(help="SLO factors.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Of these only.")] = None,
    seeds: Annotated[int, typer.Option(help="At most so many.")] = SEEDS,
    thorough: Annotated[bool, typer.Option("--thorough", help="All seeds on all layouts.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Short runs, one seed; kept apart.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
    minutes: Annotated[float, typer.Option(help="Then it stops, and prints what there is.")] = float("inf"),
    take_over: Annotated[
        int, typer.Option(help="Figures of older code count, if so many of them, drawn by chance, are the same now.")
    ] = 0,
    write: Annotated[bool, typer.Option("--write", help="Keep the page in benchmarks/results/policies.md.")] = False,
) -> None:
    """Measures what is missing, and prints all that is known."""
    length = QUICK if quick else FULL
    selection = Selection(
        model or MODELS, gpus or GPUS, factor or FACTORS, policy or list(POLICIES), 1 if quick else seeds, thorough
    )
    kept = Kept(Cell, (KEPT, RAW), {"length": [length.queries, length.slos]}, POLICIES)
    for told in kept.take_over(lambda case: measure(case, length, hint(case, kept)), take_over) if take_over else ():
        print(told)
    until = time.monotonic() + 60 * minutes
    for what, group in groups(selection, kept):
        measure_all(group, kept, lambda cell: partial(measure, cell, length, hint(cell, kept)), jobs, until, what)
    everything = Selection(MODELS, GPUS, FACTORS, list(POLICIES), SEEDS, False)
    wanted = [cell for _, group in groups(everything, kept) for cell in group]
    missing = sum(cell not in kept.by_case for cell in wanted)
    state = f"**Not complete**: {missing} of {len(wanted)} figures have not been measured yet.\n" if missing else ""
    page = text(Figures(kept.rows()), ABOUT.format(length=length), [state, *NOTES])
    print(page)
    if write:
        (RESULTS / "policies.md").write_text(page)
        kept.write(RAW)


if __name__ == "__main__":
    typer.run(main)
