"""The inputs of a job, read a few at a time: JSON lines, a folder of files, or a tensor file.

    JSON lines   one item a line: {"x": [1, 2, 3, 4]} by the model's inputs, flat or nested; just the value where it has
                 one input. For a model with a pipeline: {"image": "<base64>"}, {"text": "as it is"}, or the string
                 alone; or {"file": "path"}, below --jobs-input-dir.
    folder       all files below it, by name; kept as JSON lines of the third kind.
    tensor file  npz or safetensors: an array an input, whose first axis runs over the items.

What is wrong with one item is that item's error; what is wrong with all of them is told when the job is made.
"""

from __future__ import annotations

import codecs
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from preprocess.pipeline import PipelineFile
from scheduler.lengths import Lengths
from scheduler.tensors import Signature
from server import base64_text
from server.job_store import Position, full_disk
from server.job_values import BadItemError, Line, PipelineLines, names_of, parse_line, shortly, tensors_of, told

JSONL, FOLDER, NPZ, SAFETENSORS = "jsonl", "folder", "npz", "safetensors"
# JSON lines that our own client makes of the files of a folder.
FILES = "files"
FORMATS = (JSONL, NPZ, SAFETENSORS, FILES)
MAX_ITEM_BYTES = 64 * 1024 * 1024
# A line of tensors as JSON, generously: it is in memory as a whole, and Python's lock is held while it is searched.
CHARS_A_VALUE, LEAST_LINE_BYTES, VARYING_LINE_BYTES = 32, 1024 * 1024, 8 * 1024 * 1024
MOST_NAME_CHARS = 4096  # as a path has
# The bucket of items that a pipeline is to make tensors of.
ENCODED = (-1,)
LISTING, TENSORS = "input", "tensors.json"
# Of a file of inputs, or of what is made of it, about so many bytes are read at once.
READ_BYTES = 4 * 1024 * 1024


class Item(msgspec.Struct, gc=False):
    """One input. `parts`: the bytes of each of the model's inputs, or the encoded element of a pipeline.

    `dims`: the sizes of the varying axes, as they are in `parts`. `length`: its own, of a model that pads; 0: `dims`
    tell it. `bucket`: only items of the same share a batch; or ENCODED. `error`: what is wrong with it, if it cannot
    be run. `offset`: where it begins in the file. `crashes`: workers that died of batches with it. `alone`: it has
    to run so, after a batch that failed. `name`: its file, or what its line calls it.
    """

    number: int
    offset: int
    bucket: tuple[int, ...] = ()
    parts: tuple[bytes, ...] = ()
    error: str = ""
    alone: bool = False
    crashes: int = 0
    name: str | None = None
    dims: tuple[int, ...] = ()
    length: int = 0

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.parts))


class Reader(Protocol):
    """Reads items in order. Calls block."""

    def read(self, count: int) -> list[Item]:
        """The next ones, at most so many; none at the end. Raises OSError."""

    @property
    def position(self) -> Position:
        """Where the next one is."""

    def close(self) -> None: ...


class NothingLeft:
    """The Reader of a job whose items are all finished."""

    def __init__(self, items: int) -> None:
        self.position = Position(items)

    def read(self, count: int) -> list[Item]:
        return []

    def close(self) -> None: ...


# ---- JSON lines ----


