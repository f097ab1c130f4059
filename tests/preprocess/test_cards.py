"""Decoders that are not the CPU: a card of somebody's own as an example, and what the guard does about each hazard.

An accelerator is a class like `Sketch`, and an entry point for a function that gives one; see preprocess/cards.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import simplejpeg
import torch

from benchmarks import gpu_pictures
from preprocess import cards, gate
from preprocess.cards import Guarded, is_marked, mark, open_decoder, shape_of
from preprocess.decoders import CpuDecoder, Decoded, Picture
from preprocess.errors import BadInputError
from preprocess.images import write_image
from preprocess.pipeline import PipelineError
from preprocess.steps import ImageSteps
from tests.preprocess.pictures import corrupt, encoded, noise, photographs


class Sketch:
    """A card that decodes baseline JPEGs in three channels, here with libjpeg, and may have a fault."""

    device = torch.device("cpu")

    def __init__(self, fault: Callable[[Sequence[Picture], Sequence[torch.Tensor]], None] | None = None) -> None:
        self._fault = fault
        self.calls: list[int] = []
        self.late_writes = 0  # of work that was queued before, and writes over what is decoded if it is not waited for

    def takes(self, picture: Picture) -> bool:
        return picture.header.components == 3 and not picture.grey

    def synchronise(self) -> None:
        self.late_writes = 0

    def decode_into(self, pictures: Sequence[Picture], places: Sequence[torch.Tensor]) -> list[BadInputError | None]:
        self.calls.append(len(pictures))
        errors: list[BadInputError | None] = []
        for picture, place in zip(pictures, places, strict=True):
            try:
                place.copy_(torch.from_numpy(simplejpeg.decode_jpeg(picture.data)))
                errors.append(None)
            except ValueError as error:
                errors.append(BadInputError(str(error)))
        if self.late_writes:
            places[0][:20] = 7
        if self._fault is not None:
            self._fault(pictures, places)
        return errors


def pictures(*files: bytes) -> list[Picture]:
    return [Picture(data, gate.inspect(data)) for data in files]


def expected(picture: Picture) -> Decoded:
    return CpuDecoder().decode([picture])[0]


JPEGS = [encoded(photographs()[index % 2].resize((90 + index, 60)), "JPEG") for index in range(3)]


def agree(decoded: list[Decoded], wanted: list[Picture]) -> None:
    for each, picture in zip(decoded, wanted, strict=True):
        right = expected(picture)
        if isinstance(right, BadInputError):
            assert isinstance(each, BadInputError)
            assert str(each) == str(right)
        else:
            assert isinstance(each, torch.Tensor)
            assert torch.equal(each, right)


def test_a_card_does_what_it_takes_and_the_cpu_the_rest_in_their_order() -> None:
    card = Sketch()
    mixed = pictures(JPEGS[0], encoded(noise()), JPEGS[1], encoded(noise(channels=1), "JPEG"))
    agree(Guarded(card).decode(mixed), mixed)
    assert card.calls == [2]


def test_a_broken_picture_harms_no_other_and_is_told_in_the_cpus_words() -> None:
    card = Sketch()
    mixed = pictures(JPEGS[0], corrupt(encoded(photographs()[0], "JPEG")), JPEGS[2])
    agree(Guarded(card).decode(mixed), mixed)
    assert card.calls == [3, 1]


def test_a_call_that_fails_as_a_whole_is_tried_picture_by_picture_and_then_on_the_cpu() -> None:
    def fails(pictures: Sequence[Picture], places: Sequence[torch.Tensor]) -> None:
        if len(pictures) > 1 or pictures[0].data == JPEGS[1]:
            raise RuntimeError("nvjpeg error 9")

    card = Sketch(fails)
    wanted = pictures(*JPEGS)
    agree(Guarded(card).decode(wanted), wanted)
    assert card.calls == [3, 1, 1, 1]


@pytest.mark.parametrize("rows", [slice(None), slice(-1, None), slice(30, None)])
def test_a_picture_that_was_said_to_be_decoded_and_was_not_is_decoded_again(rows: slice) -> None:
    """In whole, or in part: what is left of it holds what was there before, which is noise that was put there."""

    class Skipping(Sketch):
        def decode_into(
            self, pictures: Sequence[Picture], places: Sequence[torch.Tensor]
        ) -> list[BadInputError | None]:
            before = [place.clone() for place in places]
            errors = super().decode_into(pictures, places)
            for place, old, picture in zip(places, before, pictures, strict=True):
                if picture.data == JPEGS[1]:
                    place[rows] = old[rows]
            return errors

    card = Skipping()
    wanted = pictures(*JPEGS)
    agree(Guarded(card).decode(wanted), wanted)
    assert card.calls == [3, 1], "alone once more, and then on the CPU"


def test_earlier_work_that_still_writes_to_recycled_memory_is_waited_for() -> None:
    """As on a GPU's stream: a block is freed and given out again while a kernel that writes to it is still queued."""
    card = Sketch()
    wanted = pictures(JPEGS[0])
    card.late_writes = 1
    place = torch.empty(shape_of(wanted[0]), dtype=torch.uint8)
    card.decode_into(wanted, [place])
    assert not torch.equal(place, expected(wanted[0])), "so it is without a guard"
    card.late_writes = 1
    agree(Guarded(card).decode(wanted), wanted)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 500, 3), (3, 7, 1), (200, 30_000, 3)])
