from __future__ import annotations

import fcntl
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator

import hypothesis
import pytest

from tests.harness import MODELS, REPOSITORY, RunningDaemon, running

# One fork server for all tests of a process, as the daemon's is: whoever started another one would leave torch, three
# seconds of importing, to each process that comes after.
multiprocessing.set_forkserver_preload(["scheduler.preload", "scheduler.preload_torch"])
# How long an example takes is for benchmarks to say.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several processes that share the files none should begin with the longest ones at the end."""
    rooms = ("tests/system/", "tests/server/")
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: [not item.nodeid.startswith(room) for room in rooms])


@pytest.fixture(scope="session")
def demo_models() -> None:
    """The demo models are in MODELS; made once, in seconds."""
    command = [sys.executable, "-m", "server", "demo-models", "--out", str(MODELS)]
    MODELS.parent.mkdir(exist_ok=True)
    with (MODELS.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of tests may be making them
        if not all((MODELS / name).is_dir() for name in ("affine", "digits", "mlp", "resnet50")):
            subprocess.run(command, cwd=REPOSITORY, check=True, timeout=150)


@pytest.fixture(scope="session")
def daemon(demo_models: None) -> Iterator[RunningDaemon]:
    """A daemon with the defaults: a simulated A100-80GB cut 4g+2g+1g, the demo models. Shared: leave it as it is."""
    with running("--drain-delay-secs", "0") as started:
        yield started
