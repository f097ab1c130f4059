"""The short way by itself, under a real uvicorn with real sockets, in front of an app that answers when told."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from server.http_protocol import HttpProtocol, Reply

Respond = Callable[[Reply], None]


def reply(body: bytes = b"ok", status: int = 200) -> Reply:
    return Reply(status, b"content-length: %d\r\n" % len(body), body)


class App:
    """Wants POSTs to /direct; answers `auto` ones at once, keeps the others to be answered by the test."""

    max_body_bytes = 1000
    read_timeout_s = 0.2

    def __init__(self) -> None:
        self.begun: list[Respond] = []
        self.answered = 0
        self.last_chunk = b""
        self.arrived = asyncio.Event()
        self.cancelled = asyncio.Event()

    def target(self, raw_path: bytes) -> bytes | None:
        return raw_path if raw_path.startswith(b"/direct") else None

    def begin(self, target: Any, headers: dict[bytes, bytes], chunks: list[bytes], respond: Respond) -> Any:
        if target.startswith(b"/direct/auto"):
            self.answered += 1
            self.last_chunk = chunks[0]
            respond(reply(b"".join(chunks) * (100_000 if target == b"/direct/auto/large" else 1)))
        else:
            self.begun.append(respond)
            self.arrived.set()
        return self.cancelled.set

    def refuse(self, target: Any, bytes_announced: int | None) -> Reply:
        return reply(b"too slow" if bytes_announced is None else b"too long", 413)

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"asgi"})


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def served(app: App, keep_alive_s: int = 60) -> AsyncIterator[Callable[[], Awaitable[Connection]]]:
    """Gives a function that opens a connection to the app."""
    options: dict[str, Any] = {"ws": "none", "lifespan": "off", "log_level": "error", "proxy_headers": False}
    config = uvicorn.Config(app, port=0, http=HttpProtocol, timeout_keep_alive=keep_alive_s, **options)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    port = server.servers[0].sockets[0].getsockname()[1]
    opened: list[asyncio.StreamWriter] = []

    async def connect() -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        opened.append(writer)
        return reader, writer

    try:
        yield connect
    finally:
        for writer in opened:
            writer.close()
        server.force_exit = True
        await server.shutdown()


def post(path: str = "/direct", body: bytes = b"hi", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), size, body)


async def read(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


async def ended(reader: asyncio.StreamReader) -> bool:
    return await asyncio.wait_for(reader.read(), 10) == b""


def test_an_idle_connection_is_closed_and_a_busy_one_is_not() -> None:
    async def story() -> None:
        app = App()
        async with served(app, keep_alive_s=1) as connect:
            idle, busy = await connect(), await connect()
            for reader, writer in (idle, busy):
                writer.write(post("/direct/auto"))
                assert await read(reader) == (200, b"hi")
            busy[1].write(post())
            assert await ended(idle[0])
            app.begun[0](reply(b"late"))
            assert await read(busy[0]) == (200, b"late")

    asyncio.run(story())


def test_a_client_that_leaves_cancels_its_request_and_a_late_answer_is_dropped() -> None:
    async def story() -> None:
        app = App()
        async with served(app) as connect:
            _, writer = await connect()
            writer.write(post())
            await app.arrived.wait()
            writer.close()
            await asyncio.wait_for(app.cancelled.wait(), 10)
            app.begun[0](reply())

    asyncio.run(story())


def test_what_is_pipelined_behind_a_waiting_request_waits_for_its_turn() -> None:
    async def story() -> None:
        app = App()
        async with served(app) as connect:
            reader, writer = await connect()
            writer.write(post() + b"GET /other HTTP/1.1\r\nHost: x\r\n\r\n" + post("/direct/auto"))
            await app.arrived.wait()
            app.begun[0](reply(b"first"))
            answers = [await read(reader) for _ in range(3)]
            assert answers == [(200, b"first"), (200, b"asgi"), (200, b"asgi")]

    asyncio.run(story())


def test_a_body_that_does_not_come_is_refused_in_time() -> None:
    async def story() -> None:
        async with served(App()) as connect:
            reader, writer = await connect()
            writer.write(post(body=b"ha", length=4))
            assert await read(reader) == (413, b"too slow")
            assert await ended(reader)

    asyncio.run(story())


def test_a_body_that_is_too_long_is_refused_by_its_announcement() -> None:
    async def story() -> None:
        async with served(App()) as connect:
            reader, writer = await connect()
            writer.write(post(body=b"", length=1001))
            assert await read(reader) == (413, b"too long")
            assert await ended(reader)

    asyncio.run(story())


def test_a_client_that_does_not_read_its_answers_is_waited_for() -> None:
    """Or else they would pile up in memory without bounds."""

    async def story() -> None:
        app = App()
        async with served(app) as connect:
            reader, writer = await connect()
            writer.write(post("/direct/auto/large") * 500)
            assert await read(reader) == (200, b"hi" * 100_000)
            assert app.answered < 50
            answers = [await read(reader) for _ in range(499)]
            assert {status for status, _ in answers} == {200}

    asyncio.run(story())


def test_an_idle_connection_does_not_keep_the_body_of_its_last_request() -> None:
    async def story() -> None:
        app = App()
        async with served(app) as connect:
            reader, writer = await connect()
            writer.write(post("/direct/auto", body=b"a body that is no constant"))
            await read(reader)
            references = sys.getrefcount(app.last_chunk)
            assert references == 2, "the app's own, and the one of this question"

    asyncio.run(story())


def test_the_rest_of_a_refused_body_is_read_and_the_connection_closed_after_it() -> None:
    async def story() -> None:
        async with served(App()) as connect:
            reader, writer = await connect()
            size = 20_000_000
            writer.write(post(body=b"", length=size))
            for _ in range(size // 1_000_000):
                writer.write(bytes(1_000_000))
                await asyncio.wait_for(writer.drain(), 10)
            assert await read(reader) == (413, b"too long")
            assert await ended(reader)

    asyncio.run(story())


def test_requests_leave_no_garbage_for_the_collector() -> None:
    """Reference cycles, one a request, would keep bodies alive until the next collection."""

    async def story() -> None:
        async with served(App()) as connect:
            reader, writer = await connect()
            for count in (10, 200):
                gc.collect()
                gc.disable()
                for _ in range(count):
                    writer.write(post("/direct/auto"))
                    await read(reader)
                found = gc.collect()
                gc.enable()
            assert found < 200

    asyncio.run(story())
