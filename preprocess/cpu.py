"""Pictures decoded on the CPU: simplejpeg, strictly, and Pillow for what is no JPEG. Both release the GIL."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import simplejpeg
from PIL import GifImagePlugin, Image, PngImagePlugin, WebPImagePlugin

from preprocess.errors import BadInputError
from preprocess.gate import ImageHeader

# Named so that Image.open does not import every plugin that Pillow has when it first meets one.
PLUGINS = (GifImagePlugin, PngImagePlugin, WebPImagePlugin)

# The gate has a limit of its own, lower and a model's to set. Pillow's would print a warning for each large picture.
Image.MAX_IMAGE_PIXELS = None

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def decode(data: bytes, header: ImageHeader, *, grey: bool = False, at_least: tuple[int, int] | None = None) -> Pixels:
    """The picture as uint8 [height, width, 1 if `grey` else 3], as Pillow's convert("L") or ("RGB") makes it.

    Only what the gate has let through, whose header this is. `at_least`: width and height below which a JPEG may not
    fall; it is then decoded smaller, by up to 8, which is quicker and less exact. Raises BadInputError.
    """
    decoded = _jpeg(data, header, at_least) if header.format == "JPEG" else None
    if decoded is None:
        decoded = _by_pillow(data, header, grey)
    channels = decoded.shape[2]
    if channels == 4:
        decoded = _without_black(decoded)
    if grey:
        return decoded if channels == 1 else _luma(decoded)
    return np.repeat(decoded, 3, axis=2) if channels == 1 else decoded


def _jpeg(data: bytes, header: ImageHeader, at_least: tuple[int, int] | None) -> Pixels | None:
    """None for what TurboJPEG has no name for, of which Pillow decodes what can be decoded, damaged or not."""
    colours = {1: "GRAY", 3: "RGB", 4: "CMYK"}[header.components]
    width, height = at_least or (0, 0)
    smaller = {"min_width": width, "min_height": height, "min_factor": 1} if at_least else {}
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, colours, strict=True, **smaller)
    except Exception as error:  # whatever hostile bytes make it raise
        if "Could not determine subsampling" in str(error):
            return None
        raise BadInputError(f"a damaged JPEG image: {error}") from None
    return pixels


def _without_black(inks: Pixels) -> Pixels:
    """CMYK to RGB as Pillow does it. The levels are inverted in the file, as Adobe's are."""
    product = inks[..., :3].astype(np.uint32) * inks[..., 3:]
    # Pillow takes away from the light that black leaves the share that the ink takes of it, rounded.
    light = inks[..., 3:].astype(np.uint32)
    taken = light * 255 - product + 128
    return _bytes(light - ((taken >> 8) + taken >> 8))


def _luma(pixels: Pixels) -> Pixels:
    """ITU-R 601 in 16 bits, rounded, as Pillow."""
    red, green, blue = (pixels[..., channel].astype(np.uint32) for channel in range(3))
    return _bytes((red * 19595 + green * 38470 + blue * 7471 + 0x8000)[..., None] >> 16)


def _bytes(levels: np.ndarray[Any, Any]) -> Pixels:
    return levels.astype(np.uint8)


def _by_pillow(data: bytes, header: ImageHeader, grey: bool) -> Pixels:
    """The first frame. Alpha is dropped; of 16 bits the upper 8 are kept, also where Pillow would saturate."""
    try:
        with Image.open(io.BytesIO(data), formats=(header.format,)) as image:
            if image.width * image.height > header.width * header.height:
                raise BadInputError(f"a {header.format} image of another size than its header says")
            return _levels(image, "L" if grey else "RGB")
    except BadInputError:
        raise
    except Exception as error:  # hostile bytes can make a decoder raise anything
        raise BadInputError(f"a damaged {header.format} image: {error}") from None


def _levels(image: Image.Image, mode: str) -> Pixels:
    if image.mode.startswith("I"):
        upper = np.asarray(image, dtype=np.int32) >> 8
        return _bytes(np.clip(upper, 0, 255)[..., None])
    image.info.pop("transparency", None)  # Pillow warns where it cannot keep it, which nobody asks for
    pixels = np.array(image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels
