"""Jobs on disk: one SQLite database (WAL) of all jobs, and of each a folder with its inputs, ledger and results.

    jobs/jobs.sqlite          what was asked for, and what has become of it
    jobs/ID/input             the inputs as they came; a folder's listing
    jobs/ID/ledger.sqlite     what is finished, by item; in any order
    jobs/ID/results.jsonl     in the order of the inputs, once all is finished; or results.npz, .safetensors

An item is finished once its row is in the ledger, which a crash leaves as it was committed. Nothing here knows the
event loop: calls block, and are made in a thread, one at a time.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path

import msgspec

from scheduler.tensors import Signature
from server.errors import Fault, ServeError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Of a job that are kept at hand: the first ones.
ERRORS_SHOWN = 10
# Of a file's name while it is being written.
UNFINISHED = ".unfinished"


class DiskFullError(Exception):
    """There is no room; what was to be written is not, and may be tried again."""


class JobState(StrEnum):
    """`paused`: by itself, and it goes on by itself. `stopped`: by itself, and goes on when somebody says so."""

    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    CANCELLED = "cancelled"
    STOPPED = "stopped"

    @property
    def is_end(self) -> bool:
        """It does not go on by itself."""
        return self in (JobState.DONE, JobState.CANCELLED, JobState.STOPPED)


class Asked(msgspec.Struct, frozen=True):
    """What a job was asked to be. `deadline_s`: of the wall clock, since 1970; None: as soon as can be.

    `format`: of the inputs. `signature` and `identity`: of the model when the job was made; a job is for no other.
    Older releases kept no identity.
    """

    model: str
    version: str | None
    deadline_s: float | None
    format: str
    output: str
    max_errors: int
    items: int
    signature: Signature
    name: str = ""
    identity: str = ""


class ItemError(msgspec.Struct, frozen=True, array_like=True):
    """What is wrong with an item; `name`: its file, or what its line calls it. Older releases kept none."""

    item: int
    error: str
    name: str | None = None

    def __str__(self) -> str:
        return f"item {self.item}{f' ({self.name[:200]})' if self.name else ''}: {self.error}"


class Job(msgspec.Struct):
    """One job, as it is on disk. Times are of the wall clock, in seconds since 1970.

    `done`: items that are finished, `errors` of them with one; `first_errors` of those.
    """

    id: str
    asked: Asked
    created_s: float
    state: JobState = JobState.RUNNING
    reason: str = ""
    done: int = 0
    errors: int = 0
    ended_s: float | None = None
    first_errors: list[ItemError] = []

    def becomes(self, state: JobState, reason: str = "") -> None:
        """Unless it has been cancelled meanwhile. What it was paused for matters no more."""
        if not self.state.is_end:
            self.state, self.reason = state, reason

    def went_wrong(self, errors: Iterable[ItemError]) -> None:
        """With these items, too."""
        found = {each.item: each for each in (*self.first_errors, *errors)}
        self.first_errors = [found[item] for item in sorted(found)[:ERRORS_SHOWN]]

    @property
    def is_complete(self) -> bool:
        """Its results are to be written, which takes no model any more."""
        return self.done >= self.asked.items


class Row(msgspec.Struct, array_like=True):
    """A finished item: its outputs, packed, or its error; and its name in the inputs, where it has one."""

    item: int
    error: str | None
    value: bytes | None
    name: str | None = None


def errors_of(rows: Iterable[Row]) -> list[ItemError]:
    return [ItemError(row.item, row.error, row.name) for row in rows if row.error is not None]


class Position(msgspec.Struct, frozen=True):
    """Where to read on: the first item that is not finished, and where it begins in the input."""

    item: int = 0
    offset: int = 0


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA busy_timeout=5000")
    return connection


class _FullDisk:
    """Turns what a full disk raises into a DiskFullError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise DiskFullError("no room for the ledger") from error
        if isinstance(error, OSError) and error.errno in _FULL:
            raise DiskFullError(os.strerror(error.errno or 0)) from error


full_disk = _FullDisk


@contextmanager
def kept_or_refused(nevertheless: str = "") -> Iterator[None]:
    """What a client is told where something could not be put down. Raises ServeError."""
    try:
        with full_disk():
            yield
    except DiskFullError as error:
        raise ServeError(Fault.UNAVAILABLE, f"the disk is full: {error}{nevertheless}", reason="disk_full") from error
    except sqlite3.Error as error:
        raise ServeError(Fault.UNAVAILABLE, f"the database of jobs cannot be written: {error}{nevertheless}") from error


