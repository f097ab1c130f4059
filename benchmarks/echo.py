"""The yardstick: the least that uvicorn can do with a POST, served as the daemon serves (uvloop, httptools, no log)."""

from __future__ import annotations

import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

Send = Callable[[dict[str, Any]], Awaitable[None]]


async def app(scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]], send: Send) -> None:
    """Sends the body back."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message.get("more_body", False)
    length = (b"content-length", b"%d" % len(body))
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json"), length]}
    )
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    """Serves on a free port, which it prints."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as sock:
        print(sock.getsockname()[1], flush=True)
        config = uvicorn.Config(
            app, loop="uvloop", http="httptools", access_log=False, log_level="error", lifespan="off"
        )
        uvicorn.Server(config).run(sockets=[sock])


if __name__ == "__main__":
    sys.exit(main())
