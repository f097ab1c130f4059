"""Accelerators that decode pictures, behind one interface, and what they are guarded against.

A package adds one by an entry point in the group `migserve.decoders`, a function that gives a Card:

    [project.entry-points."migserve.decoders"]
    mycard = "mypackage.card:open_card"

and `--preprocess-decoder mycard` chooses it; tests/preprocess/test_cards.py has a worked example. The guard knows three
hazards, seen in published reports of nvJPEG's hardware engine and its wrappers:

* It writes before earlier work of the caller's stream has ended, over memory that is still in use. So memory is
  allocated, marked, and the device synchronised before each decode.
* It says that a picture is decoded, and has never written it. So some rows are marked with noise before, and a picture
  that still has one of them counts as not decoded.
* One broken picture fails the whole call. So each is tried again alone, and then on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Protocol

import structlog
import torch

from preprocess.decoders import CpuDecoder, Decoded, Decoder, Picture
from preprocess.errors import BadInputError
from preprocess.pipeline import PipelineError

log = structlog.get_logger(__name__)

GROUP = "migserve.decoders"
# Rows of a picture that are marked, spread over its height; the last one is always among them.
MARKED_ROWS = 8

_NOISE = torch.randint(0, 256, (1 << 16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(20))


class Card(Protocol):
    """An accelerator. Called by several threads at once.

    `decode_into` writes each picture's levels to its place, uint8 [height, width, channels] on `device`, as libjpeg
    makes them (chroma interpolated, EXIF's orientation not applied), and returns for each what is wrong, or None. When
    it returns the places are written, for whoever reads them on the device's current stream.
    """

    device: torch.device

    def takes(self, picture: Picture) -> bool:
        """Is it of a kind that the card decodes? Others go to the CPU."""

    def synchronise(self) -> None:
        """Returns when no earlier work touches memory that was allocated since."""

    def decode_into(self, pictures: Sequence[Picture], places: Sequence[torch.Tensor]) -> list[BadInputError | None]:
        """May raise, which counts for all of them."""


class Guarded:
    """A Decoder: the card for what it takes, and the CPU for the rest, and for what the card fails at."""

    def __init__(self, card: Card, cpu: Decoder | None = None) -> None:
        self._card = card
        self._cpu = cpu or CpuDecoder()

    def decode(self, pictures: Sequence[Picture]) -> list[Decoded]:
        taken = [index for index, picture in enumerate(pictures) if self._card.takes(picture)]
        on_card = self._on_card([pictures[index] for index in taken])
        decoded: dict[int, Decoded] = {
            index: pixels for index, pixels in zip(taken, on_card, strict=True) if pixels is not None
        }
        left = [index for index in range(len(pictures)) if index not in decoded]
        decoded.update(zip(left, self._cpu.decode([pictures[index] for index in left]), strict=True))
        return [decoded[index] for index in range(len(pictures))]

    def _on_card(self, pictures: Sequence[Picture]) -> list[torch.Tensor | None]:
        """None for what is to be decoded by the CPU, which also finds the words for what is wrong with a picture."""
        if not pictures:
            return []
        try:
            decoded = self._tried(pictures)
        except Exception as error:  # whatever a driver raises
            log.warning("a decoder failed", pictures=len(pictures), reason=str(error))
            decoded = [None] * len(pictures)
        if len(pictures) == 1:
            return decoded
        return [
            each if each is not None else self._on_card([picture])[0]
            for each, picture in zip(decoded, pictures, strict=True)
        ]

    def _tried(self, pictures: Sequence[Picture]) -> list[torch.Tensor | None]:
        places = [torch.empty(shape_of(picture), dtype=torch.uint8, device=self._card.device) for picture in pictures]
        for place in places:
            mark(place)
        self._card.synchronise()
        errors = self._card.decode_into(pictures, places)
        return [
            None if error is not None or is_marked(place) else place
            for error, place in zip(errors, places, strict=True)
        ]


def shape_of(picture: Picture) -> tuple[int, int, int]:
    """Height, width and channels that it decodes to."""
    return picture.header.height, picture.header.width, 1 if picture.grey else 3


def mark(place: torch.Tensor) -> None:
    """Writes noise to some rows."""
    rows, noise = _rows(place)
    place[rows] = noise


def is_marked(place: torch.Tensor) -> bool:
    """Does any marked row still hold its noise?"""
    rows, noise = _rows(place)
    return bool((place[rows] == noise).flatten(1).all(1).any())


def _rows(place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows, and what of noise they hold."""
    height, width, channels = place.shape
    rows = torch.linspace(0, height - 1, min(MARKED_ROWS, height)).round().long()
    values = width * channels
    noise = _NOISE.repeat(-(-values // len(_NOISE)))[:values].reshape(width, channels)
    return rows.to(place.device), noise.to(place.device)


def open_decoder(name: str) -> Decoder:
    """The one called so: cpu, nvimagecodec, or an entry point's. Raises PipelineError where it cannot be had."""
    if name == "cpu":
        return CpuDecoder()
    try:
        if name == "nvimagecodec":
            from preprocess.nvimagecodec import open_card

            return Guarded(open_card())
        known = entry_points(group=GROUP)
        if name not in known.names:
            names = ["cpu", "nvimagecodec", *sorted(known.names)]
            raise PipelineError(f"no decoder is called {name!r}; there are {', '.join(names)}")
        return Guarded(known[name].load()())
    except PipelineError:
        raise
    except Exception as error:  # whatever a driver raises
        raise PipelineError(f"decoder {name} cannot be had: {error}") from error
