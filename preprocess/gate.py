"""What a picture says of itself, read before any decoder sees it; and what is refused on that ground. Pure.

A few bytes can claim a size that takes gigabytes, or work that takes seconds: forged dimensions, hundreds of scans in a
progressive JPEG, millions of empty chunks. Each loop here is bounded, and touches the headers only.

Formats: JPEG ITU-T T.81; PNG, W3C third edition; WebP, RFC 9649; GIF89a.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from preprocess.errors import BadInputError

EXPECTED = "a JPEG, PNG, WebP or GIF image"

# Decoded pixels of one picture.
MAX_PIXELS = 50_000_000
# Encoded bytes of one picture.
MAX_BYTES = 32 << 20
# A progressive JPEG has about ten; each is a pass over the whole picture.
MAX_SCANS = 100
# Parts before the picture itself: decoders walk them one by one, some of them in Python.
MAX_SEGMENTS = 1000
# PNG: the picture itself is in many, of 8 KiB as libpng writes them.
MAX_CHUNKS = 10_000
# PNG: texts and colour tables, each of which Pillow inflates to up to 1 MiB.
MAX_COMPRESSED_CHUNKS = 16
# Deflate makes no more of a byte.
MAX_INFLATION = 1032

_JPEG_FRAMES = {0xC0: False, 0xC1: False, 0xC2: True}  # marker of a Huffman-coded frame -> is it progressive?
_JPEG_OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """`format` as Pillow names it. `components`: of a JPEG, else 0. `exif`: its TIFF part, empty where there is none.

    `least_bytes`: a picture of this size takes as many, however little is to be seen on it.
    """

    format: str
    width: int
    height: int
    components: int = 0
    exif: bytes = b""
    least_bytes: int = 0

    @property
    def orientation(self) -> int:
        """EXIF's, 1 to 8; 1 is upright, and stands for whatever makes no sense."""
        return _orientation(self.exif)


