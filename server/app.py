"""The FastAPI app: routes, and errors in the protocol's form."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server.errors import Fault, ServeError


def create_app(routes: APIRouter) -> FastAPI:
    """Everything over HTTP but infer, which stands in front of this app."""
    app = FastAPI(title="migserve", docs_url="/docs", redoc_url=None)
    app.include_router(routes)

    @app.exception_handler(ServeError)
    async def serve_error(request: Request, error: ServeError) -> JSONResponse:
        headers = {}
        if error.retry_after_header is not None:
            headers["retry-after"] = error.retry_after_header.decode()
        return JSONResponse({"error": error.message}, error.fault.http, headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
        reasons = [f"{'.'.join(map(str, each['loc'][1:])) or 'body'}: {each['msg']}" for each in error.errors()]
        return JSONResponse({"error": "; ".join(reasons)}, Fault.INVALID.http)

    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "internal error; the server's log has the details"}, Fault.INTERNAL.http)

    return app
