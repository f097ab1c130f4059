"""Ogg files: are their pages whole, and all there? Pure.

Decoders pass over pages that are damaged, and end where the file does: the clip is shorter then, and nobody is told.

Format: RFC 3533, section 6.
"""

from __future__ import annotations

import struct
import zlib

from preprocess.errors import BadInputError

# Who writes at once has a page for each packet, of 10 ms or more. The others: tags, and pictures in these.
PAGES_PER_S = 100
MORE_PAGES = 1000

_HEADER = struct.Struct("<4sBBqIIIB")  # OggS, version, flags, granule position, stream, sequence, checksum, segments
_BEGINS_STREAM = 0x02
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def check(data: bytes, most_seconds: float) -> None:
    """Walks the pages. Raises BadInputError where one is damaged, cut off or missing, and for far too many.

    A stream need not say that it has ended: one that was recorded live does not.
    """
    most_pages = int(PAGES_PER_S * most_seconds) + MORE_PAGES
    at, pages = 0, 0
    last: dict[int, int] = {}  # stream -> sequence number
    sound_began = False
    while at < len(data):
        if pages == most_pages:
            raise BadInputError(f"an Ogg file of more than {most_pages} pages, for {most_seconds:g} s at most")
        flags, stream, sequence, end = _page(data, at)
        begins = bool(flags & _BEGINS_STREAM)
        if begins and sound_began:
            raise BadInputError("an Ogg file of several recordings one after the other; one is taken")
        sound_began = not begins
        if stream in last and sequence != (last[stream] + 1) % 2**32:
            raise BadInputError(f"an Ogg file in which pages are missing: page {sequence} comes after {last[stream]}")
        last[stream] = sequence
        at, pages = end, pages + 1


def _page(data: bytes, at: int) -> tuple[int, int, int, int]:
    """Flags, stream, sequence number, and where the next page begins."""
    if data[at : at + 4] != b"OggS"[: len(data) - at]:
        raise BadInputError(f"an Ogg file with no page at byte {at}, where one belongs")
    if at + _HEADER.size > len(data):
        raise _cut_off(at)
    _, version, flags, _, stream, sequence, checksum, segments = _HEADER.unpack_from(data, at)
    if version != 0:
        raise BadInputError(f"an Ogg file of version {version}; 0 is taken")
    body = at + _HEADER.size + segments
    end = body + sum(data[at + _HEADER.size : body])
    if end > len(data):
        raise _cut_off(at)
    if _checksum(data[at:end]) != checksum:
        raise BadInputError(f"an Ogg file that is damaged: the checksum of its page at byte {at} is wrong")
    return flags, stream, sequence, end


def _cut_off(at: int) -> BadInputError:
    return BadInputError(f"an Ogg file that is cut off: its page at byte {at} is not whole")


def _checksum(page: bytes) -> int:
    """CRC-32 of polynomial 0x04c11db7, the highest bit first, over the page with its own checksum as 0.

    zlib takes the lowest bit first, and inverts before and after: so each byte's bits are reversed, and the result's.
    """
    blank = b"".join((page[:22], bytes(4), page[26:]))
    inverted = zlib.crc32(blank.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(inverted.to_bytes(4, "little").translate(_REVERSED), "big")
