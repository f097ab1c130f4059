"""The Open Inference Protocol over gRPC, with tritonclient's generated modules and grpc.health.v1.

Spec: Triton's grpc_service.proto. Messages are turned into the same values that the HTTP side uses.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from scheduler.driver import now_ns
from server import wire
from server.codec import OutputChoice, OutputData, Tensor
from server.errors import Fault, ServeError, internal, invalid
from server.metrics import Metrics
from server.model_config import model_config, model_metadata
from server.repository import Model, Repository
from server.request_log import log_request
from server.rest import Health, model_statistics, repository_index
from server.service import InferenceService, check_outputs, late_ms, outputs_of

log = structlog.get_logger(__name__)

# The most that gRPC can say, and that clients allow themselves.
MAX_MESSAGE_BYTES = 2**31 - 1
# Requests of one stream that are under way at once; reading stops beyond that.
STREAM_WINDOW = 128

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

# Field of InferTensorContents, and struct's code, of each datatype that may come in `contents`.
_CONTENTS = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"),
}


class InferenceServicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # untyped
    """The methods that HTTP has too."""

    def __init__(
        self,
        repository: Repository,
        service: InferenceService,
        metrics: Metrics,
        health: Health,
        name: str,
        version: str,
        *,
        log_requests: bool = False,
    ) -> None:
        self._repository = repository
        self._service = service
        self._metrics = metrics
        self._health = health
        self._name = name
        self._version = version
        self._log_requests = log_requests

    # ---- health and metadata ----

    async def ServerLive(self, request: Any, context: Context) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Context) -> Any:
        return service_pb2.ServerReadyResponse(ready=not self._health.not_ready())

    async def ModelReady(self, request: Any, context: Context) -> Any:
        try:
            model = self._repository.get(request.name, request.version)
            ready = bool(self._repository.servers(model))
        except ServeError:
            ready = False  # also of a model that there is not: so Triton answers
        return service_pb2.ModelReadyResponse(ready=ready)

    async def ServerMetadata(self, request: Any, context: Context) -> Any:
        return service_pb2.ServerMetadataResponse(name=self._name, version=self._version, extensions=wire.EXTENSIONS)

    async def ModelMetadata(self, request: Any, context: Context) -> Any:
        model = await self._model(request.name, request.version, context)
        versions = [str(each.version) for each in self._repository.versions(model.name)]
        return json_format.ParseDict(model_metadata(model, versions), service_pb2.ModelMetadataResponse())

    async def ModelConfig(self, request: Any, context: Context) -> Any:
        model = await self._model(request.name, request.version, context)
        config = json_format.ParseDict(model_config(model), model_config_pb2.ModelConfig())
        return service_pb2.ModelConfigResponse(config=config)

    async def ModelStatistics(self, request: Any, context: Context) -> Any:
        try:
            entries = model_statistics(self._repository, self._metrics, request.name, request.version)
        except ServeError as error:
            return await _abort(context, error)
        return json_format.ParseDict({"model_stats": entries}, service_pb2.ModelStatisticsResponse())

    # ---- repository ----

    async def RepositoryIndex(self, request: Any, context: Context) -> Any:
        entries = repository_index(self._repository, ready_only=request.ready)
        return json_format.ParseDict({"models": entries}, service_pb2.RepositoryIndexResponse())

    async def RepositoryModelLoad(self, request: Any, context: Context) -> Any:
        try:
            if request.parameters:
                raise ServeError(Fault.UNSUPPORTED, "load takes no parameters here: the model's files say it all")
            await self._repository.load(request.model_name)
        except ServeError as error:
            await _abort(context, error)
        return service_pb2.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Context) -> Any:
        try:
            await self._repository.unload(request.model_name)
        except ServeError as error:
            await _abort(context, error)
        return service_pb2.RepositoryModelUnloadResponse()

    # ---- inference ----

    async def ModelInfer(self, request: Any, context: Context) -> Any:
        reply = await self._infer(request, context.time_remaining())
        return await _abort(context, reply) if isinstance(reply, ServeError) else reply

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """Answers in the order of the requests, which run side by side."""
        running: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(STREAM_WINDOW)
        reader = asyncio.create_task(self._read_stream(requests, running))
        try:
            while (task := await running.get()) is not None:
                yield await task
            await reader
        finally:
            reader.cancel()
            while not running.empty():
                if (left := running.get_nowait()) is not None:
                    left.cancel()

    async def _read_stream(
        self, requests: AsyncIterator[Any], running: asyncio.Queue[asyncio.Task[Any] | None]
    ) -> None:
        try:
            async for request in requests:
                await running.put(asyncio.create_task(self._stream_reply(request)))
        finally:
            await running.put(None)

    async def _stream_reply(self, request: Any) -> Any:
        """One reply of a stream; an error goes in the message and leaves the stream open."""
        reply = await self._infer(request, None)
        if isinstance(reply, ServeError):
            failed = service_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
            return service_pb2.ModelStreamInferResponse(error_message=reply.message, infer_response=failed)
        wants_final = "triton_enable_empty_final_response"
        if wants_final in request.parameters and request.parameters[wants_final].bool_param:
            reply.parameters["triton_final_response"].bool_param = True
        return service_pb2.ModelStreamInferResponse(infer_response=reply)

    async def _infer(self, request: Any, client_seconds: float | None) -> Any:
        """The reply, or a ServeError, counted and logged."""
        arrival_ns = now_ns()
        model: Model | None = None
        try:
            model = self._repository.get(request.model_name, request.model_version)
            reply = await self._infer_on(model, request, client_seconds, arrival_ns)
        except ServeError as error:
            # Its traceback would hold on to the frames that it came through, and so to the body.
            reply = error.with_traceback(None)
        except Exception:
            log.exception("infer failed", model=request.model_name)
            reply = internal()
        failed = isinstance(reply, ServeError)
        if failed:
            self._metrics.failed(model.id if model else None, reply.reason)
        if self._log_requests:
            status = reply.fault.grpc.name if failed else "OK"
            sentence = reply.message if failed else ""
            log_request("grpc", request.model_name, model, request.id, arrival_ns, status, sentence)
        return reply

    async def _infer_on(self, model: Model, request: Any, client_seconds: float | None, arrival_ns: int) -> Any:
        """The reply, or a ServeError. Raises ServeError too."""
        parameters = {name: _parameter(value) for name, value in request.parameters.items()}
        call_ms = client_seconds * 1e3 if client_seconds is not None and client_seconds > 0 else None
        choice = _output_choice(request)
        check_outputs(model, choice, binary=True)
        outcome = await self._service.infer(model, _tensors(request), parameters, arrival_ns, call_ms)
        if isinstance(outcome, ServeError):
            return outcome
        reply = _response(model, request, outputs_of(model, outcome, choice, binary=True))
        if outcome.late_ns:
            reply.parameters["late_ms"].double_param = late_ms(outcome)
        return reply

    # ---- extensions that are not implemented, and so not advertised ----

    async def _unimplemented(self, request: Any, context: Context) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this extension is not implemented; see the server metadata")

    SystemSharedMemoryStatus = SystemSharedMemoryRegister = SystemSharedMemoryUnregister = _unimplemented
    CudaSharedMemoryStatus = CudaSharedMemoryRegister = CudaSharedMemoryUnregister = _unimplemented
    TraceSetting = LogSettings = _unimplemented

    async def _model(self, name: str, version: str, context: Context) -> Model:
        try:
            return self._repository.get(name, version)
        except ServeError as error:
            return await _abort(context, error)  # type: ignore[no-any-return]  # it raises


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped
    """grpc.health.v1.Health/Check, for Kubernetes' gRPC probes."""

    def __init__(self, health: Health) -> None:
        self._health = health

    async def Check(self, request: Any, context: Context) -> Any:
        status = health_pb2.HealthCheckResponse.ServingStatus
        return health_pb2.HealthCheckResponse(status=status.NOT_SERVING if self._health.not_ready() else status.SERVING)


