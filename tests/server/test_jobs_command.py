"""`migserve jobs` beside jobs as they are, over HTTP; batches end when the test says so."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image
from structlog.testing import capture_logs
from typer.testing import CliRunner, Result

from scheduler.channel import Done
from scheduler.lengths import Lengths
from scheduler.tensors import TensorSpec
from server.__main__ import app
from server.app import create_app
from server.job_store import JobState
from server.jobs_api import router
from server.jobs_sending import folder_lines
from server.listening import HttpServer, listen
from tests.served import make_padded_model
from tests.server.test_jobs import Story, on, until
from tests.stage import KEY

Command = Callable[..., Awaitable[Result]]


@asynccontextmanager
async def served(told: Story) -> AsyncIterator[str]:
    """Jobs over HTTP, at this URL."""
    sock = listen("http", "127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    routes = create_app(router(told.jobs, told.intake))
    server = HttpServer(uvicorn.Config(routes, ws="none", lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    await server.listening.wait()
    try:
        with capture_logs():  # they would go to the stdout of whatever command is running
            yield url
    finally:
        server.should_exit = True
        await serving


@asynccontextmanager
async def command_line(told: Story) -> AsyncIterator[Command]:
    """`migserve jobs`, in a thread."""
    async with served(told) as url:

        async def command(*arguments: str) -> Result:
            return await asyncio.to_thread(CliRunner().invoke, app, ["jobs", *arguments], env={"MIGSERVE_URL": url})

        yield command


def test_results_go_into_no_file_that_is_called_otherwise(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        async with command_line(told) as command:
            job = await told.submit(1, 2)
            out = tmp_path / "r.npz"
            wrong = f"the results of job {job.id} are JSON lines: call them {tmp_path}/r.jsonl\n"
            asked = await command("wait", job.id, "--out", str(out))
            assert (asked.exit_code, asked.stderr) == (2, wrong), "and not at the end of the waiting"
            await told.all_done(job)
            asked = await command("results", job.id, "--out", str(out))
            assert (asked.exit_code, asked.stderr) == (2, wrong)
            unknown = "r.csv: results are called .jsonl, .npz, .safetensors, nothing else is known\n"
            for verb in (["results", job.id], ["wait", job.id], ["submit", "m", "-"]):
                asked = await command(*verb, "--out", str(tmp_path / "r.csv"))
                assert (asked.exit_code, asked.stderr.endswith(unknown)) == (2, True), asked.stderr
            assert not list(tmp_path.glob("r.*"))  # noqa: ASYNC240
            for name in ("r", "r.jsonl", "R.JSONL"):
                assert (await command("results", job.id, "--out", str(tmp_path / name))).exit_code == 0
                assert len((tmp_path / name).read_text().splitlines()) == 2
            assert len(told.jobs.all()) == 1, "what could not be written was not sent"

    on(tmp_path / "jobs", story)


def test_results_that_no_array_could_hold_go_into_a_file_beside_the_one_that_is_called_so(tmp_path: Path) -> None:
    model = make_padded_model(Lengths(20, (20,), length="n"), TensorSpec("y", "FP32", (-1,)))

    async def story(told: Story) -> None:
        async with command_line(told) as command:
            told.stage.driver.serves(0, KEY, tuple(range(1000, 1008)), 1.0, (20,))
            job = await told.submit("[1, 2]", "[1, 2, 3]", output="npz")
            await told.sent()
            batch = told.stage.sent[0]
            out = np.zeros((2, batch.length), np.float32)
            done = Done(batch.batch_id, [0], [out.nbytes], [out.shape], 1, 1, 1)
            told.stage.driver.batch_done(0, done, memoryview(out.tobytes()))
            await until(lambda: job.ended_s is not None)
            asked = await command("wait", job.id, "--out", str(tmp_path / "r.npz"))
            assert asked.exit_code == 0
            assert "the results are JSON lines, since output y has shape" in asked.stderr
            assert asked.stderr.endswith(f"results in {tmp_path}/r.npz.jsonl\n")
            assert [each.name for each in tmp_path.glob("r.*")] == ["r.npz.jsonl"]  # noqa: ASYNC240
            first = json.loads((tmp_path / "r.npz.jsonl").read_text().splitlines()[0])
            assert first == {"item": 0, "outputs": {"y": [0.0, 0.0]}}
            asked = await command("results", job.id, "--out", str(tmp_path / "s.npz"))
            assert asked.exit_code == 2
            assert asked.stderr.endswith(f"are JSON lines: call them {tmp_path}/s.jsonl\n")

    on(tmp_path / "jobs", story, model=model)


def test_of_a_folder_only_files_are_read(tmp_path: Path) -> None:
    """Who reads a pipe waits until somebody writes into it."""
    os.mkfifo(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"x")
    items = [json.loads(line) for line in folder_lines(tmp_path)]
    assert items == [{"name": "a", "unreadable": "a is not a file"}, {"name": "b", "bytes": "eA=="}]


def test_that_a_job_missed_its_deadline_is_seen_once_it_is_done(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        async with command_line(told) as command:
            now_s = time.time()
            for deadline_s, late in ((now_s - 4000, True), (now_s + 4000, False), (None, False)):
                job = await told.submit(1, deadline_s=deadline_s)
                await told.all_done(job)
                shown = json.loads((await command("show", job.id, "--json")).stdout)
                waited = await command("wait", job.id)
                assert waited.exit_code == 0
                ends = waited.stderr.splitlines()[-1]
                (row,) = [row for row in (await command("list")).stdout.splitlines() if row.startswith(job.id)]
                if late:
                    assert shown["late_s"] == pytest.approx(job.ended_s - deadline_s, abs=0.1)
                    assert ends.startswith(f"job {job.id} is done 1:06:4")
                    assert ends.endswith(" after its deadline")
                    assert ", 1:06:4" in row
                    assert "late_s       400" in (await command("show", job.id)).stdout
                else:
                    assert shown["late_s"] is None
                    assert "deadline" not in ends
                    assert "late" not in row
            job = await told.submit(1, deadline_s=time.time() - 1)
            (running,) = [each for each in json.loads((await command("list", "--json")).stdout) if each["id"] == job.id]
            assert (running["state"], running["late_s"] >= 1) == ("running", True)

    on(tmp_path, story)


def test_errors_of_files_have_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    Image.new("L", (2, 2), 51).save(folder / "good.png")
    for name in ("[bad].png", "no.jpg"):
        (folder / name).write_bytes(b"text")
    wrong = "input image: 4 bytes that are not a JPEG, PNG, WebP or GIF image"

    async def story(told: Story) -> None:
        async with command_line(told) as command:
            for arguments, below in (((str(folder),), ""), (("--server-folder", "files"), "files/")):
                sending = asyncio.create_task(command("submit", "m", *arguments, "--wait"))
                await told.finish()
                said = (await sending).stderr
                for item, name in ((0, "[bad].png"), (2, "no.jpg")):
                    assert f"item {item} ({below}{name}): {wrong}" in said
                job = told.jobs.all()[-1].id
                assert f"item 2 ({below}no.jpg): {wrong}" in (await command("show", job)).stdout
                shown = json.loads((await command("show", job, "--json")).stdout)
                assert shown["first_errors"][1]["name"] == f"{below}no.jpg"
            job = (await told.submit(folder="files", max_errors=0)).id
            told_of = await command("wait", job)
            assert f"more than max_errors=0; item 0 (files/[bad].png): {wrong}" in told_of.stderr

    on(tmp_path / "jobs", story, pictures=True, jobs_input_dir=tmp_path)


def test_how_many_items_failed_is_said_first_in_the_last_line(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        async with command_line(told) as command:
            job = await told.submit(*"abcd", deadline_s=time.time() - 4000)
            await told.all_done(job)
            waited = await command("wait", job.id, "--out", str(tmp_path / "r.jsonl"))
            assert waited.exit_code == 0
            last = (
                rf"4 of 4 items failed; job {job.id} is done 1:06:4\d after its deadline; migserve jobs show {job.id}"
            )
            assert re.match(last, waited.stderr.splitlines()[-1]), waited.stderr
            job = await told.submit("a", 2)
            await told.all_done(job)
            assert (await command("wait", job.id)).stderr.endswith(f"\n1 of 2 items failed; job {job.id} is done\n")
            job = await told.submit("a", *range(40), max_errors=0)
            waited = await command("wait", job.id)
            last = rf"1 of \d+( finished)? items failed; job {job.id} is stopped: "
            assert (waited.exit_code, bool(re.match(last, waited.stderr.splitlines()[-1]))) == (1, True), waited.stderr
            assert waited.stderr.endswith(f"; migserve jobs resume {job.id} --max-errors N goes on with it\n")

    on(tmp_path / "jobs", story)


def test_one_is_removed_by_its_whole_id_only(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        async with command_line(told) as command:
            job = await told.submit(1)
            await told.all_done(job)
            assert (await command("show", job.id[:4])).exit_code == 0
            removed = await command("remove", job.id[:4])
            assert (removed.exit_code, removed.stderr) == (2, f"to remove job {job.id}, give its whole id\n")
            assert (await command("remove", job.id)).exit_code == 0
            unknown = await command("show", job.id)
            said = f"unknown job '{job.id}'; migserve jobs list shows those there are\n"
            assert (unknown.exit_code, unknown.stderr) == (1, said)

    on(tmp_path / "jobs", story)


def test_the_list_has_local_times_with_seconds_where_they_are_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def local(form: str, at_s: float) -> str:
        return time.strftime(form, time.gmtime(at_s + 5.5 * 3600))

    async def story(told: Story) -> None:
        async with command_line(told) as command:
            now_s = time.time()
            wanted = []
            for after_s in (1000, 40_000, 300_000):
                await told.all_done(await told.submit(1, deadline_s=now_s + after_s))
                today = local("%j", now_s + after_s) == local("%j", now_s)
                form = "%H:%M:%S" if today else "%m-%d %H:%M:%S" if after_s < 86400 else "%m-%d %H:%M"
                wanted.append(local(form, now_s + after_s))
            no_local_time = datetime(9999, 12, 31, 23, 30, tzinfo=UTC)
            await told.all_done(await told.submit(1, deadline_s=no_local_time.timestamp()))
            wanted.append("12-31 23:30")
            rows = (await command("list")).stdout.splitlines()
            column = next(row for row in rows if row.startswith("id ")).index("deadline")
            rows = [row[column:] for row in rows if re.match("[0-9a-f]{10} ", row)]
            assert [row[: len(text) + 1] for row, text in zip(rows, wanted, strict=True)] == [f"{w} " for w in wanted]

    with monkeypatch.context() as changed:
        changed.setenv("TZ", "XXX-5:30")
        time.tzset()
        on(tmp_path, story)
    time.tzset()


def test_names_are_shown_as_they_are_and_paused_ones_with_their_reason(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        job = await told.submit(*range(20), name="[/nightly] [bold]")
        told.repository.gone = "unloaded [/]"
        await until(lambda: job.state == JobState.PAUSED)
        async with command_line(told) as command:
            listed = await command("list")
            assert (listed.exit_code, "[/nightly] [bold]" in listed.stdout) == (0, True)
            assert f"{job.id} is paused: unloaded [/]" in listed.stdout

    on(tmp_path, story)


def test_an_empty_id_is_no_job(tmp_path: Path) -> None:
    """As of a shell's variable that is not set."""

    async def story(told: Story) -> None:
        job = await told.submit(*range(20))
        async with command_line(told) as command:
            found = await command("cancel", "")
            assert (found.exit_code, "which job?" in found.stderr) == (2, True)
        assert job.state == JobState.RUNNING

    on(tmp_path, story)


