"""Padded work by how lengths are cut into buckets.

    python -m benchmarks.buckets            prints the tables
    python -m benchmarks.buckets --write    also keeps them, in benchmarks/results/buckets.md

Clips of 0.5 to 30 s, in steps of 0.1 s. An item costs what one of a full batch of bert-base costs on 1g.5gb, 30 s taken
as 512 tokens: the only table by length that there is. The edges are learned on one sample and judged on another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from partitioner.latency import shipped_measurements
from partitioner.lengths import length_tables
from scheduler.buckets import best_edges, exact_edges, padded_work

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


def quantiles(weights: Weights, count: int) -> tuple[float, ...]:
    lengths = sorted(weights)
    shares = np.cumsum([weights[length] for length in lengths]) / sum(weights.values())
    inner = {lengths[int(np.searchsorted(shares, part / count))] for part in range(1, count)}
    return tuple(sorted(inner | {LONGEST_S}))


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


def main(
    count: int = 20_000,
    write: Annotated[bool, typer.Option("--write", help="Keep the table in benchmarks/results/buckets.md.")] = False,
) -> None:
    """Cuts, and prints what padding costs."""
    console = Console(record=True, width=100)
    console.print(table(count))
    if write:
        RESULTS.write_text(
            f"# Length buckets\n\n`python -m benchmarks.buckets --write`\n\n```\n{console.export_text()}```\n"
        )


if __name__ == "__main__":
    typer.run(main)
