"""What stands behind the simulated driver's calls: the machine's GPUs, handles, ordered faults, the state file."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pynvml

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import GpuModel, IllegalLayoutError, Layout, parse_layout
from partitioner.nvml_errors import NvmlUnavailableError
from partitioner.simulated_gpu import GpuState, RefusedError

_NAMESPACE = uuid.UUID("6ba7b812-9dad-11d1-80b4-00c04fd430c8")
_FIRST_ADDRESS, _STRIDE = 0x7F0000001000, 0x40
TRACE_LENGTH = 10_000
HANDLE_TYPES = {
    "gpu": pynvml.c_nvmlDevice_t,
    "mig": pynvml.c_nvmlDevice_t,
    "gi": pynvml.c_nvmlGpuInstance_t,
    "ci": pynvml.c_nvmlComputeInstance_t,
    "events": pynvml.c_nvmlEventSet_t,
    "sample": pynvml.c_nvmlGpmSample_t,
}


class WouldCrashError(TypeError):
    """An argument that pynvml hands on as it is, and that would crash a process with the real driver."""


@cache
def _uuid(name: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, name))


@dataclass(frozen=True, slots=True)
class SimulatedGpu:
    """One GPU of a simulated machine, as it is before anybody changed it."""

    index: int
    model: GpuModel
    layout: Layout
    mig_enabled: bool = True
    mig_capable: bool = True

    @property
    def uuid(self) -> str:
        return f"GPU-{_uuid(f'{self.model.name}/{self.index}')}"

    @property
    def name(self) -> str:
        return f"NVIDIA {self.model.name} (simulated)"

    def mig_uuid(self, gi_id: int, ci_id: int) -> str:
        """Name-based, as the driver's: the same (GPU, GI, CI) gets the same UUID again."""
        return f"MIG-{_uuid(f'{self.uuid}/{gi_id}/{ci_id}')}"

    def first_state(self) -> GpuState:
        state = GpuState(self.model, self.mig_enabled, self.mig_enabled)
        for placed in self.layout if self.mig_enabled else ():
            instance = state.create(placed.profile, placed.placement)
            whole = max((0, 1, 2, 3, 4), key=lambda enum: _part_gpcs(state, instance, enum))
            state.create_part(instance, state.compute_profile(instance, whole), None)
        return state


def _part_gpcs(state: GpuState, instance: Any, enum: int) -> int:
    try:
        return state.compute_profile(instance, enum).gpcs
    except RefusedError:
        return 0


def parse_gpus(spec: str, layout: str | None) -> list[SimulatedGpu]:
    """`A100-80GB`, `A100-80GBx4` or `A100-80GBx2,H200-141GB`, every GPU cut into `layout`.

    Without a layout it is 4g+2g+1g, or what comes near; `empty` leaves a GPU uncut, `off` leaves MIG off.
    Raises IllegalLayoutError for unknown GPUs and layouts, naming what there is.
    """
    models = [model for part in spec.split(",") for model in _parse_gpu(part.strip())]
    return [_cut(index, model, layout) for index, model in enumerate(models)]


def _parse_gpu(part: str) -> list[GpuModel]:
    name, _, count = part.rpartition("x")
    if not name or not count.isdecimal():
        name, count = part, "1"
    if int(count) == 0:
        raise IllegalLayoutError(f"no GPU at all in {part!r}: the number after x must be 1 or more")
    if name not in GPU_MODELS:
        known = ", ".join(GPU_MODELS)
        raise IllegalLayoutError(f"no GPU called {name!r} in the catalogue; there are {known}, each with xN for N")
    return [GPU_MODELS[name]] * int(count)


def _cut(index: int, model: GpuModel, layout: str | None) -> SimulatedGpu:
    if layout in ("off", "empty"):
        return SimulatedGpu(index, model, (), mig_enabled=layout == "empty")
    return SimulatedGpu(index, model, parse_layout(layout or default_layout(model), model))


