"""What is counted of a model version: plain integers, histograms, and the protocol's statistics made of them. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from scheduler.messages import Reason

NS_PER_MS = 1_000_000
LATENCY_BOUNDS_NS = [
    int(ms * NS_PER_MS) for ms in (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1e3, 2.5e3, 5e3, 1e4)
]
BATCH_BOUNDS = [1, 2, 4, 8, 16, 32, 64, 128, 256]

# Everything that can be told to a client instead of an answer.
FAILURES = [
    *Reason,
    "invalid",
    "not_found",
    "too_large",
    "unsupported",
    "encoding",
    "arena_full",
    "pool_full",
    "internal",
    "cancelled",
]


class Histogram:
    """Counts by upper bound, and the sum, of integers."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[int]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0

    def observe(self, value: int) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def cumulative(self, per_unit: float) -> list[tuple[str, float]]:
        """Prometheus' buckets; `per_unit` of the integers make one of the exposed unit."""
        buckets, below = [], 0
        for bound, count in zip([*self._bounds, None], self.counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound is None else str(bound / per_unit), float(below)))
        return buckets


class ModelStats:
    """Cumulative counts of one model version, as the statistics extension wants them."""

    def __init__(self) -> None:
        self.success = 0
        self.late = 0  # answered, after their due time
        self.items = 0
        self.batches = 0
        # From zero on: what first appears at 1 is no increase to Prometheus.
        self.failures: Counter[str] = Counter(dict.fromkeys(FAILURES, 0))
        self.cancelled_before_compute = 0
        self.request_ns = 0
        self.queue_ns = 0
        self.input_ns = 0
        self.infer_ns = 0
        self.output_ns = 0
        self.last_ms = 0
        self.by_batch: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0, 0])  # items -> count, in, infer, out


class SliceStats:
    """Histograms of one model version on one worker."""

    def __init__(self) -> None:
        self.queue = Histogram(LATENCY_BOUNDS_NS)
        self.compute = Histogram(LATENCY_BOUNDS_NS)
        self.request = Histogram(LATENCY_BOUNDS_NS)
        self.batch = Histogram(BATCH_BOUNDS)


def statistics(model: str, version: str, stats: ModelStats) -> dict[str, Any]:
    """One entry of `model_stats`, with every key that perf_analyzer asks for."""

    def duration(count: int, ns: int) -> dict[str, int]:
        return {"count": count, "ns": ns}

    success = stats.success
    failed = sum(stats.failures.values())
    return {
        "name": model,
        "version": version,
        "last_inference": stats.last_ms,
        "inference_count": stats.items,
        "execution_count": stats.batches,
        "inference_stats": {
            "success": duration(success, stats.request_ns),
            "fail": duration(failed, 0),
            "queue": duration(success, stats.queue_ns),
            "compute_input": duration(success, stats.input_ns),
            "compute_infer": duration(success, stats.infer_ns),
            "compute_output": duration(success, stats.output_ns),
            "cache_hit": duration(0, 0),
            "cache_miss": duration(0, 0),
        },
        "batch_stats": [
            {
                "batch_size": items,
                "compute_input": duration(count, input_ns),
                "compute_infer": duration(count, infer_ns),
                "compute_output": duration(count, output_ns),
            }
            for items, (count, input_ns, infer_ns, output_ns) in sorted(stats.by_batch.items())
        ],
        "memory_usage": [],
        "response_stats": {},
    }