def inspect(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """What the picture is. Raises BadInputError for what no decoder should see."""
    if not data:
        raise BadInputError(f"no bytes; expected {EXPECTED}")
    if len(data) > MAX_BYTES:
        raise BadInputError(f"a picture of {len(data)} bytes; at most {MAX_BYTES} are taken")
    kind, read = _kind(data)
    try:
        header = read(data)
    except (IndexError, struct.error):
        raise BadInputError(f"a {kind} image that is cut off in its header") from None
    _check_size(header, len(data), max_pixels)
    return header


def _kind(data: bytes) -> tuple[str, Callable[[bytes], ImageHeader]]:
    """By magic bytes: what clients say of their files is often wrong."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG", _jpeg
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG", _png
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP", _webp
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF", _gif
    raise BadInputError(f"{len(data)} bytes that are not {EXPECTED}")


def _check_size(header: ImageHeader, nbytes: int, max_pixels: int) -> None:
    width, height = header.width, header.height
    what = f"a {header.format} image of {width} x {height} pixels"
    if not (width and height):
        raise BadInputError(what)
    if width * height > max_pixels:
        raise BadInputError(f"{what}; at most {max_pixels} pixels are taken")
    if header.least_bytes > nbytes:
        raise BadInputError(f"{what}, it says, which its {nbytes} bytes cannot hold")


# ---- JPEG ----


def _jpeg(data: bytes) -> ImageHeader:
    """Walks the segments up to the first scan."""
    at, exif = 2, b""
    frame: tuple[bool, bytes] | None = None
    for _ in range(MAX_SEGMENTS):
        if data[at] != 0xFF:
            raise BadInputError(f"a JPEG image with no marker at byte {at}, where one belongs")
        marker = data[at + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7:  # a fill byte, or a marker without a segment
            at += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        body = data[at + 4 : at + 2 + length]
        if marker == 0xDA:
            return _jpeg_header(data, frame, body, exif)
        if marker in _JPEG_OTHER_FRAMES:
            raise BadInputError(
                f"a JPEG image of a kind that is not taken, SOF{marker - 0xC0}: baseline or progressive"
            )
        if marker == 0xD9 or length < 2:
            raise BadInputError("a JPEG image without a picture in it")
        if marker in _JPEG_FRAMES:
            frame = _JPEG_FRAMES[marker], body
        elif marker == 0xE1 and body.startswith(b"Exif\0\0") and not exif:
            exif = body[6:]
        at += 2 + length
    raise BadInputError(f"a JPEG image with more than {MAX_SEGMENTS} segments before its picture")


def _jpeg_header(data: bytes, frame: tuple[bool, bytes] | None, scan: bytes, exif: bytes) -> ImageHeader:
    if frame is None:
        raise BadInputError("a JPEG image whose size is nowhere said")
    progressive, body = frame
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    if precision != 8 or components not in (1, 3, 4):
        raise BadInputError(f"a JPEG image of {components} channels of {precision} bits; 1, 3 or 4 of 8 are taken")
    passes = progressive or scan[0] < components  # else decoders stop after the first scan
    if passes and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise BadInputError(f"a JPEG image in {scans} scans; at most {MAX_SCANS} are taken")
    # Each block takes a bit for its mean at least, and, unless that is left to a later scan, one for its end.
    least_bits = _jpeg_blocks(body, width, height, components) * (1 if passes else 2)
    return ImageHeader("JPEG", width, height, components, exif, least_bits // 8)


def _jpeg_blocks(frame: bytes, width: int, height: int, components: int) -> int:
    """Of 8 x 8 samples, in all components (T.81, A.1.1)."""
    factors = [frame[7 + 3 * index] for index in range(components)]
    across, down = [factor >> 4 for factor in factors], [factor & 15 for factor in factors]
    if 0 in across or 0 in down:
        raise BadInputError("a JPEG image with a sampling factor of 0")
    return sum(
        -(-width * x // (8 * max(across))) * -(-height * y // (8 * max(down)))
        for x, y in zip(across, down, strict=True)
    )


# ---- PNG ----


def _png(data: bytes) -> ImageHeader:
    length, name, width, height, depth, colour, interlaced = struct.unpack_from(">I4sIIBBxxB", data, 8)
    if (length, name) != (13, b"IHDR"):
        raise BadInputError("a PNG image that does not begin with its header")
    bits = _PNG_CHANNELS.get(colour, 0) * depth
    if not bits or interlaced > 1:
        raise BadInputError(f"a PNG image of an unknown kind: colour type {colour}, {depth} bits")
    exif = _walk_png(data)
    # An interlaced picture, in seven passes, has no fewer.
    inflated = height * (1 + -(-width * bits // 8))
    return ImageHeader("PNG", width, height, exif=exif, least_bytes=inflated // MAX_INFLATION)


def _walk_png(data: bytes) -> bytes:
    """Refuses more chunks than anybody needs. Returns the EXIF part."""
    at, compressed, exif = 8, 0, b""
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(data):
            return exif  # cut off: the decoder says so
        length, name = struct.unpack_from(">I4s", data, at)
        if name == b"IEND":
            return exif
        if name in (b"zTXt", b"iTXt", b"iCCP"):
            compressed += 1
            if compressed > MAX_COMPRESSED_CHUNKS:
                raise BadInputError(f"a PNG image with more than {MAX_COMPRESSED_CHUNKS} compressed texts")
        elif name == b"eXIf":
            exif = data[at + 8 : at + 8 + length]
        at += 12 + length
    raise BadInputError(f"a PNG image in more than {MAX_CHUNKS} chunks")


# ---- WebP and GIF ----


def _webp(data: bytes) -> ImageHeader:
    name = data[12:16]
    if name == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
        struct.unpack_from("30x", data)
        return ImageHeader("WEBP", width, height, exif=_webp_exif(data))
    if name == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return ImageHeader("WEBP", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if name == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageHeader("WEBP", width & 0x3FFF, height & 0x3FFF)
    raise BadInputError("a WebP image that does not begin with its header")


def _webp_exif(data: bytes) -> bytes:
    at = 12
    for _ in range(MAX_SEGMENTS):
        if at + 8 > len(data):
            return b""
        name, length = struct.unpack_from("<4sI", data, at)
        if name == b"EXIF":
            return data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0")
        at += 8 + length + length % 2
    raise BadInputError(f"a WebP image in more than {MAX_SEGMENTS} chunks")


def _gif(data: bytes) -> ImageHeader:
    """Walks to the first picture: the others are not looked at."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    blocks = 0
    while data[at] == 0x21:  # an extension: its kind, then its parts, each behind its size, and a size of 0
        at += 2
        while size := data[at]:
            at += 1 + size
            blocks += 1
            if blocks > MAX_SEGMENTS:
                raise BadInputError(f"a GIF image with more than {MAX_SEGMENTS} blocks before its picture")
        at += 1
        blocks += 1
    if data[at] != 0x2C:
        raise BadInputError("a GIF image without a picture in it")
    left, top, across, down = struct.unpack_from("<HHHH", data, at + 1)
    return ImageHeader("GIF", max(width, left + across), max(height, top + down))


# ---- EXIF ----


def _orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory (TIFF 6.0, section 2)."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, at)
        for entry in range(min(entries, MAX_SEGMENTS)):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, at + 2 + 12 * entry)
            if (tag, kind) == (0x0112, 3):
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