def create_server(servicer: InferenceServicer, health: Health, max_input_bytes: int) -> grpc.aio.Server:
    """A server without a port yet. `max_input_bytes`: of a message that it takes."""
    options = [
        ("grpc.max_receive_message_length", min(max_input_bytes, MAX_MESSAGE_BYTES)),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.so_reuseport", 0),  # a port that is taken must be an error
    ]
    server = grpc.aio.server(options=options)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(health), server)
    return server


async def _abort(context: Context, error: ServeError) -> Any:
    """Ends the call with the error's status. Never returns."""
    trailers = []
    if error.retry_after_s is not None:
        trailers.append(("retry-after", error.retry_after_header.decode()))  # type: ignore[union-attr]  # as set
    await context.abort(error.fault.grpc, error.message, tuple(trailers))


# ---- messages to values and back ----


def _parameter(value: Any) -> Any:
    choice = value.WhichOneof("parameter_choice")
    return None if choice is None else getattr(value, choice)


def _tensors(request: Any) -> list[Tensor]:
    """The inputs, from raw_input_contents or from typed contents. Raises ServeError."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise invalid(f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs")
    tensors = []
    for index, tensor in enumerate(request.inputs):
        if "shared_memory_region" in tensor.parameters:
            raise ServeError(Fault.UNSUPPORTED, f"input {tensor.name}: shared memory is not supported; send the data")
        if not raw:
            data = _contents(tensor)
        elif tensor.HasField("contents"):
            raise invalid(f"input {tensor.name} has contents beside raw_input_contents; send one of them")
        else:
            data = [memoryview(raw[index])]
        tensors.append(Tensor(tensor.name, tensor.datatype, tuple(tensor.shape), data))
    return tensors


def _contents(tensor: Any) -> list[memoryview] | list[bytes]:
    if tensor.datatype == "BYTES":
        return list(tensor.contents.bytes_contents)
    if tensor.datatype not in _CONTENTS:
        raise invalid(f"input {tensor.name}: {tensor.datatype} must be sent in raw_input_contents")
    field, code = _CONTENTS[tensor.datatype]
    values = getattr(tensor.contents, field)
    try:
        return [memoryview(struct.pack(f"<{len(values)}{code}", *values))]
    except (struct.error, OverflowError) as error:
        raise invalid(f"input {tensor.name}: a value does not fit {tensor.datatype}: {error}") from None


def _output_choice(request: Any) -> list[OutputChoice] | None:
    """The outputs that are asked for; None for all. Raises ServeError."""
    for output in request.outputs:
        for name in ("classification", "shared_memory_region"):
            if name in output.parameters:
                raise ServeError(Fault.UNSUPPORTED, f"output {output.name}: {name} is not supported")
    return [OutputChoice(output.name, True) for output in request.outputs] or None


def _response(model: Model, request: Any, outputs: list[OutputData]) -> Any:
    reply = service_pb2.ModelInferResponse(model_name=model.name, model_version=str(model.version), id=request.id)
    for output in outputs:
        reply.outputs.add(name=output.spec.name, datatype=output.spec.datatype, shape=output.shape)
        reply.raw_output_contents.append(b"".join(output.data or ()))
    return reply
