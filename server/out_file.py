"""Files that a command is to write: what speaks against them is said before its work, not after it."""

from __future__ import annotations

import os
from pathlib import Path


def trouble_with(path: Path) -> str:
    """Why it cannot be written, found out by trying; empty where it can. A file that is there stays as it is."""
    try:
        if not path.parent.is_dir():
            return f"No such folder: {path.parent}"
        if path.is_dir():
            return "Is a folder"
        if path.exists() and not path.is_file():  # a device or a pipe, which trying would write to or wait for
            return "" if os.access(path, os.W_OK) else "Permission denied"
    except OSError as error:  # of a name that is too long
        return f"{error.strerror}"
    try:
        _try(os.path.realpath(path))  # of a link to a file that is not there yet, too
    except OSError as error:
        return f"{error.strerror}" if path.exists() else f"no file can be made in {path.parent}: {error.strerror}"
    return ""


def trouble_with_drawing(path: Path) -> str:
    """The same of a picture, whose name says its form."""
    return trouble_with(path) if path.suffix in (".svg", ".png") else "the name must end in .svg or .png"


def _try(path: str) -> None:
    """Raises OSError. Rights alone do not tell: root has all, and makes no file in /proc."""
    if os.path.exists(path):
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
        return
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    os.unlink(path)
