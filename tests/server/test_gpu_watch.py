"""The watch over simulated GPUs: what is heard of the others when one is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pynvml
import pytest
from structlog.testing import capture_logs

from partitioner.nvml import NvmlDoor
from partitioner.simulated_nvml import SimulatedNvml, parse_gpus
from partitioner.tenants import Nobody
from server.gpu_watch import GpuWatch
from server.layouts import Layouts
from server.metrics import Metrics

SECONDS = 20.0


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not true():  # noqa: ASYNC110 - what is waited for is the log of another thread
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("listens_again", ["at once", "after the first tries failed"])
def test_a_lost_gpu_ends_the_events_of_the_others_for_a_while_only(listens_again: str) -> None:
    lost, fine = parse_gpus("H100-80GBx2", None)
    sim = SimulatedNvml([lost, fine])
    door = NvmlDoor(sim, simulated=True)

    def waits() -> int:
        return sim.calls.count("nvmlEventSetWait_v2")

    async def scenario() -> None:
        layouts = Layouts(door, Nobody(), None, lambda outcome, seconds: None)
        await layouts.recover()
        watch = asyncio.create_task(GpuWatch(door, layouts, Metrics(), listen_again_s=0.01).run())
        await until(lambda: waits() > 0)
        if listens_again != "at once":
            sim.fail("nvmlEventSetCreate", pynvml.NVML_ERROR_UNKNOWN, times=5)
        sim.lose(lost.uuid)
        await until(lambda: any("for now" in line["event"] for line in log))
        seen = waits()
        await until(lambda: waits() > seen)
        sim.xid(fine.uuid, 31)
        await until(lambda: any(line["event"] == "XID" and line["gpu"] == 1 for line in log))
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)

    with capture_logs() as log:
        asyncio.run(scenario())
    reasons = [line["reason"] for line in log if "for now" in line["event"]]
    assert len(reasons) == (1 if listens_again == "at once" else 2), "each trouble is told once"
    door.close()
