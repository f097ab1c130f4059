"""Preprocessing on a GPU: `make check-gpu`; left out of `make test`. What it measures beside is in `make bench-gpu`."""

from __future__ import annotations

import pytest

from benchmarks.gpu_pictures import CHECKS, reason_not_to

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["agreement", "sentinel", "race"])
def test_the_gpu_decodes_as_the_cpu_does_and_writes_what_it_says_and_nothing_else(name: str) -> None:
    assert not reason_not_to()
    from preprocess.nvimagecodec import open_card

    found = CHECKS[name](open_card())
    assert found["passed"], found
