"""Padded work by how lengths are cut into buckets, and what a scheduler makes of it.

    python -m benchmarks.buckets            prints the tables
    python -m benchmarks.buckets --write    also keeps them, in benchmarks/results/buckets.md

Clips of 0.5 to 30 s, in steps of 0.1 s. An item costs what one of a full batch of bert-base costs on 1g.5gb, 30 s taken
as 512 tokens: the only table by length that there is. The edges are learned on one sample and judged on another.

The second table is W-length in the simulator: texts of 16 to 512 tokens for bert-base, one a query, on two A100s of
3g+2g+1g+1g. Latencies are linear between the lengths that were measured (32, 64, 128, 256, 512), and no less below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from partitioner.latency import shipped_measurements
from partitioner.lengths import length_tables
from scheduler.buckets import best_edges, exact_edges, padded_work
from scheduler.policies.pool import OnePool
from scheduler.search import Scene, fluid_bound_per_s, highest_rate, median_rate
from scheduler.simulator import SimSlice
from server.simulate_setup import Asked, prepare

RESULTS = Path(__file__).parent / "results" / "buckets.md"
SHORTEST_S, LONGEST_S, TOKENS_PER_S = 0.5, 30.0, 512 / 30
BATCH = 32
# For the best number: a bucket more must save this share of the work that there is without any padding.
BUCKET_SHARE = 0.01
Weights = Mapping[float, float]


def clips(kind: str, generator: np.random.Generator, count: int) -> Weights:
    """How many clips of each length in s."""
    if kind == "log-normal":
        seconds = generator.lognormal(np.log(6), 0.7, count)
    elif kind == "bimodal":
        short = generator.random(count) < 0.7
        seconds = np.where(short, generator.normal(3, 0.8, count), generator.normal(20, 3, count))
    else:
        seconds = generator.uniform(SHORTEST_S, LONGEST_S, count)
    rounded = np.round(np.clip(seconds, SHORTEST_S, LONGEST_S), 1)
    return {float(length): float(times) for length, times in Counter(rounded.tolist()).items()}


def item_cost() -> Callable[[float], float]:
    """ms of an item in a full batch, by length in s: between measured lengths linear."""
    rows = [each for each in shipped_measurements("migprofiler") if each.gpu == "A100-40GB"]
    table = length_tables(rows, "bert-base", BATCH)[1]
    per_item = [row[BATCH - 1] / BATCH for row in table.rows]
    # From nothing on in proportion to the length.
    return lambda seconds: float(np.interp(seconds * TOKENS_PER_S, [0, *table.lengths], [0.0, *per_item]))


def powers_of_two() -> tuple[float, ...]:
    return (1.0, 2.0, 4.0, 8.0, 16.0, LONGEST_S)


def quantiles(weights: Weights, count: int, longest: float = LONGEST_S) -> tuple[float, ...]:
    lengths = sorted(weights)
    shares = np.cumsum([weights[length] for length in lengths]) / sum(weights.values())
    inner = {lengths[int(np.searchsorted(shares, part / count))] for part in range(1, count)}
    return tuple(sorted(inner | {longest}))


def ending(edges: tuple[float, ...]) -> tuple[float, ...]:
    """Everything has a bucket."""
    return edges if edges[-1] == LONGEST_S else (*edges[:-1], LONGEST_S)


def table(count: int) -> Table:
    cost = item_cost()
    shown = Table("buckets", *KINDS, title=f"padding, as a share of the work without it; {count} clips")
    fixed = tuple(float(edge) for edge in np.arange(2.5, LONGEST_S + 1, 2.5))
    found: dict[str, list[str]] = {}
    for kind in KINDS:
        learned = clips(kind, np.random.default_rng(1), count)
        judged = clips(kind, np.random.default_rng(2), count)
        needed = sum(weight * cost(length) for length, weight in judged.items())
        share = BUCKET_SHARE * sum(weight * cost(length) for length, weight in learned.items())
        pays = best_edges(learned, cost, share)
        ways = {
            "none": (LONGEST_S,),
            "powers of two, 6": powers_of_two(),
            "quantiles, 6": quantiles(learned, 6),
            "exact, 6": exact_edges(learned, cost, 6),
            "every 2.5 s, 12": fixed,
            "quantiles, 12": quantiles(learned, 12),
            "exact, 12": exact_edges(learned, cost, 12),
            "exact, as many as pay": pays,
        }
        for name, edges in ways.items():
            wasted = padded_work(ending(edges), judged, cost) / needed - 1
            note = f" ({len(edges)})" if "pay" in name else ""
            found.setdefault(name, []).append(f"{wasted:.1%}{note}")
    for name, row in found.items():
        shown.add_row(name, *row)
    return shown


KINDS = ("log-normal", "bimodal", "uniform")


# ---- W-length in the simulator ----


def cut_by(slices: Sequence[SimSlice], edges: tuple[int, ...]) -> list[SimSlice]:
    """The same slices, with these upper edges of buckets."""
    found = []
    for each in slices:
        ((model, lengths),) = each.lengths.items()
        rows = np.array(each.tables[model]).reshape(len(lengths), -1)
        cut = [float(np.interp(edge, lengths, times)) for edge in edges for times in rows.T]
        found.append(SimSlice(each.name, each.gpcs, {model: cut}, lengths={model: edges}))
    return found


def token_edges(scene: Scene) -> dict[str, tuple[int, ...]]:
    """What is compared, learned from texts that are not those of the runs."""
    ((model, lengths),) = scene.slices[0].lengths.items()
    rows = np.array(scene.slices[0].tables[model]).reshape(len(lengths), -1)
    per_item = rows[:, BATCH - 1] / BATCH

    def cost(tokens: float) -> float:
        return float(np.interp(tokens, lengths, per_item))

    weights: Weights = {float(tokens): share for tokens, share in scene.load.lengths[model].items()}
    share = BUCKET_SHARE * sum(weight * cost(tokens) for tokens, weight in weights.items())
    ways = {
        "none": (512.0,),
        "powers of two, 5": (32.0, 64.0, 128.0, 256.0, 512.0),
        "every 42 tokens (2.5 s), 12": (*(float(edge) for edge in range(42, 500, 42)), 512.0),
        "quantiles, 5": quantiles(weights, 5, 512.0),
        "exact, 5": exact_edges(weights, cost, 5),
        "quantiles, 12": quantiles(weights, 12, 512.0),
        "exact, 12": exact_edges(weights, cost, 12),
        "exact, as many as pay": best_edges(weights, cost, share),
    }
    return {name: tuple(int(edge) for edge in edges) for name, edges in ways.items()}


def w_length_table(seeds: int) -> Table:
    """The highest rate with 95 % of the queries in time, under the default policy."""
    setup = prepare(Asked(workload="w-length"))
    ways = token_edges(setup.scene)
    rates = {}
    for name, edges in track(ways.items(), "W-length", console=Console(stderr=True)):
        scene = replace(setup.scene, slices=cut_by(setup.scene.slices, edges))
        bound_per_s = fluid_bound_per_s(scene.slices, scene.load, scene.slo_ms)
        found = [highest_rate(scene, OnePool, 0.95, bound_per_s, seed) for seed in range(seeds)]
        rates[name] = median_rate(found), bound_per_s, edges
    shown = Table("buckets", "queries/s", "of exact, 12", "of its fluid bound", "edges, tokens", title="W-length, p95")
    best = rates["exact, 12"][0]
    for name, (rate, bound_per_s, edges) in rates.items():
        told = f"{name} ({len(edges)})" if "pay" in name else name
        shown.add_row(told, f"{rate:.0f}", f"{rate / best:.3f}", f"{rate / bound_per_s:.3f}", " ".join(map(str, edges)))
    return shown


def main(
    count: Annotated[int, typer.Option(help="Clips.")] = 20_000,
    seeds: Annotated[int, typer.Option(help="Of the simulation.")] = 3,
    write: Annotated[bool, typer.Option("--write", help="Keep the table in benchmarks/results/buckets.md.")] = False,
) -> None:
    """Cuts, and prints what padding costs."""
    console = Console(record=True, width=120)
    console.print(table(count))
    console.print(w_length_table(seeds))
    if write:
        RESULTS.write_text(
            f"# Length buckets\n\n`python -m benchmarks.buckets --write`\n\n```\n{console.export_text()}```\n"
        )


if __name__ == "__main__":
    typer.run(main)
