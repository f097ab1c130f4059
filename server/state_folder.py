"""The state folder belongs to one daemon at a time: two would run its jobs twice, and undo each other's token."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import structlog

from server.gpus import StartError

log = structlog.get_logger(__name__)

LOCK_FILE = "lock"
# One that was just killed still holds it until its memory has been given back.
PATIENCE_S = 2.0
AGAIN_S = 0.02


@contextmanager
def held(folder: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Until it is left, or the process ends, however it ends. Raises StartError, naming the process that holds it.

    A folder that cannot be written is nobody's: its daemon goes on with a warning, without jobs and token.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not inherited (PEP 446): workers, which outlive a daemon that is killed for seconds, do not hold it on.
        lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        log.warning("the state folder cannot be written", folder=str(folder), reason=str(error))
        yield
        return
    with os.fdopen(lock, "r+") as file:
        _lock(file, folder, time.monotonic() + patience_s)
        with suppress(OSError):  # on a full disk nobody learns the number
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def _lock(file: IO[str], folder: Path, deadline_s: float) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:  # a file system without locks
                log.warning("the state folder cannot be locked", folder=str(folder), reason=str(error))
                return
        if time.monotonic() >= deadline_s:
            holder = f"process {pid}" if (pid := file.read()) else "another process"
            raise StartError(
                f"the state folder {folder} is in use by {holder}, a daemon too; --state-dir names another one"
            )
        time.sleep(AGAIN_S)
