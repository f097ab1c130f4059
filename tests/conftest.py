from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import MODELS, RunningDaemon, running


@pytest.fixture(scope="session")
def demo_models() -> None:
    if not (MODELS / "digits").is_dir():
        pytest.exit("the demo models are missing; `make models` makes them (`make test` does it by itself)", 2)


@pytest.fixture(scope="session")
def daemon(demo_models: None) -> Iterator[RunningDaemon]:
    """A daemon with the defaults: a simulated A100-80GB cut 4g+2g+1g, the demo models. Shared: leave it as it is."""
    with running("--drain-delay-secs", "0") as started:
        yield started
