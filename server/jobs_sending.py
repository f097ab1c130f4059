"""What `migserve jobs submit` sends, and whether its results could be written."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from server.out_file import trouble_with

FAILED, USAGE = 1, 2
STDOUT = Path("-")
CHUNK = 1 << 20
# Of a file that is called so; others are told by how they begin.
FORMATS = {".jsonl": "jsonl", ".npz": "npz", ".safetensors": "safetensors"}


class CommandError(Exception):
    """What to tell, and the exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Wish:
    """A job, as the command line asks for it."""

    model: str
    inputs: Path | None
    deadline: str | None
    server_folder: str | None
    output: str | None
    max_errors: int | None
    name: str
    strict: bool

    def query(self, out: Path | None = None) -> str:
        """The results are of the form that `out` is called by. Raises CommandError."""
        model, _, version = self.model.partition("/")
        asked = {
            "model": model,
            "version": version or None,
            "format": self._format(),
            "deadline": self.deadline,
            "folder": self.server_folder,
            "output": self._output(out),
            "max_errors": self.max_errors,
            "name": self.name or None,
            "strict": "true" if self.strict else None,
        }
        return urlencode({name: value for name, value in asked.items() if value is not None})

    def _format(self) -> str | None:
        if self.inputs is None:
            return None
        return "files" if self.inputs.is_dir() else FORMATS.get(self.inputs.suffix.lower())

    def _output(self, out: Path | None) -> str | None:
        called = form_of(out)
        if called and self.output and called != self.output:
            raise CommandError(f"{out} is called as if it were {called}, and --output says {self.output}", USAGE)
        return self.output or called


def form_of(out: Path | None) -> str | None:
    """Of the results that a file is called by; None where its name has no suffix. Raises CommandError."""
    if out is None or not out.suffix:
        return None
    form = FORMATS.get(out.suffix.lower())
    if form is None:
        raise CommandError(f"{out}: results are called {', '.join(FORMATS)}, nothing else is known", USAGE)
    return form


def check_form(out: Path | None, form: str, job: str) -> None:
    """Whether the results of that form may be called so. Raises CommandError."""
    suffix = next((suffix for suffix, known in FORMATS.items() if known == form), None)
    if out is not None and suffix is not None and form_of(out) not in (None, form):
        shown = "JSON lines" if form == "jsonl" else form
        raise CommandError(f"the results of job {job} are {shown}: call them {out.with_suffix(suffix)}", USAGE)


def check_out(out: Path | None, *, as_json: bool = False) -> None:
    """Before anything is sent; `as_json`: what became of the job goes to stdout. Raises CommandError."""
    if out == STDOUT and as_json:
        raise CommandError("--json and --out - would both write to stdout; leave one of them out", USAGE)
    if out is None or out == STDOUT:
        return
    form_of(out)
    if trouble := trouble_with(out) or trouble_with(unfinished(out)):
        raise CommandError(f"{out} cannot be written: {trouble}", USAGE)


def unfinished(out: Path) -> Path:
    """What it is called until it is whole."""
    return out.with_name(out.name + ".unfinished")


@contextmanager
def body_of(wish: Wish) -> Iterator[Any]:
    """What is sent."""
    if (wish.inputs is None) == (wish.server_folder is None):
        raise CommandError("give inputs, or a --server-folder", USAGE)
    if wish.inputs is None:
        yield None
    elif str(wish.inputs) == "-":
        yield iter(lambda: sys.stdin.buffer.read(CHUNK), b"")
    elif wish.inputs.is_dir():
        yield folder_lines(wish.inputs)
    else:
        try:
            file = wish.inputs.open("rb")
        except OSError as error:
            raise CommandError(f"{wish.inputs} cannot be read: {error.strerror}", USAGE) from error
        with file:
            yield file


def folder_lines(folder: Path) -> Iterator[bytes]:
    """Its files, by name, as JSON lines; what cannot be read becomes an item with that error."""
    for path in sorted(each for each in folder.rglob("*") if not each.is_dir()):
        name = os.fsencode(path.relative_to(folder)).decode(errors="replace")  # in JSON it must be UTF-8
        yield json.dumps({"name": name, **_content(path, name)}).encode() + b"\n"


def _content(path: Path, name: str) -> dict[str, str]:
    if path.exists() and not path.is_file():  # to read a pipe might take for ever
        return {"unreadable": f"{name} is not a file"}
    try:
        return {"bytes": base64.b64encode(path.read_bytes()).decode()}
    except OSError as error:
        return {"unreadable": f"{name} cannot be read: {error.strerror}"}
