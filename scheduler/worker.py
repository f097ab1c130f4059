"""The worker process: one slice, its models, one batch after the other.

It reads inputs where the daemon wrote them, in the arena, and leaves outputs in its outbox. It ends when its
channel does, at the latest END_SECONDS after, whatever its model is doing. Signals that a terminal or an init
system sends to the whole group it ignores, since the daemon has requests to finish.
"""

from __future__ import annotations

import gc
import os
import queue
import select
import signal
import socket
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scheduler import backends
from scheduler.arena import Descriptor
from scheduler.backends import Array, Backend, ModelLoadError
from scheduler.channel import (
    DETAIL_CHARS,
    Done,
    Failed,
    Load,
    Loaded,
    LoadFailed,
    Ready,
    RunBatch,
    Unload,
    WorkerEnd,
)
from scheduler.tensors import ALIGN, DATATYPES, InputLayout, TensorSpec

# Measuring a model at load takes at most about this long.
MEASURE_SECONDS = 0.4
LINE_CHARS = 500
# For the batch that runs when the channel ends.
END_SECONDS = 2.0


class WorkerStart(NamedTuple):
    """`device_uuid`: what CUDA is to see, None for the CPU. `threads`: of one operation on the CPU."""

    name: str
    device_uuid: str | None
    threads: int


def main(start: WorkerStart, sock: socket.socket, arena: Descriptor, outbox: Descriptor) -> None:
    """Runs until the daemon closes the channel."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(OSError):
        Path("/proc/self/comm").write_text(f"mig {start.name}"[:15])
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if start.device_uuid is not None:
        # CUDA reads it once, at its first call; the fork server has made none.
        os.environ["CUDA_VISIBLE_DEVICES"] = start.device_uuid
    backends.limit_threads(start.threads)
    threading.Thread(target=_end_with, args=(sock,), daemon=True).start()
    worker = _Worker(
        WorkerEnd(sock),
        "cpu" if start.device_uuid is None else "cuda",
        arena.attach(writable=False),
        outbox.attach(writable=True),
    )
    # A broken pipe: the daemon is gone, and nobody is left to answer.
    with suppress(BrokenPipeError, ConnectionResetError):
        worker.run()


def _end_with(sock: socket.socket) -> None:
    """Ends the process when the daemon has gone, if it does not end by itself: its model may hang."""
    watch = select.poll()
    watch.register(sock, 0)  # a hang-up is told of in any case
    watch.poll()
    time.sleep(END_SECONDS)
    os._exit(1)


class _Model:
    """A loaded model, with what every batch asks of it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.layout = InputLayout(backend.signature)
        self.batches = backend.signature.max_batch > 0
        self.min_batch = backend.signature.min_batch
        self.inputs = [_dtype(spec) for spec in backend.signature.inputs]
        self.outputs = [(spec, _dtype(spec)) for spec in backend.signature.outputs]


def _dtype(spec: TensorSpec) -> np.dtype[Any]:
    return np.dtype(DATATYPES[spec.datatype].numpy)


class _Batch(NamedTuple):
    """A batch under way. `error`: what `start` raised."""

    message: RunBatch
    model: _Model
    started: Any
    error: Exception | None
    input_ns: int
    started_ns: int


class _Written(NamedTuple):
    """Where each output lies in the outbox."""

    offsets: list[int]
    sizes: list[int]
    shapes: list[tuple[int, ...]]


