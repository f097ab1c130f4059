"""The HTTP infer route: a raw ASGI callable in front of the FastAPI app.

FastAPI's routing and its Request and Response cost more than all the rest of a small request, so this one route does
without them. Everything else falls through to the app.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple
from urllib.parse import unquote

import structlog

from server import codec, wire
from server.codec import DecodedRequest, Tensor
from server.errors import Fault, ServeError, invalid
from server.http_protocol import CONNECTION
from server.repository import Model, Repository
from server.service import InferenceService, now_ns, outputs_of

log = structlog.get_logger(__name__)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_PATH = re.compile(rb"/v2/models/([^/]+)(?:/versions/([0-9]+))?/infer")
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")
# Smaller replies are not worth the time that compressing takes.
COMPRESS_FROM_BYTES = 1024


class Target(NamedTuple):
    """Which model an infer path names."""

    model: str
    version: str | None


class Reply(NamedTuple):
    status: int
    headers: Headers
    body: bytes


class InferRoute:
    """ASGI. Answers POST /v2/models/{model}[/versions/{version}]/infer; hands on everything else."""

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        repository: Repository,
        service: InferenceService,
        *,
        max_body_bytes: int,
        read_timeout_s: float,
        log_requests: bool = False,
    ) -> None:
        self._app = app
        self._repository = repository
        self._service = service
        self._max_body_bytes = max_body_bytes
        self._read_timeout_s = read_timeout_s
        self._log_requests = log_requests
        self._targets: dict[bytes, Target] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        target = self._targets.get(scope["raw_path"]) or self._parse_path(scope["raw_path"])
        if target is None:
            return await self._app(scope, receive, send)
        connection = scope.get(CONNECTION)
        if connection is not None:
            connection.on_lost = asyncio.current_task().cancel  # type: ignore[union-attr]  # a handler is a task
        try:
            reply = await self._answer(target, dict(scope["headers"]), receive)
        except asyncio.CancelledError:
            if connection is not None and connection.lost:
                return None  # nobody is left to answer
            reply = _error(ServeError(Fault.UNAVAILABLE, "the server is shutting down"))
        finally:
            if connection is not None:
                connection.on_lost = None
        await send({"type": "http.response.start", "status": reply.status, "headers": reply.headers})
        await send({"type": "http.response.body", "body": reply.body})
        return None

    def _parse_path(self, raw_path: bytes) -> Target | None:
        match = _PATH.fullmatch(raw_path)
        if match is None:
            return None
        version = match[2].decode() if match[2] else None
        target = Target(unquote(match[1].decode("ascii")), version)
        if len(self._targets) < 4096:
            self._targets[raw_path] = target
        return target

    async def _answer(self, target: Target, headers: dict[bytes, bytes], receive: Receive) -> Reply:
        """The reply to one request, errors included."""
        arrival_ns = now_ns()
        try:
            chunks = await self._read_body(headers, receive)
            model = self._repository.get(target.model, target.version)
            encoding = headers.get(b"content-encoding")
            if encoding and encoding != b"identity":
                body = codec.decompress(b"".join(chunks), encoding.decode("latin-1"), self._max_body_bytes)
                chunks = [body]
            request = self._decode(model, chunks, headers.get(wire.HEADER_LENGTH))
            answered = await self._service.infer(model, request.tensors, request.parameters, arrival_ns)
            outputs = outputs_of(model, answered, request.outputs, request.binary_default)
            parts, header_length = codec.encode_reply(model.name, str(model.version), request.id, outputs)
            reply = _reply(parts, header_length, headers.get(b"accept-encoding"))
        except ServeError as error:
            reply = _error(error)
        except Exception:
            log.exception("infer failed", model=target.model)
            reply = _error(ServeError(Fault.INTERNAL, "internal error; the server's log has the details"))
        if self._log_requests:
            milliseconds = (now_ns() - arrival_ns) / 1e6
            log.info("infer", model=target.model, status=reply.status, ms=round(milliseconds, 3), bytes=len(reply.body))
        return reply

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> list[bytes]:
        """The body in the chunks it came in. Raises ServeError for one that is too long or too slow."""
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_body_bytes:
            raise self._too_long()
        message = await receive()
        if not message.get("more_body"):
            return [_body(message)]
        chunks = [_body(message)]
        size = len(chunks[0])
        try:
            async with asyncio.timeout(self._read_timeout_s):
                while message.get("more_body"):
                    message = await receive()
                    chunks.append(_body(message))
                    size += len(chunks[-1])
                    if size > self._max_body_bytes:
                        raise self._too_long()
        except TimeoutError:
            raise ServeError(Fault.INVALID, f"the body did not arrive within {self._read_timeout_s:.0f} s") from None
        return chunks

    def _too_long(self) -> ServeError:
        return ServeError(Fault.TOO_LARGE, f"the body is longer than {self._max_body_bytes} bytes")

    def _decode(self, model: Model, chunks: list[bytes], header_length: bytes | None) -> DecodedRequest:
        if header_length is None:
            # Clients like curl send a file as it is. JSON always begins with a brace.
            if model.serving.preprocess is not None and chunks[0].lstrip()[:1] != b"{":
                return _raw(model, chunks, binary_outputs=False)
            return codec.decode_request(chunks, None)
        if not header_length.isdigit():
            raise invalid(f"Inference-Header-Content-Length must be a number, not {header_length.decode('latin-1')!r}")
        if int(header_length) == 0:
            return _raw(model, chunks, binary_outputs=True)
        return codec.decode_request(chunks, int(header_length))


def _body(message: dict[str, Any]) -> bytes:
    if message["type"] == "http.disconnect":
        raise asyncio.CancelledError
    body: bytes = message["body"]
    return body


def _raw(model: Model, chunks: list[bytes], *, binary_outputs: bool) -> DecodedRequest:
    """A raw body is the one input's data, of one item."""
    pipeline = model.serving.preprocess
    if pipeline is not None:
        tensor = Tensor(pipeline.input, "BYTES", (1,), [b"".join(chunks)])
    else:
        inputs = model.signature.inputs
        if len(inputs) != 1 or -1 in inputs[0].dims:
            raise invalid(f"a raw body needs a model of one input of fixed shape, which {model.name} is not")
        shape = inputs[0].dims if model.signature.max_batch == 0 else (1, *inputs[0].dims)
        tensor = Tensor(inputs[0].name, inputs[0].datatype, shape, [memoryview(chunk) for chunk in chunks])
    return DecodedRequest([tensor], None, binary_outputs, None, None)


