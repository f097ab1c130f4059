"""Encoded bytes by every way in: several elements, forms, base64, gRPC; and into the slot, whatever their length."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonclient.grpc import service_pb2

from preprocess.clips import read_clip
from preprocess.steps import AudioSteps
from scheduler.driver import Answered
from server.codec import Tensor
from server.service import Outcome
from tests.preprocess.sounds import speech_like, wav
from tests.preprocess.test_text import make_tokenizer
from tests.served import Served, make_model, make_sound_model, make_text_model, on, pictures, until

NEMO = AudioSteps(preset="nemo-80")


def grey(level: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (40, 30), level).save(out, "PNG")
    return out.getvalue()


LEVELS = [0, 51, 102, 255]
FILES = [grey(level) for level in LEVELS]


def json_request(elements: list[bytes], **parameters: Any) -> dict[str, Any]:
    data = [base64.b64encode(element).decode() for element in elements]
    shape = [len(elements), 1]
    return {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": shape, "data": data}],
        "parameters": parameters,
    }


def form(elements: list[bytes]) -> bytes:
    head = b'--b0\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return b"".join(head + element + b"\r\n" for element in elements) + b"--b0--\r\n"


def inputs(stage: Served, count: int) -> list[float]:
    """What lies in the only request's slot."""
    (batch,) = stage.sent
    assert sum(batch.items) == count
    return np.frombuffer(stage.arena.memory[: 4 * count], np.float32).tolist()


