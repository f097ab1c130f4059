"""Image decoding on the CPU: Pillow, behind a gate on format and size."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from preprocess.pipeline import ImageSteps

FORMATS = ("PNG", "JPEG")
# Decoded pixels of one image. Checked in the header, before any memory is taken.
MAX_PIXELS = 50_000_000


class BadInputError(ValueError):
    """These bytes are not what the pipeline takes. The message says what they are and what was expected."""


def decode_image(data: bytes, steps: ImageSteps, target: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    """Decodes one PNG or JPEG into `target`, float32 of `steps.shape`. Raises BadInputError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the gate below is stricter
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise BadInputError(f"{len(data)} bytes that are not a {' or '.join(FORMATS)} image") from None
        except Image.DecompressionBombError:
            raise BadInputError(
                f"an image of far more than {MAX_PIXELS} pixels, which is the most that is taken"
            ) from None
        except Exception as error:  # a hostile header can make a decoder raise anything
            raise BadInputError(f"an image that cannot be read: {error}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadInputError(f"an image of {width} x {height} pixels; at most {MAX_PIXELS} pixels are taken")
    try:
        converted = image.convert(steps.mode)
    except Exception as error:  # truncated or corrupt data surface here, as various exceptions
        raise BadInputError(f"a damaged {image.format} image: {error}") from None
    rows, columns = steps.size
    if converted.size != (columns, rows):
        converted = converted.resize((columns, rows), Image.Resampling.BOX)
    pixels = np.asarray(converted, dtype=np.float32).reshape(rows, columns, -1)
    np.divide(pixels.transpose(2, 0, 1), np.float32(steps.divide_by), out=target)
