"""Real processes, real models: what they take, and what happens where they do not fit."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from partitioner.nvml import NvmlDoor
from partitioner.simulated_nvml import SimulatedNvml, parse_gpus
from scheduler.backends import ModelLoadError
from scheduler.backends.cuda import share_of_sms
from scheduler.channel import ModelSource
from scheduler.measuring import Device, Effort, Failure, Gauges, Measurer, OutOfMemory, Timed, mean_w
from server.model_files import read_model

MODELS = Path("build/demo-models")
QUICK = Effort(within=0.5, seconds=0.05, runs=10, warm_up_seconds=0.0)


def source(name: str) -> ModelSource:
    return read_model(MODELS / name, 1, 0)[0]


def test_a_torch_model_on_the_cpu() -> None:
    with Measurer(source("mlp"), Device(None), 1) as measurer:
        assert measurer.load().inputs[0].dims == (256,)
        found = [measurer.measure(batch, (), QUICK) for batch in (1, 64)]
    assert all(isinstance(each, Timed) for each in found)
    small, large = found
    assert isinstance(small, Timed)
    assert isinstance(large, Timed)
    assert 0 < small.latency_ms < large.latency_ms
    assert small.memory_mib is not None
    assert small.memory_mib > 10
    assert measurer.versions.startswith("torch ")


def test_an_emulated_model_takes_what_its_table_says() -> None:
    device = Device(None, latency_ms=((1, 4.0), (32, 40.0)))
    with Measurer(source("resnet50"), device, 2) as measurer:
        found = measurer.measure(32, (), QUICK)
    assert isinstance(found, Timed)
    assert found.latency_ms == pytest.approx(40.0, rel=0.5)
    assert found.runs >= 2


def test_what_does_not_fit_is_found_and_the_next_point_goes_well() -> None:
    """40 images of 224 x 224 pixels are 24 MB, 4000 of them 2.4 GB; emulated, so that nothing else takes memory."""
    device = Device(None, latency_ms=((1, 1.0), (2, 1.0)), memory_mib=1500)
    with Measurer(source("resnet50"), device, 1) as measurer:
        assert isinstance(measurer.measure(4000, (), QUICK), OutOfMemory)
        assert isinstance(measurer.measure(2, (), QUICK), Timed)


def test_a_model_that_raises_is_a_failure_not_an_end() -> None:
    device = Device(None, latency_ms=((1, 1.0), (2, 1.0)))
    with Measurer(source("resnet50"), device, 1) as measurer:
        found = measurer.measure(33, (), QUICK)  # more than its table and max_batch_size have
        assert isinstance(found, Failure)
        assert "IndexError" in found.detail
        assert isinstance(measurer.measure(1, (), QUICK), Timed)


def test_energy_of_a_batch_is_what_the_gpu_draws_over_its_processes_batches() -> None:
    sim = SimulatedNvml(parse_gpus("H100-80GB", "off"))
    door = NvmlDoor(sim, simulated=True)
    uuid = door.gpus()[0].uuid
    sim.draw(uuid, 300.0)
    device = Device(None, latency_ms=((1, 4.0), (32, 40.0)))
    with Measurer(source("resnet50"), device, 2, Gauges(lambda: door.energy_j(uuid), lambda: 0.5)) as measurer:
        found = measurer.measure(32, (), QUICK)
    assert isinstance(found, Timed)
    assert found.energy_j == pytest.approx(300.0 * found.latency_ms / 1e3 / 2, rel=0.1)
    assert found.sm_activity == 0.5


def test_a_process_that_dies_while_the_gauges_are_read_fails_that_point_and_not_the_next() -> None:
    before = multiprocessing.active_children()

    def sm_activity() -> float:
        if not killed:
            killed.extend(child for child in multiprocessing.active_children() if child not in before)
            killed[0].kill()
            killed[0].join()
        return 0.5

    killed: list[BaseProcess] = []
    device = Device(None, latency_ms=((1, 1.0), (2, 1.0)))
    with Measurer(source("resnet50"), device, 2, Gauges(None, sm_activity)) as measurer:
        assert isinstance(measurer.measure(1, (), QUICK), OutOfMemory)
        assert isinstance(measurer.measure(1, (), QUICK), Timed)


@pytest.mark.parametrize("readings", [[None], [7.0, 6.0, 5.0], [7.0, 8.0, None]], ids=["silent", "back", "lost"])
def test_a_counter_of_energy_that_cannot_be_right_gives_nothing(readings: list[float | None]) -> None:
    def told() -> Iterator[float | None]:
        yield from readings
        while True:
            yield readings[-1]

    counter = told()
    assert mean_w(lambda: next(counter)) is None


def test_without_cuda_shares_of_sms_say_what_they_take() -> None:
    with pytest.raises(
        ModelLoadError, match=r"no share of 16 SMs: .* it takes torch 2.12 or later, built for CUDA 12.8"
    ):
        share_of_sms(16)
    device = Device("GPU-0", memory_mib=9984, sm_count=16)
    with Measurer(source("mlp"), device, 1) as measurer, pytest.raises(ModelLoadError, match="is a CPU build"):
        measurer.load()
