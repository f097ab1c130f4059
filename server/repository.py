"""Models: found on disk, loaded on the fleet, replaced and unloaded while requests come in.

The folder is Triton's: `<repository>/<model>/<version>/model.pt2` (or `model.pt`), with an optional `config.pbtxt`.
What Triton has no words for stands in an optional `serving.yaml` beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import structlog

from preprocess.pipeline import PipelineError
from scheduler.channel import ModelSource
from scheduler.driver import Driver
from scheduler.fleet import Fleet
from scheduler.lengths import Lengths, Points, shortest
from scheduler.loading import ModelUnservableError
from scheduler.staff import Worker
from scheduler.tensors import InputLayout, Signature
from server import model_identity
from server.config_pbtxt import ModelFileError
from server.errors import Fault, ServeError
from server.model_files import ServingFile, needs_torch, read_model, versions_to_serve

log = structlog.get_logger(__name__)

Prepare = Callable[["Model"], Awaitable[None]]
Progress = Callable[[str, str], None]  # model name, what has become of it


class ModelState(StrEnum):
    """The states of Triton's repository index."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


# As much of what was asked for is repeated in an error.
NAME_CHARS = 100
# No version is longer.
VERSION_DIGITS = 18

# Of a model that is not loaded yet.
NOTHING = Signature((), (), 0)


@dataclass(eq=False)
class Model:
    """One version of a model. `key` is its name in the scheduler: a reload is a new key."""

    name: str
    version: int
    source: ModelSource | None = None
    serving: ServingFile = field(default_factory=ServingFile)
    state: ModelState = ModelState.LOADING
    reason: str = ""
    unloaded: bool = False  # on purpose
    needed: bool = False  # without it the server is not ready: it was there at the start, or was served since
    version_policy: Mapping[str, Any] = field(default_factory=dict)  # Triton's ModelVersionPolicy
    signature: Signature = NOTHING
    layout: InputLayout = field(default_factory=lambda: InputLayout(NOTHING))
    identity: str = ""  # of what its answers come from

    @property
    def id(self) -> tuple[str, str]:
        """Name and version, over all reloads."""
        return self.name, str(self.version)

    @property
    def key(self) -> str:
        return self.source.key if self.source is not None else ""

    @property
    def lengths(self) -> Lengths | None:
        return self.source.lengths if self.source is not None else None

    @property
    def backend(self) -> str:
        return self.source.backend if self.source is not None else ""

    @property
    def emulated(self) -> bool:
        return self.backend == "emulated"