def test_marks_are_seen_until_every_row_is_written(shape: tuple[int, int, int]) -> None:
    place = torch.empty(shape, dtype=torch.uint8)
    mark(place)
    assert is_marked(place)
    last = place[-1].clone()
    place[:] = 128
    assert not is_marked(place)
    place[-1] = last
    assert is_marked(place)


def test_a_decoder_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("sketch", "tests.preprocess.test_cards:Sketch", cards.GROUP)
    broken = EntryPoint("broken", "tests.preprocess.test_cards:nothing", cards.GROUP)
    monkeypatch.setattr(cards, "entry_points", lambda group: EntryPoints([entry, broken]))
    steps = ImageSteps(preset="imagenet-eval")
    by_card, by_cpu = torch.empty(steps.shape), torch.empty(steps.shape)
    write_image(JPEGS[0], steps, open_decoder("sketch"), by_card)
    write_image(JPEGS[0], steps, open_decoder("cpu"), by_cpu)
    assert torch.equal(by_card, by_cpu)
    with pytest.raises(
        PipelineError, match="no decoder is called 'scetch'; there are cpu, nvimagecodec, broken, sketch"
    ):
        open_decoder("scetch")
    with pytest.raises(PipelineError, match="decoder broken cannot be had"):
        open_decoder("broken")


def test_nvimagecodec_on_its_cpu_backend_gives_libjpegs_levels() -> None:
    """The code that a GPU runs, but for the device. Skipped where the package is not installed."""
    pytest.importorskip("nvidia.nvimgcodec")
    from preprocess.nvimagecodec import NvImageCodec

    card = NvImageCodec(on_gpu=False)
    decoder = Guarded(card)
    sizes = [(640, 480), (33, 57), (1920, 1080), (64, 64), (640, 481), (17, 1001)]
    files = [encoded(photographs()[0].resize(size), "JPEG", quality=90) for size in sizes]
    turned = encoded(photographs()[1], "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0")
    wanted = pictures(*files, turned, files[2][:30000], encoded(noise()))
    for _ in range(2):
        agree(decoder.decode(wanted), wanted)
    good = wanted[: len(files) + 1]
    places = [torch.empty(shape_of(picture), dtype=torch.uint8) for picture in good]
    assert card.decode_into(good, places) == [None] * len(good), "it was not the CPU that did it"


def test_the_checks_of_make_bench_gpu_tell_a_good_card_from_a_bad_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need no GPU: off by many levels, and pictures that were never written in whole."""
    monkeypatch.setattr(gpu_pictures, "TRIES", 6)
    monkeypatch.setattr(gpu_pictures, "SIDES", ((640, 480), (333, 500), (224, 300)))

    def off(pictures: Sequence[Picture], places: Sequence[torch.Tensor]) -> None:
        places[0].copy_(places[0] // 2)

    def skips(pictures: Sequence[Picture], places: Sequence[torch.Tensor]) -> None:
        cards.mark(places[0])

    good = gpu_pictures.agreement(Sketch())
    assert good == {"pictures": 6, "most_levels": 0, "mean_levels": 0.0, "passed": True}
    assert not gpu_pictures.agreement(Sketch(off))["passed"]
    assert gpu_pictures.sentinel(Sketch())["passed"]
    assert gpu_pictures.sentinel(Sketch(skips)) == {
        "tried": 6,
        "not_decoded_by_the_gpu": 0,
        "unnoticed": 6,
        "passed": False,
    }


def test_without_a_gpu_bench_gpu_says_that_nothing_was_measured() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    why = gpu_pictures.reason_not_to()
    assert "sees no GPU with CUDA" in why
    found = {"measured": False, "reason": why, "date": "2026-01-01"}
    assert list(gpu_pictures.lines(found)) == ["Pictures on a GPU, 2026-01-01: not measured", why]
    assert "not measured" in gpu_pictures.drawing(found)
