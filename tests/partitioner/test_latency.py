from __future__ import annotations

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
        ("model,batch\nm,1\n", "line 2"),
    ],
)
def test_broken_files_are_refused_naming_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(LatencyTableError, match=message):
        latency.read_csv(path, "m")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(LatencyTableError, match="No such file"):
        latency.read_csv(Path("nowhere.csv"), "m")
