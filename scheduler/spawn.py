"""Starting worker processes, from a fork server: never by a plain fork, which torch's threads do not survive.

The fork server has imported what workers need and has run nothing, so a worker starts in milliseconds and shares its
memory. torch takes seconds to import: where no model needs it, it is left out.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from typing import Any

from scheduler import worker

_context = get_context("forkserver")
_starting = threading.Lock()
_preload = ["scheduler.preload", "scheduler.preload_torch"]


def leave_torch_out() -> None:
    """Before the first process is started. One that is to load a torch model all the same imports torch itself."""
    _preload[:] = ["scheduler.preload"]


def start(*arguments: Any) -> ForkServerProcess:
    """A new process that runs `worker.main`. Blocking, for seconds the first time. Raises OSError."""
    return start_other(worker.main, *arguments)


def start_other(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """As `start`, for another function."""
    _context.set_forkserver_preload(_preload)
    process = _context.Process(target=target, args=arguments, daemon=True)
    with _starting, _without_main_module():
        process.start()
    return process


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Keeps multiprocessing from importing the daemon's main module, the command line, in every worker."""
    main = sys.modules["__main__"]
    spec, path = main.__spec__, main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if path is not None:
            main.__file__ = path


def end(process: ForkServerProcess, seconds: float) -> str:
    """Kills a process and waits for its end so long. Returns how it had ended, or that it has not."""
    process.kill()
    process.join(seconds)
    code = process.exitcode
    if code is None:
        return "hangs, and was given up"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
