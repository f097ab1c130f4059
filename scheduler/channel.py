"""The talk between the daemon and a worker process: one SEQPACKET message a thing said, MessagePack inside.

Tensor bytes never travel here, only where they lie in shared memory. A dead peer is an EOF.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

import msgspec

from scheduler.lengths import ByLength, Lengths
from scheduler.tensors import Signature, TensorSpec

# Bounds one message; a batch of 4096 requests needs about 60 KiB.
MESSAGE_BYTES = 256 * 1024
DETAIL_CHARS = 4000


def name_and_version(key: str) -> tuple[str, str]:
    """Of a model's key, `name/version#load`."""
    name, _, version = key.rpartition("#")[0].rpartition("/")
    return name, version


class ModelSource(msgspec.Struct, frozen=True):
    """A model version as found on disk: what a worker needs to load it.

    `key` names this load of it, so that a reload is another model. `inputs`, `outputs`, `max_batch`: as
    declared beside the model, None where the model file is to say. `latency_ms`: (batch, ms) points by
    compute slices, None where they are to be measured; `latency_origin`: how many of them came about how, such as
    `40 predicted, 12 measured`; empty where that is not known. `mig_profiles`: where it is served; empty: everywhere.
    `weight`: its part of slices that it shares. `lengths`: of a model whose items are padded, `lengths_ms` then: the
    points by compute slices and length, where they are known. `digest`: of the file at `path` as it was found;
    empty where there is none.
    """

    key: str
    name: str
    version: int
    backend: str
    path: str
    inputs: tuple[TensorSpec, ...] | None = None
    outputs: tuple[TensorSpec, ...] | None = None
    max_batch: int | None = None
    latency_ms: dict[int, tuple[tuple[int, float], ...]] | None = None
    latency_origin: str = ""
    mig_profiles: tuple[str, ...] = ()
    weight: float = 1.0
    lengths: Lengths | None = None
    lengths_ms: dict[int, ByLength] | None = None
    digest: str = ""


class ToWorker(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Said by the daemon."""


class Load(ToWorker, frozen=True):
    """Load a model; `latency_ms`: (batch, ms) points if known, else measure them. `by_length`: of one with lengths."""

    source: ModelSource
    latency_ms: tuple[tuple[int, float], ...] | None
    by_length: ByLength = ()


class Unload(ToWorker, frozen=True):
    key: str


class RunBatch(ToWorker, frozen=True):
    """Run one batch. Piece i is `items[i]` items, of equal `dims`, of the request whose slot is at `offsets[i]`.

    `cut`: of each piece that is not its whole request, the first item, and the items of the whole request. Where items
    are padded `lengths` has that of each piece, `length` is the batch's, and `dims` is empty.
    """

    batch_id: int
    key: str
    dims: tuple[int, ...]
    offsets: Sequence[int]
    items: Sequence[int]
    cut: Mapping[int, tuple[int, int]] = {}
    length: int = 0
    lengths: Sequence[int] = ()


class FromWorker(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Said by a worker."""


class Ready(FromWorker, frozen=True):
    """The process is up. `depth`: how many batches it takes at once."""

    depth: int


class Loaded(FromWorker, frozen=True):
    """`latency_ms`: (batch, ms) points, as told or as measured. `by_length`: of a model with lengths; then
    `latency_ms` is of the longest. `is_another`: the file has been replaced since it was found.
    """

    key: str
    signature: Signature
    latency_ms: tuple[tuple[int, float], ...]
    by_length: ByLength = ()
    is_another: bool = False


class LoadFailed(FromWorker, frozen=True):
    key: str
    detail: str


class Done(FromWorker, frozen=True):
    """A batch is done. Output i, for the whole batch, lies at `offsets[i]` of the outbox, `sizes[i]` bytes long.

    Times in ns: reading the inputs together, computing, writing the outputs.
    """

    batch_id: int
    offsets: Sequence[int]
    sizes: Sequence[int]
    shapes: Sequence[tuple[int, ...]]
    input_ns: int
    infer_ns: int
    output_ns: int


class Failed(FromWorker, frozen=True):
    """The model raised on this batch. `detail` is one line for the client, `full` is for the log."""

    batch_id: int
    key: str
    detail: str
    full: str


_encode = msgspec.msgpack.Encoder().encode
_decode_to_worker = msgspec.msgpack.Decoder(Load | Unload | RunBatch)
_decode_from_worker = msgspec.msgpack.Decoder(Ready | Loaded | LoadFailed | Done | Failed)


class WorkerEnd:
    """The worker's end: blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = memoryview(bytearray(MESSAGE_BYTES))

    def send(self, message: FromWorker) -> None:
        self._sock.sendall(_encode(message))

    def receive(self) -> Load | Unload | RunBatch | None:
        """The next message; None when the daemon has closed its end or is gone."""
        size = self._sock.recv_into(self._buffer)
        return _decode_to_worker.decode(self._buffer[:size]) if size else None


class DaemonEnd:
    """The daemon's end: never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._buffer = memoryview(bytearray(MESSAGE_BYTES))

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def send(self, message: ToWorker) -> None:
        """Raises OSError when the worker is gone or takes nothing more."""
        self._sock.send(_encode(message))

    def receive(self) -> Ready | Loaded | LoadFailed | Done | Failed | None:
        """The next message; None at the end. Raises BlockingIOError when there is none yet."""
        size = self._sock.recv_into(self._buffer)
        return _decode_from_worker.decode(self._buffer[:size]) if size else None


def pair() -> tuple[DaemonEnd, socket.socket]:
    """The daemon's end, and the socket for the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MESSAGE_BYTES)
    return DaemonEnd(ours), theirs
