"""The core's journal: every event and the commands it gave, as JSON lines; replayable into a fresh core."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec

from scheduler.core import SchedulerCore
from scheduler.messages import AnyCommand, AnyEvent
from scheduler.policies.named import POLICIES


class Header(msgspec.Struct, frozen=True):
    """The first line: how the core was made."""

    max_queued: int
    policy: str


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One call of `handle` and what it returned."""

    now_ns: int
    event: AnyEvent
    commands: tuple[AnyCommand, ...]


class JournalError(ValueError):
    """A journal that cannot be read, or that a fresh core does not repeat."""


class JournalWriter:
    """Appends to a file. Buffered: what a crash of the daemon cuts off is the end only."""

    def __init__(self, path: Path, header: Header) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._encode = msgspec.json.Encoder().encode
        self._file.write(self._encode(header) + b"\n")

    def write(self, now_ns: int, event: AnyEvent, commands: Sequence[AnyCommand]) -> None:
        self._file.write(self._encode((now_ns, event, commands)) + b"\n")

    def close(self) -> None:
        self._file.close()


def replay(path: Path) -> int:
    """Hands a journal's events to a fresh core. Returns how many; raises JournalError where commands differ."""
    with path.open("rb") as lines:
        try:
            header = msgspec.json.decode(next(lines, b""), type=Header)
        except msgspec.MsgspecError as error:
            raise JournalError(f"{path} is not a journal: {error}") from error
        if header.policy not in POLICIES:
            raise JournalError(f"{path}: there is no policy {header.policy!r}; there are {', '.join(POLICIES)}")
        core = SchedulerCore(header.max_queued, POLICIES[header.policy])
        count = 0
        for count, entry in enumerate(_entries(path, lines), start=1):
            commands = tuple(core.handle(entry.now_ns, entry.event))
            if commands != entry.commands:
                raise JournalError(
                    f"{path}, line {count + 1}: on {entry.event} the journal has {entry.commands}, "
                    f"this core says {commands}"
                )
        return count


def _entries(path: Path, lines: Iterable[bytes]) -> Iterator[Entry]:
    decoder = msgspec.json.Decoder(Entry)
    for number, line in enumerate(lines, start=2):
        if not line.endswith(b"\n"):
            return  # cut off in the middle of a write
        try:
            yield decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise JournalError(f"{path}, line {number}: {error}") from error
