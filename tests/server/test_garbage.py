"""Requests leave no garbage: no cycles, which only a pause of everything would clear away."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from server.infer import Target
from tests.served import GOOD, Served, grpc_error, grpc_request, on, plain


@contextmanager
def no_garbage() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
        found = gc.collect()
    finally:
        gc.enable()
    assert found < 20, "ten requests, and a cycle or more in each"


BAD_SHAPE = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0]}]}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, BAD_SHAPE),
        (400, []),
        (400, GOOD | {"outputs": [{"name": "nope"}]}),
        (429, GOOD | {"parameters": {"slo_ms": 0.0001, "strict": True}}),
        (501, GOOD | {"parameters": {"sequence_id": 1}}),
    ],
)
def test_refused_http_requests_leave_no_garbage(status: int, body: Any) -> None:
    async def story(stage: Served) -> None:
        stage.post(body)  # whatever is made once
        with no_garbage():
            for _ in range(10):
                assert stage.post(body)[0].status == status

    on(plain, story)


def test_cut_off_and_cancelled_requests_leave_no_garbage() -> None:
    async def story(stage: Served) -> None:
        stage.post(GOOD)
        with no_garbage():
            for _ in range(10):
                cancel = stage.http.begin(Target("m", None), {}, [json.dumps(GOOD).encode()], print)
                assert cancel is not None
                cancel()
            stage.driver.give_up("good bye")
            for _ in range(10):
                assert stage.post(GOOD)[0].status == 503
            del cancel

    on(plain, story)


def test_refused_grpc_requests_leave_no_garbage() -> None:
    async def story(stage: Served) -> None:
        requests = [grpc_request((1, 2)), grpc_request()]
        requests[1].parameters["slo_ms"].double_param = 0.0001
        for request in requests:
            await grpc_error(stage, request)
            with no_garbage():
                for _ in range(10):
                    assert await grpc_error(stage, request)

    on(plain, story)
