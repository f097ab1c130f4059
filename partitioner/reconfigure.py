"""Carries new layouts out: drains what goes, changes the GPU, reads back, admits what comes; undoes it on failure.

A change is recorded on disk before it begins. What a crash leaves behind is finished, or else undone, by `recover`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from partitioner.geometry import Layout, MigProfile, PlacedProfile, Slice
from partitioner.intent import Intent, IntentFile
from partitioner.nvml import NvmlDoor
from partitioner.nvml_errors import MachineBusyError, NvmlError, ReadBackError
from partitioner.nvml_types import Gpu, Instance
from partitioner.tenants import Tenants, TenantsError
from partitioner.transition import Round, Transition, arrange, transition

Tell = Callable[[str], None]
Begins = Callable[[Sequence["GpuChange"]], None]
# A reading that contradicts itself is taken again, so often.
READINGS = 3

Wanted = Mapping[str, Sequence[MigProfile]]


class RefusedChangeError(RuntimeError):
    """The change was not begun. The message says why and what to do."""


class Result(StrEnum):
    """`nearest`: neither the new layout nor the old one could be reached; what is there serves."""

    UNCHANGED = "unchanged"
    APPLIED = "applied"
    RESTORED = "restored"
    NEAREST = "nearest"


@dataclass(frozen=True, slots=True)
class GpuChange:
    """What is to be done to one GPU."""

    gpu: Gpu
    before: Layout
    target: Layout
    transition: Transition

    def steps(self) -> list[str]:
        """For people: what will happen, and what serves meanwhile."""
        name = f"GPU {self.gpu.index}"
        if not self.transition.rounds:
            return [f"{name}: stays as it is"]
        lines = [f"{name}: keeps {_names(self.transition.kept) or 'nothing'}"]
        for each, gpcs in zip(self.transition.rounds, self.transition.serving_gpcs(), strict=True):
            if each.destroy:
                lines.append(f"{name}: drain and destroy {_names(each.destroy)}; {gpcs} GPCs serve on")
            if each.create:
                lines.append(f"{name}: create and admit {_names(each.create)}")
        return lines


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a change ended. `reason`: why it was undone, or what of the undoing failed; `changes`: what was tried."""

    result: Result
    reason: str = ""
    changes: tuple[GpuChange, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class _State:
    """One GPU now: what the list of MIG devices shows, and what the lists of instances do."""

    gpu: Gpu
    instances: tuple[Instance, ...]

    @property
    def consistent(self) -> bool:
        shown = {(each.gi_id, each.ci_id, each.start) for each in self.gpu.slices if each.gi_id is not None}
        return shown == {(each.gi_id, ci, each.placement.start) for each in self.instances for ci in each.ci_ids}

    @property
    def layout(self) -> Layout:
        return tuple(each.placed for each in self.instances if each.ci_ids)

    def slices_at(self, layout: Sequence[PlacedProfile]) -> list[Slice]:
        starts = {each.placement.start for each in layout}
        return [each for each in self.gpu.slices if each.start in starts]


class Reconfigurer:
    """The one that changes layouts. Calls of NVML run in threads, one at a time."""

    def __init__(
        self,
        door: NvmlDoor,
        tenants: Tenants,
        intents: IntentFile | None = None,
        tell: Tell = lambda _: None,
        begins: Begins = lambda _: None,
    ) -> None:
        """`begins` is told the whole of a change before it begins, `tell` each step as it is done."""
        self._door = door
        self._tenants = tenants
        self._intents = intents
        self._tell = tell
        self._begins = begins
        self._changing = asyncio.Lock()
        self._named: dict[str, str] = {}  # what people call a GPU, by UUID

    async def changes(self, wanted: Wanted) -> list[GpuChange]:
        """What `apply` would do, by GPU. `wanted`: MIG profiles by GPU UUID.

        Raises RefusedChangeError, IllegalLayoutError, NvmlError.
        """
        gpus = {gpu.uuid: gpu for gpu in await self._call(self._door.gpus)}
        unknown = [uuid for uuid in wanted if uuid not in gpus]
        if unknown:
            raise RefusedChangeError(f"no GPU has the UUID {unknown[0]}; there are {', '.join(gpus) or 'none'}")
        return [await self._change(gpus[uuid], profiles) for uuid, profiles in wanted.items()]

    async def apply(self, wanted: Wanted) -> Outcome:
        """Gives GPUs new layouts, or leaves the old ones.

        Raises RefusedChangeError, IllegalLayoutError or NvmlError if it was not begun; what fails later is in
        the outcome.
        """
        async with self._changing:
            with self._exclusive():
                changes = tuple(await self.changes(wanted))
                for each in changes:
                    await self._remove_orphans(each.gpu.uuid)
                due = [each for each in changes if each.transition.rounds]
                if not due:
                    return Outcome(Result.UNCHANGED, changes=changes)
                self._begins(changes)
                return replace(await self._carry_out(due), changes=changes)

    async def switch(self, uuid: str, *, on: bool) -> None:
        """Switches MIG, where nobody serves. Off destroys every slice first. Raises RefusedChangeError, NvmlError."""
        async with self._changing:
            with self._exclusive():
                await self._check_ours(await self._call(self._door.gpu, uuid))
                if not on:
                    for each in await self._call(self._door.instances, uuid):
                        await self._call(self._door.destroy, uuid, each.gi_id)
                change = await self._call(self._door.set_mig_mode, uuid, on)
        self._tell(f"MIG {'on' if on else 'off'}: {change.status}")
        if not change.done:
            raise RefusedChangeError(change.todo)

    async def recover(self) -> Outcome | None:
        """Finishes, or undoes, a change that a crash cut off; None if there was none. Before anybody lives here.

        Raises ValueError for a record that cannot be read, NvmlError.
        """
        if self._intents is None:
            return None
        gpus = await self._call(self._door.gpus)
        intent = self._intents.read({gpu.uuid: gpu.model for gpu in gpus if gpu.model is not None})
        if intent is None or not intent.before:
            return None  # nothing is recorded, or nothing of these GPUs
        async with self._changing:
            with self._exclusive():
                for uuid in intent.before:
                    await self._remove_orphans(uuid)
                outcome = await self._finish(intent)
        self._intents.clear()
        return outcome

    # ---- forward ----

    async def _change(self, gpu: Gpu, profiles: Sequence[MigProfile]) -> GpuChange:
        await self._check_ours(gpu)
        if gpu.model is None:
            raise RefusedChangeError(f"GPU {gpu.index}, {gpu.name}, cannot be cut: it has no MIG")
        if not gpu.mig_enabled:
            raise RefusedChangeError(
                f"MIG is off on GPU {gpu.index}; migserve layout apply switches it on while nobody serves"
            )
        before = (await self._read(gpu.uuid)).layout
        target = arrange(before, profiles, gpu.model)
        return GpuChange(gpu, before, target, transition(before, target, gpu.model))

    async def _check_ours(self, gpu: Gpu) -> None:
        why_not = await self._call(self._door.refusal, gpu.uuid, self._tenants.pids())
        if why_not is not None:
            raise RefusedChangeError(f"GPU {gpu.index} is not changed: {why_not}")

    async def _carry_out(self, changes: Sequence[GpuChange]) -> Outcome:
        intent = Intent(
            {each.gpu.uuid: each.before for each in changes}, {each.gpu.uuid: each.target for each in changes}
        )
        if self._intents is not None:
            self._intents.write(intent)
        async with self._tenants.recut():
            outcome = await self._try(changes, intent)
        if self._intents is not None:
            self._intents.clear()
        return outcome

    async def _try(self, changes: Sequence[GpuChange], intent: Intent) -> Outcome:
        try:
            for each in changes:
                for round_ in each.transition.rounds:
                    await self._round(each.gpu.uuid, round_)
            self._check_tenants()
        except (NvmlError, TenantsError, OSError) as error:
            self._tell(f"undoing the change: {error}")
            return await self._bring_to(intent.before, str(error))
        return Outcome(Result.APPLIED)

    async def _round(self, uuid: str, round_: Round) -> None:
        await self._tenants.drain((await self._read(uuid)).slices_at(round_.destroy))
        for gone in round_.destroy:
            await self._destroy(uuid, gone)
        for new in round_.create:
            await self._create(uuid, new)
        await self._tenants.admit((await self._read(uuid)).slices_at(round_.create))

    def _check_tenants(self) -> None:
        unserved = self._tenants.unserved()
        if unserved:
            raise TenantsError(f"no slice of the new layout serves {', '.join(unserved)}")

    # ---- back ----

    async def _bring_to(self, layouts: Mapping[str, Layout], reason: str) -> Outcome:
        """These layouts, whatever there is now. Each step by itself: what fails is told of, and the rest goes on."""
        troubles: list[str] = []
        for uuid, layout in layouts.items():
            await self._attempt(troubles, self._remove_orphans(uuid))
            there = await self._attempt(troubles, self._read(uuid))
            if there is None:
                continue
            going = [each for each in there.layout if each not in layout]
            await self._attempt(troubles, self._tenants.drain(there.slices_at(going)))
            for each in going:
                await self._attempt(troubles, self._destroy(uuid, each))
            for each in layout:
                if each not in there.layout:
                    await self._attempt(troubles, self._create(uuid, each))
            await self._attempt(troubles, self._settle(uuid))
        reached = not troubles or await self._is(layouts)
        return Outcome(Result.RESTORED if reached else Result.NEAREST, "; then: ".join([reason, *troubles]))

    async def _settle(self, uuid: str) -> None:
        """Has every slice that there is now lived on; those that were drained, or come again, too."""
        homes = self._tenants.homes()
        await self._tenants.admit([each for each in (await self._read(uuid)).gpu.slices if each not in homes])

    async def _finish(self, intent: Intent) -> Outcome:
        """After a crash: forward if that works, else back."""
        if await self._is(intent.before):
            return Outcome(Result.RESTORED, "the daemon had ended before anything was changed")
        for uuid, before in intent.before.items():
            of_change = {*before, *intent.target[uuid]}
            if not set((await self._read(uuid)).layout) <= of_change:
                return Outcome(Result.NEAREST, "somebody has cut the GPUs otherwise since; they were left as they are")
        target = await self._bring_to(intent.target, "the daemon had ended in the middle of a change; it was finished")
        if await self._is(intent.target):
            return Outcome(Result.APPLIED, target.reason)
        return await self._bring_to(intent.before, f"the daemon had ended in the middle of a change; {target.reason}")

    async def _attempt(self, troubles: list[str], step: Awaitable[Any]) -> Any:
        try:
            return await step
        except (NvmlError, TenantsError, OSError) as error:
            troubles.append(str(error))
            return None

    # ---- the GPU ----

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        try:
            with self._door.exclusive():
                yield
        except MachineBusyError as error:
            raise RefusedChangeError(str(error)) from error

    async def _is(self, layouts: Mapping[str, Layout]) -> bool:
        try:
            return all([set((await self._read(uuid)).layout) == set(layout) for uuid, layout in layouts.items()])
        except NvmlError:
            return False

    async def _read(self, uuid: str) -> _State:
        """The GPU as NVML shows it in two ways that must agree: a single reading with a flaw could cost a slice.

        Raises ReadBackError where they go on to differ.
        """
        for _ in range(READINGS):
            gpu = await self._call(self._door.gpu, uuid)
            self._named[uuid] = f"GPU {gpu.index}"
            state = _State(gpu, tuple(await self._call(self._door.instances, uuid)))
            if state.consistent:
                return state
        raise ReadBackError("reading the GPU", "INCONSISTENT", f"its instances and its MIG devices differ: {state}")

    async def _destroy(self, uuid: str, gone: PlacedProfile) -> None:
        for each in await self._call(self._door.instances, uuid):
            if each.placement == gone.placement:
                self._tell(f"{self._named[uuid]}: destroying {_names([gone])}")
                await self._call(self._door.destroy, uuid, each.gi_id)

    async def _create(self, uuid: str, new: PlacedProfile) -> None:
        self._tell(f"{self._named[uuid]}: creating {_names([new])}")
        await self._call(self._door.create, uuid, new.profile, new.placement)

    async def _remove_orphans(self, uuid: str) -> None:
        """GPU instances without a compute instance: no process can use them, and no MIG device shows them."""
        for each in (await self._read(uuid)).instances:
            if not each.ci_ids:
                self._tell(
                    f"{self._named[uuid]}: removing a GPU instance that has no compute instance, {each.profile.name}"
                )
                await self._call(self._door.destroy, uuid, each.gi_id)

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.to_thread(function, *arguments)


def _names(layout: Sequence[PlacedProfile]) -> str:
    return ", ".join(f"{each.profile.name}@{each.placement.start}" for each in layout)
