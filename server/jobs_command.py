"""`migserve jobs`: talks to a daemon over HTTP. Each verb returns an exit code."""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import quote, urlsplit

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.table import Table

from server import progress
from server.jobs_sending import (
    CHUNK,
    FAILED,
    STDOUT,
    USAGE,
    CommandError,
    Wish,
    body_of,
    check_form,
    check_out,
    unfinished,
)
from server.plan_command import complain

T = TypeVar("T")

INTERRUPTED = 130
TIMEOUT_S = 60.0
# What was sent is looked through before it is answered: a tensor file is unpacked.
LOOKED_THROUGH_S = 3600.0
LOOK_EVERY_S = 0.5
# A daemon that is started anew loads its models first.
PATIENCE_S = 300.0
UNBROKEN = 400  # columns of what goes to a file or a pipe
ERRORS_SHOWN = 3
ENDED = ("done", "cancelled", "stopped")
EXAMPLE_URL = "http://localhost:8000"


class AwayError(CommandError):
    """The daemon does not answer, or not yet."""


class Client:
    """Of a daemon. Raises CommandError."""

    def __init__(self, url: str) -> None:
        self.url = url if "//" in url else f"http://{url}"

    def open(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        """The answer, if it is a good one."""
        connection = self._connection()
        try:
            # A refusal may come, and the connection be closed, while the inputs are still being sent.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body, {"Connection": "close"})
                if body is not None:
                    connection.sock.settimeout(LOOKED_THROUGH_S)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise AwayError(f"{self.url} cannot be reached: {error}; --url or MIGSERVE_URL say where it is") from error
        if response.status >= 400:
            kind = AwayError if response.status == http.client.SERVICE_UNAVAILABLE else CommandError
            raise kind(_error(self.whole(response)))
        return response

    def _connection(self) -> http.client.HTTPConnection:
        try:
            parts = urlsplit(self.url)
            place = parts.hostname or "localhost", parts.port
        except ValueError as error:
            raise CommandError(f"{self.url} is no address: {error}; expected such as {EXAMPLE_URL}", USAGE) from error
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(*place, timeout=TIMEOUT_S)

    def whole(self, response: http.client.HTTPResponse) -> bytes:
        """What it says. Raises AwayError where it was cut off."""
        try:
            return response.read()
        except (OSError, http.client.HTTPException) as error:
            raise AwayError(f"{self.url} broke off its answer: {error}") from error

    def ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.whole(self.open(method, path, body)))
        return found

    def copy(self, response: http.client.HTTPResponse, to: IO[bytes]) -> None:
        """A file of the daemon. Raises OSError where it cannot be written."""
        while part := self._part(response):
            to.write(part)
        if response.length:  # reading a part does not tell of an end that comes too early
            raise AwayError(f"{self.url} broke off its answer: {response.length} bytes are missing")

    def _part(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise AwayError(f"{self.url} broke off its answer: {error}") from error

    def jobs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("GET", "/v2/jobs")["jobs"]
        return found

    def path(self, job: str) -> str:
        """Of a job by its id, or by how that begins."""
        if not job:
            raise CommandError("which job? its id is empty; migserve jobs list shows those there are", USAGE)
        found = [each["id"] for each in self.jobs() if each["id"].startswith(job)]
        if len(found) > 1 and job not in found:
            raise CommandError(f"several jobs begin with {job}: {', '.join(found)}", USAGE)
        if not found:
            raise CommandError(f"unknown job {job!r}; migserve jobs list shows those there are")
        return f"/v2/jobs/{quote(job if job in found else found[0], safe='')}"


def _error(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]


def told(act: Any) -> int:
    """Runs a verb; what goes wrong is said in a sentence."""
    try:
        return int(act())
    except CommandError as error:
        return complain(str(error), error.code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            complain(str(error), FAILED)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def submit(client: Client, wish: Wish, *, wait: bool, out: Path | None, as_json: bool) -> int:
    def act() -> int:
        query = wish.query(out)
        check_out(out, as_json=as_json)
        with body_of(wish) as body:
            job = client.ask("POST", f"/v2/jobs?{query}", body)
        if as_json and not wait:
            print(json.dumps(job))
        else:
            ends = f"; ends {_ends(job, datetime.now().astimezone())}" if "ends_in_s" in job else ""
            _say(f"job {job['id']}: {job['items']} items for {escape(job['model'])}{ends}")
            if "warning" in job:
                _say(f"[yellow]{escape(job['warning'])}[/]")
            if not wait and not sys.stdout.isatty():  # for ID=$(migserve jobs submit ...)
                print(job["id"])
        return _watch(client, job["id"], out, as_json=as_json) if wait else 0

    return told(act)


def show_all(client: Client, *, as_json: bool) -> int:
    def act() -> int:
        jobs, now = client.jobs(), datetime.now().astimezone()
        if as_json:
            print(json.dumps(jobs))
            return 0
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for column in ("id", "model", "state", "done", "errors", "deadline", "ends", "slices", "name"):
            table.add_column(column, no_wrap=column not in ("model", "name"), overflow="fold")
        for job in jobs:
            table.add_row(
                job["id"],
                escape(job["model"]),
                job["state"],
                f"{job['done']}/{job['items']}",
                str(job["errors"]),
                _short(job["deadline"], now),
                _ends(job, now),
                str(len(job.get("slices", ())) or ""),
                escape(job["name"]),
            )
        console = Console(highlight=False)
        console = console if console.is_terminal else Console(highlight=False, width=UNBROKEN)
        console.print(table if jobs else "there are no jobs")
        for job in jobs:
            if job["state"] == "paused":
                console.print(f"{job['id']} is paused: {escape(job.get('reason', ''))}", soft_wrap=True)
        return 0

    return told(act)


def _ends(job: dict[str, Any], now: datetime) -> str:
    if job["state"] in ENDED or "ends_in_s" not in job:
        late = f", {_late(job)} late" if job["state"] in ENDED and job.get("late_s") else ""
        return f"{_short(job.get('ended'), now)}{late}"
    return f"in {progress.clock(job['ends_in_s'])}{'' if job['in_time'] else ', late'}"


def _late(job: dict[str, Any]) -> str:
    return progress.clock(max(job["late_s"], 1.0))


def _short(clock: str | None, now: datetime) -> str:
    """In local time, as deadlines are given; without the date where that is today's, without seconds where far off."""
    if not clock:
        return ""
    at = datetime.fromisoformat(clock)
    with suppress(OverflowError):  # at the end of all years
        at = at.astimezone()
    near = abs(at - now) < timedelta(days=1)
    return f"{at:%H:%M:%S}" if at.date() == now.date() else f"{at:%m-%d %H:%M:%S}" if near else f"{at:%m-%d %H:%M}"


def show(client: Client, job: str, *, as_json: bool) -> int:
    def act() -> int:
        found = client.ask("GET", client.path(job))
        if as_json:
            print(json.dumps(found))
            return 0
        errors = found.pop("first_errors")
        for name, value in found.items():
            shown = ", ".join(value) if isinstance(value, list) else value
            print(f"{name:12} {shown if shown is not None else ''}")
        for error in errors:
            print(_error_of(error))
        return 0

    return told(act)


def wait(client: Client, job: str, out: Path | None, *, as_json: bool) -> int:
    def act() -> int:
        check_out(out, as_json=as_json)
        path = _patiently(lambda: client.path(job), Console(stderr=True))
        return _watch(client, path.rsplit("/", 1)[1], out, as_json=as_json)

    return told(act)


def _watch(client: Client, job: str, out: Path | None, *, as_json: bool = False) -> int:
    """0 once it is done, with its results in `out`; 1 where it ends otherwise. `as_json`: how it ended, to stdout."""
    note = TextColumn("{task.fields[note]}", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), note)
    with progress.bar(*columns, transient=False) as bar:
        task = bar.add_task(job, total=None, note="", foretold=True)
        while True:
            found = _patiently(lambda: client.ask("GET", f"/v2/jobs/{job}"), bar.console)
            check_form(out, found["output"], job)
            bar.update(task, total=found["items"], completed=found["done"], note=_note(found))
            if found["state"] in ENDED:
                break
            time.sleep(LOOK_EVERY_S)
    if as_json:
        print(json.dumps(found))
    if found["state"] != "done":
        ended = f"{_failed(found)}job {job} is {found['state']}: {found.get('reason', '')}".rstrip(": ")
        raise CommandError(f"{ended}; {_going_on(found)}")
    if "reason" in found:
        _say(f"[yellow]{escape(found['reason'])}[/]")
    for each in found["first_errors"][:ERRORS_SHOWN]:
        _say(escape(_error_of(each)))
    if out == STDOUT:
        _save(client, f"/v2/jobs/{job}", out)  # what is written there cannot be begun anew
    elif out is not None:
        _patiently(lambda: _save(client, f"/v2/jobs/{job}", out, or_beside=True), Console(stderr=True))
    if found["errors"] or found.get("late_s"):
        late = f" {_late(found)} after its deadline" if found.get("late_s") else ""
        more = f"; migserve jobs show {job} has more of them" if found["errors"] > ERRORS_SHOWN else ""
        _say(f"[yellow]{_failed(found)}job {job} is done{late}[/]{more}")
    return 0


def _going_on(job: dict[str, Any]) -> str:
    """With one that has ended without results."""
    limit = " --max-errors N" if "max_errors" in job.get("reason", "") else ""
    return f"migserve jobs resume {job['id']}{limit} goes on with it"


def _failed(job: dict[str, Any]) -> str:
    """The beginning of what is said last: a job of ten items that all failed is done, too."""
    if not job["errors"]:
        return ""
    of = job["items"] if job["done"] == job["items"] else f"{job['done']} finished"
    return f"{job['errors']} of {of} items failed; "


def _error_of(error: dict[str, Any]) -> str:
    name = f" ({error['name']})" if error.get("name") else ""
    return f"item {error['item']}{name}: {error['error']}"


def _patiently(act: Callable[[], T], console: Console) -> T:
    """The job goes on over a restart of the daemon; so does who waits for it. Raises CommandError."""
    begin = time.monotonic()
    told = False
    while True:
        try:
            return act()
        except AwayError as error:
            if time.monotonic() - begin > PATIENCE_S:
                raise
            if not told:
                console.print(f"{error}; it is tried again for {PATIENCE_S:.0f} s", style="yellow", soft_wrap=True)
            told = True
        time.sleep(LOOK_EVERY_S)


def _note(job: dict[str, Any]) -> str:
    if job["state"] == "paused":
        return f"paused: {job.get('reason', '')}"
    if "rate_per_s" not in job:
        return str(job["state"])
    late = "" if job.get("in_time", True) else ", LATE"
    ends = f", ends in {progress.clock(job['ends_in_s'])}{late}" if "ends_in_s" in job else ""
    return f"{job['rate_per_s']:g}/s on {len(job['slices'])} slices{ends}"


def change(client: Client, job: str, verb: str, max_errors: int | None = None) -> int:
    def act() -> int:
        query = "" if max_errors is None else f"?max_errors={max_errors}"
        found = client.ask("POST", f"{client.path(job)}/{verb}{query}")
        _say(f"job {found['id']} is {found['state']}, {found['done']} of {found['items']} items done")
        return 0

    return told(act)


def results(client: Client, job: str, out: Path | None) -> int:
    def act() -> int:
        check_out(out)
        _save(client, client.path(job), out or STDOUT)
        return 0

    return told(act)


def _save(client: Client, path: str, out: Path, *, or_beside: bool = False) -> None:
    """To stdout, or into a file as a whole or not at all.

    They may have another form than was asked for (`jobs show` has why). `or_beside`: then they go into a file beside
    `out`, with that suffix as well.
    """
    response, job = client.open("GET", f"{path}/results"), path.rsplit("/", 1)[1]
    if out == STDOUT:
        client.copy(response, sys.stdout.buffer)
        sys.stdout.flush()
        return
    suffix = Path(response.headers.get_filename() or "").suffix
    if or_beside and out.suffix and suffix != out.suffix.lower():
        out = out.with_name(out.name + suffix)
    check_form(out, suffix.removeprefix("."), job)
    half = unfinished(out)
    try:
        with half.open("wb") as file:
            client.copy(response, file)
        half.replace(out)
    except OSError as error:
        again = f"migserve jobs results {job} --out FILE still gets the results"
        raise CommandError(f"{out} cannot be written: {error}; {again}") from error
    _say(f"results in {out}")


def remove(client: Client, job: str) -> int:
    def act() -> int:
        path = client.path(job)
        if path != f"/v2/jobs/{job}":  # what cannot be undone is not guessed
            raise CommandError(f"to remove job {path.rsplit('/', 1)[1]}, give its whole id", USAGE)
        found = client.ask("DELETE", path)
        _say(f"job {found['removed']} is removed")
        return 0

    return told(act)


def _say(text: str) -> None:
    """A line, however long."""
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)
