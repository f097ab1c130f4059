"""How long the stages of an element take, noted by the thread that does them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# What there is to note.
STAGES = frozenset({"gate", "decode", "transform"})

_noted = threading.local()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Also what ends in an error is noted: refusing takes time too."""
    begin_ns = time.perf_counter_ns()
    try:
        yield
    finally:
        note({name: time.perf_counter_ns() - begin_ns})


def note(took_ns: Mapping[str, int]) -> None:
    """Of stages that another process has done for this thread."""
    here = _noted.__dict__
    for name, ns in took_ns.items():
        here[name] = here.get(name, 0) + ns


def take() -> dict[str, int]:
    """What this thread has noted since the last call, in ns by stage."""
    noted = dict(_noted.__dict__)
    _noted.__dict__.clear()
    return noted
