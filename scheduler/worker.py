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

import msgspec
import numpy as np

from scheduler import backends, model_file, trials
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
from scheduler.tensors import ALIGN, DATATYPES, InputLayout, TensorPlace, TensorSpec

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
        self._varying = sum(spec.dims.count(-1) for spec in backend.signature.inputs)

    def dims(self, length: int) -> tuple[int, ...]:
        """Of items that are so long."""
        return (length,) * self._varying


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


# Offset of the request's slot, and where in it the piece's inputs lie.
_Piece = tuple[int, tuple[TensorPlace, ...]]


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
        source = message.source
        is_another = source.digest != "" and model_file.digest(source.path) != source.digest
        try:
            backend = backends.load(message, self._device)
            loaded = msgspec.structs.replace(_measured(message, backend), is_another=is_another)
        except ModelLoadError as error:
            self._channel.send(LoadFailed(source.key, str(error)[:DETAIL_CHARS]))
            return
        self._models[source.key] = _Model(backend)
        gc.freeze()  # torch and the model live on: going through them again and again is a pause for nothing
        self._channel.send(loaded)

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
        dims = model.dims(message.length) if message.length else message.dims
        whole = model.layout.slot(max(sum(message.items), model.min_batch), dims).places
        pieces = self._pieces(message, model)
        if any(length != message.length for length in message.lengths):
            return self._padded(pieces, whole, model)
        memory = self._inputs
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

    def _pieces(self, message: RunBatch, model: _Model) -> list[_Piece]:
        pieces = []
        for index, (offset, items) in enumerate(zip(message.offsets, message.items, strict=True)):
            dims = model.dims(message.lengths[index]) if message.lengths else message.dims
            if index in message.cut:
                first, total = message.cut[index]
                pieces.append((offset, model.layout.piece(total, dims, first, items)))
            else:
                pieces.append((offset, model.layout.slot(items, dims).places))
        return pieces

    def _padded(self, pieces: list[_Piece], whole: tuple[TensorPlace, ...], model: _Model) -> list[Array]:
        """Pieces of different lengths: zeros behind the shorter ones."""
        arrays = []
        for index, dtype in enumerate(model.inputs):
            array = model.backend.zeros(whole[index].shape, dtype)
            row = 0
            for offset, places in pieces:
                place = places[index]
                values = np.frombuffer(self._inputs, dtype, place.nbytes // dtype.itemsize, offset + place.offset)
                rows = slice(row, row + place.shape[0])
                array[(rows, *map(slice, place.shape[1:]))] = values.reshape(place.shape)
                row = rows.stop
            arrays.append(array)
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


def _measured(message: Load, backend: Backend) -> Loaded:
    """With what was told of its latencies, or else is found out now. Raises ModelLoadError."""
    key, lengths = message.source.key, message.source.lengths
    if lengths is None:
        return Loaded(key, backend.signature, message.latency_ms or trials.measure(backend))
    trials.check(backend.signature, lengths)
    by_length = message.by_length or trials.measure_lengths(backend, lengths)
    return Loaded(key, backend.signature, by_length[-1][1], by_length)


def one_line(error: Exception) -> str:
    """What an exception says, without the traceback that TorchScript and C++ put into the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = lines[-1] if any("Traceback of TorchScript" in line for line in lines) else lines[0]
    return f"{type(error).__name__}: {said}"[:LINE_CHARS]