def default_layout(model: GpuModel) -> str:
    """A mixed layout to begin with: 4g+2g+1g, on GPUs of four compute slices 2g+1g+1g."""
    by_gpcs = {profile.gpcs: profile.name for profile in reversed(model.profiles) if profile.name[-1] == "b"}
    sizes = (4, 2, 1) if model.compute_slices == 7 else (2, 1, 1)
    return "+".join(by_gpcs[size] for size in sizes)


class Handles:
    """Opaque pointers to things, as the driver gives them out: compared by identity, not hashable, never used twice."""

    def __init__(self) -> None:
        self._by_address: dict[int, tuple[str, tuple[Any, ...]]] = {}
        self._by_thing: dict[tuple[str, tuple[Any, ...]], int] = {}
        self._next = _FIRST_ADDRESS

    def give(self, kind: str, *key: Any) -> Any:
        thing = (kind, key)
        address = self._by_thing.get(thing)
        if address is None:
            address, self._next = self._next, self._next + _STRIDE
            self._by_thing[thing] = address
            self._by_address[address] = thing
        return HANDLE_TYPES[kind].from_buffer_copy(ctypes.c_void_p(address))

    def take(self, handle: Any, *kinds: str) -> tuple[str, tuple[Any, ...]]:
        """What `handle` stands for. Raises INVALID_ARGUMENT for pointers never given out or gone."""
        if not isinstance(handle, HANDLE_TYPES[kinds[0]]):
            raise WouldCrashError(
                f"{handle!r} is no {HANDLE_TYPES[kinds[0]].__name__}: the driver would follow it blindly"
            )
        address = ctypes.c_void_p.from_buffer(handle).value
        kind, key = self._by_address.get(address or 0, ("", ()))
        if kind not in kinds:
            raise RefusedError("INVALID_ARGUMENT")
        return kind, key

    def forget(self) -> None:
        """None of them is valid any more."""
        self._by_address.clear()
        self._by_thing.clear()

    def drop(self, kind: str, *key: Any) -> None:
        address = self._by_thing.pop((kind, key))
        del self._by_address[address]


@dataclass(slots=True)
class _Fault:
    call: str
    error: int | BaseException
    skip: int
    times: int
    after: bool


class Faults:
    """Errors that were ordered, and the trace of calls by which to order them."""

    def __init__(self) -> None:
        self.calls: deque[str] = deque(maxlen=TRACE_LENGTH)
        self._ordered: list[_Fault] = []

    def order(self, call: str, error: int | BaseException, nth: int, times: int, after: bool) -> None:
        if call != "*" and not hasattr(pynvml, call):
            raise ValueError(f"pynvml has no function {call!r}")
        self._ordered.append(_Fault(call, error, nth - 1, times, after))

    def clear(self) -> None:
        self._ordered.clear()

    def due(self, call: str) -> tuple[BaseException, bool] | None:
        """Counts `call`. The error it is to end with, and whether only after having done its work."""
        self.calls.append(call)
        hit = None
        for fault in list(self._ordered):
            if fault.call not in ("*", call):
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            if hit is None:
                hit = fault
                fault.times -= 1
                if fault.times == 0:
                    self._ordered.remove(fault)
        if hit is None:
            return None
        error = hit.error
        return (error if isinstance(error, BaseException) else pynvml.NVMLError(error)), hit.after


