"""What can be told of an element in a few microseconds, for an estimate of its cost. Never an error. Pure.

Whoever sends an element may forge what it says. A size that is refused counts for nothing: refusing it costs nothing.
"""

from __future__ import annotations

import struct

from preprocess.cost import Effort

# A picture's size is behind fewer segments, as cameras and programs write them.
MAX_SEGMENTS = 24
_SOF = (0xC0, 0xC1, 0xC2)
# What pictures and sounds begin with; the last are those of MP3 without a tag before it.
_BEGINNINGS = (
    *(b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"fLaC", b"OggS", b"ID3"),
    *(b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2"),
)


def is_encoded(data: bytes) -> bool:
    """Whether it begins as a picture or a sound."""
    return data.startswith(_BEGINNINGS)


def picture(data: bytes, max_pixels: int) -> Effort:
    """Its extent is in pixels, `max_pixels` those that are taken."""
    try:
        kind, pixels = _picture(data)
    except (struct.error, IndexError):
        kind, pixels = "", 0
    return Effort(kind, len(data), pixels if pixels <= max_pixels else 0)


def _picture(data: bytes) -> tuple[str, int]:
    begin = data[:16]
    webp = begin.startswith(b"RIFF") and begin[8:12] == b"WEBP"
    if begin.startswith(b"\xff\xd8"):
        return "JPEG", _jpeg_pixels(data)
    if begin.startswith(b"\x89PNG"):
        width, height = struct.unpack_from(">II", data, 16)
        return "PNG", width * height
    if begin.startswith(b"GIF8"):
        width, height = struct.unpack_from("<HH", data, 6)
        return "GIF", width * height
    if webp and begin.endswith(b"VP8X"):
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        return "WEBP", width * height
    if webp and begin.endswith(b"VP8 "):
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
        return "WEBP", width * height
    return "WEBP" if webp else "", 0


def _jpeg_pixels(data: bytes) -> int:
    at = 2
    for _ in range(MAX_SEGMENTS):
        if data[at + 1] in _SOF:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return int(height * width)
        at += 2 + (data[at + 2] << 8) + data[at + 3]
    return 0


def clip(data: bytes, max_seconds: float) -> Effort:
    """Its extent is in milliseconds, `max_seconds` what is taken."""
    try:
        kind, ms = _clip(data)
    except (struct.error, ZeroDivisionError):
        kind, ms = "", 0.0
    return Effort(kind, len(data), int(ms) if ms <= 1e3 * max_seconds else 0)


def _clip(data: bytes) -> tuple[str, float]:
    if data.startswith(b"RIFF"):
        (bytes_per_s,) = struct.unpack_from("<I", data, 28)
        return "WAV", 1e3 * len(data) / bytes_per_s
    if data.startswith(b"fLaC"):  # RFC 9639, 8.2: 20 bits of rate, 3 of channels, 5 of depth, 36 of length
        (packed,) = struct.unpack_from(">Q", data, 18)
        return "FLAC", 1e3 * (packed & (1 << 36) - 1) / (packed >> 44)
    return "OGG" if data.startswith(b"OggS") else "", 0.0
