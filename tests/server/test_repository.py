"""Models of every kind, and broken ones: loaded, refused with the reason, replaced under load."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from PIL import Image
from torch import nn

from server.demo import MAX_BATCH
from tests import repositories
from tests.harness import RunningDaemon, running
from tests.server.raw_http import infer, request

BATCH = torch.export.Dim("batch", min=1, max=MAX_BATCH)


def export(model: nn.Module, example: tuple[Any, ...], shapes: Any, folder: Path, version: int = 1) -> Path:
    target = folder / str(version)
    target.mkdir(parents=True)
    torch.export.save(torch.export.export(model.eval(), example, dynamic_shapes=shapes), target / "model.pt2")
    return folder


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Attend(nn.Module):
    """Two inputs, the second of any length; two outputs, one of that length."""

    def forward(self, query: torch.Tensor, words: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = words * query
        return {"weights": weights, "total": weights.sum(1)}


class Mutate(nn.Module):
    """Works in place on its input, and counts its calls in a buffer."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x.mul_(2.0) + 0.0 * self.calls


def make_repository(root: Path) -> None:
    """One good model of each kind, and some that cannot be served."""
    export(Scale(2), (torch.zeros(2, 3),), ({0: BATCH},), root / "versions", 1)
    export(Scale(3), (torch.zeros(2, 3),), ({0: BATCH},), root / "versions", 3)
    export(Scale(2), (torch.zeros(2, 3),), None, root / "static")
    export(Scale(2), (torch.zeros(3, 3),), ({0: torch.export.Dim.AUTO},), root / "at_least_two")
    length = torch.export.Dim("length", min=2, max=100)
    shapes = {"query": {0: BATCH}, "words": {0: BATCH, 1: length}}
    export(Attend(), (torch.zeros(2, 1), torch.zeros(2, 5)), shapes, root / "attend")
    export(Mutate(), (torch.zeros(2, 3),), ({0: BATCH},), root / "mutate")
    for name, dtype in (("half", torch.float16), ("brain", torch.bfloat16)):
        export(Scale(2), (torch.zeros(2, 3, dtype=dtype),), ({0: BATCH},), root / name)
    named = export(Scale(2), (torch.zeros(2, 3),), ({0: BATCH},), root / "named")
    (named / "config.pbtxt").write_text(
        'max_batch_size: 4 input { name: "INPUT0" data_type: TYPE_FP32 dims: [3] } '
        'output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [3] }'
    )
    repositories.picky(root / "script")
    small = export(Scale(2), (torch.zeros(2, 3),), ({0: BATCH},), root / "small_slices")
    (small / "serving.yaml").write_text("mig_profiles: [1g.10gb]\nslo_ms: 5000\n")
    make_broken(root, root / "named" / "1" / "model.pt2")


def make_broken(root: Path, good: Path) -> None:
    def broken(name: str, **files: str) -> Path:
        folder = root / f"broken_{name}"
        (folder / "1").mkdir(parents=True)
        for file, text in files.items():
            (folder / file.replace("_", ".")).write_text(text)
        return folder

    (broken("bytes") / "1" / "model.pt2").write_bytes(b"not a model at all")
    (broken("cut") / "1" / "model.pt2").write_bytes(good.read_bytes()[:3000])
    broken("empty")
    (root / "broken_no_version").mkdir()
    shutil.copy(good, broken("config", config_pbtxt="max_batch_size: many") / "1")
    shutil.copy(good, broken("batch", config_pbtxt="max_batch_size: 1000") / "1")
    shutil.copy(good, broken("names", config_pbtxt='input { name: "x" data_type: TYPE_INT8 dims: [3] }') / "1")
    nine = """input { name: "x" data_type: TYPE_FP32 dims: [9] }"""
    shutil.copy(good, broken("dims", config_pbtxt=nine) / "1")
    shutil.copy(good, broken("yaml", serving_yaml="slo_ms: fast") / "1")
    shutil.copy(good, broken("keys", serving_yaml="slo: 5") / "1")
    shutil.copy(good, broken("slices", serving_yaml="mig_profiles: [9g.90gb]") / "1")
    pipeline = "preprocess: {input: image, output: x, image: {size: [8, 8]}}"
    shutil.copy(good, broken("pipeline", serving_yaml=pipeline) / "1")
    shutil.copy(good, broken("table", serving_yaml="latency_table: {file: none.csv}") / "1")
    (repositories.picky(root / "broken_script") / "config.pbtxt").unlink()
    repositories.emulated(root / "broken_emulated", 1).joinpath("serving.yaml").write_text("slo_ms: 5")
    emulated = {
        name: repositories.emulated(root / f"broken_{name}", 1) for name in ("rate", "latin", "endless", "policy")
    }
    (emulated["rate"] / "table.csv").write_text(
        "model,mig_profile,batch,latency_ms,items_per_s\nbroken_rate,1g.10gb,1,1,0"
    )
    (emulated["latin"] / "table.csv").write_bytes(b"model,\xff\xfe\n")
    (emulated["endless"] / "serving.yaml").write_text("slo_ms: .inf")
    with (emulated["policy"] / "config.pbtxt").open("a") as config:
        config.write(" version_policy { specific { versions: [7] } }")
    repositories.emulated(root / "broken_folder", 1).joinpath("serving.yaml").unlink()
    (root / "broken_folder" / "serving.yaml").mkdir()


