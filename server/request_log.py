"""One line a request, with --log-verbose 1."""

from __future__ import annotations

import structlog

from scheduler.driver import now_ns
from server.repository import NAME_CHARS, Model

log = structlog.get_logger(__name__)

ID_CHARS = 100


def log_request(
    protocol: str, asked: str, model: Model | None, request_id: str | None, arrival_ns: int, status: object, error: str
) -> None:
    """`asked`: the model that the request names; `model`: what it found. `error`: what the client was told, if any."""
    told = {"error": error} if error else {}
    log.info(
        "infer",
        protocol=protocol,
        model=asked[:NAME_CHARS],
        version=model.version if model is not None else None,
        id=(request_id or "")[:ID_CHARS],
        status=status,
        ms=round((now_ns() - arrival_ns) / 1e6, 3),
        **told,
    )
