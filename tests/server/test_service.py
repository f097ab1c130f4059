"""Requests between the protocols and the driver: told once, and counted from acceptance on."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs
from tritonclient.grpc import service_pb2

from scheduler.answers import Answered
from scheduler.channel import Done
from scheduler.tensors import InputLayout, Signature, TensorSpec
from server.codec import Tensor
from server.errors import ServeError
from server.infer import Target
from server.model_files import ServingFile
from server.repository import Model
from server.service import Outcome
from tests.served import (
    GOOD,
    Served,
    grpc_error,
    grpc_reply,
    grpc_request,
    make_model,
    on,
    pictures,
    plain,
    until,
)
from tests.stage import KEY, OUTBOX


def tensor() -> Tensor:
    return Tensor("x", "FP32", (1, 1), [memoryview(bytes(4))])


def test_a_task_that_is_cancelled_as_its_answer_comes_costs_no_other_its_own() -> None:
    """gRPC cancels the handler's task; before that task is told, the worker's answer is read."""

    async def story(stage: Served) -> None:
        def one() -> asyncio.Task[Outcome]:
            return asyncio.create_task(stage.service.infer(stage.model, [tensor()], None, time.monotonic_ns()))

        first = one()
        await asyncio.sleep(0)
        rest = [one() for _ in range(4)]
        await asyncio.sleep(0)
        stage.finish(0)
        await first
        rest[0].cancel()
        stage.finish(1)
        done, waiting = await asyncio.wait(rest, timeout=5)
        assert (len(done), len(waiting), rest[0].cancelled()) == (4, 0, True)
        assert all(isinstance(task.result(), Answered) for task in rest[1:])
        assert (stage.driver.unfinished(), stage.arena.used) == (0, 0)

    on(plain, story)


# ---- what cannot be given is told before it is computed ----


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("FP32", {"outputs": [{"name": "nope"}]}, "unknown output nope; model m has y"),
        ("FP16", {}, "output y is FP16, which JSON cannot carry"),
        ("FP16", {"outputs": [{"name": "y", "parameters": {"binary_data": False}}]}, "which JSON cannot carry"),
    ],
)
def test_an_output_that_cannot_be_given_is_refused_before_it_is_computed(
    output: str, more: dict[str, Any], message: str
) -> None:
    async def story(stage: Served) -> None:
        (reply,) = stage.post(GOOD | more)
        assert (reply.status, message in reply.body.decode()) == (400, True)
        assert stage.sent == []

    on(lambda: Served(make_model(output=output)), story)


def test_grpc_too_checks_the_outputs_first() -> None:
    async def story(stage: Served) -> None:
        unknown, classified = grpc_request(), grpc_request()
        unknown.outputs.add(name="nope")
        classified.outputs.add(name="y").parameters["classification"].int64_param = 1
        assert "unknown output nope" in await grpc_error(stage, unknown)
        assert "classification is not supported" in await grpc_error(stage, classified)
        assert stage.sent == []

    on(plain, story)


def test_what_can_never_fit_the_arena_is_not_to_be_tried_again() -> None:
    async def story(stage: Served) -> None:
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [8, 1], "data": [1.0] * 8}]}
        assert stage.post(body) == []
        large = Served(wide_model(), arena_bytes=256)
        (reply,) = large.post({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 100], "data": [1.0] * 100}]})
        assert (reply.status, b"retry-after" in reply.head) == (413, False)
        assert b"send fewer items at once" in reply.body

    on(plain, story)


def wide_model() -> Model:
    model = make_model()
    model.signature = Signature((TensorSpec("x", "FP32", (100,)),), model.signature.outputs, 8)
    model.layout = InputLayout(model.signature)
    return model


def test_a_refusal_names_the_limit_its_source_and_the_estimate() -> None:
    async def story(stage: Served) -> None:
        # The table says 1 us.
        (reply,) = stage.post(GOOD | {"parameters": {"slo_ms": 0.0001, "strict": True}})
        assert (reply.status, b"retry-after: 1\r\n" in reply.head) == (429, True)
        assert b"slo_ms of the request is 0.0001 ms, the estimate is 0." in reply.body
        assert b"send strict: false to be answered late" in reply.body
        stage.model.serving = ServingFile(slo_ms=0.0002, strict=True)
        (reply,) = stage.post(GOOD)
        assert b"slo_ms in the model's serving.yaml is 0.0002 ms, the estimate is 0." in reply.body
        assert stage.post(GOOD | {"parameters": {"deadline_ms": 5000}}) == [], "it replaces the model's"
        assert len(stage.sent) == 1

    on(plain, story)


# ---- requests that are cut ----


def items(*values: float, **parameters: Any) -> dict[str, Any]:
    tensor = {"name": "x", "datatype": "FP32", "shape": [len(values), 1], "data": list(values)}
    return {"inputs": [tensor], "parameters": parameters}


def cut() -> Served:
    return Served(make_model(), cut_to=2)


def finish_all(stage: Served) -> None:
    """Five items, in three batches."""
    for number, values in enumerate([(1.0, 2.0), (3.0, 4.0), (5.0,)]):
        stage.finish(number, *values)


def test_what_was_cut_is_joined_in_json_and_in_binary() -> None:
    async def story(stage: Served) -> None:
        replies = stage.post(items(0, 0, 0, 0, 0))
        finish_all(stage)
        (reply,) = replies
        (output,) = json.loads(reply.body)["outputs"]
        assert (output["shape"], output["data"]) == ([5, 1], [1, 2, 3, 4, 5])
        stage.sent.clear()
        replies = stage.post(items(0, 0, 0, 0, 0, binary_data_output=True))
        finish_all(stage)
        (reply,) = replies
        assert b'"shape":[5,1],"parameters":{"binary_data_size":20}' in reply.body
        assert np.frombuffer(reply.body[-20:], np.float32).tolist() == [1, 2, 3, 4, 5]
        assert stage.arena.used == 0

    on(cut, story)


def test_what_was_cut_is_joined_over_grpc() -> None:
    async def story(stage: Served) -> None:
        replying = asyncio.create_task(grpc_reply(stage, grpc_request((5, 1))))
        await until(lambda: len(stage.sent) == 1)
        finish_all(stage)
        reply = (await replying).infer_response
        assert list(reply.outputs[0].shape) == [5, 1]
        assert np.frombuffer(reply.raw_output_contents[0], np.float32).tolist() == [1, 2, 3, 4, 5]

    on(cut, story)


@pytest.mark.parametrize("why", ["split: false", "max_batch 0"])
def test_what_must_not_be_cut_is_not(why: str) -> None:
    async def story(stage: Served) -> None:
        if why == "split: false":
            stage.model.serving = ServingFile(split=False)
            stage.post(items(1, 2, 3, 4, 5))
            assert [list(batch.items) for batch in stage.sent] == [[5]]
        else:
            stage.model.signature = Signature((TensorSpec("x", "FP32", (3, 1)),), stage.model.signature.outputs, 0)
            stage.model.layout = InputLayout(stage.model.signature)
            stage.post(items(1, 2, 3))
            assert [(list(batch.items), dict(batch.cut)) for batch in stage.sent] == [([1], {})]

    on(cut, story)


def test_outputs_whose_shape_depends_on_the_batch_cannot_be_joined_and_are_told_so() -> None:
    async def story(stage: Served) -> None:
        replies = stage.post(items(1, 2, 3))
        for batch, width in zip(stage.sent, (1, 2), strict=False):  # the second is sent when the first is done
            rows = sum(batch.items)
            done = Done(batch.batch_id, [0], [4 * rows * width], [(rows, width)], 1, 1, 1)
            stage.driver.batch_done(0, done, OUTBOX)
        (reply,) = replies
        assert (reply.status, b"the model needs `split: false`" in reply.body) == (500, True)

    on(cut, story)


# ---- late ones ----


def pass_ms(ms: float) -> None:
    end_ns = time.monotonic_ns() + int(ms * 1e6)
    while time.monotonic_ns() < end_ns:
        pass


def test_a_late_answer_says_how_late_it_is() -> None:
    async def story(stage: Served) -> None:
        replies = [stage.post(items(1, slo_ms=slo_ms)) for slo_ms in (2, 60_000)]
        pass_ms(2)
        stage.finish(0)
        stage.finish(1)
        late, in_time = (json.loads(reply.body) for (reply,) in replies)
        assert 0 < late["parameters"]["late_ms"] < 10_000
        assert "parameters" not in in_time
        request = grpc_request()
        request.parameters["slo_ms"].double_param = 2
        replying = asyncio.create_task(grpc_reply(stage, request))
        await until(lambda: len(stage.sent) == 3)
        pass_ms(2)
        stage.finish(2)
        reply = (await replying).infer_response
        assert 0 < reply.parameters["late_ms"].double_param < 10_000

    on(plain, story)


def test_what_cannot_even_be_served_late_is_refused_with_the_limit() -> None:
    async def story(stage: Served) -> None:
        # The table says 1 us: neither in 0.00005 ms nor in ten times that.
        (reply,) = stage.post(items(1, slo_ms=0.00005))
        assert (reply.status, b"retry-after: 1\r\n" in reply.head) == (429, True)
        assert b"even in ten times what it may take: slo_ms of the request is 0.0001 ms, the estimate is" in reply.body

    on(plain, story)


PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty; expected JSON such as"),
        (PNG, "the body is a PNG image; only a model with `preprocess` in its serving.yaml takes images"),
        (b"\xff\xd8\xff\xe0 and so on", "the body is a JPEG image"),
        (
            b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n--b--\r\n',
            "the body seems to be a form; only a",
        ),
    ],
)
def test_a_body_that_is_no_json_is_called_what_it_is(body: bytes, message: str) -> None:
    async def story(stage: Served) -> None:
        (reply,) = stage.post(body)
        assert (reply.status, message in reply.body.decode()) == (400, True)

    on(plain, story)


def test_every_request_has_a_line_in_the_log() -> None:
    async def story(stage: Served) -> None:
        bad = GOOD | {"id": "b", "outputs": [{"name": "nope"}]}
        unknown = grpc_request()
        unknown.model_name = unknown.id = "nope"
        with capture_logs() as lines:
            stage.post(GOOD | {"id": "a"})
            stage.finish(0)
            stage.post(bad)
            stage.post(b"", "nope")
            stage.http.refuse(Target("m", None), None)
            await grpc_error(stage, unknown)
            stream = asyncio.create_task(grpc_error(stage, grpc_request()))
            await until(lambda: len(stage.sent) == 2)
            stage.finish(1)
            await stream
        assert all(line.pop("ms") >= 0 and line["event"] == "infer" for line in lines)
        keys = ("protocol", "model", "version", "id", "status", "error")
        assert [tuple(line.get(key) for key in keys) for line in lines] == [
            ("http", "m", 1, "a", 200, None),
            ("http", "m", 1, "b", 400, "unknown output nope; model m has y"),
            ("http", "nope", None, "", 404, "unknown model 'nope'"),
            ("http", "m", None, "", 400, "the body did not arrive within 1 s"),
            ("grpc", "nope", None, "nope", "NOT_FOUND", "unknown model 'nope'"),
            ("grpc", "m", 1, "", "OK", None),
        ]

    on(plain, story)


@pytest.mark.parametrize(("name", "ready"), [("m", True), ("nope", False)])
def test_grpc_says_of_a_model_that_there_is_not_that_it_is_not_ready(name: str, ready: bool) -> None:
    async def story(stage: Served) -> None:
        no_context: Any = None
        reply = await stage.grpc.ModelReady(service_pb2.ModelReadyRequest(name=name), no_context)
        assert reply.ready is ready

    on(plain, story)


# ---- pictures ----


def picture(side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("L", (side, side), 255).save(out, "PNG")
    return out.getvalue()


def submit(stage: Served, *elements: bytes) -> tuple[list[Outcome], Callable[[], object]]:
    outcomes: list[Outcome] = []
    encoded = Tensor("image", "BYTES", (len(elements), 1), list(elements))
    return outcomes, stage.service.submit(stage.model, [encoded], None, time.monotonic_ns(), outcomes.append)


def test_a_request_is_unfinished_while_its_picture_is_decoded() -> None:
    """So that a reload, and the end of the daemon, wait for it."""

    async def story(stage: Served) -> None:
        outcomes, _ = submit(stage, picture())
        assert stage.driver.unfinished(KEY) == 1
        await until(lambda: bool(stage.sent))
        assert stage.driver.unfinished(KEY) == 1
        inputs = np.frombuffer(stage.arena.memory[:4], np.float32)
        assert inputs[0] == 1.0
        del inputs
        stage.finish(0)
        assert [type(outcome) for outcome in outcomes] == [Answered]
        assert (stage.driver.unfinished(), stage.arena.used) == (0, 0)

    on(pictures, story)


def test_giving_up_tells_those_in_preprocessing_too() -> None:
    async def story(stage: Served) -> None:
        outcomes, _ = submit(stage, picture(3000))
        stage.driver.give_up("good bye")
        assert [getattr(outcome, "message", "") for outcome in outcomes] == ["good bye"]
        assert stage.driver.unfinished() == 0
        await until(lambda: stage.arena.used == 0)
        assert stage.sent == []

    on(pictures, story)


def test_a_client_that_leaves_stops_its_preprocessing_between_pictures() -> None:
    async def story(stage: Served) -> None:
        begin = time.monotonic()
        submit(stage, picture(4000))
        await until(lambda: bool(stage.sent))
        one_s = time.monotonic() - begin
        begin = time.monotonic()
        outcomes, cancel = submit(stage, *[picture(4000)] * 8)
        cancel()
        assert stage.driver.unfinished() == 1, "only the first is left, which runs"
        await until(lambda: stage.arena.used == 256)
        assert time.monotonic() - begin < 5 * one_s + 0.5, "nothing like eight times"
        assert (outcomes, stage.seen.left) == ([], [True])

    on(pictures, story)


def test_a_picture_that_is_none_ends_its_request_with_the_reason() -> None:
    async def story(stage: Served) -> None:
        outcomes, _ = submit(stage, b"no picture")
        await until(lambda: bool(outcomes))
        assert "not a JPEG, PNG, WebP or GIF image" in getattr(outcomes[0], "message", "")
        assert (stage.driver.unfinished(), stage.arena.used) == (0, 0)

    on(pictures, story)


def test_many_pictures_are_refused_by_their_number_before_they_are_looked_at() -> None:
    async def story(stage: Served) -> None:
        data = memoryview(bytes(4 << 20))  # a million empty elements
        many = Tensor("image", "BYTES", (1,), [data])
        with pytest.raises(ServeError, match="has more than 1 elements, shape \\[1\\] takes 1"):
            stage.service.submit(stage.model, [many], None, 0, print)

    on(pictures, story)