REASONS = {
    "bytes": "model.pt2 cannot be loaded",
    "cut": "model.pt2 cannot be loaded",
    "empty": "holds no model.pt2 or model.pt",
    "no_version": "has no version folder",
    "config": "config.pbtxt",
    "batch": "sets max_batch_size 1000, the model was exported for 64",
    "names": "declares input x as INT8 [3], the model has FP32 [3]",
    "yaml": "slo_ms: expected a number",
    "keys": "unknown key slo; did you mean slo_ms?",
    "dims": "declares input x as FP32 [9], the model has FP32 [3]",
    "slices": "no slice has one of the MIG profiles 9g.90gb; there are 1g.10gb, 2g.20gb",
    "pipeline": "preprocess.image makes FP32 [3, 8, 8], input x is FP32 [3]",
    "table": "No such file",
    "script": "declare them in config.pbtxt",
    "emulated": "needs a latency_table in serving.yaml",
    "rate": "items_per_s must be more than 0",
    "latin": "codec can't decode",
    "endless": "slo_ms: expected less than 3000000000",
    "policy": "version_policy asks for 7; there are 1",
    "folder": "Is a directory",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    root = tmp_path_factory.mktemp("models")
    make_repository(root)
    flags = ("--model-repository", str(root), "--layout", "2g.20gb+1g.10gb", "--drain-delay-secs", "0")
    with running(*flags, "--no-strict-readiness") as daemon:
        yield daemon


def ask(daemon: RunningDaemon, model: str, output: str = "output_0", **inputs: Any) -> Any:
    """One request with tritonclient, in binary."""
    with httpclient.InferenceServerClient(daemon.http) as client:
        tensors = []
        for name, array in inputs.items():
            datatype = {"float16": "FP16", "float32": "FP32"}[str(array.dtype)]
            tensors.append(httpclient.InferInput(name, array.shape, datatype))
            tensors[-1].set_data_from_numpy(array)
        return client.infer(model, tensors).as_numpy(output)


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_the_highest_version_is_served(models: RunningDaemon) -> None:
    np.testing.assert_array_equal(ask(models, "versions", x=X), 3 * X)
    assert request(models.http, "GET", "/v2/models/versions").json["versions"] == ["3"]
    assert request(models.http, "GET", "/v2/models/versions/versions/1").status == 404


def test_a_model_without_a_batch_axis(models: RunningDaemon) -> None:
    np.testing.assert_array_equal(ask(models, "static", x=X), 2 * X)
    assert request(models.http, "GET", "/v2/models/static").json["inputs"][0]["shape"] == [2, 3]
    assert request(models.http, "GET", "/v2/models/static/config").json["max_batch_size"] == 0


def test_a_model_exported_for_batches_of_two_answers_one_item_too(models: RunningDaemon) -> None:
    np.testing.assert_array_equal(ask(models, "at_least_two", x=X[:1]), 2 * X[:1])
    np.testing.assert_array_equal(ask(models, "at_least_two", x=X), 2 * X)


@pytest.mark.parametrize(("items", "length"), [(1, 2), (1, 7), (3, 5), (2, 100)])
def test_two_inputs_of_which_one_varies_in_length(items: int, length: int, models: RunningDaemon) -> None:
    query = np.full((items, 1), 2, np.float32)
    words = np.arange(items * length, dtype=np.float32).reshape(items, length)
    np.testing.assert_array_equal(ask(models, "attend", "weights", query=query, words=words), 2 * words)
    np.testing.assert_array_equal(ask(models, "attend", "total", words=words, query=query), 2 * words.sum(1))


def test_many_lengths_at_once_are_never_mixed_up(models: RunningDaemon) -> None:
    wrong: list[int] = []

    def send(number: int) -> None:
        words = np.full((1, 2 + number % 3), number, np.float32)
        answer = ask(models, "attend", "total", query=np.ones((1, 1), np.float32), words=words)
        if answer[0] != words.sum():
            wrong.append(number)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_model_that_works_in_place_answers_the_same_again(models: RunningDaemon) -> None:
    for _ in range(3):
        np.testing.assert_array_equal(ask(models, "mutate", x=X), 2 * X)


def test_half_precision_in_binary_only(models: RunningDaemon) -> None:
    half = X.astype(np.float16)
    np.testing.assert_array_equal(ask(models, "half", x=half), 2 * half)
    body = {"inputs": [{"name": "x", "datatype": "FP16", "shape": [2, 3], "data": X.ravel().tolist()}]}
    assert infer(models.http, "half", body).status == 400


def test_bfloat16(models: RunningDaemon) -> None:
    bits = (X.view(np.uint32) >> 16).astype(np.uint16)
    entry = {"name": "x", "datatype": "BF16", "shape": [2, 3], "parameters": {"binary_data_size": bits.nbytes}}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    answer = infer(models.http, "brain", head + bits.tobytes(), {"Inference-Header-Content-Length": str(len(head))})
    data = answer.body[int(answer.headers["inference-header-content-length"]) :]
    np.testing.assert_array_equal(
        (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32), 2 * X.ravel()
    )
    as_json = {"inputs": [entry], "outputs": [{"name": "output_0", "parameters": {"binary_data": False}}]}
    head = json.dumps(as_json).encode()
    answer = infer(models.http, "brain", head + bits.tobytes(), {"Inference-Header-Content-Length": str(len(head))})
    assert (answer.status, "JSON cannot carry" in answer.error) == (400, True)


def test_names_and_batch_of_config_pbtxt_count(models: RunningDaemon) -> None:
    np.testing.assert_array_equal(ask(models, "named", "OUTPUT0", INPUT0=X), 2 * X)
    five = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [5, 3], "data": [0] * 15}]}
    assert "expected 1 to 4" in infer(models.http, "named", five).error


