"""The state folder belongs to one daemon at a time: two would run its jobs twice, and undo each other's token."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

import structlog

from server.gpus import StartError

log = structlog.get_logger(__name__)

LOCK_FILE = "lock"
PID_BYTES = 20
# One that was just killed still holds it until its memory has been given back.
PATIENCE_S = 2.0
AGAIN_S = 0.02


def hold(folder: Path, patience_s: float = PATIENCE_S) -> int | None:
    """Until the process ends, however it does, or the descriptor that is returned is closed.

    Nobody who serves closes it: a thread may write to the folder to the very end. A folder that cannot be written is
    nobody's: its daemon goes on with a warning, without jobs and token. Raises StartError, naming who holds it, or
    what is no folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not inherited (PEP 446): workers, which outlive a daemon that is killed for seconds, do not hold it on.
        lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
        raise StartError(
            f"the state folder cannot be {folder}: {file} is not a folder; --state-dir names another one"
        ) from error
    except OSError as error:
        log.warning("the state folder cannot be written", folder=str(folder), reason=str(error))
        return None
    try:
        _lock(lock, folder, time.monotonic() + patience_s)
    except StartError:
        os.close(lock)
        raise
    with suppress(OSError):  # on a full disk nobody learns the number
        os.truncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
    return lock


def _lock(lock: int, folder: Path, deadline_s: float) -> None:
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:  # a file system without locks
                log.warning("the state folder cannot be locked", folder=str(folder), reason=str(error))
                return
        if time.monotonic() >= deadline_s:
            holder = f"process {pid.decode()}" if (pid := os.read(lock, PID_BYTES)) else "another process"
            raise StartError(
                f"the state folder {folder} is in use by {holder}, a daemon too; --state-dir names another one"
            )
        time.sleep(AGAIN_S)