class Machine:
    """The GPUs and their state, shared by all sessions; in a file, where other processes shall see it too."""

    def __init__(self, gpus: Sequence[SimulatedGpu], state_file: Path | None) -> None:
        self.gpus = list(gpus)
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._file = state_file
        self._seen: tuple[int, int] | None = None
        self._on_change: list[Callable[[str], None]] = []
        self._by_uuid = {gpu.uuid: gpu for gpu in self.gpus}
        self.states = {gpu.uuid: gpu.first_state() for gpu in self.gpus}
        if state_file is not None:
            with self.lock, self._file_lock():
                if state_file.exists():
                    self.refresh()
                else:
                    self._save()

    def gpu(self, gpu_uuid: str) -> SimulatedGpu:
        """Raises KeyError."""
        return self._by_uuid[gpu_uuid]

    def watch(self, on_change: Callable[[str], None]) -> None:
        """`on_change(gpu_uuid)` is called, under the lock, when its instances or its mode have changed."""
        self._on_change.append(on_change)

    @contextmanager
    def change(self, gpu_uuid: str, *, tell: bool = True) -> Iterator[GpuState]:
        """The state of a GPU, to be changed; written to the file, and told, if nothing is raised."""
        with self.lock, self._file_lock():
            self.refresh()
            yield self.states[gpu_uuid]
            self._save()
            if tell:
                self._tell(gpu_uuid)

    def refresh(self) -> None:
        """Takes over what other processes have changed."""
        if self._file is None:
            return
        found = self._file.stat()
        if self._seen == (found.st_mtime_ns, found.st_ino):
            return
        self._seen = (found.st_mtime_ns, found.st_ino)
        before = {gpu_uuid: state.to_data() for gpu_uuid, state in self.states.items()}
        self.states = self._load()
        for gpu_uuid, state in self.states.items():
            if state.to_data() != before[gpu_uuid]:
                self._tell(gpu_uuid)

    def _tell(self, gpu_uuid: str) -> None:
        for on_change in self._on_change:
            on_change(gpu_uuid)
        with self.changed:
            self.changed.notify_all()

    def _load(self) -> dict[str, GpuState]:
        assert self._file is not None
        try:
            rows = json.loads(self._file.read_text())["gpus"]
            if [row["model"] for row in rows] != [gpu.model.name for gpu in self.gpus]:
                there = ", ".join(row["model"] for row in rows)
                raise NvmlUnavailableError(
                    f"the simulated machine in {self._file} has other GPUs ({there}); name the same ones, or remove "
                    f"the file"
                )
            states = (GpuState.from_data(gpu.model, row) for gpu, row in zip(self.gpus, rows, strict=True))
            return {gpu.uuid: state for gpu, state in zip(self.gpus, states, strict=True)}
        except (ValueError, KeyError, TypeError, StopIteration, RefusedError) as error:
            raise NvmlUnavailableError(
                f"{self._file} is no state of a simulated machine ({error!r}); remove it to begin anew"
            ) from error

    def _save(self) -> None:
        if self._file is None:
            return
        rows = [{"model": gpu.model.name, **self.states[gpu.uuid].to_data()} for gpu in self.gpus]
        fresh = self._file.with_name(f"{self._file.name}.{os.getpid()}.new")
        fresh.write_text(json.dumps({"gpus": rows}, indent=1))
        # Times of files are coarse and inodes are used again: only a time that always grows tells versions apart.
        now_ns = max(time.time_ns(), self._seen[0] + 1 if self._seen else 0)
        os.utime(fresh, ns=(now_ns, now_ns))
        os.replace(fresh, self._file)
        found = self._file.stat()
        self._seen = (found.st_mtime_ns, found.st_ino)

    @contextmanager
    def _file_lock(self) -> Iterator[None]:
        if self._file is None:
            yield
            return
        with self._file.with_name(f"{self._file.name}.driver").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def pointee(reference: Any, kind: type[ctypes.Structure | ctypes._SimpleCData[Any]]) -> Any:
    """What `byref(x)` or `pointer(x)` points to. Raises WouldCrashError for anything else, such as `x` itself."""
    target = getattr(reference, "_obj", None)
    if target is None and isinstance(reference, ctypes._Pointer) and reference:
        target = reference.contents
    if not isinstance(target, kind):
        raise WouldCrashError(
            f"{reference!r} is no byref() of a {kind.__name__}: pynvml hands it on as it is, and the driver would "
            f"take it for an address"
        )
    return target
