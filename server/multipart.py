"""Files in a form, multipart/form-data (RFC 7578), as browsers and `curl -F` send them. Pure.

Known by the body alone: clients that set their Content-Type by hand leave out the boundary.
"""

from __future__ import annotations

import re

from server.errors import invalid

_DISPOSITION = re.compile(rb"(?i)content-disposition:[ \t]*form-data")
_PARAMETER = re.compile(rb'(?i);[ \t]*(name|filename)="?([^";\r\n]*)')
# A boundary has up to 70 characters (RFC 2046).
MAX_BOUNDARY = 70
MAX_HEADERS = 4096
MAX_PARTS = 1024


def is_form(begin: bytes) -> bool:
    """Does a body that begins so hold a form?"""
    line, found, rest = begin[: MAX_BOUNDARY + 4 + MAX_HEADERS].partition(b"\r\n")
    headers = (found + rest).partition(b"\r\n\r\n")[0]
    return line.startswith(b"--") and bool(_DISPOSITION.search(headers))


def files(body: bytes, field: str) -> list[bytes]:
    """The files of a form, and the fields called `field`, in order. Raises ServeError."""
    delimiter = b"\r\n" + body[: body.index(b"\r\n")]
    parts = (b"\r\n" + body).split(delimiter, MAX_PARTS + 2)[1:]
    if len(parts) > MAX_PARTS:
        raise invalid(f"a form of more than {MAX_PARTS} parts")
    if not parts[-1].startswith(b"--"):
        raise invalid("a form that is cut off: its closing boundary is missing")
    contents = [_content(part, field) for part in parts[:-1]]
    if not contents:
        raise invalid(f"a form without a file; expected at least one, such as curl -F {field}=@file sends")
    return contents


def _content(part: bytes, field: str) -> bytes:
    headers, found, content = part.partition(b"\r\n\r\n")
    if not found or len(headers) > MAX_HEADERS:
        raise invalid("a form with a part that has no header of its own")
    parameters = {name.lower(): value.decode("utf-8", "replace") for name, value in _PARAMETER.findall(headers)}
    if b"filename" not in parameters and parameters.get(b"name") != field:
        name = parameters.get(b"name", "")[:100]
        raise invalid(f"the form's field {name!r} is no file; expected files, or fields called {field!r}")
    return content
