"""Files in a form, multipart/form-data (RFC 7578), as browsers and `curl -F` send them. Pure.

Known by the body alone: clients that set their Content-Type by hand leave out the boundary.
"""

from __future__ import annotations

import re

from server.errors import invalid

_DISPOSITION = re.compile(rb"(?i)content-disposition:[ \t]*form-data")
# Names are looked for in this header alone: Content-Type may have one, too, which is the file's.
_LINE = re.compile(rb"(?im)^content-disposition:[^\r\n]*")
_PARAMETER = re.compile(rb';[ \t]*([^=;"\s]+)=(?:"([^"]*)"|([^;\s]*))')
# A boundary has up to 70 characters (RFC 2046).
MAX_BOUNDARY = 70
MAX_HEADERS = 4096
MAX_PARTS = 1024
NAME_CHARS = 100


def is_form(begin: bytes) -> bool:
    """Does a body that begins so hold a form?"""
    line, found, rest = begin[: MAX_BOUNDARY + 4 + MAX_HEADERS].partition(b"\r\n")
    headers = (found + rest).partition(b"\r\n\r\n")[0]
    return line.startswith(b"--") and bool(_DISPOSITION.search(headers))


def files(body: bytes, field: str) -> list[bytes]:
    """What the fields called `field` hold, files or not, in order. Raises ServeError, for any other field too."""
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
    name = _name(headers)
    if name != field:
        raise invalid(
            f"the form's field {name[:NAME_CHARS]!r} is not the model's input; expected fields called {field!r} only, "
            f"such as curl -F {field}=@file sends; parameters go into the URL, such as ?slo_ms=50"
        )
    return content


def _name(headers: bytes) -> str:
    line = _LINE.search(headers)
    parameters = _PARAMETER.findall(line[0]) if line else []
    names = [quoted or bare for key, quoted, bare in parameters if key.lower() == b"name"]
    return names[0].decode("utf-8", "replace") if names else ""
