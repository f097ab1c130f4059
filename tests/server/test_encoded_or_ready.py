"""A request that carries the encoded input and the ready tensor: refused, unless one of them is mere filling."""

from __future__ import annotations

import base64
import struct
from pathlib import Path

import pytest

from tests.preprocess.test_text import make_tokenizer
from tests.served import Served, grpc_error, grpc_request, make_text_model, on, pictures

READY = {"name": "x", "datatype": "FP32", "shape": [1, 1, 1, 1], "data": [0.5]}
ENCODED = {"name": "image", "datatype": "BYTES", "shape": [1, 1]}
BOTH = "got both input image, encoded, and the ready tensors [x]; expected one or the other"


@pytest.mark.parametrize("file", [b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF", b"\xff\xfb"])
def test_an_encoded_input_beside_the_ready_tensor_is_not_dropped_in_silence(file: bytes) -> None:
    async def story(stage: Served) -> None:
        encoded = ENCODED | {"data": [base64.b64encode(file).decode()]}
        for both in ([encoded, READY], [READY, encoded]):
            (reply,) = stage.post({"inputs": both})
            assert (reply.status, BOTH.encode() in reply.body) == (400, True)
        request = grpc_request((1, 1, 1, 1))
        request.inputs.add(name="image", datatype="BYTES", shape=[1, 1])
        request.raw_input_contents.append(len(file).to_bytes(4, "little") + file)
        assert await grpc_error(stage, request) == BOTH
        assert (stage.sent, stage.driver.unfinished(), stage.arena.used) == ([], 0, 0)

    on(pictures, story)


@pytest.mark.parametrize("filling", ["", "TWFu" * 32, "no base64", None])
def test_what_load_generators_fill_in_beside_the_ready_tensor_is_none(filling: str | None) -> None:
    """perf_analyzer sends every input of the metadata, of nothing or of random letters."""

    async def story(stage: Served) -> None:
        encoded = ENCODED | {"data": [filling]}
        assert stage.post({"inputs": [READY, encoded]}) == []
        assert bytes(stage.arena.memory[:4]) == struct.pack("<f", 0.5)

    on(pictures, story)


def test_a_text_beside_its_ids_is_refused_unless_it_is_empty(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer.json")

    async def story(stage: Served) -> None:
        ready = [{"name": name, "datatype": "INT64", "shape": [1, 2], "data": [1, 1]} for name in ("ids", "mask")]
        text = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["cat"]}
        (reply,) = stage.post({"inputs": [text, *ready]})
        assert (reply.status, b"got both input text, encoded, and the ready tensors [ids, mask]" in reply.body) == (
            400,
            True,
        )
        assert stage.post({"inputs": [text | {"data": [""]}, *ready]}) == []
        assert len(stage.sent) == 1

    on(lambda: Served(make_text_model(str(tmp_path / "tokenizer.json"))), story)
