"""Where pictures are decoded, by what NVML says of the slices; and what happens to those who have to leave one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from preprocess.devices import CPU, NVIMAGECODEC, Device, Facts, Place, Target, choose
from preprocess.pipeline import PipelineError, PipelineFile
from preprocess.pool import PreprocessPool
from preprocess.steps import ImageSteps
from tests.preprocess.pictures import encoded, photographs

A100, H100 = Place("gpu0/1g.10gb@0", "MIG-a", 0, False), Place("gpu1/1g.10gb@0", "MIG-h", 1, False)
UNKNOWN, SIMULATED = Place("gpu2", "GPU-u", None, False), Place("gpu3/7g.80gb@0", "MIG-s", 1, True)
KEPT = Place("gpu0/1g.10gb+me@6", "MIG-me", 1, False)


def facts(*serving: Place, **more: Any) -> Facts:
    return Facts(**{"decoder": CPU, "serving": serving, "dedicated": None, "installed": True, "isolated": True, **more})


@pytest.mark.parametrize(
    ("asked", "given", "target"),
    [
        (Device.AUTO, facts(H100), Target(NVIMAGECODEC, ("MIG-h",))),
        (Device.AUTO, facts(A100, H100), Target(NVIMAGECODEC, ("MIG-h",))),
        (Device.AUTO, facts(A100), Target()),
        (Device.AUTO, facts(UNKNOWN), Target()),
        (Device.AUTO, facts(SIMULATED), Target()),
        (Device.AUTO, facts(), Target()),
        (Device.AUTO, facts(A100, dedicated=KEPT), Target(NVIMAGECODEC, ("MIG-me",))),
        (Device.AUTO, facts(H100, installed=False), Target()),
        (Device.AUTO, facts(H100, isolated=False), Target()),
        (Device.AUTO, facts(A100, decoder=NVIMAGECODEC), Target(NVIMAGECODEC)),
        (Device.AUTO, facts(H100, decoder="mycard"), Target("mycard")),
        (Device.CPU, facts(H100, dedicated=KEPT), Target()),
        (Device.SLICE, facts(A100, UNKNOWN), Target(NVIMAGECODEC, ("MIG-a", "GPU-u"))),
        (Device.SLICE, facts(A100, SIMULATED, decoder="mycard"), Target("mycard", ("MIG-a",))),
        (Device.DEDICATED, facts(H100, dedicated=KEPT), Target(NVIMAGECODEC, ("MIG-me",))),
    ],
)
def test_pictures_are_decoded_where_the_engines_are_or_where_it_is_asked_for(
    asked: Device, given: Facts, target: Target
) -> None:
    found, why = choose(asked, True, given)
    assert found == target
    assert why


@pytest.mark.parametrize(
    ("asked", "pictures", "given", "message"),
    [
        (
            Device.SLICE,
            True,
            facts(SIMULATED),
            "there is no GPU behind it .simulated: gpu3/7g.80gb@0.; use cpu or auto",
        ),
        (Device.SLICE, True, facts(), "there is no GPU behind it .simulated: none."),
        (Device.SLICE, True, facts(H100, installed=False), "needs nvImageCodec: pip install"),
        (Device.SLICE, True, facts(H100, isolated=False), "leave out --no-isolate-decoders"),
        (Device.DEDICATED, True, facts(H100), "no slice is kept for preprocessing; name one: --preprocess-slice"),
        (Device.DEDICATED, True, facts(dedicated=SIMULATED), "there is no GPU behind it"),
        (Device.SLICE, False, facts(H100), "device: slice is for pictures; sound and text are prepared by the CPU"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(asked: Device, pictures: bool, given: Facts, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        choose(asked, pictures, given)


def test_sound_and_text_are_prepared_by_the_cpu() -> None:
    assert choose(Device.AUTO, False, facts(H100, dedicated=KEPT))[0] == Target()


def test_whoever_must_leave_a_device_has_the_cpu_do_its_work() -> None:
    """A device that CUDA does not have: here it is only seen whose processes hold it."""
    pipeline = PipelineFile(input="image", output="x", image=ImageSteps(mode="L", size=(8, 8)))
    pictures = [encoded(photographs()[0], "JPEG", quality=90)] * 12

    async def story() -> None:
        pool = PreprocessPool(2, isolated=True)
        try:
            await pool.prepare(pipeline, Target(CPU, ("MIG-a", "MIG-b")))
            assert len(pool.pids("MIG-a")) == len(pool.pids()) == 2
            place = memoryview(bytearray(len(pictures) * 8 * 8 * 4))
            job = pool.write(pipeline, pictures, {"x": place})
            await asyncio.to_thread(pool.leave, ["MIG-b"])
            assert pool.pids("MIG-a") == []
            await job.future
            assert len({bytes(place[at : at + 256]) for at in range(0, len(place), 256)}) == 1
            assert any(place)
        finally:
            pool.close()

    asyncio.run(story())