@pytest.mark.parametrize("body", [json_request(FILES), form(FILES)], ids=["base64", "form"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_elements_of_a_request_come_to_their_places(body: Any, threads: int) -> None:
    async def story(stage: Served) -> None:
        assert stage.post(body) == []
        await until(lambda: bool(stage.sent))
        assert inputs(stage, 4) == pytest.approx([level / 255 for level in LEVELS])

    on(lambda: Served(make_model(pictures=True), threads=threads), story)


def test_a_bare_file_is_one_element() -> None:
    async def story(stage: Served) -> None:
        stage.post(FILES[1])
        await until(lambda: bool(stage.sent))
        assert inputs(stage, 1) == pytest.approx([0.2])

    on(pictures, story)


@pytest.mark.parametrize("raw", [True, False])
def test_grpc_takes_elements_in_both_forms(raw: bool) -> None:
    async def story(stage: Served) -> None:
        request = service_pb2.ModelInferRequest(model_name="m")
        tensor = request.inputs.add(name="image", datatype="BYTES", shape=[2, 1])
        if raw:
            parts = [len(each).to_bytes(4, "little") + each for each in FILES[:2]]
            request.raw_input_contents.append(b"".join(parts))
        else:
            tensor.contents.bytes_contents.extend(FILES[:2])
        no_context: Any = None

        async def requests() -> Any:
            yield request

        replies = stage.grpc.ModelStreamInfer(requests(), no_context)
        reply = asyncio.ensure_future(anext(replies))
        await until(lambda: bool(stage.sent))
        assert inputs(stage, 2) == pytest.approx([0, 0.2])
        stage.finish(0)
        assert not (await reply).error_message

    on(pictures, story)


@pytest.mark.parametrize("threads", [1, 3])
def test_one_bad_element_ends_its_request_by_name_and_no_other(threads: int) -> None:
    async def story(stage: Served) -> None:
        good, bad = stage.post(json_request(FILES)), stage.post(json_request([FILES[0], FILES[1], b"text", FILES[2]]))
        await until(lambda: bool(bad))
        assert bad[0].status == 400
        assert b"input image, element 2: 4 bytes that are not a JPEG" in bad[0].body
        await until(lambda: bool(stage.sent))
        stage.finish(0)
        assert [reply.status for reply in good] == [200]
        assert (stage.driver.unfinished(), stage.arena.used) == (0, 0)

    on(lambda: Served(make_model(pictures=True), threads=threads), story)


def test_what_preprocessing_alone_makes_late_is_refused_before_it_is_begun() -> None:
    async def story(stage: Served) -> None:
        (reply,) = stage.post(json_request(FILES, slo_ms=0.01))
        assert (reply.status, b"cannot answer in time: slo_ms of the request is 0.01 ms" in reply.body) == (429, True)
        assert stage.post(json_request(FILES, slo_ms=60_000)) == []
        assert stage.driver.unfinished() == 1

    on(pictures, story)


def test_too_many_that_wait_are_refused() -> None:
    async def story(stage: Served) -> None:
        replies = [stage.post(json_request([FILES[0]])) for _ in range(100)]
        refused = [reply[0] for reply in replies if reply]
        assert len(refused) == 100 - 65
        assert {(reply.status, b"retry-after" in reply.head) for reply in refused} == {(429, True)}
        await until(lambda: sum(sum(batch.items) for batch in stage.sent) + stage.driver.unfinished() >= 65)

    on(pictures, story)


# ---- what varies in length ----


def submit(stage: Served, *elements: bytes) -> list[Outcome]:
    outcomes: list[Outcome] = []
    encoded = Tensor("sound", "BYTES", (len(elements),), list(elements))
    stage.service.submit(stage.model, [encoded], None, time.monotonic_ns(), outcomes.append)
    return outcomes


def sounds(**more: Any) -> Served:
    return Served(make_sound_model(**more), arena_bytes=1 << 20)


def slot(stage: Served, items: int, frames: int) -> tuple[list[int], Any]:
    """Lengths and features, as the worker reads them."""
    layout = stage.model.layout.slot(items, (frames,))
    lengths, features = (
        np.frombuffer(stage.arena.memory[place.offset : place.offset + place.nbytes], dtype).reshape(place.shape).copy()
        for place, dtype in zip(layout.places, (np.int64, np.float32), strict=True)
    )
    return lengths.tolist(), features


@pytest.mark.parametrize(("buckets", "frames"), [((), 120), ((100, 200), 200)])
def test_clips_are_placed_with_their_lengths_and_filled_up(buckets: tuple[int, ...], frames: int) -> None:
    async def story(stage: Served) -> None:
        files = [wav(speech_like(seconds)) for seconds in (1.2, 0.4)]
        outcomes = submit(stage, *files)
        assert stage.driver.unfinished() == 1
        await until(lambda: bool(stage.sent))
        assert stage.sent[0].dims == (frames,)
        lengths, features = slot(stage, 2, frames)
        assert lengths == [120, 40]
        for row, data, length in zip(features, files, lengths, strict=True):
            np.testing.assert_array_equal(row[:, :length], read_clip(data, NEMO).values)
            assert not row[:, length:].any()
        stage.finish(0)
        assert [type(outcome) for outcome in outcomes] == [Answered]
        assert (stage.driver.unfinished(), stage.arena.used) == (0, 0)

    on(lambda: sounds(buckets=buckets), story)


def test_a_clip_longer_than_any_bucket_is_refused() -> None:
    async def story(stage: Served) -> None:
        outcomes = submit(stage, wav(speech_like(1.2)))
        await until(lambda: bool(outcomes))
        assert "element 0: a length of 120; at most 100 is taken" in getattr(outcomes[0], "message", "")
        assert (stage.driver.unfinished(), stage.arena.used) == (0, 0)

    on(lambda: sounds(buckets=(50, 100)), story)


def test_clips_for_which_there_is_no_room_are_refused_once_that_is_known() -> None:
    async def story(stage: Served) -> None:
        outcomes = submit(stage, wav(speech_like(1.2)))
        await until(lambda: bool(outcomes))
        assert "the arena has 4096; send fewer items" in getattr(outcomes[0], "message", "")
        assert (stage.driver.unfinished(), stage.arena.used) == (0, 0)

    on(lambda: Served(make_sound_model(), arena_bytes=4096), story)


def test_a_client_that_leaves_while_its_clip_is_read_leaves_nothing() -> None:
    async def story(stage: Served) -> None:
        encoded = Tensor("sound", "BYTES", (1,), [wav(speech_like(1.2))])
        cancel = stage.service.submit(stage.model, [encoded], None, time.monotonic_ns(), print)
        cancel()
        assert (stage.driver.unfinished(), stage.seen.left) == (0, [True])
        await until(lambda: not stage.pool.waiting)
        assert (stage.arena.used, stage.sent) == (0, [])

    on(sounds, story)


# ---- text ----


@pytest.mark.parametrize("binary", [False, True])
def test_texts_come_as_ids_with_their_mask(binary: bool, tmp_path: Path) -> None:
    """In JSON a text is a string as it stands: base64 is for what is no text."""
    make_tokenizer(tmp_path / "tokenizer.json")
    texts = ["the cat sat", "cat"]

    async def story(stage: Served) -> None:
        data = [text.encode() for text in texts]
        tensor = {"name": "text", "datatype": "BYTES", "shape": [2], "data": texts}
        if binary:
            encoded = Tensor("text", "BYTES", (2,), data)
            stage.service.submit(stage.model, [encoded], None, time.monotonic_ns(), print)
        else:
            assert stage.post({"inputs": [tensor]}) == []
        await until(lambda: bool(stage.sent))
        assert stage.sent[0].dims == (4, 4)
        layout = stage.model.layout.slot(2, (4, 4))
        ids, mask = (
            np.frombuffer(stage.arena.memory[place.offset : place.offset + place.nbytes], np.int64).reshape(2, 4)
            for place in layout.places
        )
        assert (ids.tolist(), mask.tolist()) == ([[1, 2, 3, 0], [2, 0, 0, 0]], [[1, 1, 1, 0], [1, 0, 0, 0]])
        del ids, mask

    on(lambda: Served(make_text_model(str(tmp_path / "tokenizer.json"), buckets=(4, 6))), story)


def test_a_text_that_is_too_long_is_refused(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer.json")

    async def story(stage: Served) -> None:
        tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["cat " * 7]}
        replies = stage.post({"inputs": [tensor]})
        await until(lambda: bool(replies))
        assert (replies[0].status, b"a text of 7 tokens; at most 6 are taken" in replies[0].body) == (400, True)

    on(lambda: Served(make_text_model(str(tmp_path / "tokenizer.json"))), story)
