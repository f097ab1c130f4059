"""How a job comes in: its terms are read, its inputs go to disk as they come, and are looked at when all are there."""

from __future__ import annotations

import asyncio
import datetime
import re
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from io import RawIOBase
from pathlib import Path

import msgspec

from scheduler.elastic import FOREVER_NS, Holding
from server import job_inputs, job_tensors
from server.errors import Fault, ServeError, invalid
from server.job_inputs import FILES, FOLDER, FORMATS, JSONL, LISTING, NPZ, SAFETENSORS, TENSORS
from server.job_progress import within_ns
from server.job_results import JSONL as LINES
from server.job_results import OUTPUTS
from server.job_store import Asked, Job, kept_or_refused
from server.jobs import Jobs
from server.repository import Model, Repository
from server.settings import MIB, Settings

PARAMETERS = ("model", "version", "deadline", "format", "output", "max_errors", "name", "folder", "strict")
WRITE_BYTES = 1 << 20
GUESS_BYTES = 512
_NO_TEXT = re.compile(rb"[\x00-\x08\x0e-\x1f]")
NAME_CHARS = 100
# Without a word on it so many items may go wrong, or a tenth.
FEW_ERRORS, ERROR_SHARE = 10, 0.1
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")


class Terms(msgspec.Struct, frozen=True):
    """What was asked for, apart from the inputs. `deadline_s`: of the wall clock. `strict`: in time or not at all."""

    model: str
    version: str | None
    deadline_s: float | None
    format: str | None
    output: str
    max_errors: int | None
    name: str
    folder: str | None
    strict: bool


def read_terms(parameters: Mapping[str, str], now_s: float) -> Terms:
    """Of a query string. Raises ServeError."""
    for name in parameters:
        if name not in PARAMETERS:
            near = get_close_matches(name, PARAMETERS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PARAMETERS)}"
            raise invalid(f"unknown parameter {name[:NAME_CHARS]}; {hint}")
    if not parameters.get("model"):
        raise invalid("which model? expected POST /v2/jobs?model=NAME, with the inputs as the body")
    max_errors = parameters.get("max_errors")
    if max_errors is not None and not (max_errors.isdecimal() and len(max_errors) < 16):
        raise invalid(f"max_errors must be a whole number, not {max_errors[:NAME_CHARS]!r}")
    if parameters.get("strict") == "true" and "deadline" not in parameters:
        raise invalid("strict means in time or not at all: it needs a deadline")
    return Terms(
        parameters["model"],
        parameters.get("version"),
        _deadline(parameters["deadline"], now_s) if "deadline" in parameters else None,
        _one_of("format", parameters["format"], FORMATS) if parameters.get("format") else None,
        _one_of("output", parameters.get("output") or LINES, OUTPUTS),
        None if max_errors is None else int(max_errors),
        parameters.get("name", "")[:NAME_CHARS],
        parameters.get("folder"),
        _one_of("strict", parameters.get("strict") or "false", ("true", "false")) == "true",
    )


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise invalid(f"{name} must be {' or '.join(known)}, not {value[:NAME_CHARS]!r}")
    return value


def _deadline(text: str, now_s: float) -> float:
    """Of the wall clock: from now on (90, 90s, 15m, 8h, 2d), or a time in ISO form, local without a zone."""
    duration = _DURATION.fullmatch(text.strip())
    try:
        if duration is not None:
            at_s = now_s + float(duration[1]) * _UNITS[duration[2]]
        else:
            at_s = datetime.datetime.fromisoformat(text.strip().replace(" ", "+")).timestamp()
        datetime.datetime.fromtimestamp(at_s, datetime.UTC)  # as it is shown: not beyond the calendar
    except (ValueError, OverflowError, OSError):
        raise invalid(
            f"deadline {text[:NAME_CHARS]!r} is neither a time from now on, such as 90s, 15m or 8h, nor one of the "
            f"clock, such as 2026-11-21T06:00"
        ) from None
    if duration is None and at_s <= now_s:
        ago = datetime.timedelta(seconds=round(now_s - at_s))
        raise invalid(f"deadline {text[:NAME_CHARS]!r} was {ago} ago, by the daemon's clock")
    return at_s


