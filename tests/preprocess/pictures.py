"""Photographs, and bytes that somebody might send for one."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from preprocess.images import write_image
from preprocess.steps import ImageSteps
from preprocess.work import CPU

NOISE = np.random.default_rng(0)


@cache
def photographs() -> tuple[Image.Image, Image.Image]:
    """scikit-learn's two: a temple in China, and a flower; 640 x 427."""
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    return Image.fromarray(china), Image.fromarray(flower)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 64, height: int = 48, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze())


def prepared(data: bytes, steps: ImageSteps) -> torch.Tensor:
    """One picture through the CPU's pipeline."""
    dtype = {"FP32": torch.float32, "FP16": torch.float16, "UINT8": torch.uint8}[steps.dtype]
    target = torch.full(steps.shape, 77, dtype=dtype)
    write_image(data, steps, CPU, target)
    return target


def levels(data: bytes, **more: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The picture's own pixels, [height, width, channels], as the pipeline decodes them."""
    width, height = Image.open(io.BytesIO(data)).size
    steps = ImageSteps.model_validate({"size": (height, width), "dtype": "UINT8", "layout": "HWC", **more})
    return prepared(data, steps).numpy().astype(np.int64)


# ---- what hostile clients send ----


def forged_jpeg(data: bytes, width: int, height: int) -> bytes:
    """A JPEG that claims another size."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 1, colour: int = 0) -> bytes:
    """A whole PNG, all black, with these chunks before its picture."""
    row = 1 + -(-width * depth // 8)
    packer = zlib.compressobj(9)
    packed = b"".join([packer.compress(bytes(row)) for _ in range(height)] + [packer.flush()])
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = b"".join(chunks) + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def forged_png(width: int, height: int) -> bytes:
    """A small one that claims another size, with a checksum that is right."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + encoded(noise())[33:]


def scan_bomb(scans: int, side: int = 4000) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encoded(Image.new("RGB", (side, side), "teal"), "JPEG", progressive=True)
    begin = data.rindex(b"\xff\xda")
    return data[:-2] + data[begin:-2] * scans + b"\xff\xd9"


def sequential_scan_bomb(scans: int, side: int = 4000) -> bytes:
    """A baseline JPEG of three components with a scan for one of them, again and again."""
    data = encoded(Image.new("RGB", (side, side), "teal"), "JPEG")
    begin = data.rindex(b"\xff\xda")
    head = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 0, 63, 0)
    return data[:begin] + (head + data[begin + 14 : -2]) * scans + b"\xff\xd9"


def many_segments(count: int) -> bytes:
    data = encoded(noise(), "JPEG")
    return data[:2] + b"\xff\xe5\x00\x02" * count + data[2:]


def many_gif_blocks(count: int) -> bytes:
    data = encoded(noise(channels=1), "GIF")
    at = data.index(b"\x2c", 13 + 3 * 256)
    return data[:at] + b"\x21\xfe" + b"\x01x" * count + b"\x00" + data[at:]


def text_bomb(texts: int) -> bytes:
    """Texts of a mebibyte each, a kilobyte when compressed."""
    text = png_chunk(b"zTXt", b"t\0\0" + zlib.compress(bytes(1 << 20), 9))
    return png(8, 8, *[text] * texts)


def corrupt(data: bytes) -> bytes:
    """Some bytes in the middle of it are others."""
    middle = len(data) // 2
    return data[:middle] + bytes(each ^ 0x55 for each in data[middle : middle + 40]) + data[middle + 40 :]


