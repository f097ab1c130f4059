"""The ledger of a job: exactly once, all or nothing, also on a full disk; results that appear as a whole."""

from __future__ import annotations

import io
import json
import sqlite3
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from scheduler.channel import Done
from scheduler.driver import Answered, BatchOutputs, Share
from scheduler.tensors import Signature, TensorSpec
from server import job_results
from server.job_results import rows_of
from server.job_store import Asked, DiskFullError, ItemError, Job, JobState, JobStore, Ledger, Position, Row
from server.job_tensors import read_safetensors

Y = TensorSpec("y", "FP32", (2,))
LABEL = TensorSpec("label", "INT64", ())


def answered(values: np.ndarray, labels: np.ndarray, first: int = 0) -> Answered:
    outbox = values.tobytes() + labels.tobytes()
    sizes = [values.nbytes, labels.nbytes]
    done = Done(1, [0, sizes[0]], sizes, [values.shape, labels.shape], 1, 1, 1)
    return Answered((Share(BatchOutputs(done, memoryview(outbox)), first, len(values) - first, 0),), 0)


def some(count: int) -> Answered:
    return answered(np.arange(2 * count, dtype=np.float32).reshape(count, 2), np.arange(count))


def rows(items: list[int], outcome: Answered, *, as_json: bool = True) -> list[Row]:
    return rows_of(items, outcome, (Y, LABEL), batches=True, as_json=as_json)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_item_counts_once_however_often_it_is_told(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.add([Row(3, None, b"x"), Row(1, "bad", None)], Position(0)) == (2, 1)
    assert ledger.add([Row(3, "late", None), Row(2, None, b"y")], Position(4, 99)) == (3, 1)
    ledger.close()
    again = Ledger(tmp_path)
    assert (again.counts, again.position) == ((3, 1), Position(4, 99))
    assert [(row.item, row.error, row.value) for row in again.rows()] == [
        (1, "bad", None),
        (2, None, b"y"),
        (3, None, b"x"),
    ]
    assert again.finished_from(2) == {2, 3}
    assert [row.item for row in again.rows(errors_only=True)] == [1]
    again.close()


def test_a_full_disk_leaves_the_ledger_as_it_was_and_room_lets_it_go_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add([Row(0, None, b"x")], Position(1))
    ledger.limit_pages(4)
    big = [Row(item, None, bytes(4096)) for item in range(1, 50)]
    with pytest.raises(DiskFullError):
        ledger.add(big, Position(50))
    assert (ledger.counts, ledger.position) == ((1, 0), Position(1))
    ledger.limit_pages(1000)
    assert ledger.add(big, Position(50)) == (50, 0)
    ledger.close()


def test_jobs_are_there_again_and_folders_of_none_are_swept(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs")
    asked = Asked("m", None, 5.0, "jsonl", "npz", 3, 10, Signature((Y,), (Y,), 8), "mine")
    errors = [ItemError(3, "bad", "a.jpg"), ItemError(5, "bad")]
    first, second = Job("a", asked, 2.0), Job("b", asked, 1.0, JobState.PAUSED, "why", 4, 2, None, errors)
    for job in (first, second):
        store.folder(job.id).mkdir()
        store.save(job)
    (tmp_path / "jobs" / "cut-off").mkdir()
    store.close()
    again = JobStore(tmp_path / "jobs")
    again.sweep()
    assert again.all() == [second, first]
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir() if path.is_dir()) == ["a", "b"]
    again.remove("a")
    assert again.all() == [second]
    assert not again.folder("a").exists()
    again.close()


def test_errors_that_an_older_release_kept_without_names_can_be_read() -> None:
    job = Job("a", Asked("m", None, None, "jsonl", "jsonl", 3, 10, Signature((Y,), (Y,), 8)), 1.0)
    kept = msgspec.json.encode(job).replace(b'"first_errors":[]', b'"first_errors":[[3,"bad"]]')
    assert msgspec.json.decode(kept, type=Job).first_errors == [ItemError(3, "bad")]


def test_inputs_of_a_job_that_is_done_go_at_the_next_start_at_the_latest(tmp_path: Path) -> None:
    """A kill between the two leaves them."""
    store = JobStore(tmp_path / "jobs")
    asked = Asked("m", None, 5.0, "jsonl", "npz", 3, 10, Signature((Y,), (Y,), 8), "mine")
    for state in (JobState.DONE, JobState.CANCELLED):
        folder = store.folder(state)
        folder.mkdir()
        store.save(Job(state, asked, 2.0, state))
        for name in ("input", "ledger.sqlite", "results.npz", "results.jsonl.unfinished"):
            (folder / name).touch()
    store.close()
    again = JobStore(tmp_path / "jobs")
    again.sweep()
    assert [path.name for path in again.folder("done").iterdir()] == ["results.npz"]
    assert len(list(again.folder("cancelled").iterdir())) == 4
    again.close()


def test_results_are_in_order_whatever_the_order_of_batches(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add(rows([4, 1], some(2)), Position())
    ledger.add([Row(0, "no good", None)], Position())
    ledger.add(rows([3, 2], some(2)), Position())
    path = tmp_path / "results.jsonl"
    job_results.write(ledger, (Y, LABEL), 5, "jsonl", path)
    assert lines(path) == [
        {"item": 0, "error": "no good"},
        {"item": 1, "outputs": {"y": [2.0, 3.0], "label": 1}},
        {"item": 2, "outputs": {"y": [2.0, 3.0], "label": 1}},
        {"item": 3, "outputs": {"y": [0.0, 1.0], "label": 0}},
        {"item": 4, "outputs": {"y": [0.0, 1.0], "label": 0}},
    ]
    assert not path.with_name("results.jsonl.unfinished").exists()
    job_results.write(ledger, (Y, LABEL), 5, "npz", tmp_path / "results.npz")
    with np.load(tmp_path / "results.npz") as found:
        assert found["y"].tolist() == [[0, 0], [2, 3], [2, 3], [0, 1], [0, 1]]
        assert (found["label"].dtype, found["label"].shape) == (np.int64, (5,))
        assert found["ok"].tolist() == [False, True, True, True, True]
    with zipfile.ZipFile(tmp_path / "results.npz") as archive:
        assert json.load(io.BytesIO(archive.read("errors.jsonl"))) == {"item": 0, "error": "no good"}
    ledger.close()


def test_results_as_safetensors_are_read_as_they_were(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    values = np.array([[1, 2], [np.inf, np.nan]], np.float32)
    rows_of_two = rows_of([2, 0], answered(values, np.array([7, 8])), (Y, LABEL), batches=True, as_json=False)
    ledger.add([*rows_of_two, Row(1, "no good", None, "b.jpg")], Position())
    path = tmp_path / "results.safetensors"
    job_results.write(ledger, (Y, LABEL), 3, "safetensors", path)
    found = load_file(path)
    np.testing.assert_array_equal(found["y"], np.float32([[np.inf, np.nan], [0, 0], [1, 2]]))
    np.testing.assert_array_equal(found["label"], [8, 0, 7])
    np.testing.assert_array_equal(found["ok"], [True, False, True])
    assert json.loads(found["errors.jsonl"].tobytes()) == {"item": 1, "name": "b.jpg", "error": "no good"}
    assert {name: each.dtype.name for name, each in found.items() if "." not in name} == {
        "y": "float32",
        "label": "int64",
        "ok": "bool",
    }
    assert "names.jsonl" in found
    # Arrays that are mapped should lie where their type may.
    assert all(each.offset % 8 == 0 for name, each in read_safetensors(path).items() if name in ("label", "y"))
    ledger.close()


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_an_output_that_is_called_ok_is_not_taken_for_ours(form: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ok = TensorSpec("ok", "FP32", (2,))
    ledger.add(rows_of([0, 1], some(2), (ok, LABEL), batches=True, as_json=False), Position())
    path = tmp_path / f"results.{form}"
    job_results.write(ledger, (ok, LABEL), 2, form, path)
    found: Any = np.load(path) if form == "npz" else read_safetensors(path)
    assert (found["ok"].shape, found["ok_"].shape) == ((2, 2), (2,))
    if form == "npz":
        found.close()
    ledger.close()


def test_names_are_in_the_results_and_a_ledger_without_them_goes_on(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    old.execute("CREATE TABLE done (item INTEGER PRIMARY KEY, error TEXT, value BLOB)")
    old.execute("INSERT INTO done VALUES (0, 'no good', NULL)")
    old.execute("CREATE TABLE totals (done INTEGER, errors INTEGER, position BLOB)")
    old.execute("INSERT INTO totals VALUES (1, 1, ?)", (b'{"item":1,"offset":9}',))
    old.close()
    ledger = Ledger(tmp_path)
    (made,) = rows([1], some(1))
    made.name = "b.jpg"
    assert ledger.add([made], Position(2)) == (2, 1)
    job_results.write(ledger, (Y, LABEL), 2, "jsonl", tmp_path / "results.jsonl")
    assert lines(tmp_path / "results.jsonl") == [
        {"item": 0, "error": "no good"},
        {"item": 1, "name": "b.jpg", "outputs": {"y": [0.0, 1.0], "label": 0}},
    ]
    job_results.write(ledger, (Y, LABEL), 2, "npz", tmp_path / "results.npz")
    with zipfile.ZipFile(tmp_path / "results.npz") as archive:
        named = [json.loads(line) for line in archive.read("names.jsonl").splitlines()]
    assert named == [{"item": 0}, {"item": 1, "name": "b.jpg"}]
    ledger.close()


def test_results_that_are_large_are_read_one_at_a_time(tmp_path: Path) -> None:
    ledger, size = Ledger(tmp_path), 1 << 20
    for item in range(16):
        ledger.add([Row(item, None, bytes(size))], Position())
    tracemalloc.start()
    try:
        assert sum(len(row.value or b"") for row in ledger.rows()) == 16 * size
        assert tracemalloc.get_traced_memory()[1] < 4 * size
    finally:
        tracemalloc.stop()
    ledger.close()


def test_what_json_cannot_carry_is_the_error_of_that_item_alone() -> None:
    values = np.array([[1, 2], [np.inf, 2], [3, np.nan]], np.float32)
    found = rows([7, 8, 9], answered(values, np.arange(3)))
    assert [row.error is None for row in found] == [True, False, False]
    assert "output=npz" in str(found[1].error)
    assert all(row.error is None for row in rows([7, 8, 9], answered(values, np.arange(3)), as_json=False))


def test_what_a_batch_was_padded_with_is_no_result(tmp_path: Path) -> None:
    spec = TensorSpec("y", "FP32", (-1,))
    values = np.array([[1, 2, 0, 0], [3, 4, 0, 0]], np.float32)
    done = Done(1, [0], [values.nbytes], [values.shape], 1, 1, 1)
    of_two = Answered((Share(BatchOutputs(done, memoryview(values.tobytes())), 0, 2, 0),), 0, 2)
    ledger = Ledger(tmp_path)
    ledger.add(rows_of([0, 1], of_two, (spec,), batches=True, as_json=True), Position())
    job_results.write(ledger, (spec,), 2, "jsonl", tmp_path / "results.jsonl")
    assert [row["outputs"] for row in lines(tmp_path / "results.jsonl")] == [{"y": [1.0, 2.0]}, {"y": [3.0, 4.0]}]
    ledger.close()


def test_outputs_of_different_shapes_fit_no_array(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add(rows([0], some(1)) + rows([1], answered(np.zeros((1, 3), np.float32), np.arange(1))), Position())
    with pytest.raises(job_results.ShapesDifferError, match="output y has shape"):
        job_results.write(ledger, (Y, LABEL), 2, "npz", tmp_path / "results.npz")
    assert list(tmp_path.glob("results.*")) == []
    ledger.close()
