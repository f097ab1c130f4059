"""Bad input: each gets its reason; within 50 ms of processor time, and 64 MiB."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys

import pytest
from PIL import Image

from preprocess import gate
from preprocess.errors import BadInputError
from preprocess.steps import ImageSteps
from tests.preprocess.pictures import (
    encoded,
    hostile,
    many_gif_blocks,
    many_segments,
    noise,
    photographs,
    png,
    png_chunk,
    prepared,
    scan_bomb,
    text_bomb,
)

STEPS = ImageSteps(preset="imagenet-eval")
HOSTILE = hostile()


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_picture_is_refused_with_the_reason(name: str) -> None:
    data, message = HOSTILE[name]
    with pytest.raises(BadInputError) as refused:
        prepared(data, STEPS)
    assert message in str(refused.value)


# In a process that does nothing else, since what is read is the peak of a whole process.
_COSTS = """
import pickle, sys, time
from preprocess.errors import BadInputError
from preprocess.steps import ImageSteps
from tests.preprocess.pictures import encoded, noise, prepared

def peak_kib():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

steps = ImageSteps(preset="imagenet-eval")
for kind in ("JPEG", "PNG", "WEBP", "GIF"):
    prepared(encoded(noise(), kind), steps)
cases = pickle.load(sys.stdin.buffer)
costs = {}
for name, data in cases.items():
    open("/proc/self/clear_refs", "w").write("5")
    before_kib, before_ns = peak_kib(), time.process_time_ns()
    try:
        prepared(data, steps)
    except BadInputError:
        pass
    costs[name] = (time.process_time_ns() - before_ns) / 1e6, (peak_kib() - before_kib) / 1024
sys.stdout.buffer.write(pickle.dumps(costs))
"""


def test_what_is_refused_costs_little() -> None:
    """No timing: the processor's time and the memory that a hostile client can take are limits that are promised."""
    cases = pickle.dumps({name: data for name, (data, _) in HOSTILE.items()})
    done = subprocess.run([sys.executable, "-c", _COSTS], input=cases, capture_output=True, check=True)
    costs: dict[str, tuple[float, float]] = pickle.loads(done.stdout)
    assert {name: cost for name, cost in costs.items() if cost[0] > 50 or cost[1] > 64} == {}


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (many_segments(900), (64, 48)),
        (scan_bomb(80, 64), (64, 64)),
        (png(8, 8, png_chunk(b"tEXt", b"a\0b") * 5000), (8, 8)),
        (text_bomb(16), (8, 8)),
        (many_gif_blocks(900), (64, 48)),
    ],
)
def test_what_stays_below_the_limits_is_read(data: bytes, size: tuple[int, int]) -> None:
    header = gate.inspect(data)
    assert (header.width, header.height) == size


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("size", [(1, 1), (640, 427), (3000, 20), (17, 1999)])
def test_sizes_are_read_from_the_header(kind: str, size: tuple[int, int]) -> None:
    data = encoded(photographs()[1].resize(size), kind)
    header = gate.inspect(data)
    assert (header.format, header.width, header.height) == (kind, *size)


@pytest.mark.parametrize("lossless", [True, False])
def test_every_kind_of_webp_says_its_size(lossless: bool) -> None:
    plain, extended = noise(300, 200), noise(300, 200, 4)
    for picture, options in ((plain, {}), (extended, {}), (plain, {"exif": b"Exif\0\0"})):
        header = gate.inspect(encoded(picture, "WEBP", lossless=lossless, **options))
        assert (header.width, header.height) == (300, 200)


def test_a_flat_picture_of_many_pixels_is_no_forgery() -> None:
    """The fewest bytes that a picture of its size can take."""
    for kind in ("JPEG", "PNG"):
        for mode in ("L", "RGB"):
            for options in ({"progressive": True, "quality": 1, "optimize": True}, {"quality": 1, "optimize": True}):
                flat = encoded(Image.new(mode, (3000, 3000)), kind, **options)
                assert gate.inspect(flat).width == 3000


def test_a_model_may_set_a_lower_limit() -> None:
    with pytest.raises(BadInputError, match="64 x 48 pixels; at most 3000"):
        prepared(encoded(noise()), STEPS.model_copy(update={"max_pixels": 3000}))


def test_too_many_bytes_are_not_looked_at() -> None:
    with pytest.raises(BadInputError, match="at most 33554432"):
        gate.inspect(encoded(noise()) + bytes(gate.MAX_BYTES))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("value", "orientation"), [(6, 6), (1, 1), (0, 1), (9, 1)])
def test_orientation_is_read_in_both_byte_orders(order: str, value: int, orientation: int) -> None:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    tiff = mark + struct.pack(f"{order}IHHHIHH", 8, 1, 0x0112, 3, 1, value, 0)
    assert gate.ImageHeader("JPEG", 1, 1, exif=tiff).orientation == orientation


@pytest.mark.parametrize(
    "tiff", [b"", b"II", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b"XX*\0" + bytes(40)]
)
def test_exif_that_makes_no_sense_is_upright(tiff: bytes) -> None:
    assert gate.ImageHeader("JPEG", 1, 1, exif=tiff).orientation == 1