def test_a_model_for_some_slices_runs_on_those_only(models: RunningDaemon) -> None:
    np.testing.assert_array_equal(ask(models, "small_slices", x=X), 2 * X)
    metrics = request(models.metrics, "GET", "/metrics").body.decode()
    ran_on = [
        line for line in metrics.splitlines() if line.startswith("migserve_batch_items_count{") and "small_sl" in line
    ]
    assert len(ran_on) == 1
    assert 'GPU_I_PROFILE="1g.10gb"' in ran_on[0]


@pytest.mark.parametrize("name", sorted(REASONS))
def test_a_broken_model_is_not_served_and_says_why(name: str, models: RunningDaemon) -> None:
    index = request(models.http, "POST", "/v2/repository/index").json
    (entry,) = [entry for entry in index if entry["name"] == f"broken_{name}"]
    assert entry["state"] == "UNAVAILABLE"
    assert REASONS[name] in entry["reason"]
    answer = infer(models.http, f"broken_{name}", {"inputs": []})
    assert answer.status == 503
    assert REASONS[name] in answer.error
    ready = request(models.http, "GET", f"/v2/models/broken_{name}/ready")
    assert (ready.status, REASONS[name] in ready.error) == (400, True)
    again = request(models.http, "POST", f"/v2/repository/models/broken_{name}/load")
    assert again.status == 400
    assert REASONS[name] in again.error


def test_the_log_has_one_line_for_each_broken_model_and_none_of_torchs(models: RunningDaemon) -> None:
    models.wait_for("serving")
    foreign = [line for line in models.text if not line.startswith("{")]
    assert foreign == []
    for name, reason in REASONS.items():
        assert reason in models.events("model not loaded", model=f"broken_{name}")[0]["reason"]


def test_the_log_has_the_traceback_of_a_failing_model_once(models: RunningDaemon) -> None:
    fails = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [repositories.RAISES]}]}
    for _ in range(3):
        assert infer(models.http, "script", fails).status == 500
    models.wait_for("model failed", count=3, model="script", version="1")
    lines = models.events("model failed", model="script", version="1")
    assert ["full" in line for line in lines] == [True, False, False]
    assert all("no such item" in line["detail"] for line in lines)


def test_the_index_can_be_of_ready_models_only(models: RunningDaemon) -> None:
    index = request(models.http, "POST", "/v2/repository/index", b'{"ready": true}').json
    assert {entry["state"] for entry in index} == {"READY"}
    with grpcclient.InferenceServerClient(models.grpc) as client:
        entries = client.get_model_repository_index().models
    assert {entry.state for entry in entries} == {"READY", "UNAVAILABLE"}


def large_picture() -> bytes:
    """Takes some 10 ms to decode, so that many of them wait."""
    out = io.BytesIO()
    Image.new("L", (1500, 1500)).save(out, "PNG")
    return out.getvalue()