class _Worker:
    def __init__(self, channel: WorkerEnd, device: str, inputs: memoryview, outbox: memoryview) -> None:
        self._channel = channel
        self._device = device
        self._inputs = inputs
        self._outbox = outbox
        # On a GPU one batch runs and one is staged, so that copying overlaps computing; a CPU has no such gain.
        self._depth = 1 if device == "cpu" else 2
        self._finished = 0
        self._models: dict[str, _Model] = {}

    def run(self) -> None:
        self._channel.send(Ready(self._depth))
        if self._depth == 1:
            self._loop(lambda batch: self._finish(batch))
            return
        staged: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        finisher = threading.Thread(target=self._finish_all, args=(staged,))
        finisher.start()
        self._loop(staged.put)
        staged.put(None)
        finisher.join()

    def _loop(self, then: Any) -> None:
        while (message := self._channel.receive()) is not None:
            match message:
                case RunBatch():
                    then(self._start(message))
                case Load():
                    self._load(message)
                case Unload():
                    self._models.pop(message.key, None)

    def _finish_all(self, staged: queue.SimpleQueue[_Batch | None]) -> None:
        while (batch := staged.get()) is not None:
            self._finish(batch)

    # ---- models ----

    def _load(self, message: Load) -> None:
        try:
            backend = backends.load(message, self._device)
            points = message.latency_ms or measure(backend)
        except ModelLoadError as error:
            self._channel.send(LoadFailed(message.source.key, str(error)[:DETAIL_CHARS]))
            return
        self._models[message.source.key] = _Model(backend)
        gc.freeze()  # torch and the model live on: going through them again and again is a pause for nothing
        self._channel.send(Loaded(message.source.key, backend.signature, points))

    # ---- batches ----

    def _start(self, message: RunBatch) -> _Batch:
        model = self._models[message.key]
        begin_ns = time.monotonic_ns()
        started, error = None, None
        try:
            inputs = self._gather(message, model)
            gathered_ns = time.monotonic_ns()
            started = model.backend.start(inputs)
        except Exception as raised:  # whatever a model raises fails its batch, not the worker
            gathered_ns = time.monotonic_ns()
            error = raised
        return _Batch(message, model, started, error, gathered_ns - begin_ns, gathered_ns)

    def _gather(self, message: RunBatch, model: _Model) -> list[Array]:
        """The inputs of all pieces, one array an input, copied once out of the arena."""
        memory = self._inputs
        pieces = [
            (offset, model.layout.slot(items, message.dims).places)
            for offset, items in zip(message.offsets, message.items, strict=True)
        ]
        for index, (first, total) in message.cut.items():
            places = model.layout.piece(total, message.dims, first, message.items[index])
            pieces[index] = message.offsets[index], places
        whole = model.layout.slot(max(sum(message.items), model.min_batch), message.dims).places
        arrays = []
        for index, dtype in enumerate(model.inputs):
            parts = []
            missing = whole[index].nbytes
            for offset, places in pieces:
                place = places[index]
                begin = offset + place.offset
                parts.append(memory[begin : begin + place.nbytes])
                missing -= place.nbytes
            if missing:
                parts.append(memoryview(bytes(missing)))
            arrays.append(model.backend.join(parts, whole[index].shape, dtype))
        return arrays

    def _finish(self, batch: _Batch) -> None:
        try:
            if batch.error is not None:
                raise batch.error
            outputs = batch.model.backend.finish(batch.started)
            finished_ns = time.monotonic_ns()
            written = self._write(batch, outputs)
        except Exception as raised:
            full = "".join(traceback.format_exception(raised))[-DETAIL_CHARS:]
            self._channel.send(Failed(batch.message.batch_id, batch.message.key, one_line(raised), full))
        else:
            self._channel.send(
                Done(
                    batch.message.batch_id,
                    *written,
                    batch.input_ns,
                    finished_ns - batch.started_ns,
                    time.monotonic_ns() - finished_ns,
                )
            )
        self._finished += 1

    def _write(self, batch: _Batch, outputs: list[Array]) -> _Written:
        """Outputs into the outbox. It has a region for each batch that can be under way."""
        model = batch.model
        items = sum(batch.message.items)
        region = len(self._outbox) // self._depth
        offset = region * (self._finished % self._depth)
        end = offset + region
        written = _Written([], [], [])
        if len(outputs) != len(model.outputs):
            raise ValueError(f"the model gave {len(outputs)} outputs, its signature has {len(model.outputs)}")
        for array, (spec, dtype) in zip(outputs, model.outputs, strict=True):
            if model.batches:
                if array.ndim == 0 or array.shape[0] < items:
                    raise ValueError(f"output {spec.name} has shape {array.shape} for a batch of {items}")
                array = array[:items]
            if array.dtype != dtype:
                raise ValueError(f"output {spec.name} has type {array.dtype}, its signature says {spec.datatype}")
            size = array.nbytes
            if offset + size > end:
                raise ValueError(f"outputs of more than {region} bytes a batch do not fit; ask for fewer items")
            if size:
                self._outbox[offset : offset + size] = array.data.cast("B")
            written.offsets.append(offset)
            written.sizes.append(size)
            written.shapes.append(array.shape)
            offset += -(-size // ALIGN) * ALIGN
        return written


def one_line(error: Exception) -> str:
    """What an exception says, without the traceback that TorchScript and C++ put into the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = lines[-1] if any("Traceback of TorchScript" in line for line in lines) else lines[0]
    return f"{type(error).__name__}: {said}"[:LINE_CHARS]


def measure(backend: Backend) -> tuple[tuple[int, float], ...]:
    """(batch, ms) points on this device: medians of a few runs each, on zeros. Raises ModelLoadError."""
    signature = backend.signature
    layout = InputLayout(signature)
    largest = max(signature.max_batch, 1)
    batches = sorted({largest, *(1 << n for n in range(largest.bit_length()))})
    deadline = time.monotonic() + MEASURE_SECONDS
    points: list[tuple[int, float]] = []
    for batch in batches:
        places = layout.slot(max(batch, signature.min_batch), signature.sample_dims).places
        inputs = [
            np.zeros(place.shape, DATATYPES[spec.datatype].numpy)
            for spec, place in zip(signature.inputs, places, strict=True)
        ]
        try:
            points.append((batch, _median_ms(backend, inputs, MEASURE_SECONDS / len(batches))))
        except Exception as error:  # a model that cannot run on zeros of its own shape is broken
            raise ModelLoadError(f"a first run at batch {batch} failed: {type(error).__name__}: {error}") from error
        if time.monotonic() > deadline:
            break  # the rest is extrapolated along the last two points
    return tuple(points)


def _median_ms(backend: Backend, inputs: list[Array], seconds: float) -> float:
    backend.finish(backend.start(inputs))  # the first run of a shape pays for caches and buffers
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < 50):
        begin = time.perf_counter()
        backend.finish(backend.start(inputs))
        times.append(time.perf_counter() - begin)
    return 1e3 * sorted(times)[len(times) // 2]