@pytest.mark.parametrize("url", ["http://h:99999", "http://[::1"])
def test_what_is_no_address_is_said_to_be_none(url: str) -> None:
    found = CliRunner().invoke(app, ["jobs", "list", "--url", url])
    assert (found.exit_code, "is no address" in found.stderr) == (2, True)


def test_in_a_pipe_there_are_ids_and_results_only(tmp_path: Path) -> None:
    async def story(told: Story) -> None:
        (tmp_path / "in.jsonl").write_text("[1]\n[2]\n")
        async with command_line(told) as command:
            sent = await command("submit", "m", str(tmp_path / "in.jsonl"))
            job = told.jobs.get(sent.stdout.strip())
            await told.all_done(job)
            both = await command("wait", job.id, "--out", "-", "--json")
            assert (both.exit_code, both.stdout) == (2, "")
            waited = await command("wait", job.id, "--out", "-")
            assert [json.loads(line)["outputs"] for line in waited.stdout.splitlines()] == [{"y": [2.0]}, {"y": [4.0]}]

    on(tmp_path / "jobs", story)


@pytest.mark.parametrize(
    ("path", "headers", "said"),
    [
        ("/v2/jobs?model=m", {"Content-Type": "multipart/form-data; boundary=b"}, "not a form"),
        ("/v2/jobs?model=m", {"Content-Type": "Multipart/Form-Data; boundary=b"}, "not a form"),
        ("/v2/jobs?model=m&model=n", {}, "model is given twice"),
        ("/v2/jobs?model=m&deadline=", {}, "deadline '' is neither"),
        ("/v2/jobs?model=m&strict=true", {}, "it needs a deadline"),
    ],
)
def test_slips_in_asking_are_told(tmp_path: Path, path: str, headers: dict[str, str], said: str) -> None:
    async def story(told: Story) -> None:
        async with served(told) as url:
            asked = urllib.request.Request(url + path, b"[1]\n", headers)
            with pytest.raises(urllib.error.HTTPError) as refused:
                await asyncio.to_thread(urllib.request.urlopen, asked)
            assert (refused.value.code, said in refused.value.read().decode()) == (400, True)
        assert told.jobs.all() == []

    on(tmp_path, story)
