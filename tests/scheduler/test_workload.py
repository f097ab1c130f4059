from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest

from scheduler import workload
from scheduler.workload import Arrival, TraceError

S = workload.NS_PER_S
Stream = Callable[..., Iterator[Arrival]]
STREAMS = [workload.poisson, workload.bursty, workload.diurnal]


@pytest.mark.parametrize("stream", STREAMS)
def test_the_mean_rate_is_as_asked_the_times_are_sorted_and_the_seed_repeats(stream: Stream) -> None:
    arrivals = list(stream("m", 200.0, 240.0, 7))
    assert len(arrivals) == pytest.approx(200 * 240, rel=0.08)
    assert all(a.at_ns <= b.at_ns for a, b in pairwise(arrivals))
    assert arrivals == list(stream("m", 200.0, 240.0, 7))
    assert arrivals != list(stream("m", 200.0, 240.0, 8))


def dispersion(stream: Stream) -> float:
    """Variance over mean of the arrivals a second: 1 for Poisson."""
    counts = Counter(arrival.at_ns // S for arrival in stream("m", 200.0, 240.0, 3))
    values = np.array([counts[second] for second in range(240)])
    return float(values.var() / values.mean())


def test_only_poisson_has_the_dispersion_of_poisson() -> None:
    assert dispersion(workload.poisson) == pytest.approx(1.0, abs=0.3)
    assert dispersion(workload.bursty) > 3
    assert dispersion(workload.diurnal) > 3


def test_the_diurnal_peak_is_a_quarter_into_the_period() -> None:
    phases = [arrival.at_ns / S % 60 for arrival in workload.diurnal("m", 500.0, 240.0, 3, swing=0.5)]
    share = sum(10 <= phase < 20 for phase in phases) / len(phases)
    assert share == pytest.approx((1 + 0.5 * 3 / math.pi) / 6, rel=0.03)  # mean of the sine around its peak: 3 / pi


def test_items_of_w_paper_are_log_normal_and_clipped() -> None:
    items = np.array([a.items for a in workload.poisson("m", 1000.0, 30.0, 1, workload.W_PAPER)])
    assert np.median(items) == 6
    assert (items.min(), items.max()) == (1, 32)
    assert np.log(items[(items > 2) & (items < 32)]).std() == pytest.approx(0.6, abs=0.1)


def test_sizes_do_not_change_the_times() -> None:
    plain = workload.poisson("m", 100.0, 10.0, 1)
    sized = workload.poisson("m", 100.0, 10.0, 1, workload.W_PAPER, workload.constant(128))
    pairs = list(zip(plain, sized, strict=True))
    assert all(a.at_ns == b.at_ns and b.length == 128 for a, b in pairs)


def test_merged_streams_are_sorted() -> None:
    streams = [workload.poisson(model, 50.0, 5.0, seed) for seed, model in enumerate("abc")]
    merged = list(workload.merge(*streams))
    assert all(a.at_ns <= b.at_ns for a, b in pairwise(merged))
    assert {arrival.model for arrival in merged} == set("abc")


def test_nothing_comes_at_a_rate_of_zero() -> None:
    assert list(workload.poisson("m", 0.0, 10.0, 1)) == []


def test_a_trace_is_read_with_its_optional_columns() -> None:
    lines = ["seconds,model,items,length", "0,a,3,128", "0.25,b,,"]
    assert list(workload.trace(lines)) == [Arrival(0, "a", 3, 128), Arrival(S // 4, "b", 1, 0)]
    assert list(workload.trace(["model,seconds", "a,1"])) == [Arrival(S, "a")]


def test_a_trace_that_was_written_reads_the_same() -> None:
    arrivals = list(workload.poisson("m", 100.0, 3.0, 1, workload.W_PAPER, workload.constant(128)))
    assert list(workload.trace(workload.write_trace(arrivals))) == arrivals


def test_a_trace_of_nothing_is_empty() -> None:
    assert list(workload.trace(["seconds,model"])) == []


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "line 1: seconds is missing; .*there is nothing"),
        (["time,model", "0,a"], "line 1: seconds is missing; the columns are seconds, model, items, length"),
        (["seconds", "0"], "line 1: model is missing"),
        (["seconds,model", "soon,a"], "line 2: seconds is 'soon', not a number"),
        (["seconds,model", ",a"], "line 2: seconds is '', not a number"),
        (["seconds,model", "inf,a"], "line 2: seconds is 'inf'"),
        (["seconds,model", "nan,a"], "line 2: seconds is 'nan'"),
        (["seconds,model,items", "0,a,0"], "line 2: items is 0, must be at least 1"),
        (["seconds,model,items", "0,a,2.5"], "line 2: items is '2.5', not a whole number"),
        (["seconds,model,items,length", "0,a,1,-3"], "line 2: length is -3, must be at least 0"),
        (["seconds,model", "0,"], "line 2: a query has a model"),
        (["seconds,model", "0"], "line 2: a query has a model"),
        (["seconds,model", "1,a", "", "0.5,a"], "line 4: 0.5 s is before the line above"),
        (["seconds,model", "-1,a"], "line 2: -1 s is before"),
        (["seconds,model", "0," + "a" * 200_000], "after line 1: field larger"),
    ],
)
def test_what_is_no_trace_is_refused_with_the_line(lines: list[str], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        list(workload.trace(lines))
