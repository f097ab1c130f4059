"""The GPUs as they are cut now, and the one way to change that while the daemon serves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import structlog

from partitioner.geometry import MigProfile, parse_layout
from partitioner.intent import IntentFile
from partitioner.nvml import NvmlDoor
from partitioner.nvml_errors import NvmlError
from partitioner.nvml_types import Gpu
from partitioner.reconfigure import GpuChange, Outcome, Reconfigurer, RefusedChangeError, Result
from partitioner.tenants import Nobody, Tenants

log = structlog.get_logger(__name__)

# How much a measured change weighs in the estimate of the next one.
NEW_WEIGHT = 0.5
FIRST_CHANGE_S = 3.0


class Layouts:
    """`gpus` is what the last change, or the start, has left. `on_change` is told each outcome and its seconds."""

    def __init__(
        self,
        door: NvmlDoor,
        tenants: Tenants,
        intents: IntentFile | None,
        on_change: Callable[[Outcome, float], None],
    ) -> None:
        self._door = door
        self._reconfigurer = Reconfigurer(door, tenants, intents, _tell, self._begins)
        self._before_anybody_lives = Reconfigurer(door, Nobody(), intents, _tell)
        self._changes: set[asyncio.Task[Outcome]] = set()
        self._on_change = on_change
        self.gpus: list[Gpu] = []
        self._began_s = 0.0  # the change under way, monotonic
        self.round_s = FIRST_CHANGE_S  # an estimate of what one round of a change takes
        self.changed_at_s: float | None = None  # monotonic; None: never

    async def recover(self) -> None:
        """Puts right what a crash in the middle of a re-cut has left, before there are workers.

        Raises NvmlError, RefusedChangeError, ValueError, OSError.
        """
        outcome = await self._before_anybody_lives.recover()
        if outcome is not None:
            log.warning("a re-cut had been cut off", result=outcome.result, reason=outcome.reason)
        self.gpus = await asyncio.to_thread(self._door.gpus)

    @property
    def changing(self) -> bool:
        return bool(self._changes)

    async def refresh(self) -> None:
        """Reads the GPUs again; if that fails, what was read before stays."""
        try:
            self.gpus = await asyncio.to_thread(self._door.gpus)
        except NvmlError as error:
            log.warning("the GPUs cannot be read", reason=str(error))

    async def changes(self, wanted: Mapping[str, str]) -> list[GpuChange]:
        """What `apply` would do. `wanted`: layouts (`3g.40gb+3g.40gb`) by GPU, its index or UUID.

        Raises RefusedChangeError, IllegalLayoutError, NvmlError.
        """
        return await self._reconfigurer.changes(self._profiles(wanted))

    async def apply(self, wanted: Mapping[str, str]) -> Outcome:
        """Re-cuts. Raises RefusedChangeError, IllegalLayoutError or NvmlError if it was not begun."""
        return await self.apply_profiles(self._profiles(wanted))

    async def apply_profiles(self, wanted: Mapping[str, Sequence[MigProfile]]) -> Outcome:
        """The same, MIG profiles by GPU UUID. Goes on to its end even if nobody waits for it any more."""
        change = asyncio.get_running_loop().create_task(self._apply(wanted))
        self._changes.add(change)
        change.add_done_callback(self._changes.discard)
        return await asyncio.shield(change)

    async def finished(self) -> None:
        """Returns when no change is under way."""
        if self._changes:
            await asyncio.wait(self._changes)

    async def _apply(self, wanted: Mapping[str, Sequence[MigProfile]]) -> Outcome:
        try:
            outcome = await self._reconfigurer.apply(wanted)
        finally:
            await self.refresh()
        if outcome.result != Result.UNCHANGED:
            self.changed_at_s = time.monotonic()
            seconds = self.changed_at_s - self._began_s
            rounds = sum(len(each.transition.rounds) for each in outcome.changes)
            self.round_s += NEW_WEIGHT * (seconds / rounds - self.round_s)
            layouts = {gpu.index: "+".join(each.mig_profile for each in gpu.slices) for gpu in self.gpus}
            log.info("re-cut done", result=outcome.result, reason=outcome.reason, seconds=seconds, layouts=layouts)
            self._on_change(outcome, seconds)
        return outcome

    def _begins(self, changes: Sequence[GpuChange]) -> None:
        self._began_s = time.monotonic()
        log.info("re-cutting", steps=[step for each in changes for step in each.steps()])

    def _profiles(self, wanted: Mapping[str, str]) -> dict[str, list[MigProfile]]:
        found = {}
        for which, layout in wanted.items():
            gpu = self._gpu(which)
            if gpu.model is None:
                raise RefusedChangeError(f"GPU {gpu.index}, {gpu.name}, cannot be cut: it has no MIG")
            found[gpu.uuid] = [placed.profile for placed in parse_layout(layout, gpu.model)]
        return found

    def _gpu(self, which: str) -> Gpu:
        for gpu in self.gpus:
            if which in (str(gpu.index), gpu.uuid):
                return gpu
        known = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in self.gpus)
        raise RefusedChangeError(f"there is no GPU {which!r}; there are {known}")


def _tell(step: str) -> None:
    log.info("re-cut", step=step)
