"""Encoded bytes by every way in: several elements, forms, base64, gRPC; and into the slot, whatever their length."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonclient.grpc import service_pb2

from preprocess.clips import read_clip
from preprocess.pipeline import PipelineFile
from preprocess.steps import AudioSteps
from scheduler.answers import Answered
from scheduler.lengths import Lengths
from scheduler.tensors import InputLayout, Signature
from server.codec import Tensor
from server.errors import ServeError
from server.model_files import ServingFile
from server.preprocess_stats import REASONS
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


def test_a_form_with_a_file_under_another_name_is_refused_as_a_whole() -> None:
    async def story(stage: Served) -> None:
        (reply,) = stage.post(form(FILES).replace(b'name="image"', b'name="img"', 1))
        assert reply.status == 400
        assert b"the form's field 'img' is not the model's input; expected fields called 'image' only" in reply.body
        assert (stage.sent, stage.driver.unfinished(), stage.arena.used) == ([], 0, 0)

    on(pictures, story)


def test_a_form_with_a_name_in_place_of_its_file_is_refused_with_the_way_to_send_it() -> None:
    async def story(stage: Served) -> None:
        (reply,) = stage.post(form([b"cat.jpg"]).replace(b'; filename="a.png"', b""))
        assert (reply.status, b"an @ before its name: -F image=@cat.jpg" in reply.body) == (400, True)

    on(pictures, story)


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


def test_where_no_decoder_can_be_had_it_is_not_the_requests_fault() -> None:
    async def story(stage: Served) -> None:
        replies = stage.post(FILES[1])
        await until(lambda: bool(replies))
        assert replies[0].status == 503
        assert b"no decoder is called 'missing'" in replies[0].body
        assert (stage.driver.unfinished(), stage.arena.used) == (0, 0)

    on(lambda: Served(make_model(pictures=True), decoder="missing"), story)


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


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"slo_ms": 0.01, "strict": True}, b"cannot answer in time: slo_ms of the request is 0.01 ms"),
        ({"deadline_ms": 0.01}, b"cannot answer in time: deadline_ms of the request is 0.01 ms"),
        ({"slo_ms": 0.01}, b"cannot answer even in ten times what it may take: slo_ms of the request is 0.01 ms"),
    ],
)
def test_what_preprocessing_alone_makes_too_late_is_refused_before_it_is_begun(
    terms: dict[str, Any], message: bytes
) -> None:
    async def story(stage: Served) -> None:
        (reply,) = stage.post(json_request(FILES, **terms))
        assert (reply.status, message in reply.body) == (429, True)
        assert stage.post(json_request(FILES, slo_ms=60_000)) == []
        assert stage.driver.unfinished() == 1

    on(pictures, story)


@pytest.mark.parametrize("body", [FILES[0], form(FILES), json_request(FILES)], ids=["bare", "form", "JSON"])
def test_parameters_may_stand_in_the_url_whatever_the_body_is(body: Any) -> None:
    async def story(stage: Served) -> None:
        (reply,) = stage.post(body, query="slo_ms=0.01&strict=true")
        assert (reply.status, b"slo_ms of the request is 0.01 ms" in reply.body) == (429, True)
        assert stage.post(body, query="slo_ms=60000") == []
        assert stage.driver.unfinished() == 1

    on(pictures, story)


@pytest.mark.parametrize("strict", [False, True])
def test_what_preprocessing_alone_makes_late_is_served_late_unless_it_is_strict(strict: bool) -> None:
    """Due times count from the arrival: this one has passed before anything is begun."""

    async def story(stage: Served) -> None:
        outcomes: list[Outcome] = []
        encoded = Tensor("image", "BYTES", (1,), [FILES[0]])
        parameters, arrival_ns = {"slo_ms": 3000.0, "strict": strict}, time.monotonic_ns() - 4_000_000_000
        if strict:
            with pytest.raises(ServeError, match="cannot answer in time"):
                stage.service.submit(stage.model, [encoded], parameters, arrival_ns, outcomes.append)
            return
        stage.service.submit(stage.model, [encoded], parameters, arrival_ns, outcomes.append)
        await until(lambda: bool(stage.sent))
        stage.finish(0)
        (outcome,) = outcomes
        assert isinstance(outcome, Answered)
        assert outcome.late_ns >= 1_000_000_000

    on(pictures, story)


def test_preprocessing_is_counted_by_stage_and_errors_by_reason() -> None:
    async def story(stage: Served) -> None:
        stage.post(json_request(FILES))
        bad = stage.post(json_request([b"text"]))
        stage.post(json_request(FILES, deadline_ms=0.01))
        await until(lambda: bool(stage.sent and bad))
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for metric in stage.service.preprocess_stats.collect()
            for sample in metric.samples
        }
        assert samples["migserve_preprocess_elements_total", "m", "1"] == 4
        errors = [samples["migserve_preprocess_errors_total", "m", "1", reason] for reason in REASONS]
        assert dict(zip(REASONS, errors, strict=True)) == {
            **dict.fromkeys(REASONS, 0.0),
            "bad_input": 1.0,
            "unreachable": 1.0,
        }
        for each in ("queue", "gate", "decode", "transform"):
            assert samples["migserve_preprocess_seconds_count", "m", "1", each] == 1
            assert samples["migserve_preprocess_seconds_sum", "m", "1", each] > 0

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


def sounds(lengths: Lengths | None = None, **more: Any) -> Served:
    return Served(make_sound_model(lengths, **more), arena_bytes=1 << 20)


def slot(stage: Served, items: int, frames: int) -> tuple[list[int], Any]:
    """Lengths and features, as the worker reads them."""
    layout = stage.model.layout.slot(items, (frames,))
    lengths, features = (
        np.frombuffer(stage.arena.memory[place.offset : place.offset + place.nbytes], dtype).reshape(place.shape).copy()
        for place, dtype in zip(layout.places, (np.int64, np.float32), strict=True)
    )
    return lengths.tolist(), features


@pytest.mark.parametrize("lengths", [None, Lengths(200, length="frames")])
def test_clips_are_placed_with_their_lengths_and_filled_up(lengths: Lengths | None) -> None:
    """To the longest of their request; a batch may have longer ones, to which the worker fills them up."""

    async def story(stage: Served) -> None:
        files = [wav(speech_like(seconds)) for seconds in (1.2, 0.4)]
        outcomes = submit(stage, *files)
        assert stage.driver.unfinished() == 1
        await until(lambda: bool(stage.sent))
        batch = stage.sent[0]
        assert (batch.dims, batch.lengths) == (((120,), ()) if lengths is None else ((), [120]))
        told, features = slot(stage, 2, 120)
        assert told == [120, 40]
        for row, data, length in zip(features, files, told, strict=True):
            np.testing.assert_array_equal(row[:, :length], read_clip(data, NEMO).values)
            assert not row[:, length:].any()
        stage.finish(0)
        assert [type(outcome) for outcome in outcomes] == [Answered]
        assert (stage.driver.unfinished(), stage.arena.used) == (0, 0)

    on(lambda: sounds(lengths), story)


def test_clips_of_different_lengths_are_refused_where_nothing_tells_the_model_what_is_padding() -> None:
    def unaware() -> Served:
        model = make_sound_model()
        model.serving = ServingFile(
            preprocess=PipelineFile(input="sound", output="x", audio=AudioSteps(preset="nemo-80"))
        )
        model.signature = Signature(model.signature.inputs[1:], model.signature.outputs, 8)
        model.layout = InputLayout(model.signature)
        return Served(model, arena_bytes=1 << 20)

    async def story(stage: Served) -> None:
        mixed = submit(stage, *(wav(speech_like(seconds)) for seconds in (1.2, 0.4)))
        alike = submit(stage, *(wav(speech_like(seconds)) for seconds in (0.4, 0.4)))
        await until(lambda: bool(mixed) and bool(stage.sent))
        assert "input sound has items of 2 lengths, 40 to 120" in getattr(mixed[0], "message", "")
        stage.finish(0)
        assert [type(outcome) for outcome in alike] == [Answered]
        assert (stage.driver.unfinished(), stage.arena.used) == (0, 0)

    on(unaware, story)


def test_a_clip_longer_than_the_model_takes_is_refused() -> None:
    async def story(stage: Served) -> None:
        outcomes = submit(stage, wav(speech_like(1.2)))
        await until(lambda: bool(outcomes))
        assert "element 0: 120 frames (1.2 s); at most 100 frames (1 s) are taken" in getattr(
            outcomes[0], "message", ""
        )
        assert (stage.driver.unfinished(), stage.arena.used) == (0, 0)

    on(lambda: sounds(longest=100), story)


def test_clips_for_which_there_is_no_room_are_refused_once_that_is_known() -> None:
    async def story(stage: Served) -> None:
        outcomes = submit(stage, wav(speech_like(1.2)))
        await until(lambda: bool(outcomes))
        assert "the arena has 4096; send fewer items" in getattr(outcomes[0], "message", "")
        assert (stage.driver.unfinished(), stage.arena.used) == (0, 0)

    on(lambda: Served(make_sound_model(), arena_bytes=4096), story)


def test_a_client_that_leaves_while_its_clip_is_read_leaves_nothing() -> None:
    async def story(stage: Served) -> None:
        said: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        encoded = Tensor("sound", "BYTES", (2,), [wav(speech_like(1.2))] * 2)
        cancel = stage.service.submit(stage.model, [encoded], None, time.monotonic_ns(), print)
        cancel()
        del cancel
        assert (stage.driver.unfinished(), stage.seen.left) == (0, [True])
        await until(lambda: not stage.pool.waiting)
        assert (stage.arena.used, stage.sent) == (0, [])
        gc.collect()
        assert said == []

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
        assert stage.sent[0].dims == (3, 3)
        layout = stage.model.layout.slot(2, (3, 3))
        ids, mask = (
            np.frombuffer(stage.arena.memory[place.offset : place.offset + place.nbytes], np.int64).reshape(2, 3)
            for place in layout.places
        )
        assert (ids.tolist(), mask.tolist()) == ([[1, 2, 3], [2, 0, 0]], [[1, 1, 1], [1, 0, 0]])
        del ids, mask

    on(lambda: Served(make_text_model(str(tmp_path / "tokenizer.json"))), story)


def test_a_text_that_begins_as_the_protocols_json_does_goes_into_a_form(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer.json")
    form = b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\n{ the cat\r\n--b--\r\n'

    async def story(stage: Served) -> None:
        (reply,) = stage.post(b"{ the cat")
        assert (reply.status, b"JSON cannot be read" in reply.body) == (400, True)
        assert stage.post(form) == []
        await until(lambda: bool(stage.sent))
        assert stage.sent[0].dims == (3, 3)

    on(lambda: Served(make_text_model(str(tmp_path / "tokenizer.json"))), story)


def test_a_text_that_is_too_long_is_refused(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer.json")

    async def story(stage: Served) -> None:
        tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["cat " * 7]}
        replies = stage.post({"inputs": [tensor]})
        await until(lambda: bool(replies))
        assert (replies[0].status, b"a text of 7 tokens; at most 6 are taken" in replies[0].body) == (400, True)

    on(lambda: Served(make_text_model(str(tmp_path / "tokenizer.json"))), story)
