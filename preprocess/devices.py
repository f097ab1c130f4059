"""Where a pipeline's pictures are decoded: on the CPU, on the slices that serve the model, or on one kept for it. Pure.

Hardware JPEG engines are per slice, and NVML counts them: of an A100 only `1g+me` and `7g` have one, of an H100 or H200
every slice has (NVIDIA's MIG guide). Where there is none, an accelerator decodes on the cores that the model computes
with: that is done where it is asked for, and not by `auto`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from preprocess.pipeline import PipelineError

CPU, NVIMAGECODEC = "cpu", "nvimagecodec"


class Device(StrEnum):
    """What serving.yaml's `preprocess.device` may say."""

    AUTO = "auto"
    CPU = "cpu"
    SLICE = "slice"
    DEDICATED = "dedicated"


class Place(NamedTuple):
    """A slice, or a whole GPU. `jpeg_engines`: as NVML counts them, None where it does not say."""

    name: str
    uuid: str
    jpeg_engines: int | None
    simulated: bool


class Target(NamedTuple):
    """Who decodes: a decoder's name (cards.py), and the devices that its processes see in turn, or none."""

    decoder: str = CPU
    uuids: tuple[str, ...] = ()


class Facts(NamedTuple):
    """What the choice goes by. `decoder`: --preprocess-decoder; `serving`: where the model is served; `dedicated`: what
    --preprocess-slice names; `installed`: is nvImageCodec there; `isolated`: do decoders have processes of their own.
    """

    decoder: str
    serving: Sequence[Place]
    dedicated: Place | None
    installed: bool
    isolated: bool


def choose(asked: Device, pictures: bool, facts: Facts) -> tuple[Target, str]:
    """The target, and why. Raises PipelineError where what is asked for is not there."""
    if not pictures:
        if asked in (Device.SLICE, Device.DEDICATED):
            raise PipelineError(f"device: {asked} is for pictures; sound and text are prepared by the CPU")
        return Target(), "sound and text are prepared by the CPU"
    if asked is Device.CPU:
        return Target(), "asked for"
    if asked is Device.AUTO:
        return _auto(facts)
    places = _asked_places(asked, facts)
    decoder = NVIMAGECODEC if facts.decoder == CPU else facts.decoder
    if decoder == NVIMAGECODEC and not facts.installed:
        raise PipelineError(f"device: {asked} needs nvImageCodec: pip install 'migserve[torch,nvimagecodec]'")
    if not facts.isolated:
        raise PipelineError(
            f"device: {asked} needs decoders in processes of their own; leave out --no-isolate-decoders"
        )
    return Target(decoder, tuple(place.uuid for place in places)), f"asked for; {_engines(places)}"


def _asked_places(asked: Device, facts: Facts) -> list[Place]:
    if asked is Device.DEDICATED and facts.dedicated is None:
        raise PipelineError("device: dedicated, but no slice is kept for preprocessing; name one: --preprocess-slice")
    places = list(facts.serving) if asked is Device.SLICE else [facts.dedicated] if facts.dedicated else []
    real = [place for place in places if not place.simulated]
    if not real:
        names = ", ".join(place.name for place in places) or "none"
        raise PipelineError(f"device: {asked}, but there is no GPU behind it (simulated: {names}); use cpu or auto")
    return real


def _auto(facts: Facts) -> tuple[Target, str]:
    if facts.decoder not in (CPU, NVIMAGECODEC):
        return Target(facts.decoder), "--preprocess-decoder names a card of its own"
    if facts.installed and facts.isolated:
        if facts.dedicated is not None and not facts.dedicated.simulated:
            return Target(
                NVIMAGECODEC, (facts.dedicated.uuid,)
            ), f"a slice is kept for it; {_engines([facts.dedicated])}"
        with_engine = [place for place in facts.serving if place.jpeg_engines and not place.simulated]
        if with_engine:
            return Target(NVIMAGECODEC, tuple(place.uuid for place in with_engine)), _engines(with_engine)
    if facts.decoder == NVIMAGECODEC:
        return Target(NVIMAGECODEC), "--preprocess-decoder says so, wherever CUDA finds a GPU"
    if not facts.installed:
        return Target(), "nvImageCodec is not installed"
    return Target(), "no slice that serves it has a JPEG engine"


def _engines(places: Sequence[Place]) -> str:
    said = ", ".join(
        f"{place.name}: {'unknown' if place.jpeg_engines is None else place.jpeg_engines}" for place in places
    )
    return f"JPEG engines: {said}"
