"""All that stands before the driver, over a stage: what the protocols' tests run requests through."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from tritonclient.grpc import service_pb2

from preprocess.pipeline import PipelineFile
from preprocess.pool import PreprocessPool
from preprocess.steps import AudioSteps, ImageSteps, TextSteps
from scheduler.channel import ModelSource
from scheduler.lengths import Lengths
from scheduler.tensors import InputLayout, Signature, TensorSpec
from server.errors import Fault, ServeError
from server.grpc_api import InferenceServicer
from server.http_protocol import Reply
from server.infer import InferRoute, Target
from server.metrics import Metrics
from server.model_files import ServingFile
from server.repository import Model, ModelState
from server.service import InferenceService
from tests.stage import KEY, Stage

PIPELINE = PipelineFile(input="image", output="x", image=ImageSteps(mode="L", size=(1, 1)))
PLAIN = TensorSpec("x", "FP32", (1,))
GOOD: dict[str, Any] = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}


def make_model(*, pictures: bool = False, output: str = "FP32") -> Model:
    spec = TensorSpec("x", "FP32", (1, 1, 1)) if pictures else PLAIN
    signature = Signature((spec,), (TensorSpec("y", output, (1,)),), 8)
    return Model(
        "m",
        1,
        source=ModelSource(KEY, "m", 1, "emulated", ""),
        serving=ServingFile(preprocess=PIPELINE) if pictures else ServingFile(),
        state=ModelState.READY,
        signature=signature,
        layout=InputLayout(signature),
    )


def make_padded_model(lengths: Lengths, output: TensorSpec) -> Model:
    """Takes values of any length, and how long each is."""
    model = make_model()
    inputs = (TensorSpec("n", "INT64", ()), TensorSpec("x", "FP32", (-1,)))
    model.source = ModelSource(KEY, "m", 1, "emulated", "", lengths=lengths)
    model.signature = Signature(inputs, (output,), 8, sample_dims=(1,))
    model.layout = InputLayout(model.signature)
    return model


def make_sound_model(lengths: Lengths | None = None, **more: Any) -> Model:
    """Takes log-mel features of any length, and how long each is."""
    pipeline = PipelineFile(input="sound", output="x", length="frames", audio=AudioSteps(preset="nemo-80"), **more)
    inputs = (TensorSpec("frames", "INT64", ()), TensorSpec("x", "FP32", (80, -1)))
    model = make_model()
    model.serving = ServingFile(preprocess=pipeline)
    model.source = ModelSource(KEY, "m", 1, "emulated", "", lengths=lengths)
    model.signature = Signature(inputs, model.signature.outputs, 8)
    model.layout = InputLayout(model.signature)
    return model


def make_text_model(tokenizer: str, **more: Any) -> Model:
    """Takes ids of any length, and their mask."""
    steps = TextSteps(tokenizer=tokenizer, max_tokens=6)
    pipeline = PipelineFile(input="text", output="ids", mask="mask", text=steps, **more)
    model = make_model()
    model.serving = ServingFile(preprocess=pipeline)
    inputs = (TensorSpec("ids", "INT64", (-1,)), TensorSpec("mask", "INT64", (-1,)))
    model.signature = Signature(inputs, model.signature.outputs, 8)
    model.layout = InputLayout(model.signature)
    return model


class OneModel:
    """A repository of one model."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def get(self, name: str, version: str | None = None) -> Model:
        if name != self._model.name:
            raise ServeError(Fault.NOT_FOUND, f"unknown model {name!r}")
        return self._model

    def servers(self, model: Model) -> list[str]:
        return ["somebody"]


class Served(Stage):
    """A stage with all that stands before the driver."""

    def __init__(
        self,
        model: Model,
        arena_bytes: int = 1 << 16,
        cut_to: int | None = None,
        *,
        threads: int = 1,
        decoder: str = "cpu",
    ) -> None:
        super().__init__(arena_bytes, cut_to)
        self.model = model
        self.pool = PreprocessPool(threads, decoder)
        self.service = InferenceService(self.driver, self.arena, self.pool)
        repository: Any = OneModel(model)
        no_app: Any = None
        limits = {"max_body_bytes": 1 << 30, "read_timeout_s": 1, "log_requests": True}
        self.http = InferRoute(no_app, repository, self.service, Metrics(), **limits)
        self.grpc = InferenceServicer(repository, self.service, Metrics(), no_app, "n", "v", log_requests=True)

    def post(self, body: dict[str, Any] | list[Any] | bytes, model: str = "m", query: str = "") -> list[Reply]:
        """The replies so far to one HTTP request."""
        replies: list[Reply] = []
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.http.begin(Target(model, None, query), {}, [text], replies.append)
        return replies


def on(served: Callable[[], Served], story: Callable[[Served], Awaitable[None]]) -> None:
    async def run() -> None:
        stage = served()
        try:
            await story(stage)
        finally:
            stage.pool.close()

    asyncio.run(run())


def plain() -> Served:
    return Served(make_model())


def pictures() -> Served:
    return Served(make_model(pictures=True))


def grpc_request(shape: tuple[int, ...] = (1, 1)) -> Any:
    request = service_pb2.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="FP32", shape=shape)
    request.raw_input_contents.append(bytes(4 * math.prod(shape)))
    return request


async def grpc_reply(stage: Served, request: Any) -> Any:
    """The reply of a stream to its one request."""

    async def requests() -> AsyncIterator[Any]:
        yield request

    no_context: Any = None
    (reply,) = [reply async for reply in stage.grpc.ModelStreamInfer(requests(), no_context)]
    return reply


async def grpc_error(stage: Served, request: Any) -> str:
    """What a stream of one request is told."""
    return str((await grpc_reply(stage, request)).error_message)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what it looks at is not told of
            await asyncio.sleep(0.001)
