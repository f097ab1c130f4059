"""The HTTP infer route: a raw ASGI callable in front of the FastAPI app.

FastAPI's routing and its Request and Response cost more than all the rest of a small request, so this one route does
without them. Everything else falls through to the app.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote

import structlog

from preprocess.pipeline import PipelineFile
from scheduler.driver import now_ns
from scheduler.staff import resolve
from server import codec, compression, multipart, wire
from server.codec import DecodedRequest, Tensor
from server.errors import Fault, ServeError, internal, invalid
from server.http_protocol import LENGTH_DIGITS, Reply, announced_bytes
from server.metrics import Metrics
from server.repository import Model, Repository
from server.request_log import log_request
from server.service import Cancel, InferenceService, Outcome, check_outputs, late_ms, outputs_of
from server.terms import with_query

log = structlog.get_logger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_PATH = re.compile(rb"/v2/models/([^/]+)(?:/versions/([0-9]+))?/infer")
_JSON = b"content-type: application/json\r\n"
_BINARY = b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n"
# Smaller replies are not worth the time that compressing takes.
COMPRESS_FROM_BYTES = 1024


class Target(NamedTuple):
    """Which model an infer URL names, and its query string."""

    model: str
    version: str | None
    query: str = ""


class InferRoute:
    """ASGI. Answers POST /v2/models/{model}[/versions/{version}]/infer; hands on everything else."""

    def __init__(
        self,
        app: Callable[[Message, Receive, Send], Awaitable[None]],
        repository: Repository,
        service: InferenceService,
        metrics: Metrics,
        *,
        max_body_bytes: int,
        read_timeout_s: float,
        log_requests: bool = False,
    ) -> None:
        self._app = app
        self._repository = repository
        self._service = service
        self._metrics = metrics
        self.max_body_bytes = max_body_bytes
        self.read_timeout_s = read_timeout_s
        self._log_requests = log_requests
        self._targets: dict[bytes, Target] = {}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """The ordinary ASGI way; under our own HTTP protocol, which calls `begin` itself, for odd requests only."""
        target = None
        if scope["type"] == "http" and scope["method"] == "POST":
            query = scope["query_string"]
            target = self.target(scope["raw_path"] + b"?" + query if query else scope["raw_path"])
        if target is None:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            chunks = await self._read_body(headers, receive)
        except ServeError as error:
            reply = self._refused(target, error)
        else:
            if chunks is None:
                return  # the client has gone
            answered = await self._answer_or_leave(target, headers, chunks, receive)
            if answered is None:
                return
            reply = answered
        headers_out = _header_list(reply.head)
        await send({"type": "http.response.start", "status": reply.status, "headers": headers_out})
        await send({"type": "http.response.body", "body": reply.body})

    async def _answer_or_leave(
        self, target: Target, headers: dict[bytes, bytes], chunks: list[bytes], receive: Receive
    ) -> Reply | None:
        """The reply; None if the client leaves before it is there."""
        answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        cancel = self.begin(target, headers, chunks, partial(resolve, answered))
        left = asyncio.ensure_future(_disconnected(receive))
        either: list[asyncio.Future[Any]] = [answered, left]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            if cancel is not None:
                cancel()  # does nothing for a request that has ended
        return answered.result() if answered.done() else None

    def target(self, url: bytes) -> Target | None:
        """What a path and its query string name, None if it is not an infer path."""
        target = self._targets.get(url)
        if target is None:
            path, _, query = url.partition(b"?")
            if (match := _PATH.fullmatch(path)) is None:
                return None
            version = match[2].decode() if match[2] else None
            target = Target(unquote(match[1].decode("ascii")), version, query.decode("latin-1"))
            if not query and len(self._targets) < 4096:
                self._targets[url] = target
        return target

    def begin(
        self,
        target: Target,
        headers: dict[bytes, bytes],
        chunks: list[bytes],
        respond: Callable[[Reply], None],
    ) -> Cancel | None:
        """Starts one whole request; `respond` gets the reply, errors included, maybe before this returns.

        Call what is returned if the client has gone; then `respond` is not called.
        """
        arrival_ns = now_ns()
        model: Model | None = None
        request_id: str | None = None

        def finish(outcome: Outcome) -> None:
            reply = self._reply(found, request, headers, outcome)
            respond(self._logged(target, found, request.id, arrival_ns, reply))

        try:
            model = found = self._repository.get(target.model, target.version)
            request = self._decode(found, headers, chunks)
            request_id = request.id
            if target.query:
                request.parameters = with_query(request.parameters, target.query)
                request.binary_default = codec.wants_binary(request.parameters, otherwise=request.binary_default)
            check_outputs(found, request.outputs, request.binary_default)
            return self._service.submit(found, request.tensors, request.parameters, arrival_ns, finish)
        except Exception as error:
            # Made here: an error that outlives this block holds on to this frame, and with it to the body.
            reply = self._failure(model, error)
        respond(self._logged(target, model, request_id, arrival_ns, reply))
        return None

    def _reply(self, model: Model, request: DecodedRequest, headers: dict[bytes, bytes], outcome: Outcome) -> Reply:
        if isinstance(outcome, ServeError):
            return self._failed(model, _with_hint(outcome, model, request.tensors[0], headers))
        try:
            outputs = outputs_of(model, outcome, request.outputs, request.binary_default)
            named = model.name, str(model.version), request.id
            parts, header_length = codec.encode_reply(*named, outputs, late_ms(outcome))
            return make_reply(parts, header_length, headers.get(b"accept-encoding"))
        except Exception as error:
            return self._failure(model, error)

    def _failure(self, model: Model | None, error: Exception) -> Reply:
        """The reply that tells of an exception."""
        if isinstance(error, ServeError):
            return self._failed(model, error)
        log.error("infer failed", model=model.name if model else None, exc_info=error)
        return self._failed(model, internal())

    def _logged(
        self, target: Target, model: Model | None, request_id: str | None, arrival_ns: int, reply: Reply
    ) -> Reply:
        if self._log_requests:
            error = "" if reply.status == 200 else wire.decode_json(reply.body)["error"]
            log_request("http", target.model, model, request_id, arrival_ns, reply.status, error)
        return reply

    def _failed(self, model: Model | None, error: ServeError) -> Reply:
        self._metrics.failed(model.id if model else None, error.reason)
        return _error(error)

    def refuse(self, target: Target, bytes_announced: int | None) -> Reply:
        """For a body that is too long, or, with None, too slow."""
        return self._refused(target, self._too_slow() if bytes_announced is None else self._too_long())

    def _refused(self, target: Target, error: ServeError) -> Reply:
        """Before there is a request to answer."""
        return self._logged(target, None, None, now_ns(), self._failed(None, error))

    def _too_long(self) -> ServeError:
        return ServeError(Fault.TOO_LARGE, f"the body is longer than {self.max_body_bytes} bytes")

    def _too_slow(self) -> ServeError:
        return ServeError(Fault.INVALID, f"the body did not arrive within {self.read_timeout_s:.0f} s")

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> list[bytes] | None:
        """The body in the chunks it came in; None if the client leaves. Raises ServeError if too long or too slow."""
        if announced_bytes(headers) > self.max_body_bytes:
            raise self._too_long()
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self.read_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message["body"])
                    if sum(map(len, chunks)) > self.max_body_bytes:
                        raise self._too_long()
                    if not message.get("more_body"):
                        return chunks
        except TimeoutError:
            raise self._too_slow() from None

    def _decode(self, model: Model, headers: dict[bytes, bytes], chunks: list[bytes]) -> DecodedRequest:
        encoding = headers.get(b"content-encoding")
        if encoding and encoding.lower() != b"identity":
            chunks = [compression.decompress(b"".join(chunks), encoding.decode("latin-1").lower(), self.max_body_bytes)]
        header_length = headers.get(wire.HEADER_LENGTH)
        if header_length is None:
            # Clients like curl send a file as it is. JSON always begins with a brace.
            if model.serving.preprocess is not None and not (chunks and chunks[0].lstrip()[:1] == b"{"):
                return _raw_or_form(model, model.serving.preprocess, b"".join(chunks))
            return codec.decode_request(chunks, None)
        if not header_length.isdigit() or len(header_length) > LENGTH_DIGITS:
            text = header_length[:LENGTH_DIGITS].decode("latin-1")
            raise invalid(f"Inference-Header-Content-Length must be a number of bytes, not {text!r}")
        if int(header_length) == 0:
            return _raw(model, chunks, binary_outputs=True)
        return codec.decode_request(chunks, int(header_length))


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _raw_or_form(model: Model, pipeline: PipelineFile, body: bytes) -> DecodedRequest:
    """Files in a form are an item each; any other body is one file. Raises ServeError."""
    if not multipart.is_form(body):
        return _raw(model, [body], binary_outputs=False)
    elements = multipart.files(body, pipeline.input, texts=pipeline.text is not None)
    return DecodedRequest([Tensor(pipeline.input, "BYTES", (len(elements),), elements)], None, False, None, None)


def _raw(model: Model, chunks: list[bytes], *, binary_outputs: bool) -> DecodedRequest:
    """A raw body is the one input's data, of one item."""
    pipeline = model.serving.preprocess
    if pipeline is not None:
        tensor = Tensor(pipeline.input, "BYTES", (1,), [b"".join(chunks)])  # an element, not a piece
    else:
        inputs = model.signature.inputs
        if len(inputs) != 1 or -1 in inputs[0].dims:
            raise invalid(f"a raw body needs a model of one input of fixed shape, which {model.name} is not")
        shape = inputs[0].dims if model.signature.max_batch == 0 else (1, *inputs[0].dims)
        tensor = Tensor(inputs[0].name, inputs[0].datatype, shape, [memoryview(chunk) for chunk in chunks])
    return DecodedRequest([tensor], None, binary_outputs, None, None)


