"""Encoded pictures into a model's input: gate, decode, transform."""

from __future__ import annotations

import torch

from preprocess import gate
from preprocess.decoders import Decoder, Picture
from preprocess.errors import BadInputError
from preprocess.image import transform
from preprocess.stages import stage
from preprocess.steps import ImageSteps

# A JPEG that is decoded at a fraction of its size stays so many times larger than what it is resized to.
DCT_HEADROOM = 2


def write_image(data: bytes, steps: ImageSteps, decoder: Decoder, target: torch.Tensor) -> None:
    """One picture into `target`, a tensor of `steps.shape` and dtype. Raises BadInputError."""
    with stage("gate"):
        header = gate.inspect(data, steps.max_pixels)
    with stage("decode"):
        (decoded,) = decoder.decode([Picture(data, header, steps.mode == "L", _at_least(header, steps))])
    if isinstance(decoded, BadInputError):
        raise decoded
    with stage("transform"):
        transform(decoded, header.orientation if steps.exif else 1, steps, target)


def _at_least(header: gate.ImageHeader, steps: ImageSteps) -> tuple[int, int] | None:
    if not steps.dct_scaling:
        return None
    width, height = steps.resized(header.width, header.height)
    if steps.exif and header.orientation >= 5:
        height, width = steps.resized(header.height, header.width)
    return min(DCT_HEADROOM * width, header.width), min(DCT_HEADROOM * height, header.height)
