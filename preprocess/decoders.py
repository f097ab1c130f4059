"""What decodes pictures: the CPU, an accelerator, or whatever card somebody has. One interface for all of them.

A decoder gets pictures that have passed the gate, and memory to write to. It gives an image or an error for each: one
that is broken harms no other. What it does with the pixels' values is fixed: levels as libjpeg makes them (chroma
interpolated), sRGB as it stands, EXIF's orientation not applied (the pipeline does that itself, if asked).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from preprocess import cpu
from preprocess.errors import BadInputError
from preprocess.gate import ImageHeader

Decoded = torch.Tensor | BadInputError


@dataclass(frozen=True, slots=True)
class Picture:
    """One to decode, to uint8 [height, width, 1 if `grey` else 3]. `at_least`: as for `cpu.decode`; may be ignored."""

    data: bytes
    header: ImageHeader
    grey: bool = False
    at_least: tuple[int, int] | None = None


class Decoder(Protocol):
    """`decode` may be called by several threads at once."""

    def decode(self, pictures: Sequence[Picture]) -> list[Decoded]:
        """For each picture its pixels, on whatever device, or what is wrong with it."""


class CpuDecoder:
    """simplejpeg and Pillow."""

    def decode(self, pictures: Sequence[Picture]) -> list[Decoded]:
        return [_decoded(picture) for picture in pictures]


def _decoded(picture: Picture) -> Decoded:
    try:
        pixels = cpu.decode(picture.data, picture.header, grey=picture.grey, at_least=picture.at_least)
    except BadInputError as error:
        return error
    return torch.from_numpy(pixels)
