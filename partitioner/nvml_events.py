"""What happens on GPUs by itself, and GPM measurements. Functions over a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pynvml

from partitioner.nvml_errors import GpuLostError, NotFoundError, NotSupportedError, NvmlError
from partitioner.nvml_session import NvmlSession, address
from partitioner.nvml_types import EventKind, GpuEvent

NOT_AN_INSTANCE = 0xFFFFFFFF
_KINDS = {
    pynvml.nvmlEventTypeXidCriticalError: EventKind.XID,
    pynvml.nvmlEventMigConfigChange: EventKind.MIG_CONFIG,
}
_SM_UTIL = pynvml.NVML_GPM_METRIC_SM_UTIL
# NVML wants more than 100 ms between two samples.
GPM_WINDOW_S = 0.12


class Events:
    """A queue of events that NVML keeps; nothing is lost between two waits."""

    def __init__(self, session: NvmlSession, handle: Any, uuids: dict[int, str]) -> None:
        self._session = session
        self._handle = handle
        self._uuids = uuids

    def wait(self, timeout_s: float) -> GpuEvent | None:
        """The next event, or None after `timeout_s`. Raises GpuLostError."""
        try:
            data = self._session.call("nvmlEventSetWait_v2", self._handle, max(1, round(1e3 * timeout_s)))
        except NvmlError as error:
            if error.code == "TIMEOUT":
                return None
            raise
        return GpuEvent(
            kind=_KINDS[int(data.eventType)],
            gpu_uuid=self._uuid(data.device),
            code=int(data.eventData),
            gi_id=_instance_id(data.gpuInstanceId),
            ci_id=_instance_id(data.computeInstanceId),
        )

    def _uuid(self, device: Any) -> str:
        """A GPU tells its UUID no more when it is lost, just when it has an event to tell."""
        try:
            return str(self._session.call("nvmlDeviceGetUUID", device))
        except GpuLostError:
            return self._uuids[address(device)]


@contextmanager
def listen(session: NvmlSession) -> Iterator[Events]:
    """Registers on GPUs, never on MIG devices: those are not supported. Unsupported kinds of events are left out."""
    handle = session.call("nvmlEventSetCreate")
    try:
        uuids = {}
        for _, gpu, uuid in session.gpus():
            uuids[address(gpu)] = uuid
            kinds = session.supported("nvmlDeviceGetSupportedEventTypes", gpu) or 0
            wanted = sum(kind for kind in _KINDS if kinds & kind)
            if wanted:
                session.call("nvmlDeviceRegisterEvents", gpu, wanted, handle)
        yield Events(session, handle, uuids)
    finally:
        session.call("nvmlEventSetFree", handle)


def utilization(session: NvmlSession, gpu_uuid: str, sleep: Callable[[float], None]) -> dict[int, float | None]:
    """Share of SMs busy by GPU instance id; None where unknown."""
    gpu = session.gpu(gpu_uuid)
    gi_ids = {int(session.call("nvmlDeviceGetGpuInstanceId", device)) for device in session.mig_devices(gpu)}
    busy: dict[int, float | None] = dict.fromkeys(sorted(gi_ids))
    support = session.supported("nvmlGpmQueryDeviceSupport", gpu)
    if support is None or not support.isSupportedDevice:
        return busy
    with _samples(session, 2 * len(gi_ids)) as samples:
        first, second = dict(zip(busy, samples, strict=False)), dict(zip(busy, samples[len(gi_ids) :], strict=False))
        taken = {gi_id for gi_id in busy if _take(session, gpu, gi_id, first[gi_id])}
        sleep(GPM_WINDOW_S)
        for gi_id in taken:
            if _take(session, gpu, gi_id, second[gi_id]):
                busy[gi_id] = _between(session, first[gi_id], second[gi_id])
    return busy


@contextmanager
def _samples(session: NvmlSession, count: int) -> Iterator[list[Any]]:
    samples: list[Any] = []
    try:
        samples.extend(session.call("nvmlGpmSampleAlloc") for _ in range(count))
        yield samples
    finally:
        for sample in samples:
            session.call("nvmlGpmSampleFree", sample)


def _take(session: NvmlSession, gpu: Any, gi_id: int, sample: Any) -> bool:
    """False for an instance that is gone meanwhile, or that cannot be measured."""
    try:
        session.call("nvmlGpmMigSampleGet", gpu, gi_id, sample)
    except (NotFoundError, NotSupportedError):
        return False
    return True


def _between(session: NvmlSession, first: Any, second: Any) -> float | None:
    asked = pynvml.c_nvmlGpmMetricsGet_t()
    asked.version = pynvml.NVML_GPM_METRICS_GET_VERSION
    asked.numMetrics = 1
    asked.sample1, asked.sample2 = first, second
    asked.metrics[0].metricId = _SM_UTIL
    if session.supported("nvmlGpmMetricsGet", asked) is None:
        return None
    metric = asked.metrics[0]
    return metric.value / 100 if metric.nvmlReturn == pynvml.NVML_SUCCESS else None


def _instance_id(number: int) -> int | None:
    return None if number == NOT_AN_INSTANCE else int(number)