def _reply(parts: list[bytes | memoryview], header_length: int | None, accept: bytes | None) -> Reply:
    body = b"".join(parts) if len(parts) > 1 else bytes(parts[0])
    headers: Headers = []
    if header_length is None:
        headers.append(_JSON)
    else:
        headers += [_BINARY, (wire.HEADER_LENGTH, b"%d" % header_length)]
    if accept is not None and len(body) >= COMPRESS_FROM_BYTES:
        encoding = codec.accepted_encoding(accept.decode("latin-1"))
        if encoding is not None:
            body = codec.compress(body, encoding)
            headers.append((b"content-encoding", encoding.encode()))
    headers.append((b"content-length", b"%d" % len(body)))
    return Reply(200, headers, body)


def _error(error: ServeError) -> Reply:
    body = wire.encode_json({"error": error.message})
    headers: Headers = [_JSON, (b"content-length", b"%d" % len(body))]
    if error.retry_after_header is not None:
        headers.append((b"retry-after", error.retry_after_header))
    if error.fault is Fault.TOO_LARGE:
        headers.append((b"connection", b"close"))  # the rest of the body is not waited for
    if error.reason == "encoding":
        headers.append((b"accept-encoding", b"gzip, deflate"))
    return Reply(error.fault.http, headers, body)
