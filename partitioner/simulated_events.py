"""The simulated driver's events (XID, changes of the MIG configuration) and GPM samples."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pynvml

from partitioner.simulated_calls import Session, api
from partitioner.simulated_gpu import RefusedError

WHOLE_GPU = 0xFFFFFFFF
SUPPORTED_EVENTS = pynvml.nvmlEventTypeXidCriticalError | pynvml.nvmlEventMigConfigChange
# A change by another process is seen by looking at the state file again.
FILE_POLL_S = 0.05
GPM_GAP_S = 0.1


@dataclass(slots=True)
class _EventSet:
    registered: dict[str, int] = field(default_factory=dict)
    waiting: deque[tuple[str, int, int, int, int]] = field(default_factory=deque)


@dataclass(slots=True)
class _Sample:
    taken_at: float | None = None
    busy: float | None = None


class EventCalls(Session):
    """Events come to every set that is registered for them; those of one instance only to the privileged."""

    _clock: Callable[[], float]

    def __init__(self) -> None:
        self._event_sets: dict[int, _EventSet] = {}
        self._samples: dict[int, _Sample] = {}
        self._activity: dict[tuple[str, int], float] = {}
        self._numbers = 0
        self._machine.watch(lambda gpu_uuid: self._push(gpu_uuid, pynvml.nvmlEventMigConfigChange, 0))

    # ---- what a test orders ----

    def xid(self, gpu_uuid: str, code: int, gi_id: int | None = None, ci_id: int | None = None) -> None:
        """An XID error of a GPU, or of one of its instances."""
        with self._machine.lock:
            where = (WHOLE_GPU if gi_id is None else gi_id, WHOLE_GPU if ci_id is None else ci_id)
            self._push(gpu_uuid, pynvml.nvmlEventTypeXidCriticalError, code, *where)
            self._machine.changed.notify_all()

    def set_activity(self, gpu_uuid: str, gi_id: int, sm_percent: float) -> None:
        """What GPM shall measure of an instance from now on; on Ampere there is no GPM."""
        self._activity[gpu_uuid, gi_id] = sm_percent

    # ---- events ----

    @api()
    def nvmlDeviceGetSupportedEventTypes(self, handle: Any) -> int:
        self._gpu(handle)
        return int(SUPPORTED_EVENTS)

    @api()
    def nvmlEventSetCreate(self) -> Any:
        self._numbers += 1
        self._event_sets[self._numbers] = _EventSet()
        return self._handles.give("events", self._numbers)

    @api()
    def nvmlDeviceRegisterEvents(self, handle: Any, eventTypes: int, eventSet: Any) -> None:
        device = self._device(handle)
        if device.part is not None or eventTypes & ~SUPPORTED_EVENTS:
            raise RefusedError("NOT_SUPPORTED")
        registered = self._event_set(eventSet).registered
        registered[device.gpu.uuid] = registered.get(device.gpu.uuid, 0) | eventTypes

    @api()
    def nvmlEventSetWait_v2(self, eventSet: Any, timeoutms: int) -> Any:
        found = self._event_set(eventSet)
        deadline = time.monotonic() + timeoutms / 1e3
        while not found.waiting:
            if any(self._machine.states[gpu_uuid].lost for gpu_uuid in found.registered):
                raise RefusedError("GPU_IS_LOST")
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise RefusedError("TIMEOUT")
            self._machine.changed.wait(min(left_s, FILE_POLL_S))
            self._machine.refresh()
        gpu_uuid, kind, code, gi_id, ci_id = found.waiting.popleft()
        device = self._handles.give("gpu", gpu_uuid, self._machine.states[gpu_uuid].epoch)
        return pynvml.c_nvmlEventData_t(device, kind, code, gi_id, ci_id)

    nvmlEventSetWait = nvmlEventSetWait_v2

    @api()
    def nvmlEventSetFree(self, eventSet: Any) -> None:
        self._event_set(eventSet)
        _, (number,) = self._handles.take(eventSet, "events")
        self._handles.drop("events", number)
        del self._event_sets[number]

    # ---- GPM ----

    @api()
    def nvmlGpmQueryDeviceSupport(self, device: Any) -> Any:
        gpu, _ = self._gpu(device)
        measured = any(gpu_uuid == gpu.uuid for gpu_uuid, _ in self._activity)
        support = pynvml.c_nvmlGpmSupport_t()
        support.isSupportedDevice = int(measured and gpu.model.architecture != "ampere")
        return support

    @api()
    def nvmlGpmSampleAlloc(self) -> Any:
        self._numbers += 1
        self._samples[self._numbers] = _Sample()
        return self._handles.give("sample", self._numbers)

    @api()
    def nvmlGpmMigSampleGet(self, device: Any, gpuInstanceId: int, gpmSample: Any) -> Any:
        gpu, state = self._gpu(device)
        if gpu.model.architecture == "ampere":
            raise RefusedError("NOT_SUPPORTED")
        instance = state.by_id(gpuInstanceId)
        sample = self._sample(gpmSample)
        sample.taken_at = self._clock()
        sample.busy = self._activity.get((gpu.uuid, instance.id))
        return gpmSample

    @api()
    def nvmlGpmMetricsGet(self, metricsGet: Any) -> Any:
        first, second = self._sample(metricsGet.sample1), self._sample(metricsGet.sample2)
        if first.taken_at is None or second.taken_at is None or second.taken_at - first.taken_at < GPM_GAP_S:
            raise RefusedError("INVALID_ARGUMENT")
        for index in range(metricsGet.numMetrics):
            metric = metricsGet.metrics[index]
            known = metric.metricId == pynvml.NVML_GPM_METRIC_SM_UTIL and second.busy is not None
            metric.nvmlReturn = pynvml.NVML_SUCCESS if known else pynvml.NVML_ERROR_NOT_SUPPORTED
            metric.value = second.busy if known else 0.0
        return metricsGet

    @api()
    def nvmlGpmSampleFree(self, gpmSample: Any) -> None:
        self._sample(gpmSample)
        _, (number,) = self._handles.take(gpmSample, "sample")
        self._handles.drop("sample", number)
        del self._samples[number]

    # ---- inside ----

    def _event_set(self, handle: Any) -> _EventSet:
        _, (number,) = self._handles.take(handle, "events")
        return self._event_sets[number]

    def _sample(self, handle: Any) -> _Sample:
        _, (number,) = self._handles.take(handle, "sample")
        return self._samples[number]

    def _push(self, gpu_uuid: str, kind: int, code: int, gi_id: int = WHOLE_GPU, ci_id: int = WHOLE_GPU) -> None:
        if gi_id != WHOLE_GPU and not self._privileged:
            return
        for each in self._event_sets.values():
            if each.registered.get(gpu_uuid, 0) & kind:
                each.waiting.append((gpu_uuid, kind, code, gi_id, ci_id))
