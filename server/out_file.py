"""Files that a command is to write: what speaks against them is said before its work, not after it."""

from __future__ import annotations

import os
from pathlib import Path


def trouble_with(path: Path) -> str:
    """Why it cannot be written, as far as can be seen before; empty where nothing speaks against it."""
    if not path.parent.is_dir():
        return f"No such folder: {path.parent}"
    if path.is_dir():
        return "Is a folder"
    return "" if os.access(path if path.exists() else path.parent, os.W_OK) else "Permission denied"


def trouble_with_drawing(path: Path) -> str:
    """The same of a picture, whose name says its form."""
    return trouble_with(path) if path.suffix in (".svg", ".png") else "the name must end in .svg or .png"
