"""Loading and unloading as the repository does it, on workers that answer when the test says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from scheduler.channel import ModelSource
from scheduler.lengths import Points
from scheduler.loading import LoadedModel
from scheduler.messages import Request
from scheduler.tensors import Signature
from server.errors import Fault, ServeError
from server.model_config import model_config
from server.repository import Model, ModelState, Repository
from tests import repositories
from tests.stage import Stage


class Workers:
    """Loads what it is asked to when `may_load` is set."""

    def __init__(self) -> None:
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.asked: list[str] = []
        self.loaded: list[str] = []
        self.measured: dict[str, Points] = {}

    async def load(self, source: ModelSource) -> LoadedModel:
        self.asked.append(source.key)
        await self.may_load.wait()
        self.loaded.append(source.key)
        if "broken" in source.name:
            raise RuntimeError("nobody has thought of this")
        signature = Signature(source.inputs or (), source.outputs or (), source.max_batch or 0)
        return LoadedModel(signature, self.measured)

    def unload(self, key: str) -> None:
        if key in self.loaded:
            self.loaded.remove(key)

    def serving(self, key: str) -> list[str]:
        return [each for each in self.loaded if each == key]


async def nothing_to_prepare(model: Model) -> None:
    """What a pipeline needs is another test's."""


class Place:
    def __init__(self, root: Path, arena_bytes: int = 1 << 20) -> None:
        self.workers = Workers()
        self.driver = Stage().driver
        fleet: Any = self.workers
        self.repository = Repository([root], fleet, self.driver, arena_bytes, nothing_to_prepare)

    def state(self, name: str = "m") -> ModelState:
        (model,) = [each for each in self.repository.models() if each.name == name]
        return model.state


def at(root: Path, story: Callable[[Place], Awaitable[None]], arena_bytes: int = 1 << 20) -> None:
    async def run() -> None:
        await asyncio.wait_for(story(Place(root, arena_bytes)), 10)

    asyncio.run(run())


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_model_whose_serving_file_does_not_fit_does_not_stay_on_the_workers(tmp_path: Path) -> None:
    pipeline = "preprocess: {input: image, output: nope, image: {size: [8, 8]}}\n"
    repositories.emulated(tmp_path / "m", 1, serving=pipeline)

    async def story(place: Place) -> None:
        for _ in range(2):
            with pytest.raises(ServeError, match=r"preprocess\.output is 'nope'"):
                await place.repository.load("m")
        assert (place.workers.loaded, place.state()) == ([], ModelState.UNAVAILABLE)

    at(tmp_path, story)


@pytest.mark.parametrize("change", ["load", "unload"])
def test_a_change_goes_on_when_its_client_leaves(change: str, tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "m", 1)

    async def story(place: Place) -> None:
        await place.repository.load("m")
        key = place.repository.get("m").key
        request = Request(1, key, 1)
        pending = place.driver.accept(request, time.monotonic_ns(), print)
        place.workers.may_load.clear()
        changing = asyncio.create_task(getattr(place.repository, change)("m"))
        await settle()
        changing.cancel()
        await settle()
        assert changing.cancelled()
        place.workers.may_load.set()
        place.driver.withdraw(pending)
        await settle()
        if change == "load":
            assert place.repository.get("m").key == "m/1#2"
            assert place.workers.loaded == ["m/1#2"]
        else:
            assert (place.state(), place.workers.loaded) == (ModelState.UNAVAILABLE, [])

    at(tmp_path, story)


def test_a_reload_waits_for_what_was_accepted_and_is_still_being_preprocessed(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "m", 1)

    async def story(place: Place) -> None:
        await place.repository.load("m")
        pending = place.driver.accept(Request(1, "m/1#1", 1), time.monotonic_ns(), print)
        reloading = asyncio.create_task(place.repository.load("m"))
        await settle()
        assert place.repository.get("m").key == "m/1#2", "new requests go to the new one"
        assert place.workers.loaded == ["m/1#1", "m/1#2"], "the old one is kept for those under way"
        place.driver.withdraw(pending)
        await reloading
        assert place.workers.loaded == ["m/1#2"]

    at(tmp_path, story)


def test_a_model_that_start_up_has_not_reached_is_unavailable(tmp_path: Path) -> None:
    for name in ("a", "m"):
        repositories.emulated(tmp_path / name, 1)

    async def story(place: Place) -> None:
        place.workers.may_load.clear()
        starting = asyncio.create_task(place.repository.load_all(lambda name, trouble: None))
        await settle()
        assert place.workers.asked == ["a/1#1"]
        for version in (None, "1"):
            with pytest.raises(ServeError, match="model m is not ready, it is LOADING") as raised:
                place.repository.get("m", version)
            assert raised.value.fault is Fault.UNAVAILABLE
        place.workers.may_load.set()
        await starting
        assert place.repository.get("m").state == ModelState.READY

    at(tmp_path, story)


def test_what_nobody_has_thought_of_costs_one_model_only(tmp_path: Path) -> None:
    for name in ("broken", "m"):
        repositories.emulated(tmp_path / name, 1)

    async def story(place: Place) -> None:
        told: dict[str, str] = {}
        await place.repository.load_all(lambda name, trouble: told.update({name: trouble}))
        assert (place.state("broken"), place.state("m")) == (ModelState.UNAVAILABLE, ModelState.READY)
        assert ("thought of this" in told["broken"], told["m"]) == (True, "")
        assert any("thought of this" in reason for reason in place.repository.not_ready())

    at(tmp_path, story)