class Intake:
    """Takes jobs in."""

    def __init__(self, settings: Settings, jobs: Jobs, repository: Repository) -> None:
        self._settings = settings
        self._jobs = jobs
        self._repository = repository

    async def take(self, terms: Terms, body: AsyncIterator[bytes], gone: Callable[[], Awaitable[bool]]) -> Job:
        """`gone`: whether its sender has, who would send it again. Raises ServeError; then nothing is left of it.

        It is cancelled only as the server stops: what it was at in a thread may go on, and the next start finds the
        job whole, or sweeps what there is of it.
        """
        model = self._repository.get(terms.model, terms.version)
        if (terms.format == FILES or terms.folder is not None) and model.serving.preprocess is None:
            raise invalid(
                f"model {model.name} takes tensors, not files: send JSON lines, npz or safetensors, or give it "
                f"`preprocess`, see docs/preprocessing.md"
            )
        job_id, folder = self._jobs.new_folder()
        try:
            await receive(body, folder / LISTING, self._settings)
            model = self._repository.get(terms.model, terms.version)  # it may have been loaded anew meanwhile
            form = FOLDER if terms.folder is not None else terms.format or _guess(folder / LISTING)
            form = JSONL if form == FILES else form
            items = await self._prepare(folder, form, model, terms.folder)
            if not items:
                raise invalid("there are no items in the inputs")
            max_errors = max(FEW_ERRORS, int(ERROR_SHARE * items)) if terms.max_errors is None else terms.max_errors
            asked = Asked(
                model.name,
                str(model.version),
                terms.deadline_s,
                form,
                terms.output,
                max_errors,
                items,
                model.signature,
                terms.name,
                model.identity,
            )
            job = Job(job_id, asked, time.time())
            foreseen = await self._jobs.forecast(job)
            if terms.strict:
                _check_deadline(job, foreseen)
            await self._jobs.add(job, foreseen)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if await gone():  # asked when it is kept: not a moment before that is left out
            for forget in (self._jobs.cancel, self._jobs.remove):
                with suppress(ServeError):  # it has ended already; or the server stops, and goes on with it later
                    await forget(job.id)
            raise invalid("whoever sent the inputs has gone")
        return job

    async def _prepare(self, folder: Path, form: str, model: Model, files: str | None) -> int:
        """Returns how many items there are. Raises ServeError."""
        try:
            with kept_or_refused():
                return await asyncio.to_thread(self._prepared, folder, form, model, files)
        except OSError as error:
            raise invalid(f"the inputs cannot be read: {error.strerror or error}") from error

    def _prepared(self, folder: Path, form: str, model: Model, files: str | None) -> int:
        path = folder / LISTING
        if form in (NPZ, SAFETENSORS):
            return self._unpacked(path, form, model)
        if form == FOLDER:
            if path.stat().st_size:
                raise invalid("the inputs are either a folder or a body, not both")
            return job_inputs.list_folder(*self._inside(files or ""), path)
        return job_inputs.count_lines(path)

    def _unpacked(self, path: Path, form: str, model: Model) -> int:
        most = self._settings.jobs_max_input_mib * MIB
        found = job_tensors.unpack_npz(path, most) if form == NPZ else job_tensors.read_safetensors(path)
        tensors, items = job_tensors.check_tensors(found, model.signature)
        path.with_name(TENSORS).write_bytes(msgspec.json.encode(tensors))
        return items

    def _inside(self, files: str) -> tuple[Path, Path]:
        root = self._settings.jobs_input_dir
        if root is None:
            raise invalid("folders of the server are not read: it was started without --jobs-input-dir")
        folder = job_inputs.below(root, files)
        if folder is None or not folder.is_dir():
            raise invalid(f"{files[:200]!r} is no folder below --jobs-input-dir")
        return folder, root.resolve()


def _check_deadline(job: Job, holding: Holding) -> None:
    """Raises ServeError."""
    if holding.feasible:
        return
    earliest = "no slice that serves it has time for it now"
    if holding.ends_ns < FOREVER_NS:
        late_s = (holding.ends_ns - within_ns(job)) / 1e9
        earliest = f"the earliest end is in {holding.ends_ns / 1e9:.0f} s, {late_s:.0f} s after it"
        earliest += "" if holding.planned else "; until then other jobs hold the slices"
    raise ServeError(Fault.CONFLICT, f"the job cannot end by its deadline: {earliest}", reason="infeasible")


async def receive(body: AsyncIterator[bytes], path: Path, settings: Settings) -> None:
    """Puts what comes into a file, a piece at a time, in a thread. Raises ServeError."""
    most, timeout_s = settings.jobs_max_input_mib * MIB, settings.http_read_timeout_secs
    size, waiting = 0, bytearray()
    with kept_or_refused(), path.open("wb", buffering=0) as file:
        parts = aiter(body)
        while True:
            try:
                async with asyncio.timeout(timeout_s):
                    part = await anext(parts, None)
            except TimeoutError:
                raise invalid("the inputs did not arrive in time") from None
            size += len(part or b"")
            waiting += part or b""
            if size > most:
                raise ServeError(Fault.TOO_LARGE, f"the inputs are longer than {most} bytes; --jobs-max-input-mib")
            if len(waiting) >= WRITE_BYTES or part is None:
                await asyncio.to_thread(_write, file, bytes(waiting))
                waiting.clear()
            if part is None:
                return


def _write(file: RawIOBase, data: bytes) -> None:
    """All of it: without a buffer a call may write less."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) or 0 :]


def _guess(path: Path) -> str:
    """By how the file begins. Raises ServeError where that is no text either."""
    with path.open("rb") as file:
        begin = file.read(GUESS_BYTES)
    if begin.startswith(b"PK\3\4"):
        return NPZ
    if begin[8:9] == b"{" and 0 in begin[:8]:
        return SAFETENSORS
    if _NO_TEXT.search(begin):
        raise invalid(
            "the inputs are no text, and neither npz nor safetensors: they cannot be used; pictures and other files "
            "are taken as a folder, arrays in .npy as an npz (numpy.savez)"
        )
    return JSONL
