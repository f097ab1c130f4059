"""What is said where a runtime cannot use the device that it was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scheduler.backends import ModelLoadError, without_cuda
from scheduler.measuring import Device, Measurer
from server.model_files import read_model


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that torch can use")
def test_a_torch_that_finds_no_gpu_says_what_to_install() -> None:
    source = read_model(Path("build/demo-models/mlp"), 1, 0)[0]
    with Measurer(source, Device("MIG-0"), 1) as measurer, pytest.raises(ModelLoadError) as found:
        measurer.load()
    if torch.version.cuda is None:
        assert f"torch {torch.__version__} is a CPU build" in str(found.value)
        assert "-m pip install torch" in str(found.value)
    else:
        assert "nvidia-smi" in str(found.value)


def test_a_build_for_cuda_that_finds_no_gpu_is_no_matter_of_pip_first() -> None:
    said = without_cuda("2.13.0+cu130", "13.0", "python")
    assert "built for CUDA 13.0, and finds no device" in said
    assert "if its CUDA Version is below 13.0" in said
    assert "pip uninstall" not in said
