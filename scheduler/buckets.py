"""Length buckets: where to cut, so that padding wastes the least. Pure.

An item is padded to the upper edge of its bucket, and costs what an item of that length costs. PREBA (arXiv 2411.19114)
cuts every 2.5 s; ElasticBatch (TPDS 35(10), 2024) says only that bucketization makes the choices few. Ours: with the
lengths l1 < l2 < ... that were seen, weights w and cost c of an item, dynamic programming finds the edges exactly:
    best[k][j] = min over i < j of best[k-1][i] + (w[i+1] + ... + w[j]) c(l_j)
An edge is always a length that was seen: any other could be lowered to the next one below, at no loss.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Costs = Callable[[float], float]
_Vector = np.ndarray[Any, np.dtype[np.float64]]

# What weighs less than this is forgotten.
NEGLIGIBLE = 1e-3
# New edges must save this share of the work, or the old ones stay: new shapes cost caches and compilations.
WORTH_IT = 0.02
# Items of batch jobs count as much as requests at most, since these have less time; where requests are few, as so many.
OF_JOBS = 1000.0


def padded_work(edges: Sequence[float], weights: Mapping[float, float], cost: Costs) -> float:
    """The work of items with these weights by length. Longer ones than the last edge are padded to nothing."""
    return sum(weight * cost(padded_length(length, edges)) for length, weight in weights.items())


def padded_length(length: float, edges: Sequence[float]) -> float:
    """The least edge that is long enough; the length itself where there is none."""
    place = bisect_left(edges, length)
    return edges[place] if place < len(edges) else length


def exact_edges(weights: Mapping[float, float], cost: Costs, count: int) -> tuple[float, ...]:
    """Upper edges of at most `count` buckets with the least padded work. Raises ValueError for no lengths or buckets.

    `weights`: of items by length; `cost`: of an item padded to a length, never less for a longer one.
    """
    lengths, total, costs = _prepared(weights, cost)
    if count < 1:
        raise ValueError("there must be at least one bucket")
    size = len(lengths)
    best = np.concatenate([[0.0], total[1:] * costs])
    cuts = [np.zeros(size + 1, dtype=int)]
    for _ in range(1, min(count, size)):
        best, cut = _one_more(best, total, costs)
        cuts.append(cut)
    return _edges(lengths, [*reversed(cuts)])


def best_edges(weights: Mapping[float, float], cost: Costs, cost_of_bucket: float) -> tuple[float, ...]:
    """As many buckets as pay: the least padded work plus `cost_of_bucket` each, in the unit of weight x cost."""
    lengths, total, costs = _prepared(weights, cost)
    size = len(lengths)
    best, cut = np.zeros(size + 1), np.zeros(size + 1, dtype=int)
    for last in range(1, size + 1):
        work = best[:last] + (total[last] - total[:last]) * costs[last - 1] + cost_of_bucket
        cut[last] = int(work.argmin())
        best[last] = work[cut[last]]
    return _edges(lengths, [cut] * size)


def _prepared(weights: Mapping[float, float], cost: Costs) -> tuple[list[float], _Vector, _Vector]:
    """Lengths, the weight of all up to each (from none on), and the cost at each."""
    lengths = sorted(length for length, weight in weights.items() if weight > 0)
    if not lengths:
        raise ValueError("no lengths were seen")
    total = np.concatenate([[0.0], np.cumsum([weights[length] for length in lengths])])
    return lengths, total, np.array([cost(length) for length in lengths])


def _one_more(best: _Vector, total: _Vector, costs: _Vector) -> tuple[_Vector, Any]:
    """With one bucket more: the least work of the first j lengths, and how many of them lie below the last bucket."""
    more, cut = best.copy(), np.zeros(len(best), dtype=int)
    for last in range(1, len(best)):
        work = best[:last] + (total[last] - total[:last]) * costs[last - 1]
        cut[last] = int(work.argmin())
        more[last] = work[cut[last]]
    return more, cut


def _edges(lengths: Sequence[float], cuts: Sequence[Any]) -> tuple[float, ...]:
    """Walks back from the longest length."""
    found, last = [], len(lengths)
    for cut in cuts:
        if last == 0:
            break
        found.append(lengths[last - 1])
        last = int(cut[last])
    return tuple(reversed(found))


class SeenLengths:
    """A histogram that forgets: a count loses half its weight every half-life. Times are seconds of one clock."""

    def __init__(self, half_life_s: float, start_s: float) -> None:
        self._half_life_s = half_life_s
        self._now_s = start_s
        self._weights: dict[float, float] = {}

    def observe(self, now_s: float, items: Mapping[float, int]) -> None:
        """Adds items by length, that came since the last call. A clock that jumps back counts as standing still."""
        decay = 0.5 ** (max(0.0, now_s - self._now_s) / self._half_life_s)
        self._now_s = max(now_s, self._now_s)
        kept = {length: weight * decay for length, weight in self._weights.items()}
        for length, count in items.items():
            kept[length] = kept.get(length, 0.0) + count
        self._weights = {length: weight for length, weight in kept.items() if weight > NEGLIGIBLE}

    def weights(self) -> dict[float, float]:
        return dict(sorted(self._weights.items()))


def together(of_requests: Mapping[float, float], of_jobs: Mapping[float, float]) -> dict[float, float]:
    """Weights by length of requests and of batch jobs: a few requests do not outweigh a job, nor a large job them."""
    asked, items = sum(of_requests.values()), sum(of_jobs.values())
    scale = min(1.0, max(asked, OF_JOBS) / items) if items else 0.0
    found = dict(of_requests)
    for length, weight in of_jobs.items():
        found[length] = found.get(length, 0.0) + scale * weight
    return found


def relearned(
    edges: tuple[float, ...], weights: Mapping[float, float], cost: Costs, count: int, longest: float
) -> tuple[float, ...]:
    """The edges to use from now on: the same ones, unless new ones save at least 2 % of the work seen lately.

    `longest`: what a client may send; the last edge, so that everything has a bucket. What is queued keeps the bucket
    it has: edges are a value, and whoever made a queue from them may empty it as it is.
    """
    seen = {length: weight for length, weight in weights.items() if weight > 0}
    if not seen:
        return edges or (longest,)
    # So little that it moves no other edge, but enough to be the last one.
    found = exact_edges({longest: NEGLIGIBLE**2} | seen, cost, count)
    saved = 1 - padded_work(found, seen, cost) / padded_work(edges, seen, cost) if edges else 1.0
    return found if saved >= WORTH_IT else edges
