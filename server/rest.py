"""The HTTP routes of the Open Inference Protocol, but infer. Ordinary FastAPI."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from server import wire
from server.app import refuse_web_pages
from server.counts import statistics
from server.errors import Fault, ServeError, invalid
from server.metrics import Metrics
from server.model_config import model_config, model_metadata
from server.repository import ModelState, Repository

# Of a request to the repository. Inference has a limit of its own.
BODY_BYTES = 64 * 1024


class Health(Protocol):
    """What the daemon says of itself."""

    def not_ready(self) -> list[str]:
        """Why it should get no requests; empty: it should."""

    def slices_out(self) -> list[str]:
        """Slices that stay out, each with its reason."""


def router(
    repository: Repository, metrics: Metrics, health: Health, name: str, version: str, *, read_timeout_s: float
) -> APIRouter:
    """All routes under /v2, and /metrics. All are async: they read what belongs to the event loop's thread."""
    routes = APIRouter()

    @routes.get("/v2")
    async def server_metadata() -> dict[str, Any]:
        return {"name": name, "version": version, "extensions": wire.EXTENSIONS}

    routes.include_router(_health_routes(health))
    routes.include_router(_statistics_routes(repository, metrics))  # first: "stats" is not a model
    routes.include_router(_model_routes(repository, health))
    routes.include_router(_repository_routes(repository, read_timeout_s))
    routes.include_router(metrics_router(metrics))
    return routes


def _health_routes(health: Health) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v2/health/live")
    async def live() -> dict[str, Any]:
        return {"live": True}

    @routes.get("/v2/health/ready")
    async def ready() -> JSONResponse:
        reasons = health.not_ready()
        body: dict[str, Any] = {"ready": not reasons}
        if reasons:
            body["error"] = "; ".join(reasons)
        if health.slices_out():
            body["slices_out"] = health.slices_out()
        return JSONResponse(body, 503 if reasons else 200)

    return routes


def _statistics_routes(repository: Repository, metrics: Metrics) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v2/models/stats")
    async def all_stats() -> dict[str, Any]:
        return {"model_stats": model_statistics(repository, metrics)}

    @routes.get("/v2/models/{model}/stats")
    @routes.get("/v2/models/{model}/versions/{version}/stats")
    async def model_stats(model: str, version: str | None = None) -> dict[str, Any]:
        return {"model_stats": model_statistics(repository, metrics, model, version or "")}

    return routes


def _model_routes(repository: Repository, health: Health) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v2/models/{model}/ready")
    @routes.get("/v2/models/{model}/versions/{version}/ready")
    async def model_ready(model: str, version: str | None = None) -> Response:
        try:
            if repository.servers(repository.get(model, version)):
                return Response()
        except ServeError as error:
            if error.fault is not Fault.UNAVAILABLE:
                raise
            raise invalid(error.message) from None  # 400, as Triton
        out = "; ".join(["", *health.slices_out()])
        raise invalid(f"model {model} is not ready: no slice serves it now{out}")

    @routes.get("/v2/models/{model}/config")
    @routes.get("/v2/models/{model}/versions/{version}/config")
    async def config(model: str, version: str | None = None) -> dict[str, Any]:
        return model_config(repository.get(model, version))

    @routes.get("/v2/models/{model}")
    @routes.get("/v2/models/{model}/versions/{version}")
    async def metadata(model: str, version: str | None = None) -> dict[str, Any]:
        found = repository.get(model, version)
        versions = [str(each.version) for each in repository.versions(model)]
        return model_metadata(found, versions)

    @routes.post("/v2/models/{model}/infer")
    @routes.post("/v2/models/{model}/versions/{version}/infer")
    async def infer(model: str, version: str | None = None) -> Response:
        """Inference. For the documentation, and for 405: requests are answered by server/infer.py, in front of this.

        But for those of a version that is no number.
        """
        repository.get(model, version)
        raise ServeError(Fault.NOT_FOUND, f"the version must be a number, not {version!r}")

    return routes


def _repository_routes(repository: Repository, read_timeout_s: float) -> APIRouter:
    routes = APIRouter(dependencies=[Depends(refuse_web_pages)])

    @routes.post("/v2/repository/index")
    async def index(request: Request) -> list[dict[str, str]]:
        body = await _json_body(request, read_timeout_s)
        return repository_index(repository, ready_only=bool(body.get("ready")))

    @routes.post("/v2/repository/models/{model}/load")
    async def load(model: str, request: Request) -> Response:
        body = await _json_body(request, read_timeout_s)
        if body.get("parameters"):
            raise ServeError(Fault.UNSUPPORTED, "load takes no parameters here: the model's files say it all")
        await repository.load(model)
        return Response()

    @routes.post("/v2/repository/models/{model}/unload")
    async def unload(model: str, request: Request) -> Response:
        await _json_body(request, read_timeout_s)
        await repository.unload(model)
        return Response()

    return routes


def metrics_router(metrics: Metrics) -> APIRouter:
    """Only /metrics: its port is often open to more than the others are."""
    routes = APIRouter()

    @routes.get("/metrics")
    async def scrape() -> Response:
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def repository_index(repository: Repository, *, ready_only: bool) -> list[dict[str, str]]:
    """What is in the repository, as /v2/repository/index and gRPC's RepositoryIndex show it."""
    entries = []
    for model in repository.models():
        if ready_only and model.state != ModelState.READY:
            continue
        entry = {"name": model.name, "version": str(model.version), "state": str(model.state)}
        if model.reason:
            entry["reason"] = model.reason
        entries.append(entry)
    return entries


def model_statistics(
    repository: Repository, metrics: Metrics, name: str = "", version: str = ""
) -> list[dict[str, Any]]:
    """What was counted of one version, of one model, or of all that are ready. Raises ServeError."""
    if not name:
        models = [each for each in repository.models() if each.state == ModelState.READY]
    else:
        models = [repository.get(name, version)] if version else repository.versions(name)
    return [statistics(*each.id, metrics.stats(*each.id)) for each in models]


async def _json_body(request: Request, timeout_s: float) -> dict[str, Any]:
    """Clients send JSON under any content type, or nothing at all."""
    text = b""
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                text += chunk
                if len(text) > BODY_BYTES:
                    raise ServeError(Fault.TOO_LARGE, f"the body is longer than {BODY_BYTES} bytes")
    except TimeoutError:
        raise invalid(f"the body did not arrive within {timeout_s:g} s") from None
    if not text.strip():
        return {}
    try:
        body = wire.decode_json(text)
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    return body
