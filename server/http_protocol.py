"""The one file that knows uvicorn's inside: a protocol that tells a handler at once when its client has gone.

ASGI offers `await receive()` for that, which costs a task a request; here it costs an attribute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# The key of the scope under which a handler finds its connection.
CONNECTION = "migserve.connection"


class HttpProtocol(HttpToolsProtocol):
    """A handler that runs may set `on_lost`; it is called once, when the connection ends before the answer."""

    on_lost: Callable[[], Any] | None = None
    lost = False

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[typeddict-unknown-key]  # ASGI lets servers add keys

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()
            self.on_lost = None
