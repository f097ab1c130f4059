from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner import latency
from partitioner.latency import LatencyTableError

POINTS = st.dictionaries(st.integers(1, 64), st.floats(0.01, 1e3), min_size=1, max_size=8).map(
    lambda d: sorted(d.items())
)


@given(POINTS, st.integers(1, 80))
def test_per_batch_is_monotone_and_never_below_a_measured_point(
    points: list[tuple[int, float]], max_batch: int
) -> None:
    times = latency.per_batch(points, max_batch)
    assert len(times) == max_batch
    assert times == sorted(times)
    for batch, ms in points:
        if batch <= max_batch:
            assert times[batch - 1] >= ms * (1 - 1e-9)


def test_between_points_it_is_linear_and_beyond_them_it_goes_on() -> None:
    assert latency.per_batch([(1, 10.0), (3, 14.0)], 5) == [10, 12, 14, 16, 18]
    assert latency.per_batch([(2, 10.0)], 3) == [10, 10, 10]


@given(st.lists(st.floats(0.01, 1e3), min_size=1, max_size=64).map(sorted))
def test_the_knee_is_the_first_batch_with_four_fifths_of_the_peak_rate(times: list[float]) -> None:
    rates = [batch / time for batch, time in enumerate(times, start=1)]
    knee = latency.knee(times)
    assert rates[knee - 1] >= 0.8 * max(rates)
    assert all(rate < 0.8 * max(rates) for rate in rates[: knee - 1])


def test_the_shipped_tables_have_every_slice_size_of_an_a100() -> None:
    table = latency.shipped("resnet50")
    assert sorted(table.by_gpcs) == [1, 2, 3, 4, 7]
    by_size = [dict(table.points(gpcs))[8] for gpcs in (1, 2, 3, 4, 7)]
    assert by_size == sorted(by_size, reverse=True)
    assert dict(table.points(1))[1] == pytest.approx(5.08, abs=0.01)  # from items_per_s, finer than its whole ms


def test_a_size_that_was_not_measured_takes_the_nearest_smaller_one() -> None:
    rows = [{"model": "m", "mig_profile": f"{g}g.x", "batch": "1", "latency_ms": str(9 - g)} for g in (2, 4)]
    table = latency.from_rows(rows, "m")
    assert [table.points(gpcs)[0][1] for gpcs in (1, 2, 3, 4, 7)] == [7, 7, 7, 5, 5]


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("model,mig_profile,batch,latency_ms\nm,1g.10gb,1,5\nm,1g.10gb,4,8.5\nother,1g.10gb,1,1\n")
    assert latency.read_csv(path, "m").points(1) == [(1, 5), (4, 8.5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,mig_profile,batch,latency_ms\nother,1g.10gb,1,5\n", "no rows for model 'm'; it has other"),
        ("model,mig_profile,batch,latency_ms\nm,1g.10gb,one,5\n", "line 2"),
        (
            "model,batch\nm,1\n",
            r"line 2: mig_profile, latency_ms \(or items_per_s\) missing; needed are .*are model, batch",
        ),
        ("name;mig_profile\nm;1g.10gb\n", "line 2: model, mig_profile, batch, latency_ms"),
    ],
)
def test_broken_files_are_refused_naming_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(LatencyTableError, match=message):
        latency.read_csv(path, "m")


@pytest.mark.parametrize(("gpcs", "taken"), [(1, 2), (2, 2), (3, 2), (4, 4), (7, 4)])
def test_a_size_that_was_not_measured_is_stood_in_for_by_the_next_smaller_one(gpcs: int, taken: int) -> None:
    assert latency.LatencyTable({2: {1: 5.0}, 4: {1: 3.0}}).stand_in(gpcs) == taken


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(LatencyTableError, match="No such file"):
        latency.read_csv(Path("nowhere.csv"), "m")


