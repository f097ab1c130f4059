"""Pictures against the reference: torchvision's transforms on Pillow's, computed here with Pillow alone."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from preprocess.image import resize
from preprocess.steps import ImageSteps
from server.demo import picture_of
from tests.preprocess.pictures import encoded, levels, noise, photographs, prepared

IMAGENET = ImageSteps(preset="imagenet-eval")
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
SIZES = [
    (640, 427),
    (640, 480),
    (1920, 1080),
    (480, 640),
    (257, 1001),
    (1003, 255),
    (333, 251),
    (256, 256),
    (100, 301),
    (37, 41),
    (2999, 211),
    (3001, 2003),
]


def reference(data: bytes, short_side: int, crop: int, filtered: Image.Resampling) -> np.ndarray[Any, Any]:
    """Resize(short_side), CenterCrop(crop) of torchvision 0.28 on a Pillow image, in its own words; levels, HWC."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = short_side, int(short_side * long / short)
    new_width, new_height = (new_short, new_long) if width <= height else (new_long, new_short)
    image = image.resize((new_width, new_height), filtered)
    top, left = round((new_height - crop) / 2.0), round((new_width - crop) / 2.0)
    return np.asarray(image.crop((left, top, left + crop, top + crop))).astype(np.int64)


@pytest.mark.parametrize("photograph", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_a_photograph_comes_within_a_level_of_the_reference(size: tuple[int, int], photograph: int) -> None:
    data = encoded(photographs()[photograph].resize(size, Image.Resampling.BICUBIC), "JPEG", quality=90)
    expected = reference(data, 256, 224, Image.Resampling.BILINEAR)
    made = prepared(data, ImageSteps(resize=256, crop=224, dtype="UINT8", layout="HWC")).numpy()
    difference = np.abs(made - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.15
    normalised = prepared(data, IMAGENET).permute(1, 2, 0).numpy()
    wanted = (expected.astype(np.float32) / 255 - MEAN) / STD
    assert (np.abs(normalised - wanted) <= 1.0001 / 255 / STD).all()


@pytest.mark.parametrize(("short_side", "crop"), [(232, 224), (473, 384), (64, 33), (299, 298)])
@pytest.mark.parametrize(("interpolation", "most"), [("bilinear", 1), ("bicubic", 2)])
def test_other_sizes_and_filters_agree_too(short_side: int, crop: int, interpolation: str, most: int) -> None:
    """Of bicubic, a value in 100,000 is two levels off: torch and Pillow round its negative weights differently."""
    data = encoded(photographs()[0].resize((701, 523)), "PNG")
    expected = reference(data, short_side, crop, Image.Resampling[interpolation.upper()])
    steps = {"resize": short_side, "crop": crop, "interpolation": interpolation, "dtype": "UINT8", "layout": "HWC"}
    made = prepared(data, ImageSteps.model_validate(steps)).numpy()
    difference = np.abs(made - expected)
    assert difference.max() <= most
    assert (difference > 1).mean() < 1e-4


@pytest.mark.parametrize("step", [2, 5, 16])
def test_by_area_each_pixel_is_the_mean_of_a_whole_number_of_others_as_with_pillows_box(step: int) -> None:
    picture = photographs()[1].crop((0, 0, 400, 320))
    size = (400 // step, 320 // step)
    expected = np.asarray(picture.resize(size, Image.Resampling.BOX)).astype(np.int64)
    assert np.abs(levels(encoded(picture), size=size[::-1], interpolation="area") - expected).max() <= 1


def test_levels_are_normalised_to_the_very_bits_of_torchvision() -> None:
    """ToTensor, Normalize: divide, subtract, divide, each rounded to float32."""
    data = encoded(noise(300, 280))
    steps = {"resize": 256, "crop": 224}
    pixels = prepared(data, ImageSteps.model_validate({**steps, "dtype": "UINT8"}))
    expected = pixels.to(torch.float32).div(255).sub(torch.tensor(MEAN)[:, None, None])
    assert torch.equal(prepared(data, IMAGENET), expected.div(torch.tensor(STD)[:, None, None]))
    half = prepared(data, IMAGENET.model_copy(update={"dtype": "FP16"}))
    assert torch.equal(half, prepared(data, IMAGENET).half())


def test_accelerators_arithmetic_comes_within_a_level_of_the_cpus() -> None:
    """They resize in float32 and round; that can be computed here, too."""
    image = torch.from_numpy(np.asarray(photographs()[0]).copy()).permute(2, 0, 1)
    exact = torch.nn.functional.interpolate(image[None].float(), (256, 383), mode="bilinear", antialias=True)
    difference = (resize(image, 256, 383, "bilinear").float() - exact[0].round()).abs()
    assert difference.max() <= 1


def test_a_digits_picture_gives_its_very_pixels() -> None:
    digit = np.arange(64, dtype=np.float32).reshape(1, 8, 8) / np.float32(255)
    steps = ImageSteps(mode="L", size=(8, 8), interpolation="area")
    np.testing.assert_array_equal(prepared(encoded(picture_of(digit)), steps), digit)
    photographed = prepared(encoded(picture_of(digit), "JPEG", quality=95), steps)
    assert np.abs(photographed.numpy() - digit).max() < 0.03


# ---- kinds of pictures ----


def rgb(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB")).astype(np.int64)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_every_format_gives_pillows_pixels(kind: str) -> None:
    data = encoded(photographs()[0], kind)
    np.testing.assert_array_equal(levels(data), rgb(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_jpeg_gives_pillows_pixels(mode: str, options: dict[str, Any]) -> None:
    data = encoded(photographs()[0].convert(mode), "JPEG", **options)
    np.testing.assert_array_equal(levels(data), rgb(Image.open(io.BytesIO(data))))
    grey = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(np.int64)
    np.testing.assert_array_equal(levels(data, mode="L")[..., 0], grey)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_every_png_gives_pillows_pixels_without_alpha(mode: str) -> None:
    picture = photographs()[1].convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(3)
    data = encoded(picture)
    np.testing.assert_array_equal(levels(data), rgb(picture))


def test_a_palette_with_transparency_is_no_reason_to_complain() -> None:
    picture = photographs()[0].convert("P")
    data = encoded(picture, transparency=bytes(range(200)))
    np.testing.assert_array_equal(levels(data), rgb(picture))


def test_of_16_bits_the_upper_8_are_kept() -> None:
    """Pillow saturates: everything above 255 would be white."""
    deep = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 21
    data = encoded(Image.fromarray(deep))
    np.testing.assert_array_equal(levels(data), np.repeat((deep >> 8)[..., None], 3, 2))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    first, second = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    data = encoded(first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(levels(data), rgb(first))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_only_where_the_model_asks(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = photographs()[0].resize((64, 40))
    data = encoded(picture, kind, exif=exif.tobytes())
    plain = Image.open(io.BytesIO(data))
    turned = ImageOps.exif_transpose(plain)
    np.testing.assert_array_equal(levels(data), rgb(plain))
    np.testing.assert_array_equal(levels(data, exif=True, size=turned.size[::-1]), rgb(turned))


def test_jpegs_may_be_decoded_at_a_fraction_where_the_model_allows_it() -> None:
    data = encoded(photographs()[0].resize((3000, 2000), Image.Resampling.BICUBIC), "JPEG", quality=90)
    quick = ImageSteps(resize=256, crop=224, dtype="UINT8", dct_scaling=True)
    exact = ImageSteps(resize=256, crop=224, dtype="UINT8")
    difference = np.abs(prepared(data, quick).numpy().astype(int) - prepared(data, exact).numpy())
    assert difference.max() <= 12, "the bound that is documented"
    assert difference.max() > 0, "it was"
