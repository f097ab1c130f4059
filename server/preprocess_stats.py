"""What is counted of preprocessing, a request at a time, and its Prometheus series."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.counts import LATENCY_BOUNDS_NS, Histogram

# Why a request did not get through. `unreachable`, `overloaded`: by the estimate, before it was begun.
REASONS = ("bad_input", "pool_full", "unreachable", "overloaded", "cancelled", "internal")
ModelId = tuple[str, str]  # name, version
LABELS = ["model", "version"]


class PreprocessStats(Collector):
    """Told by the event loop, scraped from wherever. `waiting`: jobs that are not done, `threads`: of the pool."""

    def __init__(self, waiting: Callable[[], int], threads: int) -> None:
        self._waiting = waiting
        self._threads = threads
        self._elements: Counter[ModelId] = Counter()
        self._stages: dict[ModelId, dict[str, Histogram]] = defaultdict(dict)
        self._errors: dict[ModelId, Counter[str]] = defaultdict(lambda: Counter(dict.fromkeys(REASONS, 0)))

    def done(self, model: ModelId, elements: int, took_ns: Mapping[str, int]) -> None:
        """A request's elements are all done. `took_ns`: by stage, summed over them; `queue`: until the first began."""
        self._elements[model] += elements
        stages = self._stages[model]
        for stage, ns in took_ns.items():
            if stage not in stages:
                stages[stage] = Histogram(LATENCY_BOUNDS_NS)
            stages[stage].observe(ns)
        self._errors[model]  # so that its series are there, at zero

    def failed(self, model: ModelId, reason: str) -> None:
        """One of REASONS."""
        self._errors[model][reason] += 1

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("migserve_preprocess_waiting", "Requests in preprocessing", value=self._waiting())
        yield GaugeMetricFamily("migserve_preprocess_threads", "Of the preprocessing pool", value=self._threads)
        elements = CounterMetricFamily("migserve_preprocess_elements", "Elements preprocessed", labels=LABELS)
        for model, count in self._elements.items():
            elements.add_metric(model, count)
        seconds = HistogramMetricFamily(
            "migserve_preprocess_seconds",
            "Time of a request's stage, summed over its elements; queue: until the first one is begun",
            labels=[*LABELS, "stage"],
        )
        for model, stages in self._stages.items():
            for stage, histogram in stages.items():
                seconds.add_metric([*model, stage], histogram.cumulative(1e9), histogram.total / 1e9)
        errors = CounterMetricFamily(
            "migserve_preprocess_errors", "Requests that did not get through preprocessing", labels=[*LABELS, "reason"]
        )
        for model, reasons in self._errors.items():
            for reason, count in reasons.items():
                errors.add_metric([*model, reason], count)
        yield from (elements, seconds, errors)
