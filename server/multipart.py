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
# What is longer is no file's name (Linux's PATH_MAX).
MAX_PATH = 4096


def is_form(begin: bytes) -> bool:
    """Does a body that begins so hold a form?"""
    line, found, rest = begin[: MAX_BOUNDARY + 4 + MAX_HEADERS].partition(b"\r\n")
    headers = (found + rest).partition(b"\r\n\r\n")[0]
    return line.startswith(b"--") and bool(_DISPOSITION.search(headers))


def files(body: bytes, field: str, *, texts: bool = False) -> list[bytes]:
    """What the fields called `field` hold, files or not, in order. Raises ServeError, for any other field too.

    `texts`: they may be words, which are otherwise taken for the name of a file that was meant.
    """
    delimiter = b"\r\n" + body[: body.index(b"\r\n")]
    parts = (b"\r\n" + body).split(delimiter, MAX_PARTS + 2)[1:]
    if len(parts) > MAX_PARTS:
        raise invalid(f"a form of more than {MAX_PARTS} parts")
    if not parts[-1].startswith(b"--"):
        raise invalid("a form that is cut off: its closing boundary is missing")
    contents = [_content(part, field, texts) for part in parts[:-1]]
    if not contents:
        raise invalid(f"a form without a file; expected at least one, such as curl -F {field}=@file sends")
    return contents


def _content(part: bytes, field: str, texts: bool) -> bytes:
    headers, found, content = part.partition(b"\r\n\r\n")
    if not found or len(headers) > MAX_HEADERS:
        raise invalid("a form with a part that has no header of its own")
    parameters = _parameters(headers)
    name = parameters.get("name", "")
    if name != field:
        raise invalid(
            f"the form's field {name[:NAME_CHARS]!r} is not the model's input; expected fields called {field!r} only, "
            f"such as curl -F {field}=@file sends; parameters go into the URL, such as ?slo_ms=50"
        )
    if not texts and not {"filename", "filename*"} & parameters.keys() and (words := _words(content)):
        raise invalid(
            f"the form's field {field!r} is the text {words!r}, no file; curl sends one that has an @ before its name: "
            f"-F {field}=@{words}"
        )
    return content


def _words(content: bytes) -> str:
    """What could be a file's name, as much as is shown of it; empty for what is none."""
    if len(content) > MAX_PATH:
        return ""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return ""
    return text[:NAME_CHARS] if text.isprintable() else ""


def _parameters(headers: bytes) -> dict[str, str]:
    """Of a part's disposition; of two by one name the first."""
    line = _LINE.search(headers)
    found = reversed(_PARAMETER.findall(line[0])) if line else ()
    return {key.lower().decode("latin-1"): (quoted or bare).decode("utf-8", "replace") for key, quoted, bare in found}
