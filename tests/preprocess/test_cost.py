from __future__ import annotations

import struct

import numpy as np
import pytest

from preprocess import glance
from preprocess.cost import CostModel, Effort


def law_ns(nbytes: int, extent: int, factor: float = 1.0) -> int:
    return int(factor * (200_000 + 8 * nbytes + 3 * extent))


def efforts(count: int, seed: int = 0) -> list[Effort]:
    rng = np.random.default_rng(seed)
    return [
        Effort("JPEG", int(extent * ratio), int(extent))
        for extent, ratio in zip(rng.uniform(5e4, 1e7, count), rng.uniform(0.05, 0.5, count), strict=True)
    ]


def off_by(model: CostModel, factor: float = 1.0) -> float:
    """The median of how far estimates of other elements are off, relatively."""
    wrong = [
        abs(model.estimate_ns(each) / law_ns(each.nbytes, each.extent, factor) - 1) for each in efforts(200, seed=9)
    ]
    return float(np.median(wrong))


def taught(count: int, factor: float = 1.0, model: CostModel | None = None, noise: float = 0.1) -> CostModel:
    model = model or CostModel()
    rng = np.random.default_rng(1)
    for each in efforts(count):
        model.learn(each, int(law_ns(each.nbytes, each.extent, factor) * rng.lognormal(0, noise)))
    return model


def test_what_pictures_cost_is_learned_from_a_few_dozen() -> None:
    assert off_by(taught(50)) < 0.1


def test_another_machine_is_learned_as_well() -> None:
    assert off_by(taught(800, factor=5, model=taught(400)), factor=5) < 0.15


def test_one_that_waited_for_a_core_teaches_little() -> None:
    model = taught(200)
    model.learn(Effort("JPEG", 100_000, 300_000), 10**10)
    assert off_by(model) < 0.2


def test_pictures_that_are_all_alike_are_no_reason_to_lose_hold() -> None:
    model = CostModel()
    for _ in range(20_000):
        model.learn(Effort("JPEG", 100_000, 307_200), 1_500_000)
    assert model.estimate_ns(Effort("JPEG", 100_000, 307_200)) == pytest.approx(1_500_000, rel=0.01)
    model.learn(Effort("JPEG", 1_000_000, 8_000_000), 30_000_000)
    assert 0 < model.estimate_ns(Effort("JPEG", 1_000_000, 8_000_000)) < 10**9


def test_an_estimate_is_a_time_before_anything_is_learned() -> None:
    assert CostModel().estimate_ns(Effort("", 0, 0)) > 0


HUGE = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", HUGE, HUGE), "PNG"),
        (b"GIF89a" + struct.pack("<HH", 0xFFFF, 0xFFFF), "GIF"),
        (b"RIFF1234WEBPVP8X" + b"\xff" * 20, "WEBP"),
        (b"RIFF1234WEBPVP8L" + b"\xff" * 20, "WEBP"),
        (b"RIFF1234ABCDVP8X" + b"\xff" * 20, ""),
        (b"12341234WEBPVP8 " + b"\xff" * 20, ""),
    ],
)
def test_a_picture_that_lies_about_its_size_holds_up_no_estimate(data: bytes, kind: str) -> None:
    """Nor does it make formats up: costs are learned by format."""
    assert glance.picture(data, 50_000_000) == Effort(kind, len(data), 0)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"RIFF".ljust(28, b"\0") + struct.pack("<I", 1) + bytes(200), "WAV"),
        (b"fLaC".ljust(18, b"\0") + struct.pack(">Q", 1 << 44 | (1 << 36) - 1), "FLAC"),
    ],
)
def test_a_clip_that_lies_about_its_length_holds_up_no_estimate(data: bytes, kind: str) -> None:
    assert glance.clip(data, 120.0) == Effort(kind, len(data), 0)
