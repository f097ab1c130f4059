from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.harness import MODELS, REPOSITORY, RunningDaemon, running


@pytest.fixture(scope="session")
def demo_models() -> None:
    """The demo models are in MODELS; made once, in seconds."""
    command = [sys.executable, "-m", "server", "demo-models", "--out", str(MODELS)]
    if not all((MODELS / name).is_dir() for name in ("affine", "digits", "mlp", "resnet50")):
        subprocess.run(command, cwd=REPOSITORY, check=True, timeout=150)


@pytest.fixture(scope="session")
def daemon(demo_models: None) -> Iterator[RunningDaemon]:
    """A daemon with the defaults: a simulated A100-80GB cut 4g+2g+1g, the demo models. Shared: leave it as it is."""
    with running("--drain-delay-secs", "0") as started:
        yield started
