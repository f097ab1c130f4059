"""Files with some bytes changed, cut, or doubled: read, or refused with a reason, and nothing else ever."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest

from preprocess import glance
from preprocess.clips import read_clip
from preprocess.errors import BadInputError
from preprocess.gate import MAX_PIXELS
from preprocess.steps import AudioSteps, ImageSteps
from tests.preprocess.pictures import encoded, photographs, prepared
from tests.preprocess.sounds import sound_file, speech_like, wav

ROUNDS = int(os.environ.get("MUTATIONS", "200"))
PICTURE = photographs()[0].resize((97, 61))
IMAGE = ImageSteps(resize=32, crop=32, exif=True)
SOUND = AudioSteps(preset="nemo-80", max_seconds=5)
CLIP = speech_like(0.3)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Mostly near the beginning, where headers are."""
    made = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        reach = len(made) if rng.random() < 0.4 else min(len(made), 200)
        at = int(rng.integers(0, max(reach, 1)))
        match rng.integers(0, 5):
            case 0:
                made[at : at + 1] = bytes([rng.integers(0, 256)])
            case 1:
                made[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1"])
            case 2:
                del made[at : at + int(rng.integers(1, 30))]
            case 3:
                made[at:at] = made[at : at + int(rng.integers(1, 30))]
            case _:
                del made[max(at, 4) :]
    return bytes(made)


def survives(data: bytes, read: Callable[[bytes], object]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(ROUNDS):
        changed = mutated(data, rng)
        with suppress(BadInputError):
            read(changed)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01"}])
def test_jpegs(options: dict[str, object]) -> None:
    survives(
        encoded(PICTURE, "JPEG", **options), lambda data: (glance.picture(data, MAX_PIXELS), prepared(data, IMAGE))
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "I;16"])
def test_pngs(mode: str) -> None:
    data = encoded(PICTURE.convert("L").convert(mode) if mode == "I;16" else PICTURE.convert(mode))
    survives(data, lambda data: (glance.picture(data, MAX_PIXELS), prepared(data, IMAGE)))


@pytest.mark.parametrize("kind", ["WEBP", "GIF"])
@pytest.mark.parametrize("frames", [1, 3])
def test_webps_and_gifs(kind: str, frames: int) -> None:
    more = {"save_all": True, "append_images": [PICTURE.rotate(90 * turn) for turn in range(1, frames)]}
    survives(encoded(PICTURE, kind, **more), lambda data: (glance.picture(data, MAX_PIXELS), prepared(data, IMAGE)))


@pytest.mark.parametrize(
    "data",
    [
        wav(CLIP),
        sound_file(CLIP, subtype="FLOAT"),
        sound_file(CLIP, subtype="PCM_24"),
        sound_file(CLIP, kind="FLAC"),
        sound_file(CLIP, kind="OGG"),
        sound_file(CLIP, kind="MP3"),
    ],
    ids=["PCM16", "float", "PCM24", "FLAC", "Ogg", "MP3"],
)
def test_sounds(data: bytes) -> None:
    survives(data, lambda data: (glance.clip(data, 120.0), read_clip(data, SOUND)))