def test_a_model_unloaded_on_purpose_is_not_missing(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "m", 1)

    async def story(place: Place) -> None:
        await place.repository.load("m")
        await place.repository.unload("m")
        assert (place.state(), place.repository.not_ready()) == (ModelState.UNAVAILABLE, [])

    at(tmp_path, story)


def test_of_what_there_is_an_unloaded_model_is_none(tmp_path: Path) -> None:
    for name in ("gone", "m"):
        repositories.emulated(tmp_path / name, 1)

    async def story(place: Place) -> None:
        for name in ("gone", "m"):
            await place.repository.load(name)
        await place.repository.unload("gone")
        with pytest.raises(ServeError, match=r"unknown model 'x'; there are: m$"):
            place.repository.get("x")

    at(tmp_path, story)


def test_a_full_batch_that_does_not_fit_the_arena_is_warned_of(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "m", 1, items=100, max_batch=8)

    async def story(place: Place) -> None:
        with capture_logs() as lines:
            await place.repository.load("m")
        warnings = [line for line in lines if line["log_level"] == "warning"]
        assert [(line["model"], line["nbytes"]) for line in warnings] == [("m", 3200)]

    at(tmp_path, story, arena_bytes=2048)


def test_a_change_that_fails_is_logged_and_so_is_one_that_does_not(tmp_path: Path) -> None:
    good, bad = (repositories.emulated(tmp_path / name, 1) for name in ("good", "bad"))
    (bad / "serving.yaml").write_text("slo: 5")
    with (good / "config.pbtxt").open("a") as config:
        config.write(" instance_group {}")

    async def story(place: Place) -> None:
        with capture_logs() as lines:
            await place.repository.load("good")
            await place.repository.unload("good")
            for change in (place.repository.load("bad"), place.repository.unload("nope")):
                with pytest.raises(ServeError):
                    await change
        assert [(line["event"], line["model"], line["log_level"]) for line in lines] == [
            ("config.pbtxt sets what is ignored here", "good", "warning"),
            ("model ready", "good", "info"),
            ("model unloaded", "good", "info"),
            ("model not loaded", "bad", "error"),
            ("model not unloaded", "nope", "error"),
        ]
        assert lines[0]["fields"] == ["instance_group"]
        assert "did you mean slo_ms?" in lines[3]["reason"]

    at(tmp_path, story)


def test_what_start_up_cannot_load_is_logged_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    async def story(place: Place) -> None:
        with capture_logs() as lines:
            await place.repository.load_all(lambda name, trouble: None)
        assert [(line["event"], line["model"]) for line in lines] == [("model not loaded", "empty")]

    at(tmp_path, story)


def test_the_latencies_that_were_measured_are_logged_shortly(tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "m", 1)

    async def story(place: Place) -> None:
        place.workers.measured = {"cpu": tuple((1 << n, 0.123456789 * (n + 1)) for n in range(7))}
        with capture_logs() as lines:
            await place.repository.load("m")
        assert [line["measured_ms"] for line in lines] == [{"cpu": "0.123 for 1, 0.864 for 64"}]

    at(tmp_path, story)


def test_a_model_dispatched_by_predicted_latencies_says_so(tmp_path: Path) -> None:
    table = repositories.emulated(tmp_path / "m", 1) / "table.csv"
    rows = ["m,1g.10gb,1,1", "m,1g.10gb,2,2,predicted", "m,1g.10gb,8,6,predicted", "m,1g.10gb,4,3,measured,A30-24GB"]
    not_its_own = ["other,1g.10gb,8,6,predicted", "m,1g.10gb,8,6,measured,,2"]  # two processes: nothing goes by them
    header = "model,mig_profile,batch,latency_ms,source,gpu,processes"
    table.write_text("\n".join([header, *rows, *not_its_own]))
    origin = "2 predicted, 1 of unknown origin, 1 measured on A30-24GB"

    async def story(place: Place) -> None:
        with capture_logs() as lines:
            await place.repository.load("m")
        assert [line["latency_table"] for line in lines] == [origin]
        parameters = model_config(place.repository.get("m"))["parameters"]
        assert parameters["latency_table"] == {"string_value": origin}

    at(tmp_path, story)


@pytest.mark.parametrize("digits", [1, 5000])
def test_a_version_that_there_is_not_is_not_found_however_long(digits: int, tmp_path: Path) -> None:
    repositories.emulated(tmp_path / "m", 1)

    async def story(place: Place) -> None:
        await place.repository.load("m")
        with pytest.raises(ServeError, match=r"has no version '9+'; served: 1") as raised:
            place.repository.get("m", "9" * digits)
        assert len(raised.value.message) < 200

    at(tmp_path, story)


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ("", {"latest": {"num_versions": 1}}),
        ("version_policy { all {} }", {"all": {}}),
        ("version_policy { specific { versions: [1] } }", {"specific": {"versions": ["1"]}}),
    ],
)
def test_the_configuration_tells_the_version_policy_as_it_is(policy: str, told: Any, tmp_path: Path) -> None:
    config = repositories.emulated(tmp_path / "m", 1) / "config.pbtxt"
    config.write_text(config.read_text() + policy)

    async def story(place: Place) -> None:
        await place.repository.load("m")
        assert model_config(place.repository.get("m"))["version_policy"] == told

    at(tmp_path, story)
