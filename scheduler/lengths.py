"""Models with an axis that varies: which lengths are measured, what batches are padded to, and what they take. Pure.

A batch is padded to the upper edge of its length bucket (`buckets.py` chooses the edges). Latency is measured at a few
lengths; between two of them it is taken to be linear.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cache

import msgspec

from partitioner import latency
from partitioner.lengths import LengthTable
from scheduler import buckets
from scheduler.tensors import Signature

Points = tuple[tuple[int, float], ...]
# (length, (batch, ms) points) by ascending length.
ByLength = tuple[tuple[int, Points], ...]

# Lengths that are measured, each half of the next one.
MEASURED = 6
# Edges and what was seen are rounded up to such a part of the longest: a shape of its own for each length costs caches.
STEPS = 128
NS_PER_MS = 1_000_000


class Lengths(msgspec.Struct, frozen=True):
    """How items of different lengths share batches: zeros behind an item's end change nothing.

    All that varies in the model's inputs is this length. `longest`: longer ones are refused. `edges`: what batches are
    padded to, ascending, the last one `longest`; empty: at most `count` are learned. `length`: the model's INT64 input
    that is told each item's length, `mask`: that which has 1 for what is there and 0 for padding; "" where it has none.
    """

    longest: int
    edges: tuple[int, ...] = ()
    count: int = 6
    length: str = ""
    mask: str = ""


def shortest(signature: Signature) -> int:
    """A length that the model surely takes."""
    return max(signature.sample_dims, default=1)


def to_measure(lengths: Lengths, shortest: int) -> tuple[int, ...]:
    """Ascending."""
    if lengths.edges:
        return lengths.edges
    halves = (lengths.longest >> n for n in range(MEASURED))
    return tuple(sorted({max(length, min(shortest, lengths.longest)) for length in halves}))


def stepped(length: int, longest: int) -> int:
    """Rounded up, so that there are few different ones."""
    step = -(-longest // STEPS)
    return min(-(-length // step) * step, longest)


def table(by_length: ByLength, max_batch: int) -> LengthTable:
    """Times in ms of batches 1..max_batch at the lengths that were measured.

    A shorter length is never slower: what disturbs a measurement makes it longer.
    """
    rows: list[tuple[float, ...]] = []
    for _, points in reversed(by_length):
        times = latency.per_batch(points, max_batch)
        rows.append(tuple(map(min, times, rows[-1] if rows else times)))
    return LengthTable(tuple(length for length, _ in by_length), tuple(reversed(rows)))


def batch_ms(known: LengthTable, length: float) -> tuple[float, ...]:
    """By batch, at any length; what is longer than was measured takes longer in proportion."""
    lengths, rows = known
    place = bisect_left(lengths, length)
    if place == len(lengths):
        return tuple(ms * length / lengths[-1] for ms in rows[-1])
    if place == 0:
        return rows[0]
    share = (length - lengths[place - 1]) / (lengths[place] - lengths[place - 1])
    return tuple(low + share * (high - low) for low, high in zip(rows[place - 1], rows[place], strict=True))


def latency_ns(by_length: ByLength, edges: Sequence[int], max_batch: int) -> tuple[int, ...]:
    """A row for each edge, one after the other, as `messages.Serves` has them."""
    known = table(by_length, max_batch)
    return tuple(int(ms * NS_PER_MS) for edge in edges for ms in batch_ms(known, edge))


def item_costs(tables: Iterable[ByLength], max_batch: int) -> buckets.Costs:
    """The least time, in ms, of an item padded to a length, in a batch of the best size; over all kinds of workers."""
    known = [table(by_length, max_batch) for by_length in tables]

    @cache
    def cost(length: float) -> float:
        return sum(min(ms / batch for batch, ms in enumerate(batch_ms(each, length), start=1)) for each in known)

    return cost


def first_edges(lengths: Lengths, shortest: int, costs: buckets.Costs) -> tuple[int, ...]:
    """Before any request was seen: all lengths are as likely."""
    if lengths.edges:
        return lengths.edges
    step = -(-lengths.longest // STEPS)
    seen: dict[float, float] = dict.fromkeys(range(max(step, shortest), lengths.longest, step), 1.0)
    seen[lengths.longest] = 1.0
    return tuple(int(edge) for edge in buckets.exact_edges(seen, costs, lengths.count))
