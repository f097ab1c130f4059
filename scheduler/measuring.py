"""Measuring a model on one slice, in processes of its own: what it breaks or eats up ends with them.

k processes run batches side by side, as k workers on a slice would. Each times its own batches until their median is
steady, and then goes on, untimed, until all are done: every timed batch had k - 1 neighbours.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, NamedTuple

from scheduler import backends, spawn
from scheduler.backends import Array, Backend, ModelLoadError
from scheduler.channel import Load, ModelSource
from scheduler.steady import LEAST_RUNS, Steady, summary
from scheduler.tensors import Signature
from scheduler.trials import sample

# Loading may read tens of gigabytes; one batch that takes longer hangs.
LOAD_SECONDS, HANG_SECONDS = 300.0, 120.0
END_SECONDS = 5.0
PATIENCE = 5
# How long energy is counted, how long a step of its counter may take, and how often it is looked at.
ENERGY_SECONDS, STEP_SECONDS, LOOK_SECONDS = 1.0, 1.0, 0.002


class Device(NamedTuple):
    """Where to measure. `uuid`: of a CUDA device, None for the CPU. `memory_mib`: a limit for the data of each process
    on the CPU, of all of them on CUDA. `sm_count`: a share of the CUDA device, instead of all its SMs.
    """

    uuid: str | None
    threads: int = 1
    latency_ms: tuple[tuple[int, float], ...] | None = None
    memory_mib: int | None = None
    sm_count: int | None = None

    @property
    def kind(self) -> str:
        return "cpu" if self.uuid is None else "cuda"


class Effort(NamedTuple):
    """When to stop: the median is known `within` a share of itself, or after so many `seconds` or `runs`."""

    within: float = 0.02
    seconds: float = 3.0
    runs: int = 500
    warm_up_seconds: float = 0.1


class Gauges(NamedTuple):
    """What can be read of a device while it works; they block. `energy_j`: a counter. None: there is no such thing."""

    energy_j: Callable[[], float | None] | None = None
    sm_activity: Callable[[], float | None] | None = None


NO_GAUGES = Gauges()


class Timed(NamedTuple):
    """What was measured of one point: the processes' mean, their slowest `within`, all their outliers and runs.

    `energy_j`: of one batch, with what the GPU takes for being on. `sm_activity`: share of SMs that were busy.
    """

    latency_ms: float
    within: float
    outliers: int
    runs: int
    memory_mib: float | None
    energy_j: float | None = None
    sm_activity: float | None = None


class OutOfMemory(NamedTuple):
    """The point does not fit; nothing with more items does."""

    detail: str


class Failure(NamedTuple):
    """The model raised, hung or crashed."""

    detail: str


class _Ask(NamedTuple):
    batch: int
    dims: tuple[int, ...]
    effort: Effort


class Measurer:
    """`processes` processes that have loaded a model on a device. A context manager; starts them where needed.

    After a point that did not go well they are started anew.
    """

    def __init__(self, source: ModelSource, device: Device, processes: int, gauges: Gauges = NO_GAUGES) -> None:
        if device.uuid is not None and device.memory_mib is not None:
            device = device._replace(memory_mib=device.memory_mib // processes)
        self._source, self._device, self._count = source, device, processes
        self._gauges = gauges
        self._children: list[tuple[ForkServerProcess, Connection]] = []
        self.signature: Signature | None = None
        self.versions = ""

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for process, pipe in self._children:
            pipe.close()
            spawn.end(process, END_SECONDS)
        self._children = []

    def load(self) -> Signature:
        """Starts the processes, if they are not there; raises ModelLoadError, MemoryError."""
        if self._children and self.signature is not None:
            return self.signature
        for _ in range(self._count):
            ours, theirs = Pipe()
            self._children.append((spawn.start_other(main, self._source, self._device, theirs), ours))
            theirs.close()
        answers = [self._hear(index, LOAD_SECONDS) for index in range(self._count)]
        for answer in answers:
            if isinstance(answer, OutOfMemory):
                self.close()
                raise MemoryError(answer.detail)
            if isinstance(answer, Failure):
                self.close()
                raise ModelLoadError(answer.detail)
        self.signature, self.versions = answers[0]
        return self.signature

    def measure(self, batch: int, dims: tuple[int, ...], effort: Effort) -> Timed | OutOfMemory | Failure:
        """One point. Raises ModelLoadError where the model cannot even be loaded any more."""
        try:
            self.load()
        except MemoryError as error:
            return OutOfMemory(str(error))
        for _, pipe in self._children:
            with suppress(OSError):  # a dead one is heard of below
                pipe.send(_Ask(batch, dims, effort))
        seconds = PATIENCE * effort.seconds + effort.warm_up_seconds + HANG_SECONDS
        answers = [self._hear(index, seconds) for index in range(self._count)]
        bad = [answer for answer in answers if isinstance(answer, OutOfMemory | Failure)]
        if not bad:
            found = _together([answer[0] for answer in answers], [answer[1] for answer in answers], self._device.kind)
            found = self._gauged(found)
            bad = self._stopped(seconds)
            if not bad:
                return found
        self.close()
        return next((answer for answer in bad if isinstance(answer, OutOfMemory)), bad[0])

    def _stopped(self, seconds: float) -> list[OutOfMemory | Failure]:
        """All of them, after this point; what went wrong with any since it was timed."""
        for _, pipe in self._children:
            with suppress(OSError):
                pipe.send(None)
        answers = [self._hear(index, seconds) for index in range(self._count)]
        return [answer for answer in answers if answer is not None]

    def _gauged(self, found: Timed) -> Timed:
        """All processes go on with their batches meanwhile."""
        watts = mean_w(self._gauges.energy_j) if self._gauges.energy_j is not None else None
        return found._replace(
            energy_j=None if watts is None else watts * found.latency_ms / 1e3 / self._count,
            sm_activity=None if self._gauges.sm_activity is None else self._gauges.sm_activity(),
        )

    def _hear(self, index: int, seconds: float) -> Any:
        """What `main` sends; or what its silence means."""
        process, pipe = self._children[index]
        try:
            if pipe.poll(seconds):
                return pipe.recv()
            return Failure(f"no answer in {seconds:.0f} s")
        except (EOFError, OSError):
            process.join(END_SECONDS)
            if process.exitcode == -signal.SIGKILL:
                return OutOfMemory("the process was killed, as the system does when memory runs out")
            return Failure(spawn.end(process, END_SECONDS))


def _together(each: Sequence[Steady], memory: Sequence[float | None], kind: str) -> Timed:
    """Of processes side by side. CUDA tells the slice's memory, the CPU each process its own."""
    known = [mib for mib in memory if mib is not None]
    return Timed(
        sum(one.median_ms for one in each) / len(each),
        max(one.within for one in each),
        sum(one.outliers for one in each),
        sum(one.runs for one in each),
        (max(known) if kind == "cuda" else sum(known)) if known else None,
    )


