"""The admin endpoints: the layout and the plan, to look at and to change. On an address of their own, with a token."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fastapi import APIRouter, Depends, Header, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from partitioner.geometry import IllegalLayoutError, Layout, Slice
from partitioner.nvml_errors import NvmlError
from partitioner.nvml_types import Gpu
from partitioner.reconfigure import RefusedChangeError, Result
from server.autopilot import Autopilot
from server.errors import Fault, ServeError, invalid
from server.layouts import Layouts

TOKEN_FILE = "admin-token"


class Serving(Protocol):
    """The daemon."""

    def serves(self, where: Slice) -> list[str]: ...


class LayoutRequest(BaseModel):
    """`gpus`: layouts by GPU index or UUID, as `3g.40gb+3g.40gb`. GPUs that are not named stay as they are."""

    model_config = ConfigDict(extra="forbid")

    gpus: dict[str, str] = Field(min_length=1, examples=[{"0": "3g.40gb+3g.40gb"}])
    dry_run: bool = False


def token(given: str | None, folder: Path) -> str:
    """The token that was given, else a new one, left in a file that only this user can read. Raises OSError."""
    if given is not None:
        return given
    fresh = secrets.token_urlsafe(24)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TOKEN_FILE
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(fresh)
    return fresh


def router(layouts: Layouts, autopilot: Autopilot, serving: Serving, expected_token: str) -> APIRouter:
    """All routes under /admin. They need `Authorization: Bearer TOKEN`."""

    async def check(authorization: str = Header("")) -> None:
        if not hmac.compare_digest(authorization.encode(), f"Bearer {expected_token}".encode()):
            raise HTTPException(
                401,
                "the header 'Authorization: Bearer TOKEN' is missing or wrong; the token is what --admin-token says, "
                "else in the file admin-token of the state folder",
                {"WWW-Authenticate": "Bearer"},
            )

    routes = APIRouter(prefix="/admin", dependencies=[Depends(check)])

    @routes.get("/layout")
    async def layout() -> dict[str, Any]:
        return {"gpus": [_gpu(gpu, serving) for gpu in layouts.gpus]}

    @routes.post("/layout")
    async def change(wanted: LayoutRequest) -> dict[str, Any]:
        try:
            changes = await layouts.changes(wanted.gpus)
            steps = [step for each in changes for step in each.steps()]
            if wanted.dry_run:
                return {"result": "dry run", "steps": steps}
            outcome = await layouts.apply(wanted.gpus)
        except (IllegalLayoutError, RefusedChangeError) as error:
            raise invalid(str(error)) from error
        except (NvmlError, OSError) as error:
            raise ServeError(Fault.UNAVAILABLE, f"the layout was not changed: {error}") from error
        if outcome.result in (Result.RESTORED, Result.NEAREST):
            raise ServeError(Fault.INTERNAL, f"the change failed; {_LEFT[outcome.result]}: {outcome.reason}")
        return {"result": outcome.result, "steps": steps, **await layout()}

    @routes.get("/plan")
    async def plan() -> dict[str, Any]:
        view = autopilot.view
        found: dict[str, Any] = {
            "traffic": {
                model: {"rate_per_s": seen.rate_per_s, "items": dict(seen.items), "lengths": dict(seen.lengths)}
                for model, seen in view.traffic.items()
            }
        }
        if view.proposal is None:
            return {**found, "proposal": None, "reason": view.note}
        return {
            **found,
            "proposal": {uuid: _names(each) for uuid, each in view.proposal.layouts.items()},
            "served_now": view.proposal.served_now,
            "served_then": view.proposal.served_then,
            "worthwhile": view.proposal.worthwhile,
            "reason": view.proposal.reason,
        }

    return routes


_LEFT = {
    Result.RESTORED: "the old layout is back",
    Result.NEAREST: "neither the new nor the old layout could be reached, what is there serves",
}


def _gpu(gpu: Gpu, serving: Serving) -> dict[str, Any]:
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "mig_enabled": gpu.mig_enabled,
        "simulated": gpu.simulated,
        "layout": "+".join(each.mig_profile for each in gpu.slices),
        "slices": [_slice(each, serving.serves(each)) for each in gpu.slices],
    }


def _slice(each: Slice, serves: Sequence[str]) -> dict[str, Any]:
    return {
        "name": each.name,
        "mig_profile": each.mig_profile,
        "start": each.start,
        "size": each.size,
        "gpcs": each.gpcs,
        "memory_mib": each.memory_mib,
        "uuid": each.device_uuid,
        "serves": list(serves),
    }


def _names(layout: Layout) -> str:
    return "+".join(placed.profile.name for placed in layout)
