"""Where the daemon listens: sockets, and the HTTP server on them."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from server.gpus import StartError


class HttpServer(uvicorn.Server):
    """uvicorn, without its own signal handlers: the daemon drains all its servers together."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(name: str, address: str, port: int) -> socket.socket:
    """Raises StartError, naming the flag that is to be another."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=2048)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[0]
        if error.errno == errno.EADDRNOTAVAIL or (error.errno or 0) < 0:  # below 0: it is no address, or has none
            raise StartError(
                f"--{name}-address {address} is no address of this machine: {why}; use 127.0.0.1 for "
                f"clients on it, 0.0.0.0 for all"
            ) from error
        raise StartError(
            f"--{name}-port {port} on {address} cannot be used: {why}; stop what uses it, or choose "
            f"another one (0: any that is free)"
        ) from error
