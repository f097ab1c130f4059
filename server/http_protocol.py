"""The one file that knows uvicorn's inside, pinned to its version: a short way for the infer route.

An app that has `target` and `begin` is asked directly for what it wants: no scope, no task, no receive and send, head
and body in one write; and it is told at once when its client has gone, for which ASGI would need a task a request. That
halves what a small request costs (see `make bench-overhead`). Everything else, and every unusual request (pipelined,
Expect: 100-continue, HTTP/1.0), goes the ordinary ASGI way, which gives the same answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

Headers = list[tuple[bytes, bytes]]


class Reply(NamedTuple):
    """A whole HTTP response. `headers` must name the body's length, and hold nothing that would need escaping."""

    status: int
    headers: Headers
    body: bytes


class DirectApp(Protocol):
    """What the short way needs of an app."""

    max_body_bytes: int
    read_timeout_s: float

    def target(self, raw_path: bytes) -> Any:
        """Anything but None: `begin` wants POSTs to this path."""

    def begin(
        self, target: Any, headers: dict[bytes, bytes], chunks: list[bytes], respond: Callable[[Reply], None]
    ) -> Callable[[], object] | None:
        """Starts a request. Returns what to call when the client has gone; then `respond` is not called."""

    def refuse(self, bytes_announced: int | None) -> Reply:
        """For a body that is too long, or, with None, too slow."""


class _Exchange:
    """A request on the short way. Stands where uvicorn keeps its RequestResponseCycle, with what it asks of one."""

    def __init__(self, target: Any, headers: dict[bytes, bytes], keep_alive: bool) -> None:
        self.target = target
        self.headers = headers
        self.keep_alive = keep_alive
        self.chunks: list[bytes] = []
        self.size = 0
        self.begun = False
        self.cancel: Callable[[], object] | None = None
        self.timeout: asyncio.TimerHandle | None = None
        self.disconnected = False
        self.response_complete = False

    @property
    def message_event(self) -> _Exchange:
        """uvicorn sets a cycle's message event when the client has gone."""
        return self

    def set(self) -> None:
        if self.timeout is not None:
            self.timeout.cancel()
        if self.cancel is not None and not self.response_complete:
            self.cancel()


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with the short way in front."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        app: Any = self.app
        self._direct: DirectApp | None = app if hasattr(app, "begin") else None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        exchange: Any = self.cycle
        if type(exchange) is _Exchange and not exchange.begun and exchange.timeout is None:
            assert self._direct is not None  # it made the exchange
            exchange.timeout = self.loop.call_later(self._direct.read_timeout_s, self._refuse, exchange, None)

    # ---- parser callbacks ----

    def on_headers_complete(self) -> None:
        exchange = self._exchange()
        if exchange is None:
            super().on_headers_complete()
            return
        self.cycle = exchange  # type: ignore[assignment]  # it is what uvicorn asks of a cycle
        announced = exchange.headers.get(b"content-length", b"0")
        if announced.isdigit() and self._direct is not None and int(announced) > self._direct.max_body_bytes:
            self._refuse(exchange, int(announced))

    def on_body(self, body: bytes) -> None:
        exchange: Any = self.cycle
        if type(exchange) is not _Exchange:
            super().on_body(body)
            return
        exchange.chunks.append(body)
        exchange.size += len(body)
        if self._direct is not None and exchange.size > self._direct.max_body_bytes:
            self._refuse(exchange, exchange.size)

    def on_message_complete(self) -> None:
        exchange: Any = self.cycle
        if type(exchange) is not _Exchange:
            super().on_message_complete()
        elif not exchange.response_complete:
            self._begin(exchange)

    def _exchange(self) -> _Exchange | None:
        """For a request that may go the short way."""
        if self._direct is None or (self.cycle is not None and not self.cycle.response_complete):
            return None  # a pipelined request waits for its turn in uvicorn's queue
        if self.expect_100_continue or self.parser.should_upgrade() or self.parser.get_http_version() != "1.1":
            return None
        if self.parser.get_method() != b"POST":
            return None
        target = self._direct.target(httptools.parse_url(self.url).path)
        return None if target is None else _Exchange(target, dict(self.headers), self.parser.should_keep_alive())

    # ---- answering ----

    def _begin(self, exchange: _Exchange) -> None:
        exchange.begun = True
        if exchange.timeout is not None:
            exchange.timeout.cancel()

        def respond(reply: Reply) -> None:
            if not exchange.disconnected:
                self._write(exchange, reply)

        assert self._direct is not None  # it made the exchange
        cancel = self._direct.begin(exchange.target, exchange.headers, exchange.chunks, respond)
        if not exchange.response_complete:
            exchange.cancel = cancel

    def _refuse(self, exchange: _Exchange, bytes_announced: int | None) -> None:
        if exchange.response_complete or exchange.disconnected:
            return
        assert self._direct is not None  # it made the exchange
        exchange.begun = True
        exchange.keep_alive = False  # the rest of the body is not read
        self._write(exchange, self._direct.refuse(bytes_announced))

    def _write(self, exchange: _Exchange, reply: Reply) -> None:
        """Head and body in one write; then what uvicorn does at the end of a response."""
        parts = [STATUS_LINE[reply.status]]
        for name, value in self.server_state.default_headers:
            parts += (name, b": ", value, b"\r\n")
        for name, value in reply.headers:
            parts += (name, b": ", value, b"\r\n")
        if not exchange.keep_alive:
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", reply.body)
        self.transport.write(b"".join(parts))
        exchange.response_complete = True
        exchange.cancel = None  # or else the exchange, through what is to be cancelled, holds on to itself
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()
