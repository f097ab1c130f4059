"""Metrics: plain integers counted as batches end, turned into Prometheus series only when scraped.

Triton's `nv_inference_*` and `nv_gpu_*` series, which its dashboards read, and our own under `migserve_`: latency
as histograms per model and slice, slice states with their reasons, refusals by reason.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from partitioner.geometry import Slice
from partitioner.nvml_types import Gpu, GpuEvent, GpuReadings, SliceMemory
from partitioner.reconfigure import Outcome, Result
from scheduler.channel import name_and_version
from scheduler.driver import BatchRecord
from scheduler.fleet import Fleet
from scheduler.messages import Reason
from scheduler.staff import State, Worker
from server.counts import NS_PER_MS, Histogram, ModelStats, SliceStats

# Triton's reasons of nv_inference_request_failure.
_TRITON_REASON = {
    "cancelled": "CANCELED",
    Reason.MODEL_FAILED: "BACKEND",
    Reason.CRASHED: "BACKEND",
    "invalid": "OTHER",
    "unsupported": "OTHER",
}

ModelId = tuple[str, str]  # name, version

COUNT_AT_ONCE = 64


# GPU, GPU instance, MIG profile, worker: a slice that comes again after a re-cut counts on.
SliceLabels = tuple[str, str, str, str]


class Metrics(Collector):
    """Observes the driver, and is scraped. `watch` tells it of what it cannot count itself."""

    def __init__(self) -> None:
        self._models: dict[ModelId, ModelStats] = defaultdict(ModelStats)
        self._uncounted: list[BatchRecord] = []
        self._wall_offset_ns = time.time_ns() - time.monotonic_ns()
        self._slices: dict[tuple[ModelId, SliceLabels], SliceStats] = defaultdict(SliceStats)
        self._ids: dict[str, ModelId] = {}
        self._places: Sequence[tuple[Slice, int]] = ()
        self._workers: Callable[[], Sequence[Worker]] = lambda: ()
        self._gpus: Callable[[], Sequence[Gpu]] = lambda: ()
        self._readings: dict[str, GpuReadings] = {}
        self._models_now: Callable[[], Iterable[tuple[ModelId, bool, bool, int]]] = lambda: ()
        self._arena: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._slices_read: dict[tuple[str, ...], tuple[SliceMemory | None, float | None]] = {}
        self._xids: Counter[tuple[str, str, str]] = Counter()
        self._recuts: Counter[str] = Counter()
        self._recut_seconds = 0.0
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def register(self, more: Collector) -> None:
        """Shows the series of another one, too."""
        self._registry.register(more)

    def watch(
        self,
        fleet: Fleet,
        gpus: Callable[[], Sequence[Gpu]],
        models_now: Callable[[], Iterable[tuple[ModelId, bool, bool, int]]],
        arena: Callable[[], tuple[int, int]],
    ) -> None:
        """`models_now`: (model, ready, emulated, unfinished requests) of each; `arena`: bytes used and in all."""
        self._places, self._workers = fleet.places, lambda: fleet.workers
        self._gpus, self._models_now, self._arena = gpus, models_now, arena

    def add(self, collector: Collector) -> None:
        """Somebody else's series beside these."""
        self._registry.register(collector)

    def stats(self, model: str, version: str) -> ModelStats:
        """Everything counted of one model version."""
        self._count_all()
        return self._models[model, version]

    def gpu_read(self, uuid: str, readings: GpuReadings | None) -> None:
        """What NVML says of a GPU now; None where it says nothing any more."""
        if readings is None:
            self._readings.pop(uuid, None)
        else:
            self._readings[uuid] = readings

    def slice_read(self, where: Slice, memory: SliceMemory | None, busy: float | None) -> None:
        """What NVML says of a slice now: its memory, the share of its SMs that work; None where it says nothing."""
        self._slices_read[_slice_labels(where, 0)[:3]] = (memory, busy)

    def xid(self, event: GpuEvent) -> None:
        """The driver told an error."""
        self._xids[event.gpu_uuid, "" if event.gi_id is None else str(event.gi_id), str(event.code)] += 1

    def recut(self, outcome: Outcome, seconds: float) -> None:
        """A change of layouts has ended."""
        self._recuts[outcome.result] += 1
        self._recut_seconds += seconds

    # ---- observing ----

    def batch_done(self, record: BatchRecord) -> None:
        """Kept as it is until many have come or somebody looks: counting one by one delays the next request."""
        self._uncounted.append(record)
        if len(self._uncounted) >= COUNT_AT_ONCE:
            self._count_all()

    def _count_all(self) -> None:
        records, self._uncounted = self._uncounted, []
        for record in records:
            self._count(record)

    def _count(self, record: BatchRecord) -> None:
        model = self._id(record.model)
        stats = self._models[model]
        slice_stats = self._slices[model, _slice_labels(*self._places[record.worker_id])]
        for request_ns, queue_ns in zip(record.request_ns, record.queue_ns, strict=True):
            slice_stats.request.observe(request_ns)
            slice_stats.queue.observe(queue_ns)
        count = len(record.request_ns)
        slice_stats.compute.observe(record.infer_ns)
        slice_stats.batch.observe(record.items)
        stats.success += count
        stats.items += record.items
        stats.batches += 1
        stats.late += record.late
        stats.request_ns += sum(record.request_ns)
        stats.queue_ns += sum(record.queue_ns)
        stats.input_ns += count * record.input_ns
        stats.infer_ns += count * record.infer_ns
        stats.output_ns += count * record.output_ns
        stats.last_ms = (record.ended_ns + self._wall_offset_ns) // NS_PER_MS
        by_batch = stats.by_batch[record.items]
        by_batch[0] += 1
        by_batch[1] += record.input_ns
        by_batch[2] += record.infer_ns
        by_batch[3] += record.output_ns

    def failed(self, model: ModelId | None, reason: str) -> None:
        """A request that was told an error; None where it named no model that there is."""
        self._models[model or ("", "")].failures[reason] += 1

    def cancelled(self, model: str, *, before_compute: bool) -> None:
        stats = self._models[self._id(model)]
        stats.failures["cancelled"] += 1
        stats.cancelled_before_compute += before_compute

    def _id(self, key: str) -> ModelId:
        """Reloads of a model count on: `name/version#generation` loses its generation."""
        found = self._ids.get(key)
        if found is None:
            found = self._ids[key] = name_and_version(key)
        return found

    # ---- scraping ----

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        self._count_all()
        for model, *_ in self._models_now():
            self._models[model]  # so that all its series are there, at zero, before its first request
        yield from self._collect_triton()
        yield from self._collect_models()
        yield from self._collect_histograms()
        yield from self._collect_workers()
        yield from self._collect_gpus()
        recuts = CounterMetricFamily("migserve_recuts", "Changes of layouts, by how they ended", labels=["result"])
        for result in (Result.APPLIED, Result.RESTORED, Result.NEAREST):
            recuts.add_metric([result], self._recuts[result])
        yield recuts
        yield CounterMetricFamily("migserve_recut_seconds", "Time that they took in all", value=self._recut_seconds)
        used, size = self._arena()
        yield GaugeMetricFamily("migserve_arena_used_bytes", "Arena memory in slots", value=used)
        yield GaugeMetricFamily("migserve_arena_size_bytes", "Arena memory in all", value=size)

    def _collect_triton(self) -> Iterator[Metric]:
        labels = ["model", "version"]
        fields: list[tuple[str, str, Callable[[ModelStats], float]]] = [
            ("nv_inference_request_success", "Requests answered", lambda s: s.success),
            ("nv_inference_count", "Items inferred", lambda s: s.items),
            ("nv_inference_exec_count", "Batches run", lambda s: s.batches),
            (
                "nv_inference_request_duration_us",
                "Sum of whole request times",
                lambda s: s.request_ns // 1000,
            ),
            ("nv_inference_queue_duration_us", "Sum of queue times", lambda s: s.queue_ns // 1000),
            ("nv_inference_compute_input_duration_us", "Sum of input times", lambda s: s.input_ns // 1000),
            ("nv_inference_compute_infer_duration_us", "Sum of compute times", lambda s: s.infer_ns // 1000),
            ("nv_inference_compute_output_duration_us", "Sum of output times", lambda s: s.output_ns // 1000),
        ]
        for name, help_text, value in fields:
            family = Metric(name, help_text, "unknown")  # a "counter" would be renamed to end in _total
            for model, stats in self._models.items():
                family.add_sample(name, dict(zip(labels, model, strict=True)), value(stats))
            yield family
        name = "nv_inference_request_failure"
        family = Metric(name, "Requests not answered, by Triton's reasons", "unknown")
        for model, stats in self._models.items():
            reasons: Counter[str] = Counter()
            for reason, count in stats.failures.items():
                reasons[_TRITON_REASON.get(reason, "REJECTED")] += count
            for reason, count in reasons.items():
                family.add_sample(name, {"model": model[0], "version": model[1], "reason": reason}, count)
        yield family

    def _collect_models(self) -> Iterator[Metric]:
        labels = ["model", "version"]
        pending = GaugeMetricFamily("nv_inference_pending_request_count", "Requests not ended", labels=labels)
        ready = GaugeMetricFamily("migserve_model_ready", "1: a slice serves it", labels=[*labels, "emulated"])
        for model, is_ready, emulated, unfinished in self._models_now():
            pending.add_metric(model, unfinished)
            ready.add_metric([*model, str(emulated).lower()], float(is_ready))
        refused = CounterMetricFamily(
            "migserve_requests_not_answered",
            "Requests that ended without an answer",
            labels=[*labels, "reason"],
        )
        late = CounterMetricFamily("migserve_late_requests", "Requests answered after their due time", labels=labels)
        dropped = CounterMetricFamily(
            "migserve_requests_cancelled_before_compute", "Clients that left in time", labels=labels
        )
        for model, stats in self._models.items():
            for reason, count in stats.failures.items():
                refused.add_metric([*model, reason], count)
            late.add_metric(model, stats.late)
            dropped.add_metric(model, stats.cancelled_before_compute)
        yield from (pending, ready, refused, late, dropped)

    def _collect_histograms(self) -> Iterator[Metric]:
        labels = ["model", "version", *_SLICE_LABELS]
        families: list[tuple[HistogramMetricFamily, Callable[[SliceStats], Histogram], float]] = [
            (
                HistogramMetricFamily("migserve_queue_seconds", "Arrival to start of its first batch", labels=labels),
                lambda s: s.queue,
                1e9,
            ),
            (
                HistogramMetricFamily("migserve_compute_seconds", "Time of a batch in the model", labels=labels),
                lambda s: s.compute,
                1e9,
            ),
            (
                HistogramMetricFamily("migserve_request_seconds", "Arrival to answer", labels=labels),
                lambda s: s.request,
                1e9,
            ),
            (
                HistogramMetricFamily("migserve_batch_items", "Items of a batch", labels=labels),
                lambda s: s.batch,
                1,
            ),
        ]
        for family, histogram, per_unit in families:
            for (model, where), stats in self._slices.items():
                found = histogram(stats)
                family.add_metric([*model, *where], found.cumulative(per_unit), found.total / per_unit)
            yield family

    def _collect_workers(self) -> Iterator[Metric]:
        state = GaugeMetricFamily("migserve_slice_state", "1 for the state it is in", labels=[*_SLICE_LABELS, "state"])
        restarts = CounterMetricFamily("migserve_worker_restarts", "Restarts of a worker", labels=_SLICE_LABELS)
        info = GaugeMetricFamily(
            "migserve_slice_info", "What a slice is", labels=[*_SLICE_LABELS, "UUID", "gpu_name", "simulated"]
        )
        out = GaugeMetricFamily("migserve_slice_out", "Why a slice is out", labels=[*_SLICE_LABELS, "reason"])
        for worker in self._workers():
            values = _slice_labels(worker.where, worker.index)
            for each in State:
                state.add_metric([*values, each], float(worker.state == each))
            restarts.add_metric(values, max(worker.starts - 1, 0))
            where = worker.where
            info.add_metric([*values, where.gpu_uuid, where.gpu_name, str(where.simulated).lower()], 1)
            if worker.state == State.OUT:
                out.add_metric([*values, worker.reason], 1)
        yield from (state, restarts, info, out)

    def _collect_gpus(self) -> Iterator[Metric]:
        fields: list[tuple[str, str, Callable[[GpuReadings], float | None]]] = [
            ("nv_gpu_utilization", "Share of time in use, 0 to 1", lambda r: r.utilization),
            ("nv_gpu_power_usage", "Watts", lambda r: r.power_w),
            ("nv_gpu_power_limit", "Watts", lambda r: r.power_limit_w),
            ("nv_gpu_memory_total_bytes", "Bytes", lambda r: r.memory_total_bytes),
            ("nv_gpu_memory_used_bytes", "Bytes", lambda r: r.memory_used_bytes),
            ("nv_energy_consumption", "Joules since the driver was loaded", lambda r: r.energy_j),
        ]
        for name, help_text, field in fields:
            family = GaugeMetricFamily(name, help_text, labels=["gpu_uuid"])
            for uuid, readings in self._readings.items():
                value = field(readings)
                if value is not None:  # not supported is unknown, never zero
                    family.add_metric([uuid], value)
            yield family
        yield from self._collect_slices()
        xids = CounterMetricFamily("migserve_xid", "Errors of the driver", labels=["gpu_uuid", "GPU_I_ID", "code"])
        for labels, count in self._xids.items():
            xids.add_metric(labels, count)
        yield xids
        info = GaugeMetricFamily("migserve_gpu_info", "What a GPU is", labels=["gpu", "UUID", "name", "simulated"])
        for gpu in self._gpus():
            info.add_metric([str(gpu.index), gpu.uuid, gpu.name, str(gpu.simulated).lower()], 1)
        yield info

    def _collect_slices(self) -> Iterator[Metric]:
        labels = _SLICE_LABELS[:3]
        total = GaugeMetricFamily("migserve_slice_memory_total_bytes", "Memory of a slice", labels=labels)
        used = GaugeMetricFamily("migserve_slice_memory_used_bytes", "Of it in use", labels=labels)
        busy = GaugeMetricFamily("migserve_slice_utilization", "Share of its SMs that work, by GPM", labels=labels)
        there = {_slice_labels(each, 0)[:3] for gpu in self._gpus() for each in gpu.slices}
        for values, (memory, share) in self._slices_read.items():
            if values not in there:
                continue  # it went with a re-cut
            if memory is not None:
                total.add_metric(values, memory.total_bytes)
            if memory is not None and memory.used_bytes is not None:
                used.add_metric(values, memory.used_bytes)
            if share is not None:  # not supported is unknown, never zero
                busy.add_metric(values, share)
        yield from (total, used, busy)


# As DCGM's exporter labels them; `worker` tells apart several on one slice.
_SLICE_LABELS = ["gpu", "GPU_I_ID", "GPU_I_PROFILE", "worker"]


def _slice_labels(where: Slice, index: int) -> SliceLabels:
    gi_id = "" if where.gi_id is None else str(where.gi_id)
    return str(where.gpu_index), gi_id, where.mig_profile, str(index)
