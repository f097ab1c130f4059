"""Requests of a model with lengths: those of different ones share a batch, and each gets back what is its own."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from scheduler.channel import Done
from scheduler.lengths import Lengths
from scheduler.tensors import InputLayout, TensorSpec
from server.codec import Tensor
from server.config_pbtxt import ModelFileError
from server.errors import ServeError
from server.model_files import read_model
from tests.served import Served, make_padded_model, on
from tests.stage import KEY

LENGTHS = Lengths(20, (10, 20), length="n")
SUM, EACH = TensorSpec("y", "FP32", (1,)), TensorSpec("y", "FP32", (-1,))


def stage(output: TensorSpec = SUM) -> Served:
    served = Served(make_padded_model(LENGTHS, output))
    served.driver.serves(0, KEY, tuple(range(1000, 1008)) * 2, 1.0, LENGTHS.edges)
    return served


def request(length: int, n: int | None = None, shape: list[int] | None = None) -> dict[str, Any]:
    x = {"name": "x", "datatype": "FP32", "shape": shape or [1, length], "data": list(range(length))}
    told = [] if n is None else [{"name": "n", "datatype": "INT64", "shape": [1], "data": [n]}]
    return {"inputs": [x, *told]}


def test_tensors_of_one_bucket_share_a_batch() -> None:
    async def story(served: Served) -> None:
        for length in (3, 4, 10, 11):
            assert served.post(request(length, n=length)) == []
        served.finish(0)
        served.finish(1)
        assert [(batch.length, batch.lengths, batch.items) for batch in served.sent] == [
            (10, [3], [1]),
            (10, [4, 10], [1, 1]),
            (20, [11], [1]),
        ]

    on(stage, story)


def test_how_long_an_item_is_may_be_left_out() -> None:
    async def story(served: Served) -> None:
        assert served.post(request(3)) == []
        place = served.model.layout.slot(1, (3,)).places[0]
        assert np.frombuffer(served.arena.memory[place.offset : place.offset + 8], np.int64).tolist() == [3]

    on(stage, story)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (request(21, n=21), b"a length of 21; at most 20 is taken"),
        (request(21), b"a length of 21; at most 20 is taken"),
        (request(3, shape=[0, 3]), b"input x has shape [0, 3], a batch of 0 items; expected 1 to 8"),
        (request(1, shape=[9, 1]), b"input x has shape [9, 1], a batch of 9 items; expected 1 to 8"),
        (request(3, shape=[3]), b"input x has shape [3], expected [-1, -1]; the batch dimension is missing"),
        (request(3, shape=[1, 1, 3]), b"input x has shape [1, 1, 3], expected [-1, -1]"),
        (request(0, shape=[1, 0]), b"input x has shape [1, 0], expected [1, -1] (-1: any size from 1 on)"),
        (request(1, shape=[1, 2**40]), b"input x has shape [1, 1099511627776], expected [1, -1]"),
        ({"inputs": [request(3)["inputs"][0] | {"name": "y"}]}, b"expected inputs [x], got [y]"),
    ],
)
def test_what_cannot_be_padded_is_refused(body: dict[str, Any], message: bytes) -> None:
    async def story(served: Served) -> None:
        (reply,) = served.post(body)
        assert (reply.status, message in reply.body) == (400, True)

    on(stage, story)


@pytest.mark.parametrize("n", [7, 4, 0, -1, 2**62])
@pytest.mark.parametrize("binary", [False, True])
def test_a_length_that_its_item_does_not_have_is_refused(n: int, binary: bool) -> None:
    async def story(served: Served) -> None:
        if binary:
            tensors = [
                Tensor("x", "FP32", (2, 3), [memoryview(bytes(24))]),
                Tensor("n", "INT64", (2,), [memoryview(struct.pack("<2q", 3, n))]),
            ]
            with pytest.raises(
                ServeError, match=f"input n is {n} for item 1, which has a length of 3; expected 1 to 3"
            ):
                served.service.submit(served.model, tensors, None, 0, print)
        else:
            (reply,) = served.post(request(3, n=n))
            message = b"input n is %d for item 0, which has a length of 3; expected 1 to 3" % n
            assert (reply.status, message in reply.body) == (400, True)
        assert (served.driver.unfinished(), served.arena.used) == (0, 0)

    on(stage, story)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_an_item_may_be_padded_by_its_client(n: int) -> None:
    async def story(served: Served) -> None:
        assert served.post(request(3, n=n)) == []
        assert [batch.lengths for batch in served.sent] == [[3]]

    on(stage, story)


@pytest.mark.parametrize("shape", [[1, 2], [1, 4], [1], [2, 3], [1, 3, 1]])
def test_a_mask_of_another_shape_is_refused(shape: list[int]) -> None:
    def masked() -> Served:
        model = make_padded_model(Lengths(20, mask="mask"), SUM)
        inputs = (TensorSpec("mask", "INT64", (-1,)), *model.signature.inputs[1:])
        model.signature = msgspec.structs.replace(model.signature, inputs=inputs)
        model.layout = InputLayout(model.signature)
        return Served(model)

    async def story(served: Served) -> None:
        mask = {"name": "mask", "datatype": "INT64", "shape": shape, "data": [1] * math.prod(shape)}
        (reply,) = served.post({"inputs": [*request(3)["inputs"], mask]})
        assert reply.status == 400
        assert served.post({"inputs": [*request(3)["inputs"], mask | {"shape": [1, 3], "data": [1, 1, 0]}]}) == []

    on(masked, story)


def test_an_output_that_varies_is_cut_to_its_own_length() -> None:
    async def story(served: Served) -> None:
        first, second = served.post(request(3)), served.post(request(2))
        outputs = np.arange(20, dtype=np.float32).reshape(1, 20)
        for number in (0, 1):
            done = Done(served.sent[number].batch_id, [0], [40], [(1, 10)], 1, 1, 1)
            served.driver.batch_done(0, done, memoryview(outputs.tobytes()))
        assert [json.loads(replies[0].body)["outputs"][0] for replies in (first, second)] == [
            {"name": "y", "datatype": "FP32", "shape": [1, length], "data": [0, 1, 2][:length]} for length in (3, 2)
        ]

    on(lambda: stage(EACH), story)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ("{}", "give longest, the greatest length that is taken, or buckets as a list of lengths"),
        ("{longest: 10, buckets: 0}", "buckets must be 1 to 64, or a list of lengths"),
        ("{buckets: [5, 5]}", "buckets must be lengths in ascending order"),
        ("{buckets: [5, 9], longest: 10}", "longest is 10, but the last of the buckets 9"),
        ("{longest: 10, bucket: 3}", "unknown key lengths.bucket; did you mean buckets?"),
    ],
)
def test_serving_yaml_is_checked(lengths: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.pt2").touch()
    (tmp_path / "m" / "serving.yaml").write_text(f"lengths: {lengths}\n")
    with pytest.raises(ModelFileError, match=message.replace("?", r"\?")):
        read_model(tmp_path / "m", 1, 1)


def test_lengths_take_names_over_from_preprocessing_and_tables_with_seq_len(tmp_path: Path) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.pt2").touch()
    rows = [f"m,1g.10gb,{batch},{batch * length},{length}" for length in (10, 30) for batch in (1, 2)]
    (tmp_path / "m" / "t.csv").write_text("\n".join(["model,mig_profile,batch,latency_ms,seq_len", *rows]))
    (tmp_path / "m" / "serving.yaml").write_text(
        "preprocess: {input: sound, output: x, length: frames, audio: {preset: nemo-80}}\n"
        "lengths: {longest: 30}\nlatency_table: {file: t.csv}\n"
    )
    source, serving, _ = read_model(tmp_path / "m", 1, 1)
    assert source.lengths == Lengths(30, length="frames")
    assert serving.preprocess is not None
    assert serving.preprocess.longest == 30
    assert source.lengths_ms == {1: ((10, ((1, 10.0), (2, 20.0))), (30, ((1, 30.0), (2, 60.0))))}
