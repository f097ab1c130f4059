"""base64 as JSON carries an element's bytes (RFC 4648, section 4), and what is usually wrong with it. Pure."""

from __future__ import annotations

import base64
import string
from collections.abc import Iterable, Iterator

from server.errors import invalid

# RFC 4648, section 5; a name such as my-cat.png has a dot.
_OF_URLS = f"{string.ascii_letters}{string.digits}-_=".encode()


def decode_all(texts: Iterable[str], name: str) -> Iterator[bytes]:
    """The elements of the input `name`. Raises ServeError, which names the element."""
    for index, text in enumerate(texts):
        try:
            yield decode(text)
        except ValueError as error:
            raise invalid(f"input {name}, element {index}: BYTES in JSON must be base64: {error}") from None


def decode(text: str) -> bytes:
    """Raises ValueError, which says what to change."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(_usual_mistake(text) or str(error)) from None


def _usual_mistake(text: str) -> str:
    if text[:5].lower() == "data:":
        return "it begins with a data: prefix; send what follows its comma"
    if "\n" in text or "\r" in text:
        return "it has line breaks; leave them out, as base64 -w 0 does"
    if ("-" in text or "_" in text) and not text.encode().translate(None, _OF_URLS):
        return "it is base64 for URLs; expected + and / in place of - and _"
    return ""
