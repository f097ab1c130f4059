"""The admin endpoints: the layout and the plan, to look at and to change. On an address of their own, with a token."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from partitioner.geometry import IllegalLayoutError, Layout, Slice
from partitioner.nvml_errors import NvmlError
from partitioner.nvml_types import Gpu
from partitioner.reconfigure import GpuChange, RefusedChangeError, Result
from server.app import NO_WEB_PAGES, Message
from server.autopilot import Autopilot
from server.errors import Fault, ServeError, invalid
from server.http_protocol import announced_bytes
from server.layouts import Layouts

TOKEN_FILE = "admin-token"
# A layout for every GPU of a large machine takes a few KiB.
MAX_BODY_BYTES = 64 * 1024
_NO_TOKEN = (
    "the header 'Authorization: Bearer TOKEN' is missing or wrong; the token is what --admin-token says, "
    "else in the file admin-token of the state folder"
)


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


class Guard:
    """ASGI. Lets a request pass that is no web page's, has `Authorization: Bearer TOKEN`, and is not too long.

    Others are answered before any of their body is read; one whose length is not announced, as soon as it is too long.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], expected_token: str) -> None:
        self._app = app
        self._expected = f"Bearer {expected_token}".encode()

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        refusal = self._refusal(headers)
        if refusal is None:
            messages = await _received(receive)
            if messages is not None:
                await self._app(scope, _replay(messages, receive), send)
                return
            refusal = _too_large()
        await refusal(scope, receive, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> JSONResponse | None:
        if b"origin" in headers:
            return JSONResponse({"error": NO_WEB_PAGES}, Fault.FORBIDDEN.http)
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            return JSONResponse({"error": _NO_TOKEN}, 401, {"WWW-Authenticate": "Bearer"})
        return _too_large() if announced_bytes(headers) > MAX_BODY_BYTES else None


def _too_large() -> JSONResponse:
    return JSONResponse({"error": f"the body is longer than {MAX_BODY_BYTES} bytes"}, Fault.TOO_LARGE.http)


async def _received(receive: Callable[[], Awaitable[Message]]) -> list[Message] | None:
    """The messages of a whole body; None as soon as it is too long."""
    messages: list[Message] = []
    size = 0
    while not messages or messages[-1].get("more_body"):
        messages.append(await receive())
        size += len(messages[-1].get("body", b""))
        if size > MAX_BODY_BYTES:
            return None
    return messages


def _replay(messages: list[Message], receive: Callable[[], Awaitable[Message]]) -> Callable[[], Awaitable[Message]]:
    async def replayed() -> Message:
        return messages.pop(0) if messages else await receive()

    return replayed


def router(layouts: Layouts, autopilot: Autopilot, serving: Serving) -> APIRouter:
    """All routes under /admin. Whoever serves them puts a Guard in front."""
    routes = APIRouter(prefix="/admin")

    @routes.get("/layout")
    async def layout() -> dict[str, Any]:
        return {"gpus": [_gpu(gpu, serving) for gpu in layouts.gpus]}

    @routes.post("/layout")
    async def change(wanted: LayoutRequest) -> dict[str, Any]:
        try:
            if wanted.dry_run:
                return {"result": "dry run", "steps": _steps(await layouts.changes(wanted.gpus))}
            outcome = await layouts.apply(wanted.gpus)
        except (IllegalLayoutError, RefusedChangeError) as error:
            raise invalid(str(error)) from error
        except (NvmlError, OSError) as error:
            raise ServeError(Fault.UNAVAILABLE, f"the layout was not changed: {error}") from error
        if outcome.result in (Result.RESTORED, Result.NEAREST):
            raise ServeError(Fault.INTERNAL, f"the change failed; {_LEFT[outcome.result]}: {outcome.reason}")
        return {"result": outcome.result, "steps": _steps(outcome.changes), **await layout()}

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


def _steps(changes: Sequence[GpuChange]) -> list[str]:
    return [step for each in changes for step in each.steps()]


def _names(layout: Layout) -> str:
    return "+".join(placed.profile.name for placed in layout)