def _with_hint(error: ServeError, model: Model, tensor: Tensor, headers: dict[bytes, bytes]) -> ServeError:
    """Was it a file, damaged by `curl -d`? That says that it sends a form, as `--data-binary` does, and leaves none
    of the bytes that almost any file has. A text it leaves whole, or nearly so.
    """
    pipeline = model.serving.preprocess
    is_form = headers.get(b"content-type") == b"application/x-www-form-urlencoded"
    if error.fault is not Fault.INVALID or not is_form or pipeline is None or pipeline.text is not None:
        return error
    element = tensor.data[0] if tensor.data and isinstance(tensor.data, list) else None
    if not isinstance(element, bytes) or not element or any(lost in element for lost in (b"\n", b"\r", b"\0")):
        return error
    return invalid(f"{error.message}; curl -d drops line breaks and zero bytes, send files with --data-binary")


def make_reply(parts: list[bytes | memoryview], header_length: int | None, accept: bytes | None) -> Reply:
    """A 200 of these parts, compressed where `accept`, an Accept-Encoding header, allows it and it pays."""
    body = b"".join(parts) if len(parts) > 1 else bytes(parts[0])
    head = _JSON if header_length is None else _BINARY % header_length
    if accept is not None and len(body) >= COMPRESS_FROM_BYTES:
        encoding = compression.accepted_encoding(accept.decode("latin-1"))
        if encoding is not None:
            body = compression.compress(body, encoding)
            head += b"content-encoding: %s\r\n" % encoding.encode()
    return Reply(200, b"%scontent-length: %d\r\n" % (head, len(body)), body)


def _error(error: ServeError) -> Reply:
    body = wire.encode_json({"error": error.message})
    head = b"%scontent-length: %d\r\n" % (_JSON, len(body))
    if error.retry_after_header is not None:
        head += b"retry-after: %s\r\n" % error.retry_after_header
    if error.reason == "encoding":
        head += b"accept-encoding: gzip, deflate\r\n"
    return Reply(error.fault.http, head, body)


def _header_list(head: bytes) -> list[tuple[bytes, ...]]:
    """Header lines as ASGI wants them."""
    return [tuple(line.split(b": ", 1)) for line in head.splitlines()]