class Repository:
    """All models that were asked for, by name and version."""

    def __init__(self, roots: Sequence[Path], fleet: Fleet, driver: Driver, arena_bytes: int, prepare: Prepare) -> None:
        """`prepare`: gets ready what the preprocessing of a model needs, and raises PipelineError."""
        self._roots = list(roots)
        self._arena_bytes = arena_bytes
        self._fleet = fleet
        self._driver = driver
        self.prepare = prepare
        self._models: dict[str, dict[int, Model]] = {}
        self._answering: dict[tuple[str, str | None], Model] = {}  # what `get` found, until anything changes
        self._generation = 0
        self._changing: dict[str, asyncio.Lock] = {}
        self._changes: set[asyncio.Task[None]] = set()

    # ---- reading ----

    def get(self, name: str, version: str | None = None) -> Model:
        """The model that answers requests now; the highest version if none is named. Raises ServeError."""
        model = self._answering.get((name, version))
        if model is None or model.state != ModelState.READY:
            model = self._answering[name, version] = self._find(name, version)
        return model

    def is_mixed(self, model: Model) -> bool:
        """Whether its file was replaced, and is served by some slices, though nobody has loaded it anew."""
        return self._fleet.is_mixed(model.key)

    def _find(self, name: str, version: str | None) -> Model:
        versions = self._models.get(name)
        if versions is None:
            gone = {
                name for name, of_it in self._models.items() if of_it and all(each.unloaded for each in of_it.values())
            }
            known = ", ".join(name for name in self.names() if name not in gone) or "none"
            raise ServeError(Fault.NOT_FOUND, f"unknown model {name[:NAME_CHARS]!r}; there are: {known}")
        model = self._version(name, versions, version)
        if model.state != ModelState.READY:
            reason = f": {model.reason}" if model.reason else ""
            raise ServeError(Fault.UNAVAILABLE, f"model {name} is not ready, it is {model.state}{reason}")
        return model

    def _version(self, name: str, versions: dict[int, Model], version: str | None) -> Model:
        if not versions:
            raise ServeError(Fault.UNAVAILABLE, f"model {name} is not ready, it is {ModelState.LOADING}")
        if version:
            if version.isdecimal() and len(version) <= VERSION_DIGITS and int(version) in versions:
                return versions[int(version)]
            known, asked = ", ".join(map(str, sorted(versions))), version[: VERSION_DIGITS + 1]
            raise ServeError(Fault.NOT_FOUND, f"model {name} has no version {asked!r}; served: {known}")
        ready = [number for number, model in versions.items() if model.state == ModelState.READY]
        return versions[max(ready or versions)]

    def names(self) -> list[str]:
        return sorted(self._models)

    def models(self) -> list[Model]:
        """Every version, whatever its state."""
        return [versions[number] for _, versions in sorted(self._models.items()) for number in sorted(versions)]

    def versions(self, name: str) -> list[Model]:
        """The ready versions of a model. Raises ServeError for an unknown one."""
        self.get(name)
        return [model for model in self._models[name].values() if model.state == ModelState.READY]

    def servers(self, model: Model) -> list[Worker]:
        """The workers that would run it now."""
        return self._fleet.serving(model.key)

    def measured_ms(self, model: Model) -> dict[str, Points]:
        """What was measured of it, by kind of worker; also on slices that came after it was loaded."""
        return self._fleet.measured_ms(model.key)

    def lengths(self) -> Iterator[tuple[str, Lengths, int]]:
        """Of ready models whose length buckets are to be learned: key, lengths, and the shortest that they take."""
        for model in self.models():
            if model.state == ModelState.READY and model.lengths is not None and not model.lengths.edges:
                yield model.key, model.lengths, shortest(model.signature)

    def not_ready(self) -> list[str]:
        """Why some models that should be served are not, one sentence each."""
        reasons = []
        for model in self.models():
            if model.state == ModelState.READY and not self.servers(model):
                reasons.append(f"model {model.name}: no slice serves it now")
            elif model.needed and model.state in (ModelState.LOADING, ModelState.UNAVAILABLE):
                reasons.append(f"model {model.name}: {model.reason or 'loading'}")
        return reasons

    def needs_torch(self) -> bool:
        """Whether a model on disk does. Of an empty repository nothing is known: yes."""
        folders = [path for root in self._roots for path in _model_folders(root)]
        return not folders or any(map(needs_torch, folders))

    # ---- changing ----

    async def load_all(self, progress: Progress) -> None:
        """Loads everything in the repository. A broken model is logged and told of, and harms no other."""
        names = sorted({path.name for root in self._roots for path in _model_folders(root)})
        for name in names:
            self._models.setdefault(name, {})
        for name in names:
            try:
                await self._finish(self._load(name, needed=True), "model not loaded", name)
                progress(name, "")
            except ServeError as error:
                progress(name, error.message)
            except Exception as error:  # one folder that we have no words for must not end the daemon
                log.exception("model not served", model=name)
                self._fail(name, 1, f"cannot be loaded: {error!r}", needed=True)
                progress(name, repr(error))

    async def load(self, name: str) -> None:
        """Loads a model anew from disk; what ran before goes on until the new one is up. Raises ServeError.

        Goes on, like `unload`, if the one who asked for it leaves: half a change would be neither.
        """
        await self._finish(self._load(name, needed=False), "model not loaded", name)

    async def unload(self, name: str) -> None:
        """Stops taking requests for a model, lets those under way finish, and frees it. Raises ServeError."""
        await self._finish(self._unload(name), "model not unloaded", name)

    async def _finish(self, change: Coroutine[Any, Any, None], failed: str, name: str) -> None:
        async def told() -> None:
            try:
                await change
            except ServeError as error:
                log.error(failed, model=name[:NAME_CHARS], reason=error.message)
                raise

        task = asyncio.create_task(told())
        self._changes.add(task)  # the loop itself would not keep it alive
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    async def _load(self, name: str, *, needed: bool) -> None:
        async with self._changing.setdefault(name, asyncio.Lock()):
            folder = self._folder(name)
            try:
                numbers, ignored = versions_to_serve(folder)
            except ModelFileError as error:
                self._fail(name, 1, str(error), needed=needed)
                raise ServeError(Fault.INVALID, f"model {name} cannot be loaded: {error}") from error
            if ignored:
                log.warning("config.pbtxt sets what is ignored here", model=name, fields=ignored)
            before = dict(self._models.get(name, {}))
            for number in numbers:
                await self._load_version(name, number, folder, needed=needed)
            for number, model in before.items():
                if number not in numbers:
                    await self._retire(model)
                    del self._models[name][number]

    async def _unload(self, name: str) -> None:
        if name not in self._models:
            raise ServeError(Fault.NOT_FOUND, f"unknown model {name[:NAME_CHARS]!r}")
        async with self._changing.setdefault(name, asyncio.Lock()):
            for model in self._models[name].values():
                await self._retire(model)
                model.state, model.reason = ModelState.UNAVAILABLE, "unloaded"
                model.unloaded, model.needed = True, False
        log.info("model unloaded", model=name)

    async def _load_version(self, name: str, number: int, folder: Path, *, needed: bool) -> None:
        old = self._models.get(name, {}).get(number)
        model = Model(name, number, needed=needed or (old is not None and old.needed))
        if old is None or old.state != ModelState.READY:
            self._models.setdefault(name, {})[number] = model
        try:
            self._generation += 1
            model.source, model.serving, model.version_policy = read_model(folder, number, self._generation)
            loaded = await self._fleet.load(model.source)
            model.serving.check(loaded.signature)
            await self.prepare(model)
            model.identity = model_identity.of(model.source, model.serving.preprocess)
        except (ModelFileError, ModelUnservableError, PipelineError) as error:
            if model.source is not None:
                self._fleet.unload(model.key)
            model.state, model.reason = ModelState.UNAVAILABLE, str(error)
            raise ServeError(Fault.INVALID, f"model {name} cannot be loaded: {error}") from error
        model.signature = loaded.signature
        model.layout = InputLayout(loaded.signature)
        model.state, model.needed = ModelState.READY, True
        self._models[name][number] = model
        self._answering.clear()
        self._warn_of_arena(model)
        measured_ms = {kind: _shortly(points) for kind, points in loaded.measured_ms.items()}
        known = {"latency_table": model.source.latency_origin} if model.source.latency_origin else {}
        log.info("model ready", model=name, version=number, backend=model.backend, measured_ms=measured_ms, **known)
        if old is not None and old.state == ModelState.READY:
            await self._retire(old)

    def _warn_of_arena(self, model: Model) -> None:
        signature = model.signature
        nbytes = model.layout.slot(max(signature.max_batch, 1), signature.sample_dims).nbytes
        if nbytes > self._arena_bytes:
            log.warning(
                "a request of a full batch does not fit the arena; see --arena-mib",
                model=model.name,
                items=signature.max_batch,
                nbytes=nbytes,
                arena_bytes=self._arena_bytes,
            )

    async def _retire(self, model: Model) -> None:
        self._answering.clear()
        if model.state != ModelState.READY:
            return
        model.state = ModelState.UNLOADING
        await self._driver.idle(model.key)
        self._fleet.unload(model.key)

    def _folder(self, name: str) -> Path:
        for root in self._roots:
            for path in _model_folders(root):
                if path.name == name:
                    return path
        raise ServeError(Fault.NOT_FOUND, f"model {name[:NAME_CHARS]!r} is not in {', '.join(map(str, self._roots))}")

    def _fail(self, name: str, number: int, reason: str, *, needed: bool) -> None:
        versions = self._models.setdefault(name, {})
        if not any(model.state == ModelState.READY for model in versions.values()):
            needed = needed or any(model.needed for model in versions.values())
            versions[number] = Model(name, number, state=ModelState.UNAVAILABLE, reason=reason, needed=needed)


def _shortly(points: Points) -> str:
    """For a log line: the smallest and the largest batch that was measured."""
    ends = [points[0], points[-1]] if len(points) > 1 else points
    return ", ".join(f"{ms:.3g} for {batch}" for batch, ms in ends)


def _model_folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