def mean_w(energy_j: Callable[[], float | None]) -> float | None:
    """What is drawn, over a second or so; None where the counter is silent, stands still, or goes back.

    The counter moves in steps of up to a tenth of a second or so: from one step to another nothing of it is lost.
    """
    first = _next_step(energy_j)
    if first is None:
        return None
    time.sleep(ENERGY_SECONDS)
    last = _next_step(energy_j)
    if last is None or last.joules <= first.joules:
        return None
    return (last.joules - first.joules) / (last.at_s - first.at_s)


class _Reading(NamedTuple):
    at_s: float
    joules: float


def _next_step(energy_j: Callable[[], float | None]) -> _Reading | None:
    before, begin = energy_j(), time.perf_counter()
    while before is not None and time.perf_counter() - begin < STEP_SECONDS:
        now, at = energy_j(), time.perf_counter()
        if now != before:
            return None if now is None else _Reading(at, now)
        time.sleep(LOOK_SECONDS)
    return None


# ---- in the processes ----


def main(source: ModelSource, device: Device, pipe: Connection) -> None:
    """Loads, says so, and measures what it is asked for until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if device.uuid is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device.uuid
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    backends.limit_threads(device.threads)
    with suppress(EOFError, OSError):
        try:
            if device.memory_mib is not None:
                backends.limit_memory(device.kind, device.memory_mib)
            backend = backends.load(Load(source, device.latency_ms), device.kind, device.sm_count)
        except ModelLoadError as error:
            pipe.send(OutOfMemory(str(error)) if backends.is_out_of_memory(error) else Failure(str(error)))
            return
        except MemoryError as error:
            pipe.send(OutOfMemory(f"while loading: {error!r}"))
            return
        pipe.send((backend.signature, backends.versions(device.kind)))
        while True:
            _answer(pipe.recv(), backend, source, device, pipe)


def _answer(ask: _Ask, backend: Backend, source: ModelSource, device: Device, pipe: Connection) -> None:
    try:
        dims = ask.dims or backend.signature.sample_dims
        inputs = sample(backend.signature, ask.batch, dims, source.lengths, dims[0] if dims else 0)
        backends.forget_memory(device.kind)
        pipe.send((_timed(backend, inputs, ask.effort), backends.memory_mib(device.kind)))
        while not pipe.poll():
            backend.finish(backend.start(inputs))
        pipe.send(pipe.recv())
    except Exception as error:
        if isinstance(error, EOFError | BrokenPipeError):
            raise
        detail = f"{type(error).__name__}: {error}"[:500]
        pipe.send(OutOfMemory(detail) if backends.is_out_of_memory(error) else Failure(detail))


def _timed(backend: Backend, inputs: list[Array], effort: Effort) -> Steady:
    """Warm-up: at least two batches, since the first of a shape pays for caches and buffers."""
    begin = time.perf_counter()
    for index in range(effort.runs):
        backend.finish(backend.start(inputs))
        if index and time.perf_counter() - begin > effort.warm_up_seconds:
            break
    times_ms: list[float] = []
    begin = time.perf_counter()
    while True:
        started = time.perf_counter()
        backend.finish(backend.start(inputs))
        ended = time.perf_counter()
        times_ms.append(1e3 * (ended - started))
        found = summary(times_ms)
        # Slow batches may take a few times as long, so that there are runs enough to speak of a median.
        tired = ended - begin > effort.seconds * (1 if found.runs >= LEAST_RUNS else PATIENCE)
        if found.within <= effort.within or tired or found.runs >= effort.runs:
            return found