class LineReader:
    """`inputs_dir`: where {"file": ...} is looked up, None if nowhere."""

    def __init__(
        self,
        path: Path,
        start: Position,
        signature: Signature,
        pipeline: PipelineFile | None,
        inputs_dir: Path | None,
        lengths: Lengths | None = None,
    ) -> None:
        self._lengths = lengths
        self._file = path.open("rb")
        self._file.seek(start.offset)
        self._number, self._offset = start.item, start.offset
        self._signature, self._pipeline, self._inputs_dir = signature, pipeline, inputs_dir
        self._most_bytes = most_line_bytes(signature, lengths)
        self._lines = PipelineLines(pipeline.input, signature) if pipeline is not None else None

    def read(self, count: int) -> list[Item]:
        items: list[Item] = []
        size = 0
        while len(items) < count and size < READ_BYTES:
            offset = self._offset
            line = self._line()
            if not line:
                break
            if _is_item(line):
                items.append(self._item(line, offset))
                # Of the text, too: a bad line has no parts, and took as long.
                size += max(len(line), items[-1].nbytes)
                self._number += 1
        return items

    @property
    def position(self) -> Position:
        return Position(self._number, self._offset)

    def _line(self) -> bytes:
        """Of a line that is too long only so much as shows that it is."""
        line = self._file.readline(MAX_ITEM_BYTES + 1)
        self._offset += len(line)
        rest = line
        while len(rest) > MAX_ITEM_BYTES and not rest.endswith(b"\n"):
            rest = self._file.readline(MAX_ITEM_BYTES + 1)
            self._offset += len(rest)
        return line

    def _item(self, line: bytes, offset: int) -> Item:
        item = Item(self._number, offset)
        try:
            self._fill(item, line if offset else line.removeprefix(codecs.BOM_UTF8))
        except BadItemError as error:
            item.error = str(error)
        except RecursionError:
            item.error = "the line is nested too deeply"
        return item

    def _fill(self, item: Item, line: bytes) -> None:
        """Raises BadItemError."""
        if len(line) > MAX_ITEM_BYTES:
            raise BadItemError(f"the line is longer than {MAX_ITEM_BYTES} bytes")
        value: Line | None = self._lines.read(line) if self._lines is not None else None
        if value is None:
            self._check_length(line)
            value = tensors = parse_line(line)
            if self._pipeline is None or self._is_ready(tensors):
                item.parts, item.dims = tensors_of(tensors, self._signature, self._lengths)
                item.bucket = item.dims
                return
        assert self._pipeline is not None  # else there are tensors only
        item.name = name_of(value, self._pipeline.input)
        item.parts, item.bucket = (element_of(value, self._pipeline, self._inputs_dir),), ENCODED

    def _check_length(self, line: bytes) -> None:
        """Of one that has nothing for a pipeline. Raises BadItemError."""
        if len(line) > self._most_bytes:
            lacks = f", and has no {self._pipeline.input!r}" if self._pipeline is not None else ""
            raise BadItemError(f"the line is longer than {self._most_bytes} bytes{lacks}")

    def _is_ready(self, value: object) -> bool:
        """Whether it needs no pipeline."""
        names = {spec.name for spec in self._signature.inputs}
        return isinstance(value, dict) and bool(value) and set(value) <= names <= {*value, *told(self._lengths)}

    def close(self) -> None:
        self._file.close()


def most_line_bytes(signature: Signature, lengths: Lengths | None) -> int:
    """Of an item of ready tensors as JSON. What varies without a known end goes far in a tensor file only."""
    dims = [dim for spec in signature.inputs for dim in spec.dims]
    if lengths is None and -1 in dims:
        return min(VARYING_LINE_BYTES, MAX_ITEM_BYTES)
    longest = lengths.longest if lengths is not None else 0
    values = sum(math.prod(longest if dim == -1 else dim for dim in spec.dims) for spec in signature.inputs)
    return min(max(CHARS_A_VALUE * values, LEAST_LINE_BYTES), MAX_ITEM_BYTES)


