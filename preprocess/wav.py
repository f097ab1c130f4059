"""WAV files: what their headers say, and what of it can be true. Pure.

Format: Multimedia Programming Interface and Data Specifications 1.0 (1991), and WAVE_FORMAT_EXTENSIBLE.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from preprocess.errors import BadInputError

PCM = 1
EXTENSIBLE = 0xFFFE
# Parts of a file before its sound.
MAX_CHUNKS = 100
# What is written where the length is not known yet, by programs that write to a pipe. SoX writes the greatest multiple
# of a frame's bytes, which are at most 65535, up to 0x7FFFF000.
UNKNOWN_SIZES = (0, 0xFFFFFFFF)
UNKNOWN_FROM, UNKNOWN_TO = 0x7FFE0000, 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class WavHeader:
    """`begin`, `end`: where in the file its samples are."""

    format: int
    channels: int
    sample_rate: int
    bits: int
    frame_bytes: int
    begin: int
    end: int

    @property
    def frames(self) -> int:
        """Samples of each channel; of a compressed format about as many at least."""
        return (self.end - self.begin) // self.frame_bytes


def inspect(data: bytes) -> WavHeader:
    """Walks the chunks up to the sound. Raises BadInputError for what contradicts itself, or the file."""
    try:
        return _walk(data)
    except struct.error:
        raise BadInputError("a WAV file that is cut off in its header") from None


def with_length(data: bytes, header: WavHeader) -> bytes:
    """The same file; one that left its length open says it, for libraries that would take 0 for no sound."""
    length = struct.pack("<I", header.end - header.begin)
    at = header.begin - len(length)
    return data if data[at : header.begin] == length else data[:at] + length + data[header.begin :]


def _walk(data: bytes) -> WavHeader:
    at, described = 12, b""
    for _ in range(MAX_CHUNKS):
        name, size = struct.unpack_from("<4sI", data, at)
        begin = at + 8
        if name == b"fmt ":
            described = data[begin : begin + size]
        elif name == b"data":
            return _header(described, begin, _end(size, begin, len(data)))
        at = begin + size + size % 2
    raise BadInputError(f"a WAV file with more than {MAX_CHUNKS} parts before its sound")


def _end(size: int, begin: int, file_size: int) -> int:
    if size in UNKNOWN_SIZES or UNKNOWN_FROM <= size <= UNKNOWN_TO:
        return file_size
    if begin + size > file_size:
        raise BadInputError(f"a WAV file that announces {size} bytes of sound; {file_size - begin} are there")
    return begin + size


def _header(described: bytes, begin: int, end: int) -> WavHeader:
    if not described:
        raise BadInputError("a WAV file that says nowhere what its samples are")
    kind, channels, rate, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", described)
    if kind == EXTENSIBLE:
        (kind,) = struct.unpack_from("<H", described, 24)
    if not channels or not frame_bytes or (kind == PCM and frame_bytes != channels * -(-bits // 8)):
        raise BadInputError(f"a WAV file of {channels} channels of {bits} bits in frames of {frame_bytes} bytes")
    return WavHeader(kind, channels, rate, bits, frame_bytes, begin, end)
