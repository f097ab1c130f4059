"""Jobs over the driver and core as they are, with batches that end when the test says so."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import resource
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from scheduler.channel import Done, Failed
from scheduler.lengths import Lengths
from scheduler.tensors import TensorSpec
from server import job_pace, job_results, job_window
from server.app import create_app
from server.errors import Fault, ServeError
from server.http_protocol import HttpProtocol
from server.job_intake import WRITE_BYTES, Intake, Terms, receive
from server.job_metrics import JobMetrics
from server.job_preparing import JobPreparer
from server.job_store import DiskFullError, Job, JobState, JobStore
from server.job_supply import Supply
from server.jobs import Jobs
from server.jobs_api import router
from server.listening import HttpServer, listen
from server.repository import Model
from server.settings import Settings
from tests.served import Served, make_model, make_padded_model
from tests.stage import KEY, WHERE


class Repository:
    """One model, loaded or not."""

    def __init__(self, stage: Served) -> None:
        self.model = stage.model
        self.gone = ""
        self.mixed = False

    def get(self, name: str, version: str | None = None) -> Any:
        if self.gone or name != self.model.name:
            raise ServeError(Fault.UNAVAILABLE, self.gone or f"unknown model {name}")
        return self.model

    def models(self) -> list[Any]:
        return [self.model]

    def is_mixed(self, model: Model) -> bool:
        return self.mixed


class Story:
    """A stage with jobs, which live on in `folder`."""

    def __init__(
        self,
        folder: Path,
        *,
        pictures: bool = False,
        model: Model | None = None,
        gone: str = "",
        decoder: str = "cpu",
        **settings: Any,
    ) -> None:
        self.stage = Served(model or make_model(pictures=pictures), 1 << 20, decoder=decoder)
        self.repository: Any = Repository(self.stage)
        self.repository.gone = gone
        self.settings = Settings(jobs_min_free_mib=0, **settings)
        stage = self.stage
        supply = Supply(stage.driver._core.pool, stage.driver, self.repository, stage.arena.size)
        preparer = JobPreparer(stage.pool)
        name: Callable[[int], str] = "slice {}".format
        self.jobs = Jobs(self.settings, folder, supply, self.repository, stage.service, preparer, name)
        self.intake = Intake(self.settings, self.jobs, self.repository)
        self._at = 0

    async def submit(self, *values: object, **terms: Any) -> Job:
        """Lines, or numbers of which lines are made; or a file."""
        asked = {"deadline_s": None, "format": None, "output": "jsonl", "max_errors": None, "folder": None, **terms}
        asked = {"model": "m", "version": None, "name": "", "strict": False, **asked}
        if values and isinstance(values[0], bytes):
            body = values[0]
        else:
            body = "\n".join(v if isinstance(v, str) else json.dumps([v]) for v in values).encode()

        async def parts() -> AsyncIterator[bytes]:
            for begin in range(0, len(body), 10):
                yield body[begin : begin + 10]

        async def gone() -> bool:
            return False

        return await self.intake.take(Terms(**asked), parts(), gone)

    async def sent(self, number: int = 1) -> None:
        """So many batches more are on their way."""
        await until(lambda: len(self.stage.sent) >= self._at + number)

    async def finish(self) -> None:
        """The next batch is done: y = 2 x."""
        await self.sent()
        batch = self.stage.sent[self._at]
        values = []
        for offset, items in zip(batch.offsets, batch.items, strict=True):
            place = self.stage.arena.memory[offset : offset + 4 * items].cast("f")
            values += [2 * value for value in place]
        self.stage.finish(self._at, *values)
        self._at += 1

    def drop_running(self) -> None:
        """What workers have been sent ends for nobody."""
        while self._at < len(self.stage.sent):
            self.stage.finish(self._at)
            self._at += 1

    async def fail(self) -> None:
        """The model raises on it."""
        await self.sent()
        self.stage.driver.batch_failed(0, Failed(self.stage.sent[self._at].batch_id, KEY, "raised", ""))
        self._at += 1

    async def die(self) -> None:
        """The worker dies of it, and comes back."""
        await self.sent()
        driver = self.stage.driver
        driver.worker_lost(0, "killed", comes_back=True, batch_ids=[self.stage.sent[self._at].batch_id])
        self._at += 1
        driver.worker_up(0, WHERE, 1)
        driver.serves(0, KEY, tuple(range(1000, 1008)), 1.0)

    async def unless_over(self, job: Job, happens: Coroutine[Any, Any, None]) -> None:
        """To the next batch, if there is one."""
        waiting = asyncio.create_task(happens)
        await until(lambda: waiting.done() or job.state != JobState.RUNNING)
        waiting.cancel()

    async def all_done(self, job: Job) -> list[dict[str, Any]]:
        while job.state == JobState.RUNNING:
            await self.unless_over(job, self.finish())
        await until(lambda: job.ended_s is not None)
        return results(self.jobs, job)


def results(jobs: Jobs, job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in jobs.results(job.id).read_text().splitlines()]


def y(*values: float) -> list[dict[str, Any]]:
    return [{"item": item, "outputs": {"y": [value]}} for item, value in enumerate(values)]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what it looks at is not told of
            await asyncio.sleep(0.002)


def on(folder: Path, story: Callable[[Story], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        told = Story(folder, **settings)
        await told.jobs.start()
        try:
            await story(told)
        finally:
            await told.jobs.stop()
            told.stage.pool.close()

    asyncio.run(run())


def test_a_job_runs_in_batches_and_its_results_are_in_order(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await told.submit(*range(20))
        assert (job.state, job.asked.items) == (JobState.RUNNING, 20)
        found = await told.all_done(job)
        assert found == y(*(2.0 * value for value in range(20)))
        assert [sum(batch.items) for batch in told.stage.sent] == [8, 8, 4]
        assert job.state == JobState.DONE
        folder = told.jobs.store.folder(job.id)
        await until(lambda: [path.name for path in folder.iterdir()] == ["results.jsonl"])  # nothing else is needed

    on(tmp_path, story)


def test_what_is_wrong_with_a_line_is_the_error_of_that_item(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        found = await told.all_done(await told.submit(1, "nonsense", 3))
        assert found[0] == y(2.0)[0]
        assert "not JSON" in found[1]["error"]
        assert found[2] == {"item": 2, "outputs": {"y": [6.0]}}

    on(tmp_path, story)


def test_a_line_that_is_nested_too_deeply_is_an_error_of_its_own_and_no_other_ones(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        deep = [f"{'[' * depth}{']' * depth}" for depth in (60, 300, 500, 700, 980, 2000)]
        found = await told.all_done(await told.submit(*deep, 3))
        assert [row["item"] for row in found if "error" in row] == list(range(len(deep)))
        assert found[-1]["outputs"] == {"y": [6.0]}

    on(tmp_path, story)


def test_a_job_with_nothing_but_errors_ends(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        found = await told.all_done(await told.submit("a", "b"))
        assert [sorted(row) for row in found] == [["error", "item"]] * 2

    on(tmp_path, story)


def test_too_many_errors_stop_a_job_and_it_can_go_on_with_more(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await told.submit("a", 1, "b", 2, max_errors=1)
        await until(lambda: job.ended_s is not None)
        assert job.state == JobState.STOPPED
        assert job.reason.startswith("2 items have errors, more than max_errors=1; item 0: the line is not JSON")
        assert [each.item for each in job.first_errors] == [0, 2]
        advice = f"; migserve jobs resume {job.id} --max-errors N goes on, with an N of 2 or more"
        with pytest.raises(ServeError, match=rf"is stopped, \d of 4 items done, 2 of them with errors{advice}"):
            told.jobs.results(job.id)
        for too_few in (None, 1):
            with pytest.raises(ServeError, match=f"again at once: 2 items have errors, more than max_errors=1{advice}"):
                await told.jobs.resume(job.id, too_few)
        assert job.state == JobState.STOPPED
        # The batch that ran when it was stopped ends for nobody.
        if told.stage.sent:
            await told.finish()
        await told.jobs.resume(job.id, 5)
        found = await told.all_done(job)
        assert [row.get("outputs") for row in found] == [None, {"y": [2.0]}, None, {"y": [4.0]}]

    on(tmp_path, story)


def test_a_batch_that_fails_costs_the_culprit_only(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await told.submit(1, 2, 3)
        await told.fail()
        await told.finish()
        await told.fail()
        found = await told.all_done(job)
        assert [sum(batch.items) for batch in told.stage.sent] == [3, 1, 1, 1]
        errors = [row for row in found if "error" in row]
        assert len(errors) == 1
        assert "raised" in errors[0]["error"]

    on(tmp_path, story)


def test_a_worker_that_dies_costs_nothing_and_an_item_that_kills_is_given_up(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await told.submit(1, 2)
        await told.die()  # of both
        await told.die()  # of one, alone
        await told.finish()  # the other one
        await told.die()  # and again of that one: it is given up
        found = await told.all_done(job)
        assert sorted("error" in row for row in found) == [False, True]
        assert "died" in next(row["error"] for row in found if "error" in row)

    on(tmp_path, story)


def test_an_error_that_nobody_has_thought_of_while_a_batch_is_sent_loses_none_of_its_items(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        submit, failures = told.stage.service.submit_background, [True, False, True]

        def fails(*of_batch: Any) -> Any:
            if failures and failures.pop(0):
                raise MemoryError
            return submit(*of_batch)

        told.stage.service.submit_background = fails  # type: ignore[method-assign]
        found = await told.all_done(await told.submit(*range(3)))
        assert [sum(batch.items) for batch in told.stage.sent] == [1, 1]
        assert [row.get("error", "")[:17] for row in found] == ["", "an internal error", ""]

    on(tmp_path, story)


def test_an_error_that_nobody_has_thought_of_stops_the_job_which_can_go_on(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        def fails(*of_batch: Any) -> Any:
            raise MemoryError

        async def stops(job: Job) -> None:
            await until(lambda: job.ended_s is not None)
            assert (job.state, job.reason[:17]) == (JobState.STOPPED, "an internal error")
            supply.batch = sizes  # type: ignore[method-assign]
            await told.jobs.resume(job.id)

        supply = told.jobs._supply
        sizes, supply.batch = supply.batch, fails  # type: ignore[method-assign]
        job = await told.submit(*range(40))
        await stops(job)  # while a batch is made
        await told.sent()
        supply.batch = fails  # type: ignore[method-assign]
        await told.finish()
        await stops(job)  # while one ends
        assert job.done == 8, "which is done all the same"
        told.drop_running()
        assert await told.all_done(job) == y(*(2.0 * value for value in range(40)))

    on(tmp_path, story)


def test_cancelled_and_resumed_nothing_is_lost_and_nothing_doubled(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await told.submit(*range(40))
        await told.finish()
        await until(lambda: job.done == 8)
        await told.sent()
        await told.jobs.cancel(job.id)
        assert job.state == JobState.CANCELLED
        with pytest.raises(ServeError, match="cancelled already"):
            await told.jobs.cancel(job.id)
        with pytest.raises(ServeError, match=f"cancelled, 8 of 40 items done; migserve jobs resume {job.id} goes on"):
            told.jobs.results(job.id)
        await told.finish()  # it ran on, for nobody
        await told.jobs.resume(job.id)
        assert await told.all_done(job) == y(*(2.0 * value for value in range(40)))
        with pytest.raises(ServeError, match="only what was stopped"):
            await told.jobs.resume(job.id)
        await told.jobs.remove(job.id)
        assert told.jobs.all() == []

    on(tmp_path, story)


def test_after_a_restart_it_goes_on_with_what_is_not_finished(tmp_path: Path) -> None:
    ids = []

    async def before(told: Story) -> None:
        job = await told.submit(*range(40))
        ids.append(job.id)
        await told.finish()
        await told.finish()
        await until(lambda: job.done == 16)

    async def after(told: Story) -> None:
        job = told.jobs.get(ids[0])
        assert (job.state, job.done) == (JobState.RUNNING, 16)
        assert await told.all_done(job) == y(*(2.0 * value for value in range(40)))
        assert sum(sum(batch.items) for batch in told.stage.sent) == 24

    on(tmp_path, before)
    on(tmp_path, after)


def test_before_the_disk_is_read_nobody_is_told_that_there_are_no_jobs(tmp_path: Path) -> None:
    async def story() -> None:
        told = Story(tmp_path, pictures=False)
        for ask in (told.jobs.known, lambda: told.jobs.get("a1")):
            with pytest.raises(ServeError, match="the server is starting"):
                ask()
        await told.jobs.start()
        assert told.jobs.known() == []
        await told.jobs.stop()
        told.stage.pool.close()

    asyncio.run(story())


def test_without_its_model_a_job_pauses(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await told.submit(*range(40))
        await told.finish()
        told.repository.gone = "model m is not ready, it is UNAVAILABLE: unloaded"
        await told.finish()
        await until(lambda: job.state == JobState.PAUSED)
        assert "unloaded" in job.reason
        told.repository.gone = ""
        await until(lambda: job.state == JobState.RUNNING)
        assert await told.all_done(job) == y(*(2.0 * value for value in range(40)))

    on(tmp_path, story)


def test_another_model_under_the_name_of_its_own_pauses_it(tmp_path: Path) -> None:
    model = make_model()
    model.identity = "one"

    async def story(told: Story) -> None:
        job = await told.submit(*range(40))
        assert job.asked.version == "1"
        await told.finish()
        model.identity = "another"
        await until(lambda: job.state == JobState.PAUSED)
        assert "another one than when the job was made" in job.reason
        sent = len(told.stage.sent)
        model.identity = "one"
        told.repository.mixed = True
        await until(lambda: "slices that came later serve the new one" in job.reason)
        told.repository.mixed = False
        await until(lambda: job.state == JobState.RUNNING)
        told.drop_running()
        assert await told.all_done(job) == y(*(2.0 * value for value in range(40)))
        assert len(told.stage.sent) > sent

    on(tmp_path, story, model=model)


def test_a_model_that_is_loaded_anew_while_the_inputs_come_is_the_one_that_it_is_for(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        async def parts() -> AsyncIterator[bytes]:
            yield b"[1]\n"
            told.repository.model = make_model()
            told.repository.model.identity = "another"
            yield b"[2]\n"

        async def gone() -> bool:
            return False

        terms = Terms("m", None, None, None, "jsonl", None, "", None, False)
        job = await told.intake.take(terms, parts(), gone)
        assert (job.state, job.asked.identity) == (JobState.RUNNING, "another")

    on(tmp_path, story)


def test_a_cancel_that_comes_as_the_server_stops_is_refused_and_the_job_goes_on_later(tmp_path: Path) -> None:
    ids = []

    async def before(told: Story) -> None:
        job = await told.submit(*range(40))
        ids.append(job.id)
        await told.jobs.stop()
        with pytest.raises(ServeError, match=r"the server is stopping$"):
            await told.jobs.cancel(job.id)
        assert job.state == JobState.RUNNING

    async def after(told: Story) -> None:
        assert len(await told.all_done(told.jobs.get(ids[0]))) == 40

    on(tmp_path, before)
    on(tmp_path, after)


def test_one_that_is_cancelled_while_it_begins_stays_so_and_can_be_resumed(tmp_path: Path) -> None:
    ids = []

    async def before(told: Story) -> None:
        submitting = asyncio.create_task(told.submit(*range(2000)))
        await until(told.jobs.all)
        (job,) = told.jobs.all()
        await told.jobs.cancel(job.id)
        assert await submitting is job
        assert (job.state, told.jobs.progress(job)) == (JobState.CANCELLED, {})
        await told.jobs.resume(job.id)
        assert len(await told.all_done(job)) == 2000
        ids.append(job.id)

    async def after(told: Story) -> None:
        assert told.jobs.get(ids[0]).state == JobState.DONE
        assert len(results(told.jobs, told.jobs.get(ids[0]))) == 2000

    on(tmp_path, before)
    on(tmp_path, after)


def test_a_job_whose_items_are_all_finished_needs_its_model_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, ids = "model m is not ready, it is UNAVAILABLE: unloaded", []
    write = job_results.write_as_asked

    def full(*of_job: Any) -> str:
        raise DiskFullError("no room for the results")

    async def meanwhile(told: Story) -> None:
        writes, goes = threading.Event(), threading.Event()

        def slowly(*of_job: Any) -> str:
            writes.set()
            goes.wait()
            return write(*of_job)

        monkeypatch.setattr(job_results, "write_as_asked", slowly)
        job = await told.submit(*range(8))
        await told.finish()
        told.repository.gone = gone
        await until(writes.is_set)
        told.jobs._again.set()
        await until(lambda: not told.jobs._again.is_set())
        goes.set()
        assert await told.all_done(job) == y(*(2.0 * value for value in range(8)))

    async def before(told: Story) -> None:
        monkeypatch.setattr(job_results, "write_as_asked", full)
        ids.append((await told.submit(*range(8))).id)
        await told.finish()
        await until(lambda: told.jobs.get(ids[0]).state == JobState.PAUSED)

    async def after(told: Story) -> None:
        monkeypatch.setattr(job_results, "write_as_asked", write)
        await until(lambda: told.jobs.get(ids[0]).ended_s is not None)
        assert results(told.jobs, told.jobs.get(ids[0])) == y(*(2.0 * value for value in range(8)))

    on(tmp_path, meanwhile)
    on(tmp_path, before)
    on(tmp_path, after, gone=gone)


def test_no_more_is_run_than_there_is_memory_for_outputs_that_are_not_put_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_window, "OUTPUT_BYTES", 2 * 8 * 4)  # of two batches

    async def story(told: Story) -> None:
        job = await told.submit(*range(80))
        kept = threading.Event()
        told.jobs._runs[job.id].in_thread(kept.wait)
        try:
            for _ in range(4):
                while told._at < len(told.stage.sent):
                    await told.finish()
                told.jobs._again.set()  # somebody looks at what could be run
                await until(lambda: not told.jobs._again.is_set())
            assert 2 <= len(told.stage.sent) <= 3, "one may be on its way as the second one ends"
        finally:
            kept.set()
        assert await told.all_done(job) == y(*(2.0 * value for value in range(80)))

    on(tmp_path, story)


def test_a_full_disk_pauses_it_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_pace, "FULL_S", 0.5)

    async def story(told: Story) -> None:
        job = await told.submit(*range(4000))
        told.jobs._runs[job.id].ledger.limit_pages(0)
        with capture_logs() as logs:
            while not any("no room for results" in line["event"] for line in logs):
                await told.finish()
            # It begins anew, with a ledger that nobody limits.
            await until(lambda: "job goes on" in [line["event"] for line in logs])
        assert await told.all_done(job) == y(*(2.0 * value for value in range(4000)))

    on(tmp_path, story)


def test_a_disk_that_stays_full_though_it_shows_room_is_not_tried_again_at_once(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await told.submit(*range(4000))
        told.jobs._runs[job.id].ledger.limit_pages(0)
        while job.state == JobState.RUNNING:
            await told.unless_over(job, told.finish())
        told.drop_running()
        for gone in ("", "not loaded", "", ""):  # its model comes and goes meanwhile
            told.repository.gone = gone
            told.jobs._again.set()
            await until(lambda: not told.jobs._again.is_set())
            assert (job.state, job.reason) == (JobState.PAUSED, "the disk: no room for the ledger")
        await told.jobs.cancel(job.id)
        await told.jobs.resume(job.id)  # by somebody who has made room
        assert len(await told.all_done(job)) == 4000

    on(tmp_path, story)


@contextmanager
def no_file_beyond(nbytes: int) -> Iterator[None]:
    """As over a quota: writes fail, with an error of their own that is not that of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_quota_is_not_tried_again_at_once_either(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await told.submit(*range(4000))
        with capture_logs(), no_file_beyond(64 << 10):
            while job.state == JobState.RUNNING:
                await told.unless_over(job, told.finish())
            told.drop_running()
            for _ in range(4):
                told.jobs._again.set()
                await until(lambda: not told.jobs._again.is_set())
                assert (job.state, job.reason) == (JobState.PAUSED, "the disk: disk I/O error")
        await told.jobs.cancel(job.id)
        await told.jobs.resume(job.id)
        assert len(await told.all_done(job)) == 4000

    on(tmp_path, story)


def test_inputs_that_cannot_be_read_pause_it_until_they_can(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await told.submit(*range(9))
        told.repository.gone = "not loaded"
        await until(lambda: job.state == JobState.PAUSED)
        told.drop_running()
        path = told.jobs.store.folder(job.id) / "input"
        elsewhere = path.rename(path.with_name("elsewhere"))
        told.repository.gone = ""
        await until(lambda: "the disk: [Errno 2] No such file" in job.reason)
        elsewhere.rename(path)
        await until(lambda: job.state == JobState.RUNNING)
        assert await told.all_done(job) == y(*(2.0 * value for value in range(9)))

    on(tmp_path, story)


def numbers_as_npz(count: int) -> bytes:
    out = io.BytesIO()
    np.savez(out, x=np.arange(count, dtype=np.float32).reshape(count, 1))
    return out.getvalue()


@pytest.mark.parametrize(
    ("inputs", "file", "missing"), [(range(2000), "input", b"\n[1999]"), ((numbers_as_npz(2000),), "array-0", b"1234")]
)
def test_items_that_are_not_there_any_more_stop_it(
    inputs: Sequence[Any], file: str, missing: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_window, "ITEMS", 1024)  # so many are read before

    async def story(told: Story) -> None:
        job = await told.submit(*inputs)
        path = told.jobs.store.folder(job.id) / file
        whole = path.read_bytes()
        os.truncate(path, len(whole) - len(missing))  # it is being read
        while job.state == JobState.RUNNING:
            await told.unless_over(job, told.finish())
        await until(lambda: job.ended_s is not None)
        assert (job.state, job.reason) == (
            JobState.STOPPED,
            "the inputs have become shorter: 1999 of 2000 items are there",
        )
        path.write_bytes(whole)
        told.drop_running()
        await told.jobs.resume(job.id)
        assert await told.all_done(job) == y(*(2.0 * value for value in range(2000)))

    on(tmp_path, story)


def test_a_job_that_cannot_even_begin_is_stopped_and_the_others_go_on(tmp_path: Path) -> None:
    out = io.BytesIO()
    np.savez(out, x=np.zeros((30, 1), np.float32))
    ids = []

    async def before(told: Story) -> None:
        ids.extend([(await told.submit(out.getvalue())).id, (await told.submit(*range(20))).id])
        (told.jobs.store.folder(ids[0]) / "tensors.json").write_bytes(b"[]x")

    async def after(told: Story) -> None:
        broken = told.jobs.get(ids[0])
        await until(lambda: broken.ended_s is not None)
        assert (broken.state, broken.reason[:17]) == (JobState.STOPPED, "an internal error")
        assert await told.all_done(told.jobs.get(ids[1])) == y(*(2.0 * value for value in range(20)))

    on(tmp_path, before)
    on(tmp_path, after)


STEPS = st.lists(st.sampled_from(["finish", "finish", "die", "cancel", "restart"]), min_size=3, max_size=10)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_whatever_happens_each_result_is_there_once_and_right(tmp_path: Path, steps: list[str]) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    ids: list[str] = []

    async def act(told: Story, step: str, job: Job) -> None:
        if job.state != JobState.RUNNING:
            return
        if step == "cancel":
            await told.jobs.cancel(job.id)
            told.drop_running()
            await told.jobs.resume(job.id)
        elif step == "die":
            await told.unless_over(job, told.die())
        else:
            await told.unless_over(job, told.finish())

    def life(of_life: list[str]) -> Callable[[Story], Awaitable[None]]:
        async def story(told: Story) -> None:
            job = told.jobs.get(ids[0]) if ids else await told.submit(*range(60), "broken")
            ids[:] = [job.id]
            for step in of_life:
                await act(told, step, job)

        return story

    async def end(told: Story) -> None:
        job = told.jobs.get(ids[0])
        found = await told.all_done(job)
        assert found[:60] == y(*(2.0 * value for value in range(60)))
        assert [sorted(row) for row in found[60:]] == [["error", "item"]]

    # A worker that dies of the same batch again and again would be the item's fault.
    once = [step for at, step in enumerate(steps) if step != "die" or "die" not in steps[:at]]
    while "restart" in once:
        at = once.index("restart")
        on(folder, life(once[:at]))
        once = once[at + 1 :]
    on(folder, life(once))
    on(folder, end)


def test_no_job_is_taken_where_there_is_no_room(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        told.settings.jobs_min_free_mib = 1 << 40
        with pytest.raises(ServeError, match="no room"):
            await told.submit(1)
        assert told.jobs.all() == []

    on(tmp_path, story)


def test_what_cannot_end_in_time_is_said_or_refused(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        soon = time.time() + 1e-4
        with pytest.raises(ServeError, match="the earliest end is in"):
            await told.submit(*range(4000), deadline_s=soon, strict=True)
        assert not list(tmp_path.glob("*/")), "nothing is left of it"  # noqa: ASYNC240
        job = await told.submit(*range(40), deadline_s=soon)
        await until(lambda: told.jobs.progress(job).get("in_time") is False)
        assert (await told.all_done(job))[39] == {"item": 39, "outputs": {"y": [78.0]}}

    on(tmp_path, story)


def test_online_work_goes_first_and_a_jobs_batches_are_not_counted_as_requests(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        await told.submit(*range(40))
        await told.sent()
        replies = told.stage.post({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [7]}]})
        await told.finish()
        await told.sent()
        assert told.stage.sent[1].items == [1], "before the job's next batch"
        await told.finish()
        await until(lambda: replies)
        assert json.loads(replies[0].body)["outputs"][0]["data"] == [14.0]
        await until(lambda: len(told.stage.seen.records) == 2)
        assert [len(record.request_ns) for record in told.stage.seen.records] == [0, 1]

    on(tmp_path, story)


def test_pictures_go_through_the_pipeline_and_bad_ones_have_their_errors(tmp_path: Path) -> None:
    def picture(value: int) -> str:
        out = io.BytesIO()
        Image.new("L", (3, 3), value).save(out, "PNG")
        return json.dumps(base64.b64encode(out.getvalue()).decode())

    files = tmp_path / "files"
    files.mkdir()
    Image.new("L", (2, 2), 51).save(files / "there.png")

    async def story(told: Story) -> None:
        lines = [picture(0), '"AAAA"', '{"file": "there.png"}', '{"file": "missing.png"}', '{"x": [[[0.5]]]}']
        found = await told.all_done(await told.submit(*lines, *(picture(255) for _ in range(20))))
        assert found[0]["outputs"] == {"y": [0.0]}
        assert "not a JPEG, PNG" in found[1]["error"]
        assert found[2]["outputs"]["y"][0] == pytest.approx(0.4)
        assert "missing.png cannot be read" in found[3]["error"]
        assert found[4]["outputs"] == {"y": [1.0]}, "a ready tensor needs no pipeline"
        assert [row["outputs"] for row in found[5:]] == [{"y": [2.0]}] * 20
        assert [row.get("name") for row in found[:5]] == [None, None, "there.png", "missing.png", None]
        folder = await told.submit(folder=".")
        (row,) = await told.all_done(folder)
        assert (row["name"], row["outputs"]["y"][0]) == ("there.png", pytest.approx(0.4))
        with pytest.raises(ServeError, match="no folder below"):
            await told.submit(folder="../..")

    on(tmp_path / "jobs", story, pictures=True, jobs_input_dir=files)


def test_a_decoder_that_cannot_be_had_pauses_it_and_is_no_items_fault(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("L", (1, 1), 51).save(out, "PNG")
    line = json.dumps({"image": base64.b64encode(out.getvalue()).decode()})
    ids = []

    async def before(told: Story) -> None:
        job = await told.submit(line, line)
        ids.append(job.id)
        await until(lambda: job.state == JobState.PAUSED)
        assert job.reason.startswith("preprocessing: no decoder is called 'missing'")
        assert job.done == 0

    async def after(told: Story) -> None:
        found = await told.all_done(told.jobs.get(ids[0]))
        assert ["outputs" in row for row in found] == [True, True]

    on(tmp_path, before, pictures=True, decoder="missing")
    on(tmp_path, after, pictures=True)


def test_who_comes_behind_a_late_job_is_told_when_it_ends_and_why(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        told.stage.driver.serves(0, KEY, tuple(range(50_000_000, 50_000_008)), 1.0)
        first = await told.submit(*range(4000), deadline_s=time.time() + 1e-4)
        await until(lambda: told.jobs.progress(first).get("in_time") is False)
        soon = time.time() + 1e-3
        with pytest.raises(ServeError, match=r"the earliest end is in 2\d s, .* other jobs hold the slices"):
            await told.submit(1, deadline_s=soon, strict=True)
        second = await told.submit(1, deadline_s=soon)
        await until(lambda: "ends_in_s" in told.jobs.progress(second))
        found = told.jobs.progress(second)
        assert (found["slices"], found["in_time"], found["ends_in_s"] > 20) == ([], False, True)
        assert "jobs that come first hold" in await shown(told, second)
        registry = CollectorRegistry()
        registry.register(JobMetrics(told.jobs))
        assert registry.get_sample_value("migserve_job_late", {"job_id": second.id, "model": "m"}) == 1
        # What can be in time goes first.
        third = await told.submit(1, deadline_s=time.time() + 10, strict=True)
        await until(lambda: told.jobs.progress(third)["slices"])

    on(tmp_path, story)


async def shown(told: Story, job: Job) -> str:
    app = FastAPI()
    app.include_router(router(told.jobs, told.intake))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        return (await client.get(f"/v2/jobs/{job.id}")).text


EACH = TensorSpec("y", "FP32", (-1,))
PADDED = Lengths(20, (10, 20), length="n")


def test_tensors_of_different_lengths_share_the_batches_of_their_length_bucket(tmp_path: Path) -> None:
    """y is x; `n` says how long each is, and may be left out."""
    lengths = [3, 10, 4, 11, 3, 20, 7, 21]

    async def story(told: Story) -> None:
        told.stage.driver.serves(0, KEY, tuple(range(1000, 1008)) * 2, 1.0, PADDED.edges)
        lines = [json.dumps({"x": [float(item)] * length}) for item, length in enumerate(lengths)]
        lines.append(json.dumps({"x": [8.0] * 5, "n": 5}))
        job = await told.submit(*lines)
        found = {}
        for number in range(2):
            await told.sent(number + 1)
            batch = told.stage.sent[number]
            (offset,), (items,), (length,) = batch.offsets, batch.items, batch.lengths
            n, x = (
                told.stage.arena.memory[offset + place.offset :]
                for place in told.stage.model.layout.slot(items, (length,)).places
            )
            real = np.frombuffer(n, np.int64, items).tolist()
            values = np.frombuffer(x, np.float32, items * length).reshape(items, length)
            found[batch.length] = real
            assert all((row[own:] == 0).all() for row, own in zip(values, real, strict=True)), "padded with zeros"
            out = np.zeros((items, batch.length), np.float32)
            out[:, :length] = values
            done = Done(batch.batch_id, [0], [out.nbytes], [out.shape], 1, 1, 1)
            told.stage.driver.batch_done(0, done, memoryview(out.tobytes()))
        assert found == {10: [3, 10, 4, 3, 7, 5], 20: [11, 20]}
        await until(lambda: job.ended_s is not None)
        rows = results(told.jobs, job)
        assert "a length of 21; at most 20 is taken" in rows.pop(7)["error"]
        assert [row["outputs"]["y"] for row in rows] == [
            [float(item)] * length for item, length in [*enumerate(lengths[:7]), (8, 5)]
        ]

    on(tmp_path, story, model=make_padded_model(PADDED, EACH))


def test_the_forecast_of_a_job_that_is_sent_counts_how_long_its_items_are(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        serves = told.stage.driver.serves
        serves(0, KEY, (*range(1000, 1008), *range(50_000_000, 50_000_008)), 1.0, (5, 20))
        short, long = (json.dumps({"x": [1.0] * length}) for length in (3, 15))
        deadline_s = time.time() + 5
        with pytest.raises(ServeError, match=r"the earliest end is in \d"):
            await told.submit(*[long] * 1600, deadline_s=deadline_s, strict=True)
        job = await told.submit(*[short] * 1600, deadline_s=deadline_s, strict=True)
        assert told.jobs.progress(job)["in_time"], "it is told at once"
        late = await told.submit(*[long] * 1600, deadline_s=deadline_s)
        assert told.jobs.progress(late)["in_time"] is False

    on(tmp_path, story, model=make_padded_model(PADDED, EACH))


def test_what_waits_goes_into_the_length_buckets_that_are_learned_meanwhile(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        serves = told.stage.driver.serves
        serves(0, KEY, tuple(range(50_000_000, 50_000_008)), 1.0, (20,))
        job = await told.submit(*[json.dumps({"x": [1.0] * 3})] * 40)
        await told.sent(1)
        assert list(told.jobs._runs[job.id].left) == [(20,)]
        serves(0, KEY, (*range(1000, 1008), *range(50_000_000, 50_000_008)), 1.0, (5, 20))
        await until(lambda: list(told.jobs._runs[job.id].left) == [(5,)])

    on(tmp_path, story, model=make_padded_model(PADDED, EACH))


def test_inputs_that_are_none(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        with pytest.raises(ServeError, match="no items"):
            await told.submit("", " ")
        for rubbish in (b"PK\3\4 rubbish", b"PK\5\6" + bytes(18), bytes(range(256)), b"{\0}"):
            with pytest.raises(ServeError, match=r"npz.* cannot be"):
                await told.submit(rubbish)
        with pytest.raises(ServeError, match="npz file cannot be read"):
            await told.submit(b"rubbish", format="npz")
        told.settings.jobs_max_input_mib = 0
        with pytest.raises(ServeError, match="longer than"):
            await told.submit(1)

    on(tmp_path, story)


def test_an_npz_with_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    np.savez(out, xé=np.zeros((3, 1), np.float32))  # type: ignore[arg-type]

    async def story(told: Story) -> None:
        with pytest.raises(ServeError, match="npz file cannot be read: 'utf-8'") as refused:
            await told.submit(out.getvalue().replace("\u00e9".encode(), b"\xc3\x28"))
        assert refused.value.fault == Fault.INVALID
        assert not list(tmp_path.glob("*/")), "nothing is left of it"  # noqa: ASYNC240

    on(tmp_path, story)


@pytest.mark.parametrize("nbytes", [10, WRITE_BYTES + 10])
def test_a_disk_that_is_full_is_told_as_that_whenever_it_shows(nbytes: int) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield bytes(nbytes)

    with pytest.raises(ServeError, match="the disk is full: No space left"):
        asyncio.run(receive(parts(), Path("/dev/full"), Settings()))


async def stopped(told: Story) -> Job:
    job = await told.submit("a", "b", 3, max_errors=0)
    await until(lambda: job.state == JobState.STOPPED)
    assert job.ended_s is None  # that much earlier than its files are let go of
    return job


def threads_of(job: Job) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(f"job-{job.id}")]


def test_resumed_as_soon_as_it_shows_as_stopped_it_runs_once(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await stopped(told)
        await told.jobs.resume(job.id, 5)
        found = await told.all_done(job)
        assert [row.get("outputs") for row in found] == [None, None, {"y": [6.0]}]
        await until(lambda: not threads_of(job))

    on(tmp_path, story)


def test_a_job_whose_ledger_cannot_be_read_any_more_is_let_go_of_all_the_same(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await told.submit("a", 1)
        await until(lambda: job.errors == 1)
        told.jobs._runs[job.id].ledger.close()
        await told.jobs.cancel(job.id)
        await until(lambda: not threads_of(job))
        assert job.ended_s is not None

    on(tmp_path, story)


def test_the_first_errors_are_told_while_its_thread_is_busy_and_after_a_restart(tmp_path: Path) -> None:
    ids = []

    async def before(told: Story) -> None:
        job = await told.submit(
            *(f"bad {number}" for number in range(8)), 1, "bad 9", "bad 10", "bad 11", 2, max_errors=20
        )
        ids.append(job.id)
        await until(lambda: job.errors == 11)
        written = threading.Event()
        told.jobs._runs[job.id].in_thread(written.wait)
        await first_errors_of(told, job)
        written.set()

    async def first_errors_of(told: Story, job: Job) -> None:
        async with asyncio.timeout(5):
            found = json.loads(await shown(told, job))["first_errors"]
        assert [each["item"] for each in found] == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]

    async def after(told: Story) -> None:
        await first_errors_of(told, told.jobs.get(ids[0]))
        await told.all_done(told.jobs.get(ids[0]))
        await first_errors_of(told, told.jobs.get(ids[0]))

    on(tmp_path, before)
    on(tmp_path, after)


def test_a_job_that_is_slow_to_stop_keeps_no_other_from_it(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        slow, quick = await told.submit(*range(8)), await told.submit(*range(8))
        writes = threading.Event()
        told.jobs._runs[slow.id].in_thread(writes.wait)
        stopping = asyncio.create_task(told.jobs.stop())
        await until(lambda: not threads_of(quick))
        assert threads_of(slow)
        writes.set()
        await stopping

    on(tmp_path, story)


def test_removed_as_soon_as_it_shows_as_ended_it_is_gone_for_good(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await stopped(told)
        await told.jobs.remove(job.id)
        await until(lambda: not threads_of(job))
        assert told.jobs.store.all() == []

    on(tmp_path, story)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_resume_that_cannot_be_kept_leaves_it_as_it_was(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await told.submit("a", "b", 3, max_errors=0)
        await until(lambda: job.ended_s is not None)
        told.jobs.store._jobs.execute("PRAGMA busy_timeout=0")
        with sqlite3.connect(tmp_path / "jobs.sqlite") as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(ServeError, match="database is locked") as refused:
                await told.jobs.resume(job.id, 5)
            assert refused.value.fault == Fault.UNAVAILABLE
            assert (job.state, job.asked.max_errors, job.ended_s is None) == (JobState.STOPPED, 0, False)
        other.close()
        await told.jobs.resume(job.id, 5)
        assert (await told.all_done(job))[2]["outputs"] == {"y": [6.0]}

    on(tmp_path, story)


async def ended_without_room(told: Story) -> Job:
    lines = [json.dumps({"unreadable": "e" * 500})] * 12
    await told.submit(*lines, max_errors=0)  # the database has a page for it
    await until(lambda: told.jobs.all()[0].ended_s is not None)
    database = told.jobs.store._jobs
    job = await told.submit(*lines, max_errors=0)
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count={pages}")
    await until(lambda: job.state == JobState.STOPPED)
    await until(lambda: not threads_of(job))  # it is let go of, and could not be kept
    return job


def test_on_a_full_disk_a_job_can_be_removed_all_the_same(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await ended_without_room(told)
        with pytest.raises(ServeError, match="the disk is full"):
            await told.jobs.resume(job.id, 50)
        await told.jobs.remove(job.id)
        assert [each.id == job.id for each in told.jobs.store.all()] == [False]
        assert not told.jobs.store.folder(job.id).exists()

    on(tmp_path, story, pictures=True)


def test_an_end_that_finds_no_room_on_the_disk_is_kept_once_there_is(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        await ended_without_room(told)
        assert [each.state for each in told.jobs.store.all()] == [JobState.STOPPED, JobState.RUNNING]
        told.jobs.store._jobs.execute("PRAGMA max_page_count=1000000")
        await until(lambda: {each.state for each in told.jobs.store.all()} == {JobState.STOPPED})

    on(tmp_path, story, pictures=True)


class SlowSaves:
    """The row of a job is written when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        save = JobStore.save

        def slowly(store: JobStore, job: Job) -> None:
            self.begun.set()
            self.go.wait(10)
            save(store, job)

        monkeypatch.setattr(JobStore, "save", slowly)


@pytest.mark.parametrize("items", [2, 50_000])
def test_nothing_is_left_of_a_job_whose_sender_goes_as_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items: int
) -> None:
    """Behind a large body nobody reads from the connection any more, where its end would be seen."""

    async def story(told: Story) -> None:
        saves = SlowSaves(monkeypatch)
        app = create_app(router(told.jobs, told.intake))
        answered = asyncio.Event()

        async def telling(scope: Any, receive: Any, send: Any) -> None:
            await app(scope, receive, send)
            answered.set()

        with listen("http", "127.0.0.1", 0) as sock:
            server = HttpServer(uvicorn.Config(telling, http=HttpProtocol, lifespan="off", log_config=None))
            serving = asyncio.create_task(server.serve(sockets=[sock]))
            await server.listening.wait()
            _, writer = await asyncio.open_connection(*sock.getsockname())
            head = b"POST /v2/jobs?model=m HTTP/1.1\r\nHost: m\r\nContent-Length: %d\r\n\r\n" % (4 * items)
            writer.write(head + b"[1]\n" * items)
            await until(saves.begun.is_set)
            writer.close()
            await writer.wait_closed()
            saves.go.set()
            await answered.wait()
            server.should_exit = True
            await serving
        assert told.jobs.all() == told.jobs.store.all() == []
        assert not list(tmp_path.glob("*/"))  # noqa: ASYNC240

    on(tmp_path, story)


def test_a_job_whose_sender_is_cancelled_as_its_row_is_written_is_whole_after_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stops(told: Story) -> None:
        saves = SlowSaves(monkeypatch)
        sending = asyncio.create_task(told.submit(*range(20)))
        await until(saves.begun.is_set)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        saves.go.set()

    async def after(told: Story) -> None:
        (job,) = told.jobs.all()
        assert await told.all_done(job) == y(*(2.0 * value for value in range(20)))

    on(tmp_path, stops)
    on(tmp_path, after)


def test_a_job_that_is_sent_as_the_server_stops_is_there_with_its_inputs_or_not_at_all(tmp_path: Path) -> None:
    for number in range(12):

        async def story(told: Story) -> None:
            sending = asyncio.create_task(told.submit(1, 2))
            while not (sending.done() or told.jobs._threads._work_queue.qsize()):  # noqa: ASYNC110  # not kept yet
                await asyncio.sleep(0)
            await told.jobs.stop()
            await asyncio.gather(sending, return_exceptions=True)

        on(tmp_path / str(number), story)
        store = JobStore(tmp_path / str(number))
        assert [store.folder(job.id).exists() for job in store.all()] == [True] * len(store.all())
        store.close()
