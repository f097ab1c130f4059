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

# A number of bytes that is longer makes no sense.
LENGTH_DIGITS = 18
# So long the rest of a body that was refused is read, and thrown away: closing at once would reset the connection,
# and the client might never see why.
LINGER_S = 5.0
# A request without these is one that offers no other protocol.
_UPGRADE_HEADERS = (b"connection", b"upgrade", b"http2-settings")


class Reply(NamedTuple):
    """A whole HTTP response. `head`: header lines, each with its CRLF, the body's length among them."""

    status: int
    head: bytes
    body: bytes


class DirectApp(Protocol):
    """What the short way needs of an app."""

    max_body_bytes: int
    read_timeout_s: float

    def target(self, url: bytes) -> Any:
        """Anything but None: `begin` wants POSTs to this path, whose query string is part of it."""

    def begin(
        self, target: Any, headers: dict[bytes, bytes], chunks: list[bytes], respond: Callable[[Reply], None]
    ) -> Callable[[], object] | None:
        """Starts a request. Returns what to call when the client has gone; then `respond` is not called."""

    def refuse(self, target: Any, bytes_announced: int | None) -> Reply:
        """For a body that is too long, or, with None, too slow."""


def announced_bytes(headers: dict[bytes, bytes]) -> int:
    """Content-Length; 0 if there is none."""
    announced = headers.get(b"content-length", b"0")
    return int(announced[:LENGTH_DIGITS]) if announced.isdigit() else 0


class _Exchange:
    """A request on the short way. Stands where uvicorn keeps its RequestResponseCycle, with what it asks of one."""

    def __init__(self, target: Any, headers: dict[bytes, bytes], keep_alive: bool) -> None:
        self.target = target
        self.headers = headers
        self.keep_alive = keep_alive
        self.chunks: list[bytes] = []
        self.size = 0
        self.begun = False
        self.refused = False  # with its body, or the rest of it, still to come
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
        self.chunks = []
        cancel, self.cancel = self.cancel, None  # see _write
        if cancel is not None:
            cancel()


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with the short way in front."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        app: Any = self.app
        self._direct: DirectApp | None = app if hasattr(app, "begin") else None
        self._answered_at = 0.0
        self._upgrading = False

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        exchange: Any = self.cycle
        if type(exchange) is _Exchange and not exchange.begun and exchange.timeout is None:
            assert self._direct is not None  # it made the exchange
            exchange.timeout = self.loop.call_later(self._direct.read_timeout_s, self._refuse, exchange, None)

    # ---- parser callbacks ----

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        exchange = self._exchange()
        if exchange is None:
            self._upgrading = self.parser.should_upgrade()
            if self._upgrading:
                return
            self._make_scope()
            super().on_headers_complete()
            return
        self.cycle = exchange  # type: ignore[assignment]  # it is what uvicorn asks of a cycle
        announced = announced_bytes(exchange.headers)
        if self._direct is not None and announced > self._direct.max_body_bytes:
            self._refuse(exchange, announced)

    def on_body(self, body: bytes) -> None:
        exchange: Any = self.cycle
        if type(exchange) is not _Exchange:
            super().on_body(body)
            return
        if exchange.begun:
            return  # it was refused
        exchange.chunks.append(body)
        exchange.size += len(body)
        if self._direct is not None and exchange.size > self._direct.max_body_bytes:
            self._refuse(exchange, exchange.size)

    def on_message_complete(self) -> None:
        exchange: Any = self.cycle
        if self._upgrading:
            return
        if type(exchange) is not _Exchange:
            super().on_message_complete()
        elif not exchange.begun:
            self._begin(exchange)
        elif exchange.refused:
            self.transport.close()

    def _without_upgrade(self, rest: bytes) -> None:
        """Reads a request that offers another protocol once more, as one that does not: the parser drops its body.

        Java's client offers HTTP/2 in this way with every first request. `rest`: what came after the headers.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("CONNECT is not supported.")
            return
        lines = [b"%s %s HTTP/1.1" % (method, self.url)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] not in _UPGRADE_HEADERS]
        self._upgrading = False
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _make_scope(self) -> None:
        """What uvicorn makes when a message begins, and the short way does without."""
        kept = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue = kept
        self.scope["headers"] = self.headers

    def _exchange(self) -> _Exchange | None:
        """For a request that may go the short way."""
        if self._direct is None or (self.cycle is not None and not self.cycle.response_complete):
            return None  # a pipelined request waits for its turn in uvicorn's queue
        target = self._direct.target(self.url)
        if target is None or self.parser.get_method() != b"POST" or self.parser.get_http_version() != "1.1":
            return None
        if self.expect_100_continue or self.parser.should_upgrade():
            return None
        if self.flow.write_paused:
            return None  # the client does not read its answers; the ordinary way waits until it does
        return _Exchange(target, dict(self.headers), self.parser.should_keep_alive())

    # ---- keep-alive ----
    # uvicorn starts and stops a timer with every request. Here it runs on, and when it ends it looks whether the
    # connection has been idle all the time.

    def _unset_keepalive_if_required(self) -> None:
        if self.transport.is_closing():
            super()._unset_keepalive_if_required()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self._answered_at = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._look_later(self.timeout_keep_alive)
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self.transport.is_closing():
            return
        left_s = self._answered_at + self.timeout_keep_alive - self.loop.time()
        if not self.cycle.response_complete:
            left_s = self.timeout_keep_alive
        if left_s > 0:
            self._look_later(left_s)
        else:
            self.transport.close()

    def _look_later(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    # ---- answering ----

    def _begin(self, exchange: _Exchange) -> None:
        exchange.begun = True
        if exchange.timeout is not None:
            exchange.timeout.cancel()

        def respond(reply: Reply) -> None:
            if not exchange.disconnected:
                self._write(exchange, reply)

        assert self._direct is not None  # it made the exchange
        # Handed over: an idle connection must not keep the body of its last request.
        chunks, exchange.chunks = exchange.chunks, []
        cancel = self._direct.begin(exchange.target, exchange.headers, chunks, respond)
        if not exchange.response_complete:
            exchange.cancel = cancel

    def _refuse(self, exchange: _Exchange, bytes_announced: int | None) -> None:
        if exchange.response_complete or exchange.disconnected:
            return
        assert self._direct is not None  # it made the exchange
        exchange.begun = exchange.refused = True
        exchange.keep_alive = False
        exchange.chunks = []
        self._write(exchange, self._direct.refuse(exchange.target, bytes_announced))

    def _write(self, exchange: _Exchange, reply: Reply) -> None:
        """Head and body in one write; then what uvicorn does at the end of a response."""
        parts = [STATUS_LINE[reply.status], reply.head]
        for name, value in self.server_state.default_headers:  # the date
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n" if exchange.keep_alive else b"connection: close\r\n\r\n", reply.body)
        self.transport.write(b"".join(parts))
        exchange.response_complete = True
        exchange.cancel = None  # or else the exchange, through what is to be cancelled, holds on to itself
        if exchange.refused:
            self.transport.write_eof()
            self.loop.call_later(LINGER_S, self.transport.close)
        elif not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()
