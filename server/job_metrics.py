"""Prometheus' series of batch jobs; by job of those only that have not ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.job_progress import within_ns
from server.job_store import JobState
from server.jobs import Jobs

# `job` is what Prometheus itself calls the target.
_LABELS = ["job_id", "model"]


class JobMetrics(Collector):
    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        states = Counter(job.state for job in self._jobs.all())
        jobs = GaugeMetricFamily("migserve_jobs", "Batch jobs that are kept, by state", labels=["state"])
        for state in JobState:
            jobs.add_metric([state], states[state])
        items = GaugeMetricFamily("migserve_job_items", "Items of a job", labels=_LABELS)
        done = GaugeMetricFamily("migserve_job_items_done", "Of them finished", labels=_LABELS)
        errors = GaugeMetricFamily("migserve_job_items_failed", "Of these with an error", labels=_LABELS)
        slices = GaugeMetricFamily("migserve_job_slices", "Slices that it holds", labels=_LABELS)
        ends = GaugeMetricFamily("migserve_job_ends_seconds", "Until its end, as forecast", labels=_LABELS)
        gpcs = GaugeMetricFamily("migserve_job_gpcs", "Compute slices (GPCs) of these", labels=_LABELS)
        rate = GaugeMetricFamily("migserve_job_items_per_second", "Items that it finishes, of late", labels=_LABELS)
        deadline = GaugeMetricFamily(
            "migserve_job_deadline_seconds", "Until its deadline, below 0 after it", labels=_LABELS
        )
        late = GaugeMetricFamily("migserve_job_late", "1: it cannot end by its deadline", labels=_LABELS)
        for job in self._jobs.all():
            if job.state.is_end:
                continue
            labels = [job.id, job.asked.model]
            items.add_metric(labels, job.asked.items)
            done.add_metric(labels, job.done)
            errors.add_metric(labels, job.errors)
            progress = self._jobs.progress(job)
            slices.add_metric(labels, len(progress.get("slices", ())))
            gpcs.add_metric(labels, progress.get("gpcs", 0))
            rate.add_metric(labels, progress.get("rate_per_s", 0.0))
            if job.asked.deadline_s is not None:
                deadline.add_metric(labels, within_ns(job) / 1e9)
            if "ends_in_s" in progress:
                ends.add_metric(labels, progress["ends_in_s"])
                late.add_metric(labels, float(not progress["in_time"]))
        finished = CounterMetricFamily(
            "migserve_job_items_finished", "Items of jobs, of all that there were", labels=["model", "outcome"]
        )
        for (model, outcome), count in self._jobs.finished.items():
            finished.add_metric([model, outcome], count)
        yield from (jobs, items, done, errors, slices, gpcs, rate, ends, deadline, late, finished)
