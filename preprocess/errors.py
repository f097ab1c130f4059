"""What can be wrong with the bytes of a request. Pure."""

from __future__ import annotations


class BadInputError(ValueError):
    """These bytes are not what the pipeline takes. The message says what they are and what was expected."""


class ClosedError(RuntimeError):
    """Who was to do it has been ended on purpose."""