def test_a_model_is_replaced_under_load_without_an_error(tmp_path: Path) -> None:
    """Version 1 doubles, version 2 triples; every answer is one or the other, and in the end all are the new one."""
    folder = export(Scale(2), (torch.zeros(2, 3),), ({0: BATCH},), tmp_path / "models" / "scale")
    new = export(Scale(3), (torch.zeros(2, 3),), ({0: BATCH},), tmp_path / "new")
    pipeline = "preprocess: {input: image, output: x, image: {mode: L, size: [8, 8]}}\n"
    pictures = repositories.emulated(folder.parent / "pictures", 1, serving=pipeline) / "config.pbtxt"
    pictures.write_text(pictures.read_text().replace("dims: [16]", "dims: [1, 8, 8]"))
    with running("--model-repository", str(folder.parent), "--layout", "2g.20gb+1g.10gb") as daemon:
        factors: list[float] = []
        stop = threading.Event()

        def send() -> None:
            while not stop.is_set():
                factors.append(float(ask(daemon, "scale", x=np.ones((1, 3), np.float32))[0, 0]))

        answered: Counter[int] = Counter()
        picture = large_picture()

        def send_pictures() -> None:
            while not stop.is_set():
                answered[infer(daemon.http, "pictures", picture).status] += 1

        threads = [threading.Thread(target=send) for _ in range(4)]
        threads += [threading.Thread(target=send_pictures) for _ in range(8)]
        for thread in threads:
            thread.start()
        shutil.copytree(new / "1", folder / "2")
        for _ in range(3):
            assert request(daemon.http, "POST", "/v2/repository/models/scale/load").status == 200
            assert request(daemon.http, "POST", "/v2/repository/models/pictures/load").status == 200
        stop.set()
        for thread in threads:
            thread.join()
        assert list(answered) == [200]
        assert set(factors) <= {2, 3}
        assert factors[-1] == 3
        assert float(ask(daemon, "scale", x=np.ones((1, 3), np.float32))[0, 0]) == 3
        # Unloaded, it is refused, and readiness is not troubled: it was on purpose.
        assert request(daemon.http, "POST", "/v2/repository/models/scale/unload").status == 200
        assert infer(daemon.http, "scale", {"inputs": []}).status == 503
        assert request(daemon.http, "GET", "/v2/health/ready").status == 200
        assert request(daemon.http, "POST", "/v2/repository/models/scale/load").status == 200
        assert float(ask(daemon, "scale", x=np.ones((1, 3), np.float32))[0, 0]) == 3


def test_strict_readiness_waits_for_every_model(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "good", 1)
    (tmp_path / "bad" / "1").mkdir(parents=True)
    with running("--model-repository", str(tmp_path), "--layout", "7g.80gb") as daemon:
        answer = request(daemon.http, "GET", "/v2/health/ready")
        assert answer.status == 503
        assert "model bad" in answer.error
        assert request(daemon.http, "GET", "/v2/models/good/ready").status == 200


def test_a_model_that_comes_later_and_cannot_be_loaded_takes_nothing_out_of_rotation(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "good", 1)
    with running("--model-repository", str(tmp_path), "--layout", "7g.80gb") as daemon:
        late = repositories.emulated(tmp_path / "late", 1)
        good = (late / "serving.yaml").read_text()
        (late / "serving.yaml").write_text("slo_mss: 1")
        assert request(daemon.http, "POST", "/v2/repository/models/late/load").status == 400
        assert request(daemon.http, "GET", "/v2/health/ready").status == 200
        (late / "serving.yaml").write_text(good)
        assert request(daemon.http, "POST", "/v2/repository/models/late/load").status == 200
        assert request(daemon.http, "GET", "/v2/health/ready").status == 200


def test_workers_without_torch_load_a_torch_model_that_comes_later(tmp_path: Path) -> None:
    """A start is quick where every model is emulated: torch is left out until it is needed."""
    repositories.emulated(tmp_path / "emulated", 1)
    with running("--model-repository", str(tmp_path), "--layout", "7g.80gb") as daemon:
        (pid,) = daemon.workers().values()
        maps = Path(f"/proc/{pid}/maps")
        assert "libtorch" not in maps.read_text()
        linear = nn.Linear(3, 3)
        export(linear, (torch.zeros(2, 3),), ({0: BATCH},), tmp_path / "linear")
        assert request(daemon.http, "POST", "/v2/repository/models/linear/load").status == 200
        assert "libtorch" in maps.read_text()
        expected = linear(torch.from_numpy(X)).detach().numpy()
        np.testing.assert_allclose(ask(daemon, "linear", input=X), expected, rtol=1e-5)
