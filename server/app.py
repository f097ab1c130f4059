"""The FastAPI app: routes, and errors in the protocol's form."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server import wrong_values
from server.errors import Fault, ServeError

Message = MutableMapping[str, Any]

# As much of an unknown path is repeated.
PATH_CHARS = 200
NO_WEB_PAGES = "requests of web pages, which have an Origin header, are refused here"


class HeadAsGet:
    """ASGI. Routes answer HEAD as they answer GET; the server leaves out the body."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


async def refuse_web_pages(request: Request) -> None:
    """For routes that change things: any page that the operator's browser shows could send requests to this port."""
    if "origin" in request.headers:
        raise ServeError(Fault.FORBIDDEN, NO_WEB_PAGES)


def _sentence(request: Request, error: HTTPException) -> str:
    """Starlette's own two words for 404 and 405, made useful."""
    asked = f"{request.method} {request.url.path[:PATH_CHARS]}"
    if error.status_code == 405 and error.headers:
        return f"{asked} is not allowed, but {error.headers['Allow']}"
    if error.status_code == 404 and error.detail == "Not Found":
        there = ", ".join(path for path in request.app.openapi()["paths"] if "/versions/" not in path)
        return f"there is nothing at {asked}; there are {there}"
    return str(error.detail)


def create_app(routes: APIRouter, *, docs: bool = True) -> FastAPI:
    """Everything over HTTP but infer, which stands in front of this app.

    `docs`: with /docs and /openapi.json.
    """
    app = FastAPI(
        title="migserve",
        docs_url="/docs" if docs else None,
        openapi_url="/openapi.json" if docs else None,
        redoc_url=None,
    )
    app.include_router(routes)
    app.add_middleware(HeadAsGet)

    @app.exception_handler(ServeError)
    async def serve_error(request: Request, error: ServeError) -> JSONResponse:
        headers = {}
        if error.retry_after_header is not None:
            headers["retry-after"] = error.retry_after_header.decode()
        return JSONResponse({"error": error.message}, error.fault.http, headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": _sentence(request, error)}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
        reasons = [
            f"{'.'.join(map(str, each['loc'][1:])) or 'body'}: {wrong_values.said(each)}" for each in error.errors()
        ]
        if "json" not in request.headers.get("content-type", ""):
            reasons = ["the body is JSON; send it with the header 'Content-Type: application/json'"]
        return JSONResponse({"error": "; ".join(reasons)}, Fault.INVALID.http)

    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "internal error; the server's log has the details"}, Fault.INTERNAL.http)

    return app
