"""What was logged of models that fail: a client may cause the same failure a thousand times."""

from __future__ import annotations

import re
from typing import Any

from scheduler.channel import Failed, name_and_version

# Bounds the memory, and the log, where every error has words of its own.
MOST_KNOWN = 1000
_DIGITS = re.compile(r"\d+")


class Failures:
    """Remembers model and error. Errors that differ in their numbers only are the same one."""

    def __init__(self) -> None:
        self._known: set[tuple[str, str]] = set()

    def fields(self, failed: Failed) -> dict[str, Any]:
        """What the log line of a failure says; the traceback only the first time."""
        model, version = name_and_version(failed.key)
        fields: dict[str, Any] = {"model": model, "version": version, "detail": failed.detail}
        kind = (failed.key, _DIGITS.sub("", failed.detail))
        if kind not in self._known and len(self._known) < MOST_KNOWN:
            self._known.add(kind)
            fields["full"] = failed.full
        return fields
