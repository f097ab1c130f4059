from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from preprocess.cpu import BadInputError, decode_image
from preprocess.pipeline import ImageSteps, PipelineError, PipelineFile, checked
from server.demo import picture_of

GREY8 = ImageSteps(mode="L", size=(8, 8))
RGB4 = ImageSteps(mode="RGB", size=(4, 4))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes, steps: ImageSteps = GREY8) -> Any:
    target = np.full(steps.shape, np.nan, np.float32)
    decode_image(data, steps, target)
    return target


def test_a_digits_picture_gives_its_very_pixels() -> None:
    levels = np.arange(64, dtype=np.float32).reshape(1, 8, 8) / np.float32(255)
    np.testing.assert_array_equal(decoded(encoded(picture_of(levels))), levels)


def test_jpeg_comes_near() -> None:
    levels = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    assert np.abs(decoded(encoded(picture_of(levels), "JPEG", quality=95)) - levels).max() < 0.03


def test_colours_are_channels_first_and_grey_is_spread_over_them() -> None:
    red = decoded(encoded(Image.new("RGB", (9, 5), (255, 0, 51))), RGB4)
    np.testing.assert_allclose(red[:, 0, 0], [1, 0, 0.2], atol=1e-6)
    grey = decoded(encoded(Image.new("L", (4, 4), 102)), RGB4)
    np.testing.assert_allclose(grey, 0.4, atol=1e-6)


@pytest.mark.parametrize(
    ("side", "message"), [(60_000, "far more than 50000000"), (8_000, "8000 x 8000 pixels; at most")]
)
def test_a_forged_size_costs_no_memory(side: int, message: str) -> None:
    """A PNG of a few bytes that claims a huge size."""
    picture = bytearray(encoded(Image.new("L", (8, 8))))
    picture[16:24] = struct.pack(">II", side, side)
    picture[29:33] = struct.pack(">I", zlib.crc32(bytes(picture[12:29])))
    with pytest.raises(BadInputError, match=message):
        decoded(bytes(picture))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(BadInputError, match="not a PNG or JPEG image"):
        decoded(encoded(Image.new("L", (8, 8)), kind))


@pytest.mark.parametrize("cut", [8, 20, 50, -40])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_pictures_are_refused(kind: str, cut: int) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8))
    with pytest.raises(BadInputError):
        decoded(encoded(noise, kind)[:cut])


PIPELINE = PipelineFile(input="image", output="x", image=GREY8)


def test_a_pipeline_that_fits() -> None:
    checked(PIPELINE, {"x": ("FP32", (1, 8, 8))})
    checked(PIPELINE, {"x": ("FP32", (1, -1, -1))})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"y": ("FP32", (1, 8, 8))}, "preprocess.output is 'x', but the model's inputs are y"),
        ({"x": ("FP32", (1, 8, 8)), "y": ("FP32", ())}, "feeds a model of one input"),
        ({"x": ("FP32", (3, 8, 8))}, r"makes FP32 \[1, 8, 8\], input x is FP32 \[3, 8, 8\]"),
        ({"x": ("UINT8", (1, 8, 8))}, "input x is UINT8"),
        ({"x": ("FP32", (8, 8))}, "input x is FP32"),
    ],
)
def test_a_pipeline_that_does_not_fit(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        checked(PIPELINE, inputs)
