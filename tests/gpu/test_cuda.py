"""What only a GPU can show. `make check-gpu` on a machine that has one; left out of `make test`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu_worker import heavy_model, milliseconds_by_sms
from scheduler.channel import ModelSource
from server.demo import digits_split
from tests.clients import http_binary, in_threads
from tests.harness import MODELS, running

pytestmark = pytest.mark.gpu


def backend(name: str, sm_count: int | None = None) -> Any:
    from scheduler.backends.cuda import CudaBackend

    assert torch.cuda.is_available(), "make check-gpu needs a GPU, and torch in its CUDA build"
    return CudaBackend(ModelSource("k", name, 1, "torch_export", str(MODELS / name / "1" / "model.pt2")), sm_count)


def gathered(model: Any, array: Any) -> list[Any]:
    rows = [memoryview(row.tobytes()) for row in array]
    return [model.join(rows, array.shape, array.dtype)]


@torch.inference_mode()
def test_the_gpu_answers_as_the_cpu_does(demo_models: None) -> None:
    x = np.random.default_rng(0).normal(size=(32, 256)).astype(np.float32)
    model = backend("mlp")
    (ours,) = model.finish(model.start(gathered(model, x)))
    reference = torch.export.load(MODELS / "mlp" / "1" / "model.pt2").module()(torch.from_numpy(x))["y"]
    np.testing.assert_allclose(ours, reference.numpy(), rtol=2e-2, atol=1e-3)  # TF32 may be on


@torch.inference_mode()
def test_inputs_and_outputs_are_pinned_and_two_batches_keep_apart(demo_models: None) -> None:
    model = backend("affine")
    batches = [np.full((64, 16), value, np.float32) for value in range(20)]
    staged = None
    for x in batches:
        inputs = gathered(model, x)
        assert torch.from_numpy(inputs[0]).is_pinned()
        started = model.start(inputs)
        assert all(tensor.is_pinned() for tensor in started.outputs)
        if staged is not None:
            previous, before = staged
            np.testing.assert_array_equal(model.finish(before)[0], 2 * previous + 1)
        staged = (x, started)
    assert staged is not None
    np.testing.assert_array_equal(model.finish(staged[1])[0], 2 * staged[0] + 1)


@torch.inference_mode()
def test_a_share_of_the_sms_answers_the_same_and_computes_on_no_others(demo_models: None, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    whole, share = backend("mlp"), backend("mlp", 16)
    (expected,), (ours,) = (model.finish(model.start(gathered(model, x))) for model in (whole, share))
    np.testing.assert_allclose(ours, expected, rtol=2e-2, atol=1e-3)
    model = ModelSource("k", "heavy", 1, "torch_export", str(heavy_model(tmp_path)))
    all_ms = milliseconds_by_sms(model, 64, (16, 32, torch.cuda.get_device_properties(0).multi_processor_count))
    assert all_ms[0] > 1.5 * all_ms[1] > 2 * all_ms[2]


def test_the_daemon_serves_every_held_out_digit_from_the_gpus_that_there_are(demo_models: None) -> None:
    _, _, images, truth = digits_split()
    with running("--gpu", "nvml") as daemon:
        assert daemon.events("gpu", simulated=False)
        answers = np.full(len(images), -1)

        def start() -> Any:
            infer = http_binary(daemon.http)

            def do(index: int) -> None:
                (answers[index],) = infer("digits", images[index : index + 1]).as_numpy("label")

            return do

        in_threads(32, range(len(images)), start)
        assert (answers == truth).mean() >= 0.97
        for pid in daemon.workers().values():
            assert "libcuda" in Path(f"/proc/{pid}/maps").read_text(), "the worker runs on the GPU"
