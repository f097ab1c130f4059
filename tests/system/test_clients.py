"""Stock clients against the real daemon: every held-out digit, by every protocol, from many clients at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from server.demo import digits_split
from tests.clients import PROTOCOLS, in_threads
from tests.harness import MODELS, RunningDaemon

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def offline(demo_models: None) -> tuple[Array, Array, Array]:
    """Held-out images, the labels that the model gives them outside any server, and the true ones."""
    _, _, images, truth = digits_split()
    model = torch.export.load(MODELS / "digits" / "1" / "model.pt2").module()
    with torch.inference_mode():
        parts = [model(part)["label"] for part in torch.from_numpy(images).split(64)]
    return images, torch.cat(parts).numpy(), truth


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_held_out_digit_from_64_clients_is_answered_as_offline(
    protocol: str, daemon: RunningDaemon, offline: tuple[Array, Array, Array]
) -> None:
    images, expected, truth = offline
    port, connect = PROTOCOLS[protocol]
    answers = np.full(len(images), -1)

    def start() -> Any:
        infer = connect(getattr(daemon, port))

        def do(index: int) -> None:
            (answers[index],) = infer("digits", images[index : index + 1]).as_numpy("label")

        return do

    in_threads(64, range(len(images)), start)
    np.testing.assert_array_equal(answers, expected)
    assert (answers == truth).mean() >= 0.97
    print(f"{protocol}: {len(answers)} of {len(images)} answered as offline, {(answers == truth).mean():.1%} right")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_batch_of_one_client_is_answered_in_its_order(protocol: str, daemon: RunningDaemon) -> None:
    port, connect = PROTOCOLS[protocol]
    x = np.arange(16 * 7, dtype=np.float32).reshape(7, 16)
    np.testing.assert_array_equal(connect(getattr(daemon, port))("affine", x).as_numpy("y"), 2 * x + 1)
