"""How far a long verb is, on stderr: a bar at a terminal; where there is none, as in a log, a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task

# Nothing is silent for longer than the one; and lines are a tenth of the time apart, so that hours do not fill a log.
SELDOM_S, OFTEN_S = 300.0, 10.0
SHARE = 0.1


class Far(NamedTuple):
    """How far something is. `total` and `left_s`: None where they are not known."""

    what: str
    done: float
    total: float | None
    elapsed_s: float
    left_s: float | None
    note: str = ""


def pause_s(elapsed_s: float) -> float:
    """How long to wait for the next line."""
    return min(max(OFTEN_S, SHARE * elapsed_s), SELDOM_S)


def line(far: Far) -> str:
    parts = [f"{far.what}: {far.done:.0f} of {far.total:.0f}" if far.total is not None else far.what]
    if far.note:
        parts.append(far.note)
    parts.append(f"{clock(far.elapsed_s)} so far")
    if far.left_s is not None:
        parts.append(f"about {clock(far.left_s)} left")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """Such as 1:05, or 1:00:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def bar(*columns: ProgressColumn, transient: bool = True) -> Iterator[Progress]:
    """`transient`: nothing stays of it in the end.

    A task's field `note` is said in lines, too; with `foretold` the note says when it ends, where that can be known.
    """
    console = Console(stderr=True)
    shown = Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)
    if console.is_terminal:
        with shown:
            yield shown
        return
    with lines(lambda: _say_tasks(shown)):
        yield shown
    if not transient:
        _say_tasks(shown)


@contextmanager
def status(what: str) -> Iterator[Callable[[str], None]]:
    """The same for what has no steps; it is told what is being done now."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(what) as spinner:
            yield lambda text: spinner.update(f"{what}: {text}")
        return
    begin = time.monotonic()
    now = [what]
    with lines(lambda: say(line(Far(now[0], 0, None, time.monotonic() - begin, None)))):
        yield lambda text: now.__setitem__(0, f"{what}: {text}")


@contextmanager
def lines(tell: Callable[[], None]) -> Iterator[None]:
    """Calls it now and then, from a thread: what is waited for may not come back for minutes."""
    done = threading.Event()
    thread = threading.Thread(target=_go_on, args=(tell, done), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _go_on(tell: Callable[[], None], done: threading.Event) -> None:
    begin = time.monotonic()
    while not done.wait(pause_s(time.monotonic() - begin)):
        tell()


def _say_tasks(shown: Progress) -> None:
    for task in shown.tasks:
        say(line(_far(task)))


def _far(task: Task) -> Far:
    note = str(task.fields.get("note", ""))
    left_s = None if task.finished or task.fields.get("foretold") else task.time_remaining
    return Far(task.description, task.completed, task.total, task.elapsed or 0.0, left_s, note)


def say(text: str) -> None:
    """A line on stderr, however long."""
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
