"""Latency-bounded throughput of the scheduling policies on W-paper, in the simulator, on measured A100 tables.

    python -m benchmarks.policies             prints the table
    python -m benchmarks.policies --write     also keeps it, in benchmarks/results/policies.md

W-paper: Poisson queries of one model, log-normal items (ln-median 6, sigma 0.9, clipped to 1..32); the SLO is twice
the time of 32 items on a whole GPU. A rate counts if 95 % of all queries end within the SLO and every one within ten
of them; nothing is refused. Ratios are to the fluid bound of the layout: every slice always at its
best batch that ends within the SLO.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from partitioner import latency
from scheduler import search, workload
from scheduler.domain import Pool
from scheduler.mix import Mix, Stream
from scheduler.policies import Policy, named
from scheduler.search import Scene
from scheduler.simulator import EXACT, Noise, SimSlice

RESULTS = Path(__file__).parent / "results" / "policies.md"
MODELS = ("mobilenetv2", "resnet50", "bert", "vgg16", "densenet121")
LAYOUTS = ((1, 1, 1, 1, 1, 1, 1), (4, 3), (3, 2, 1, 1), (4, 2, 1))
GPUS = 2
LARGEST_BATCH = 64
MOST_ITEMS = 32
SLO_FACTOR = 2.0
WITHIN = 0.95
NOISE = Noise(0.05, 0.01, 0.25)
OURS = next(iter(named.POLICIES))
POLICIES: tuple[tuple[str, Callable[[Pool], Policy], Noise], ...] = (
    *((name, policy, EXACT) for name, policy in named.POLICIES.items()),
    (f"{OURS}, 5 % noise", named.POLICIES[OURS], NOISE),
)


def slices_of(model: str, layout: Sequence[int]) -> list[SimSlice]:
    """`GPUS` GPUs cut alike, all serving one model."""
    measured = latency.shipped(model)
    return [
        SimSlice(f"gpu{gpu}/{index}", gpcs, {model: latency.per_batch(measured.points(gpcs), LARGEST_BATCH)})
        for gpu in range(GPUS)
        for index, gpcs in enumerate(layout)
    ]


def table(queries: int, seeds: int) -> Table:
    shown = Table("model", "layout, twice", "SLO ms", "bound /s", *(name for name, *_ in POLICIES))
    best: dict[str, list[float]] = {name: [] for name, *_ in POLICIES}
    for model in track(MODELS, transient=True):
        slo_ms = SLO_FACTOR * latency.per_batch(latency.shipped(model).points(7), MOST_ITEMS)[-1]
        of_model: dict[str, list[float]] = {name: [] for name, *_ in POLICIES}
        for layout in LAYOUTS:
            slices = slices_of(model, layout)
            load, slo = Mix([Stream(model, 1.0, workload.W_PAPER)]), {model: slo_ms}
            bound = search.fluid_bound_per_s(slices, load, slo)
            for name, policy, noise in POLICIES:
                scene = Scene(slices, load, slo, queries, noise)
                found = [search.highest_rate(scene, policy, WITHIN, bound, seed) for seed in range(seeds)]
                of_model[name].append(search.median_rate(found) / bound)
            ratios = [f"{of_model[name][-1]:.2f}" for name, *_ in POLICIES]
            shown.add_row(model, "+".join(f"{gpcs}g" for gpcs in layout), f"{slo_ms:.1f}", f"{bound:.0f}", *ratios)
        for name, ratios_of_layouts in of_model.items():
            best[name].append(max(ratios_of_layouts))
    shown.add_section()
    shown.add_row("median of the best", "", "", "", *(f"{statistics.median(each):.2f}" for each in best.values()))
    return shown


def main(write: Annotated[bool, typer.Option()] = False, queries: int = 10_000, seeds: int = 2) -> None:
    """Prints the table; --write keeps it."""
    shown = table(queries, seeds)
    console = Console(record=True, width=120)
    console.print(shown)
    if write:
        text = f"""# Policies on W-paper

{__doc__ or ""}
{queries} queries a probe, medians of {seeds} seeds, {GPUS} GPUs.

```
{console.export_text()}```
"""
        RESULTS.write_text(text)


if __name__ == "__main__":
    typer.run(main)
