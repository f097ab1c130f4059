"""Decoded pictures into tensors: turn, resize, crop, normalise. The same functions on every device.

On the CPU torch resizes uint8 that is channels-last several times faster than Pillow, and within one level of it; a
GPU has no such kernel, and takes float32, rounded.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional

from preprocess import framing
from preprocess.errors import BadInputError
from preprocess.steps import ImageSteps

# Of a resized picture, before the crop: one that is very long and thin would otherwise be made huge.
MAX_RESIZED_PIXELS = 20_000_000


def transform(pixels: torch.Tensor, orientation: int, steps: ImageSteps, target: torch.Tensor) -> None:
    """Writes a decoded picture, uint8 [height, width, channels], to `target`: one item, as the steps declare it.

    `orientation`: EXIF's, 1 where it is upright or not to be looked at. Raises BadInputError.
    """
    turned = upright(pixels, orientation)
    height, width = turned.shape[:2]
    to_width, to_height = steps.resized(width, height)
    if to_width * to_height > MAX_RESIZED_PIXELS:
        raise BadInputError(
            f"an image of {width} x {height} pixels, which would be {to_width} x {to_height} once resized; "
            f"at most {MAX_RESIZED_PIXELS} pixels are made"
        )
    image = resize(turned.permute(2, 0, 1), to_height, to_width, steps.interpolation)
    rows, columns = steps.frame
    top, left = framing.centred(to_height, rows), framing.centred(to_width, columns)
    normalise(image[:, top : top + rows, left : left + columns], steps, target)


def upright(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """[height, width, channels], turned by EXIF's orientation (Exif 2.32, table 6)."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(0, 1)
    flipped = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}.get(orientation, ())
    return pixels.flip(flipped).contiguous()


def resize(image: torch.Tensor, height: int, width: int, interpolation: str) -> torch.Tensor:
    """uint8 [channels, height, width], its channels last in memory, to another size; whole levels, antialiased."""
    if image.shape[1:] == (height, width):
        return image
    if interpolation == "area":  # a channel at a time: floats take four times the memory
        return torch.cat(
            [functional.adaptive_avg_pool2d(each[None].float(), (height, width)) for each in image]
        ).round_()
    exact = image.device.type == "cpu"
    source = image[None] if exact else image[None].float()
    made = functional.interpolate(source, (height, width), mode=interpolation, antialias=True)[0]
    return made if exact else made.round_().clamp_(0, 255)


def normalise(image: torch.Tensor, steps: ImageSteps, target: torch.Tensor) -> None:
    """[channels, height, width] of levels into `target`: in torchvision's order of operations, so to its very bits."""
    if steps.layout == "HWC":
        target = target.permute(2, 0, 1)
    if steps.dtype == "UINT8":
        target.copy_(image)
    elif steps.dtype == "FP32" and image.device == target.device:
        _scale(image, steps, target)
    else:
        exact = torch.empty(image.shape, device=image.device)
        _scale(image, steps, exact)
        target.copy_(exact)


def _scale(image: torch.Tensor, steps: ImageSteps, target: torch.Tensor) -> None:
    torch.div(image, steps.divide_by, out=target)
    if steps.mean is not None and steps.std is not None:
        target.sub_(_per_channel(steps.mean, target.device)).div_(_per_channel(steps.std, target.device))


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device)[:, None, None]