def hostile() -> dict[str, tuple[bytes, str]]:
    """What is refused: name -> bytes, and a part of the reason."""
    picture = photographs()[0]
    jpeg, progressive = encoded(picture, "JPEG"), encoded(picture, "JPEG", progressive=True)
    cmyk = encoded(picture.convert("CMYK"), "JPEG")
    return {
        "nothing": (b"", "no bytes; expected a JPEG, PNG, WebP or GIF image"),
        "text": (b"GET / HTTP/1.1", "14 bytes that are not a JPEG, PNG, WebP or GIF image"),
        "a TIFF": (encoded(noise(), "TIFF"), "not a JPEG, PNG, WebP or GIF image"),
        "a BMP": (encoded(noise(), "BMP"), "not a JPEG, PNG, WebP or GIF image"),
        "three bytes of a JPEG": (jpeg[:3], "cut off in its header"),
        "a JPEG cut off in its header": (jpeg[:150], "cut off in its header"),
        "a JPEG cut off": (jpeg[: len(jpeg) // 2], "damaged JPEG image"),
        "a progressive JPEG cut off": (progressive[: len(progressive) // 2], "damaged JPEG image"),
        "a CMYK JPEG cut off": (cmyk[: len(cmyk) // 2], "damaged JPEG image"),
        "a JPEG, corrupt in the middle": (corrupt(jpeg), "damaged JPEG image"),
        "a JPEG with no marker where one belongs": (jpeg[:20] + b"\0" + jpeg[20:], "no marker at byte 20"),
        "a JPEG without a picture": (b"\xff\xd8\xff\xd9", "cut off in its header"),
        "a JPEG without a picture, filled up": (b"\xff\xd8\xff\xd9" + bytes(9), "without a picture in it"),
        "an arithmetic JPEG": (jpeg.replace(b"\xff\xc0\x00\x11", b"\xff\xc9\x00\x11"), "not taken, SOF9"),
        "a JPEG of 12 bits": (jpeg.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c"), "3 channels of 12 bits"),
        "a JPEG of no height": (forged_jpeg(jpeg, 640, 0), "640 x 0 pixels"),
        "a JPEG that claims 30000 x 30000": (forged_jpeg(jpeg, 30000, 30000), "30000 x 30000 pixels; at most 50000000"),
        "a JPEG that claims 7000 x 7000": (forged_jpeg(jpeg, 7000, 7000), "which its"),
        "a progressive JPEG that claims 7000 x 7000": (forged_jpeg(progressive[:30000], 7000, 7000), "which its"),
        "a JPEG of 1100 scans": (scan_bomb(1100), "scans; at most 100 are taken"),
        "a baseline JPEG of 200 scans": (sequential_scan_bomb(200, 400), "in 200 scans; at most 100 are taken"),
        "a JPEG of a million segments": (many_segments(1_000_000), "more than 1000 segments"),
        "a PNG cut off in its header": (encoded(noise())[:20], "cut off in its header"),
        "a PNG cut off": (encoded(noise())[:-400], "damaged PNG image"),
        "a PNG, corrupt in the middle": (corrupt(encoded(noise())), "damaged PNG image"),
        "a PNG of 20000 x 20000, whole": (png(20000, 20000), "20000 x 20000 pixels; at most 50000000"),
        "a PNG that claims 60000 x 60000": (forged_png(60000, 60000), "60000 x 60000 pixels; at most 50000000"),
        "a PNG that claims 7000 x 7000": (forged_png(7000, 7000), "which its"),
        "a PNG of a million chunks": (png(8, 8, png_chunk(b"tEXt", b"") * 1_000_000), "more than 10000 chunks"),
        "a PNG of 100 MiB of text": (text_bomb(100), "more than 16 compressed texts"),
        "a PNG of an unknown kind": (png(8, 8, colour=5), "unknown kind"),
        "a WebP cut off": (encoded(noise(), "WEBP")[:-400], "damaged WEBP image"),
        "a WebP cut off in its header": (encoded(noise(), "WEBP")[:20], "cut off in its header"),
        "a WebP that is none": (b"RIFF\0\0\0\0WEBPhello", "does not begin with its header"),
        "a GIF cut off": (encoded(noise(), "GIF")[:-1000], "damaged GIF image"),
        "a GIF of a million blocks": (many_gif_blocks(1_000_000), "more than 1000 blocks"),
        "a GIF without a picture": (encoded(noise(), "GIF")[:13] + bytes(768) + b";", "without a picture"),
        "a line of 65535 pixels": (png(65_535, 1), "at most 20000000 pixels are made"),
    }
