"""Who lives on the slices, as the partitioner sees them: asked to leave, told to come. Pure protocols."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

from partitioner.geometry import Slice


class TenantsError(RuntimeError):
    """The tenants cannot live on the new slices. The message says why."""


class Tenants(Protocol):
    """The scheduler's workers. `drain` and `admit` are called inside `recut` only."""

    def recut(self) -> AbstractAsyncContextManager[None]:
        """For the time of a change: who has nowhere to live meanwhile is expected back. No two at once."""

    async def drain(self, slices: Sequence[Slice]) -> None:
        """Has what lives on these slices finish its work and leave; returns when no process uses them any more.

        Slices that nobody lives on are nothing to do.
        """

    async def admit(self, slices: Sequence[Slice]) -> None:
        """Has new slices lived on; returns when they work. Raises TenantsError if they cannot."""

    def homes(self) -> list[Slice]:
        """Slices that are lived on now."""

    def pids(self) -> list[int]:
        """Their processes: what else runs on a GPU is foreign, and keeps it from being changed."""

    def unserved(self) -> list[str]:
        """Models that lived somewhere, and that now live nowhere: reasons to undo the change."""


class Nobody:
    """Tenants of a machine that nobody serves on: for the command line, and before the daemon's workers are up."""

    def recut(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def drain(self, slices: Sequence[Slice]) -> None:
        return

    async def admit(self, slices: Sequence[Slice]) -> None:
        return

    def homes(self) -> list[Slice]:
        return []

    def pids(self) -> list[int]:
        return []

    def unserved(self) -> list[str]:
        return []