def element_of(value: Any, pipeline: PipelineFile, inputs_dir: Path | None) -> bytes:
    """What a line has for a pipeline. Raises BadItemError."""
    if isinstance(value, dict):
        if "file" in value and pipeline.input != "file":
            return _read_file(value["file"], inputs_dir)
        if "unreadable" in value and pipeline.input != "unreadable":  # said by our own client
            reason = value["unreadable"] or "it could not be read"
            raise BadItemError(reason[:500] if isinstance(reason, str) else _no_text("unreadable", reason))
        if pipeline.input not in value and "bytes" not in value:
            raise BadItemError(f"the line has no {pipeline.input!r}; it has {names_of(value)}")
        if pipeline.input not in value:  # a file that was sent along, by our own client
            return _base64(value["bytes"], "bytes")
        value = value[pipeline.input]
    if pipeline.text is None:
        return _base64(value, pipeline.input)
    if not isinstance(value, str):
        raise BadItemError(_no_text(pipeline.input, value))
    return value.encode()


def name_of(value: Any, taken: str) -> str | None:
    """What a line for a pipeline calls its item; `taken`: the key of what it is made of."""
    keys = [key for key in ("name", "file") if isinstance(value, dict) and key != taken]
    found = next((value[key] for key in keys if isinstance(value.get(key), str)), None)
    return None if found is None else str(found)[:MOST_NAME_CHARS]


def _no_text(name: str, value: object) -> str:
    return f"{name} must be a string, not {shortly(value)}"


def _base64(value: object, name: str) -> bytes:
    if not isinstance(value, str):
        raise BadItemError(_no_text(name, value))
    try:
        return base64_text.decode(value)
    except ValueError as error:
        raise BadItemError(f"{name} must be base64: {error}") from None


def _read_file(name: object, inputs_dir: Path | None) -> bytes:
    if not isinstance(name, str):
        raise BadItemError(f"file must be a path, not {shortly(name)}")
    if inputs_dir is None:
        raise BadItemError("files of the server are not read: it was started without --jobs-input-dir")
    path = below(inputs_dir, name)
    if path is None:
        raise BadItemError(f"{name[:200]} is not below --jobs-input-dir")
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadItemError(f"{name[:200]} is not a file")
            data = file.read(MAX_ITEM_BYTES + 1)
    except BadItemError:
        raise
    except (OSError, ValueError) as error:
        raise BadItemError(f"{name[:200]} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_ITEM_BYTES:
        raise BadItemError(f"{name[:200]} is longer than {MAX_ITEM_BYTES} bytes")
    return data


def _open_at_once(path: str, flags: int) -> int:
    """A pipe has nobody at its other end, perhaps for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def below(folder: Path, name: str) -> Path | None:
    """A path inside a folder, with links followed; None for what is outside."""
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError):
        return None
    return path if path.is_relative_to(folder.resolve()) else None


def _is_item(line: bytes) -> bool:
    """Of what `_lines` yields: all but blank lines. One that is too long is an item, whatever is in it."""
    return len(line) > MAX_ITEM_BYTES or not line.isspace()


def count_lines(path: Path) -> int:
    """Items of a file of JSON lines: as many as a LineReader finds in it."""
    with path.open("rb") as file:
        return sum(map(_is_item, _lines(file)))


def _lines(file: Any) -> Iterator[bytes]:
    """Of a line that is too long only so much as shows that it is."""
    while line := file.readline(MAX_ITEM_BYTES + 1):
        yield line
        while len(line) > MAX_ITEM_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_ITEM_BYTES + 1)


def list_folder(folder: Path, root: Path, listing: Path) -> int:
    """Writes the files below a folder, by name, as JSON lines. Returns how many. Raises OSError, DiskFullError."""
    count = 0
    with full_disk(), listing.open("wb") as out:
        for path in _files(folder):
            out.write(msgspec.json.encode(_listed(str(path.relative_to(root)))) + b"\n")
            count += 1
    return count


def _listed(name: str) -> dict[str, str]:
    """As a line that is JSON, which names need not be."""
    shown = os.fsencode(name).decode(errors="replace")
    if shown == name:
        return {"file": name}
    return {"name": shown, "unreadable": f"{shown} cannot be read: its name is not UTF-8"}


def _files(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as found:
        entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)
    for name, is_folder in entries:
        if is_folder:
            yield from _files(folder / name)
        else:
            yield folder / name
