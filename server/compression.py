"""Bodies that are compressed: gzip and deflate, in and out. Pure."""

from __future__ import annotations

import re
import zlib

from server.errors import Fault, ServeError, invalid

# An Accept-Encoding's quality of zero.
_NOT_AT_ALL = re.compile(r"q=0(\.0*)?")


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """Undoes Content-Encoding gzip or deflate, to at most `limit` bytes. Raises ServeError."""
    try:
        wbits = {"gzip": 31, "deflate": 15}[encoding]
    except KeyError:
        message = f"Content-Encoding {encoding!r} is not supported; use gzip, deflate or none"
        raise ServeError(Fault.UNSUPPORTED, message, reason="encoding") from None
    inflater = zlib.decompressobj(wbits)
    try:
        data = inflater.decompress(body, limit)
    except zlib.error as error:
        raise invalid(f"the body is not valid {encoding}: {error}") from None
    if inflater.unconsumed_tail:
        raise ServeError(Fault.TOO_LARGE, f"the body inflates to more than {limit} bytes")
    if not inflater.eof or inflater.unused_data:
        raise invalid(f"the body is not one whole {encoding} stream")
    return data


def compress(body: bytes, encoding: str) -> bytes:
    """`encoding`: gzip or deflate, the latter as zlib's stream."""
    deflater = zlib.compressobj(1, wbits=31 if encoding == "gzip" else 15)
    return deflater.compress(body) + deflater.flush()


def accepted_encoding(header: str) -> str | None:
    """Which of ours an Accept-Encoding header asks for first; None for no compression."""
    for part in header.lower().split(","):
        name, _, quality = part.replace(" ", "").partition(";")
        if name in ("gzip", "deflate") and not _NOT_AT_ALL.fullmatch(quality):
            return name
    return None
