"""Watches the GPUs beside serving: what NVML measures, every few seconds, and the events that it tells."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog

from partitioner.nvml import NvmlDoor
from partitioner.nvml_errors import NvmlError
from partitioner.nvml_events import Events
from partitioner.nvml_types import EventKind, GpuEvent, SliceMemory
from server.layouts import Layouts
from server.metrics import Metrics

log = structlog.get_logger(__name__)

READ_INTERVAL_S = 5.0
EVENT_WAIT_S = 0.5
LISTEN_AGAIN_S = 5.0


class GpuWatch:
    """Tells the metrics and the log. Changes nothing: a worker that an XID kills is noticed by its end."""

    def __init__(
        self, door: NvmlDoor, layouts: Layouts, metrics: Metrics, *, listen_again_s: float = LISTEN_AGAIN_S
    ) -> None:
        self._door = door
        self._layouts = layouts
        self._metrics = metrics
        self._listen_again_s = listen_again_s
        self._trouble = ""  # of listening, as it was logged

    async def run(self) -> None:
        """Until cancelled."""
        await asyncio.gather(self._measure(), self._listen())

    async def _measure(self) -> None:
        while True:
            for gpu in self._layouts.gpus:
                try:
                    self._metrics.gpu_read(gpu.uuid, await asyncio.to_thread(self._door.readings, gpu.uuid))
                except NvmlError as error:  # a lost GPU must not end the daemon
                    self._metrics.gpu_read(gpu.uuid, None)
                    log.warning("gpu cannot be read", uuid=gpu.uuid, reason=str(error))
                busy = await asyncio.to_thread(self._busy, gpu.uuid)
                for each in gpu.slices:
                    memory = await asyncio.to_thread(self._memory, each.device_uuid)
                    self._metrics.slice_read(each, memory, busy.get(each.gi_id or 0))
            await asyncio.sleep(READ_INTERVAL_S)

    def _memory(self, device_uuid: str) -> SliceMemory | None:
        try:
            return self._door.memory(device_uuid)
        except NvmlError:
            return None  # it went with a re-cut just now

    def _busy(self, gpu_uuid: str) -> Mapping[int, float | None]:
        try:
            return self._door.utilization(gpu_uuid)
        except NvmlError:
            return {}

    async def _listen(self) -> None:
        """Events, as long as there are the right and the means to have them.

        A GPU that is lost ends the events of all; those of the others come again with a new registration.
        """
        while True:
            try:
                with self._door.events() as events:
                    while True:
                        event = await asyncio.to_thread(_next, events)
                        self._trouble = ""
                        if event is not None:
                            self._tell(event)
            except NvmlError as error:
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    log.warning("no events of GPUs for now", reason=self._trouble, again_in_s=self._listen_again_s)
            await asyncio.sleep(self._listen_again_s)

    def _tell(self, event: GpuEvent) -> None:
        where = next((each for each in self._layouts.gpus if each.uuid == event.gpu_uuid), None)
        gpu = None if where is None else where.index
        if event.kind == EventKind.XID:
            self._metrics.xid(event)
            log.error("XID", gpu=gpu, gpu_instance=event.gi_id, code=event.code)
        elif not self._layouts.changing:
            log.warning("the layout was changed by somebody else", gpu=gpu, uuid=event.gpu_uuid)


def _next(events: Events) -> GpuEvent | None:
    return events.wait(EVENT_WAIT_S)
