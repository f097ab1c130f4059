"""The parts of a request, each run by itself many times in one process, without sockets: what the code itself costs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httptools
import numpy as np

from scheduler.answers import Answered, BatchOutputs, Share
from scheduler.arena import Arena
from scheduler.channel import Done, Load, ModelSource, RunBatch, WorkerEnd, _decode_to_worker, _encode
from scheduler.core import SchedulerCore
from scheduler.messages import Arrived, BatchDone, Request, Run, Serves, WorkerUp
from scheduler.tensors import InputLayout, Signature, TensorSpec
from scheduler.worker import _Worker
from server import codec
from server.infer import make_reply
from server.repository import Model
from server.service import outputs_of
from tests.harness import MODELS

REPEATS = 3000
BATCH = 32
SIGNATURE = Signature((TensorSpec("x", "FP32", (16,)),), (TensorSpec("y", "FP32", (16,)),), 64)
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [0.1] * 16}]}).encode()


class Part(NamedTuple):
    """Microseconds a request: of one that comes alone, and of one that shares a batch of 32."""

    name: str
    where: str
    process: str
    alone_us: float
    batched_us: float


def breakdown() -> list[Part]:
    """Every part, in the order of the request's story."""
    worker = _worker()
    return [_parse(), _decode(), _place(), *_schedule(), _encode_reply(), *worker]


def _us(do: Callable[[], object]) -> float:
    for _ in range(REPEATS // 10):
        do()
    rounds = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(REPEATS):
            do()
        rounds.append(time.perf_counter() - begin)
    return 1e6 * min(rounds) / REPEATS


def _parse() -> Part:
    class Callbacks:
        def on_header(self, name: bytes, value: bytes) -> None:
            pass

    message = b"POST /v2/models/affine/infer HTTP/1.1\r\nHost: localhost:8000\r\nContent-Length: %d\r\n\r\n" % len(BODY)

    def parse() -> None:
        httptools.HttpRequestParser(Callbacks()).feed_data(message + BODY)

    us = _us(parse)
    return Part("parse HTTP", "httptools", "daemon", us, us)


def _decode() -> Part:
    us = _us(lambda: codec.decode_request([BODY], None))
    return Part("decode the JSON envelope", "server/codec.py", "daemon", us, us)


def _place() -> Part:
    arena = Arena(1 << 20)
    layout = InputLayout(SIGNATURE)
    tensors = codec.decode_request([BODY], None).tensors

    def place() -> None:
        checked = codec.check_inputs(SIGNATURE, tensors)
        slot = layout.slot(checked.items, checked.dims)
        offset = arena.allocate(slot.nbytes)
        target = arena.memory[offset : offset + slot.nbytes]
        codec.write_tensor(checked.tensors[0], SIGNATURE.inputs[0], slot.places[0].shape, target)
        arena.free(offset)

    us = _us(place)
    return Part("check, allocate, write to the arena", "server/codec.py, scheduler/arena.py", "daemon", us, us)


def _schedule() -> list[Part]:
    def story(batch: int) -> tuple[float, float]:
        """us a request of arriving, and of the batch's end."""
        core = SchedulerCore()
        core.handle(0, WorkerUp(0, 7, 1))
        core.handle(0, Serves(0, "m", tuple(50_000 + 100 * size for size in range(1, 65))))
        running: list[int] = []
        number = 0
        spent = [0.0, 0.0]
        for now_ns in range(REPEATS):
            requests = [Request(number + index, "m", 1) for index in range(batch)]
            number += batch
            begin = time.perf_counter()
            for request in requests:
                running += [
                    command.batch_id for command in core.handle(now_ns, Arrived(request)) if type(command) is Run
                ]
            spent[0] += time.perf_counter() - begin
            begin = time.perf_counter()
            commands = core.handle(now_ns, BatchDone(0, running.pop(0)))
            spent[1] += time.perf_counter() - begin
            running += [command.batch_id for command in commands if type(command) is Run]
        return 1e6 * spent[0] / REPEATS / batch, 1e6 * spent[1] / REPEATS / batch

    arrive_alone, done_alone = story(1)
    arrive_batched, done_batched = story(BATCH)
    return [
        Part("the core: arrival", "scheduler/core.py", "daemon", arrive_alone, arrive_batched),
        Part("the core: end of a batch, next batch", "scheduler/core.py", "daemon", done_alone, done_batched),
    ]


def _encode_reply() -> Part:
    model = Model("affine", 1, signature=SIGNATURE)

    def us(batch: int) -> float:
        outbox = memoryview(np.ones((batch, 16), np.float32)).cast("B")
        done = Done(1, [0], [len(outbox)], [(batch, 16)], 0, 0, 0)

        def encode() -> None:
            outputs = BatchOutputs(done, outbox)
            for row in range(batch):
                data = outputs_of(model, Answered((Share(outputs, row, 1, 0),), 0), None, False)
                make_reply(*codec.encode_reply("affine", "1", None, data), None)

        return _us(encode) / batch if batch == 1 else _us_few(encode) / batch

    return Part("take the outputs, encode the reply", "server/service.py, server/codec.py", "daemon", us(1), us(BATCH))


def _us_few(do: Callable[[], object]) -> float:
    begin = time.perf_counter()
    for _ in range(REPEATS // 10):
        do()
    return 1e6 * (time.perf_counter() - begin) / (REPEATS // 10)


class _NoSocket(WorkerEnd):
    def __init__(self) -> None:
        pass

    def send(self, message: object) -> None:
        _encode(message)


def _worker() -> list[Part]:
    memory = memoryview(bytearray(1 << 20))
    worker = _Worker(_NoSocket(), "cpu", memory, memoryview(bytearray(1 << 20)))
    path = str(MODELS / "affine" / "1" / "model.pt2")
    worker._load(Load(ModelSource("m", "affine", 1, "torch_export", path), ((1, 1.0),)))
    backend = worker._models["m"].backend

    def run(batch: int) -> float:
        message = _encode(RunBatch(1, "m", (), [index * 256 for index in range(batch)], [1] * batch))
        return _us(lambda: worker._finish(worker._start(_decode_to_worker.decode(message)))) / batch

    def model(batch: int) -> float:
        x = np.ones((batch, 16), np.float32)
        return _us(lambda: backend.finish(backend.start([x]))) / batch

    alone, batched = model(1), model(BATCH)
    return [
        Part("gather, scatter, messages", "scheduler/worker.py", "worker", run(1) - alone, run(BATCH) - batched),
        Part("the model", str(Path("scheduler/backends/torch.py")), "worker", alone, batched),
    ]


if __name__ == "__main__":
    for part in asyncio.run(asyncio.to_thread(breakdown)):
        print(part)
