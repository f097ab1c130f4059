"""The autopilot's loop: watches the traffic, proposes layouts, and applies those that are worth it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import structlog

from partitioner import autopilot
from partitioner.autopilot import Proposal, Rules
from partitioner.demand import Demand, Kind, Traffic, job_demand
from partitioner.geometry import GpuModel, IllegalLayoutError, Layout, PlacedProfile, Placement
from partitioner.latency import LatencyTable
from partitioner.nvml_errors import NvmlError
from partitioner.nvml_types import Gpu
from partitioner.plans import ModelDemand, PlanError
from partitioner.programme import InfeasibleError
from partitioner.reconfigure import RefusedChangeError, Result
from scheduler.driver import Driver
from scheduler.lengths import Points
from server.layouts import Layouts
from server.repository import Model, ModelState, Repository
from server.settings import Settings

log = structlog.get_logger(__name__)

# A target that could not be reached is not tried again for so many dwell times.
RETRY_DWELLS = 10


@dataclass(frozen=True, slots=True)
class View:
    """What the autopilot sees and thinks now. `proposal` is None where `note` says why there is none."""

    traffic: Mapping[str, Traffic]
    proposal: Proposal | None
    note: str


class Autopilot:
    """`view` is its latest look at things. It changes layouts only where the setting `replan` is `auto`."""

    def __init__(
        self,
        settings: Settings,
        layouts: Layouts,
        repository: Repository,
        driver: Driver,
        jobs: Callable[[], Iterable[tuple[str, float, float]]] = tuple,
    ) -> None:
        """`jobs`: (model, items that are left, seconds to the deadline) of those that run."""
        self._jobs = jobs
        self._settings = settings
        self._layouts = layouts
        self._repository = repository
        self._driver = driver
        self._begin()
        self._failed: dict[str, list[str]] = {}  # the target that could not be reached, by GPU
        self._retry_at_s = 0.0
        off = "traffic is not watched: --replan propose thinks about layouts, --replan auto changes them, too"
        self.view = View({}, None, off if settings.replan == "off" else "no traffic seen yet")

    def _begin(self) -> None:
        self._started_s = time.monotonic()
        self._demand = Demand(self._settings.replan_half_life_secs, self._started_s)

    async def run(self) -> None:
        """Until cancelled."""
        self._begin()  # minutes of loading models are no minutes without traffic
        while True:
            await asyncio.sleep(self._settings.replan_interval_secs)
            try:
                await self.observe()
                proposal = self.view.proposal
                if self._settings.replan == "auto" and proposal is not None and proposal.worthwhile:
                    await self._change(proposal)
            except Exception:
                log.exception("the autopilot failed; it goes on")

    async def observe(self) -> View:
        """Takes in what has arrived since the last time, and thinks again."""
        counts: Counter[Kind] = Counter()
        for (key, items, length), count in self._driver.take_arrivals().items():
            counts[Kind(key.partition("/")[0], items, length)] += count
        self._demand.observe(time.monotonic(), counts)
        traffic = self._demand.traffic()
        try:
            self.view = View(traffic, await self._propose(traffic), "")
        except (PlanError, InfeasibleError, IllegalLayoutError, _NothingToPlanError) as reason:
            self.view = View(traffic, None, str(reason))
        return self.view

    async def _propose(self, traffic: Mapping[str, Traffic]) -> Proposal:
        gpu, current = _machine(self._layouts.gpus)
        models = {model.name: model for model in self._repository.models() if model.state == ModelState.READY}
        demands, tables = [], {}
        for name, seen in traffic.items():
            model = models.get(name)
            table = _table(model, self._repository.measured_ms(model)) if model is not None else None
            if model is not None and table is not None and model.serving.slo_ms is not None:
                demands.append(ModelDemand(name, seen.rate_per_s, model.serving.slo_ms, dict(seen.items)))
                tables[name] = table
        for name, items, within_s in self._jobs():
            model = models.get(name)
            table = _table(model, self._repository.measured_ms(model)) if model is not None else None
            if table is not None:
                largest = max(batch for points in table.by_gpcs.values() for batch in points)
                demand = job_demand(name, items, within_s, largest)
                demands.append(demand)
                tables[demand.model] = table
        if not demands:
            raise _NothingToPlanError(
                "no model with traffic has both a latency table and an slo_ms in its serving.yaml, and no job runs: "
                "nothing to plan by"
            )
        settings = self._settings
        rules = Rules(
            dwell_s=settings.replan_dwell_secs,
            horizon_s=settings.replan_horizon_secs,
            change_s=self._layouts.round_s,
        )
        changed_s = self._layouts.changed_at_s
        since_s = time.monotonic() - (self._started_s if changed_s is None else changed_s)
        # In a thread: with many models it takes half a second, in which requests go on.
        return await asyncio.to_thread(
            autopilot.propose, demands, tables, gpu, current, settings.planner, rules, since_s
        )

    async def _change(self, proposal: Proposal) -> None:
        wanted = {uuid: [placed.profile for placed in layout] for uuid, layout in proposal.layouts.items()}
        names = {uuid: sorted(profile.name for profile in profiles) for uuid, profiles in wanted.items()}
        if names == self._failed and time.monotonic() < self._retry_at_s:
            return
        log.info("re-cutting by itself", reason=proposal.reason)
        try:
            outcome = await self._layouts.apply_profiles(wanted)
        except (RefusedChangeError, NvmlError, OSError) as error:
            log.warning("re-cut not begun", reason=str(error))
            await self._layouts.refresh()  # it may be that they are no more what we took them for
            return
        if outcome.result in (Result.RESTORED, Result.NEAREST):
            self._failed = names
            self._retry_at_s = time.monotonic() + RETRY_DWELLS * self._settings.replan_dwell_secs


class _NothingToPlanError(Exception):
    """There is nothing that a plan could be made from. The message says why."""


def _machine(gpus: list[Gpu]) -> tuple[GpuModel, dict[str, Layout]]:
    """The one kind of GPU, and how each is cut."""
    cut = [gpu for gpu in gpus if gpu.mig_enabled and gpu.model is not None]
    kinds = {gpu.model for gpu in cut if gpu.model is not None}
    if len(kinds) != 1:
        names = ", ".join(sorted(kind.name for kind in kinds)) or "none with MIG on"
        raise _NothingToPlanError(f"planning needs GPUs of one kind with MIG on; there are {names}")
    gpu = kinds.pop()
    return gpu, {
        each.uuid: tuple(PlacedProfile(gpu.profile(s.mig_profile), Placement(s.start, s.size)) for s in each.slices)
        for each in cut
    }


def _table(model: Model, measured_ms: Mapping[str, Points]) -> LatencyTable | None:
    """What is known of a model's times by slice size: given with it, or measured where it was loaded."""
    if model.source is not None and model.source.latency_ms is not None:
        return LatencyTable({gpcs: dict(points) for gpcs, points in model.source.latency_ms.items()})
    measured = {
        int(kind.partition("g.")[0]): dict(points)
        for kind, points in measured_ms.items()
        if kind.partition("g.")[0].isdigit()
    }
    return LatencyTable(measured) if measured else None