def row(**values: object) -> dict[str, str]:
    return {"model": "m", "mig_profile": "1g.10gb", **{name: str(value) for name, value in values.items()}}


def test_rows_of_several_processes_are_read_and_left_out_of_the_table_of_one(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("model,mig_profile,batch,processes,latency_ms\nm,1g.10gb,4,1,8\nm,1g.10gb,4,2,14\n")
    rows = latency.read_measurements(path)
    assert [(each.batch, each.processes, each.items, each.latency_ms) for each in rows] == [(4, 1, 4, 8), (4, 2, 8, 14)]
    assert latency.read_csv(path, "m").points(1) == [(4, 8)]


def test_the_slices_rate_is_finer_than_the_latency() -> None:
    table = latency.from_rows([row(batch=4, latency_ms=8, items_per_s=510)], "m")
    assert table.points(1) == [(4, pytest.approx(7.843, abs=1e-3))]


MEASUREMENTS = st.builds(
    latency.Measurement,
    model=st.text('abc,"-', min_size=1),
    mig_profile=st.sampled_from(["1g.10gb", "2g.20gb"]),
    gpcs=st.integers(1, 7),
    batch=st.integers(1, 512),
    processes=st.integers(1, 8),
    latency_ms=st.floats(1e-3, 1e6),
    memory_mib=st.none() | st.floats(1, 1e6),
    gpu=st.sampled_from(["", "A100-80GB"]),
    source=st.sampled_from(["", "here"]),
    seq_len=st.none() | st.integers(1, 512),
)


@given(st.lists(MEASUREMENTS, max_size=5))
def test_what_is_written_is_read_again(measurements: list[latency.Measurement]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("t.csv", latency.to_csv(measurements)), ("t.json", latency.to_json(measurements))):
            path = Path(folder) / name
            path.write_text(text)
            assert latency.read_measurements(path) == measurements


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "model,mig_profile,batch,latency_ms\nm,1g.10gb,1,5\nm,1g.10gb,2,-5\n", "t.csv, line 3: .*positive"),
        ("t.csv", "model,mig_profile,batch,latency_ms\nm,1g.10gb,1,nan\n", "line 2"),
        ("t.csv", "model,mig_profile,batch,processes,latency_ms\nm,1g.10gb,1,0.5,3\n", "line 2"),
        ("t.json", "[]", 'expected JSON of the form {"measurements"'),
        ("t.json", "{", "expected JSON"),
        ("t.json", '{"measurements": [{"model": "m"}]}', "t.json, measurement 1"),
    ],
)
def test_broken_tables_are_refused_naming_the_row(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(LatencyTableError, match=message):
        latency.read_measurements(tmp_path / name)


def test_the_suspect_points_of_the_shipped_table() -> None:
    kept, suspect = latency.without_suspects(latency.shipped_measurements())
    assert len(kept) + len(suspect) == len(latency.shipped_measurements()) == 1747
    assert {(each.model, each.gpcs, each.batch, each.processes) for each in suspect} == {
        ("densenet169", 3, 128, 1),
        ("densenet169", 4, 128, 1),
        ("densenet169", 7, 128, 2),
        ("mobilenetv2", 4, 64, 4),
        ("mobilenetv2", 4, 128, 3),
        ("mobilenetv2", 4, 256, 2),
        ("resnet50", 2, 32, 4),
    }


@given(st.dictionaries(st.integers(1, 7), st.integers(1, 300), min_size=1), st.integers(1, 128))
def test_monotone_knees_never_fall_and_end_at_the_largest_batch(knees: dict[int, int], max_batch: int) -> None:
    found = latency.monotone_knees(knees, max_batch)
    values = [found[gpcs] for gpcs in sorted(found)]
    assert values == sorted(values)
    assert values[-1] == max_batch
    for gpcs in sorted(knees)[:-1]:
        assert found[gpcs] == min(max_batch, max(knee for size, knee in knees.items() if size <= gpcs))