class JobStore:
    """All jobs. `folder` is made where it is not there. Raises OSError and sqlite3.Error where it cannot be had."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root = folder
        self._jobs = _connect(folder / "jobs.sqlite")
        self._jobs.execute("CREATE TABLE IF NOT EXISTS jobs (id TEXT PRIMARY KEY, created REAL, job BLOB)")

    def folder(self, job_id: str) -> Path:
        return self.root / job_id

    def results_path(self, job: Job) -> Path:
        return self.folder(job.id) / f"results.{job.asked.output}"

    def all(self) -> list[Job]:
        """By when they came."""
        rows = self._jobs.execute("SELECT job FROM jobs ORDER BY created, id")
        return [msgspec.json.decode(row[0], type=Job) for row in rows]

    def save(self, job: Job) -> None:
        """Raises DiskFullError."""
        with full_disk():
            self._jobs.execute(
                "INSERT OR REPLACE INTO jobs VALUES (?, ?, ?)", (job.id, job.created_s, msgspec.json.encode(job))
            )

    def remove(self, job_id: str) -> None:
        """Its folder goes last: what is left of one that no row knows is swept at the next start.

        Unless there is no room: even to forget a row takes some, which its files then make. Raises DiskFullError.
        """
        forget = partial(self._jobs.execute, "DELETE FROM jobs WHERE id = ?", (job_id,))
        try:
            forget()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                raise
            shutil.rmtree(self.folder(job_id), ignore_errors=True)
            with full_disk():
                forget()
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def tidy(self, job: Job) -> None:
        """Of one that is done all goes but its results."""
        for path in self.folder(job.id).glob("*"):
            if not path.name.startswith("results.") or path.name.endswith(UNFINISHED):
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """What was cut off: submissions, and the tidying of what is done."""
        jobs = {job.id: job for job in self.all()}
        for path in self.root.iterdir():
            if path.is_dir() and path.name not in jobs:
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir() and jobs[path.name].state == JobState.DONE:
                self.tidy(jobs[path.name])

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.root).free

    def close(self) -> None:
        self._jobs.close()


class Ledger:
    """What is finished of one job. Counts and rows change together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "ledger.sqlite"
        with full_disk():
            self._rows = _connect(self._path)
            self._rows.execute(
                "CREATE TABLE IF NOT EXISTS done (item INTEGER PRIMARY KEY, error TEXT, value BLOB, name TEXT)"
            )
            if "name" not in {row[1] for row in self._rows.execute("PRAGMA table_info(done)")}:
                self._rows.execute("ALTER TABLE done ADD COLUMN name TEXT")  # begun by an older release
            self._rows.execute("CREATE TABLE IF NOT EXISTS totals (done INTEGER, errors INTEGER, position BLOB)")
            if self._totals() is None:
                self._rows.execute("INSERT INTO totals VALUES (0, 0, ?)", (msgspec.json.encode(Position()),))

    def _totals(self) -> tuple[int, int, bytes] | None:
        found: tuple[int, int, bytes] | None = self._rows.execute(
            "SELECT done, errors, position FROM totals"
        ).fetchone()
        return found

    def limit_pages(self, pages: int) -> None:
        """As if the disk had room for so many more only; for tests."""
        (now,) = self._rows.execute("PRAGMA page_count").fetchone()
        self._rows.execute(f"PRAGMA max_page_count={now + pages}")

    @property
    def counts(self) -> tuple[int, int]:
        """Finished items, and those of them with an error."""
        totals = self._totals()
        return (totals[0], totals[1]) if totals is not None else (0, 0)

    @property
    def position(self) -> Position:
        totals = self._totals()
        return msgspec.json.decode(totals[2], type=Position) if totals is not None else Position()

    def add(self, rows: Iterable[Row], position: Position) -> tuple[int, int]:
        """Adds what is not there yet; returns the counts. All of it or nothing. Raises DiskFullError."""
        with full_disk():
            self._rows.execute("BEGIN IMMEDIATE")
            try:
                done = errors = 0
                for row in rows:
                    values = (row.item, row.error, row.value, row.name)
                    new = self._rows.execute("INSERT OR IGNORE INTO done VALUES (?, ?, ?, ?)", values).rowcount
                    done += new
                    errors += new and row.error is not None
                self._rows.execute(
                    "UPDATE totals SET done = done + ?, errors = errors + ?, position = ?",
                    (done, errors, msgspec.json.encode(position)),
                )
                self._rows.execute("COMMIT")
            except BaseException:
                if self._rows.in_transaction:  # a full disk may have ended it
                    self._rows.execute("ROLLBACK")
                raise
        return self.counts

    def finished_from(self, item: int) -> set[int]:
        """Items from that one on that are finished."""
        return {row[0] for row in self._rows.execute("SELECT item FROM done WHERE item >= ?", (item,))}

    @property
    def has_names(self) -> bool:
        return self._rows.execute("SELECT 1 FROM done WHERE name IS NOT NULL LIMIT 1").fetchone() is not None

    def rows(self, *, errors_only: bool = False, limit: int = -1) -> Iterator[Row]:
        """In the order of the items."""
        where = "WHERE error IS NOT NULL" if errors_only else ""
        cursor = self._rows.execute(
            f"SELECT item, error, value, name FROM done {where} ORDER BY item LIMIT ?", (limit,)
        )
        for values in cursor:  # one at a time: they may be large
            yield Row(*values)

    def first_errors(self) -> list[ItemError]:
        return errors_of(self.rows(errors_only=True, limit=ERRORS_SHOWN))

    def close(self) -> None:
        self._rows.close()

    def remove(self) -> None:
        self.close()
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
