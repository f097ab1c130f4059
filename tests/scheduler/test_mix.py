from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from scheduler import workload
from scheduler.mix import ARRIVALS, Mix, Stream, Trace
from scheduler.workload import NS_PER_S, Arrival

TWO = (Stream("a", 0.75), Stream("b", 0.25, workload.constant(4)))


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_a_mix_has_the_rate_and_shares_asked_for_and_the_seed_repeats(arrivals: str) -> None:
    mix = Mix(TWO, arrivals)
    drawn = mix.draw(100.0, 6000, 1)
    counts = Counter(arrival.model for arrival in drawn)
    seconds = drawn[-1].at_ns / NS_PER_S
    assert len(drawn) / seconds == pytest.approx(100, rel=0.15)
    assert counts["a"] / len(drawn) == pytest.approx(0.75, abs=0.03)
    assert all(one.at_ns <= other.at_ns for one, other in pairwise(drawn))
    assert drawn == mix.draw(100.0, 6000, 1) != mix.draw(100.0, 6000, 2)
    assert mix.items == {"a": 1.0, "b": 4.0}


def test_a_rare_model_makes_the_run_longer_but_not_without_end() -> None:
    assert len(Mix([Stream("a", 0.9), Stream("b", 0.1)]).draw(100.0, 1000, 1)) == pytest.approx(3000, rel=0.1)
    assert len(Mix([Stream("a", 0.99), Stream("b", 0.01)]).draw(100.0, 1000, 1)) == pytest.approx(4000, rel=0.1)


def test_bursty_runs_have_several_bursts() -> None:
    assert Mix([Stream("a")], "bursty").draw(1000.0, 100, 1)[-1].at_ns / NS_PER_S > 20


def test_a_trace_is_stretched_to_another_rate() -> None:
    trace = Trace([Arrival(5 * NS_PER_S, "a", 2), Arrival(6 * NS_PER_S, "b"), Arrival(7 * NS_PER_S, "a", 4)])
    assert trace.rate_per_s == 1.0
    assert trace.draw(1.0, 10, 0) == [Arrival(0, "a", 2), Arrival(NS_PER_S, "b"), Arrival(2 * NS_PER_S, "a", 4)]
    assert [arrival.at_ns for arrival in trace.draw(2.0, 10, 0)] == [0, NS_PER_S // 2, NS_PER_S]
    assert trace.items == {"a": 3.0, "b": 1.0}
    assert trace.shares == {"a": pytest.approx(2 / 3), "b": pytest.approx(1 / 3)}
    assert trace.lengths == {"a": {0: 1.0}, "b": {0: 1.0}}


def test_a_trace_of_one_query_or_of_one_moment_has_a_rate() -> None:
    assert Trace([Arrival(5, "a")]).draw(2.0, 1, 0) == [Arrival(0, "a")]
    assert len(Trace([Arrival(5, "a"), Arrival(5, "a")]).draw(2.0, 1, 0)) == 2


def test_lengths_are_shares_of_the_items() -> None:
    trace = Trace([Arrival(0, "a", 3, 10), Arrival(1, "a", 1, 20)])
    assert trace.lengths == {"a": {10: 0.75, 20: 0.25}}
    drawn = Mix([Stream("m", 1.0, None, workload.W_LENGTH)]).lengths["m"]
    assert (min(drawn), max(drawn)) == (16, 512)
    assert sum(drawn.values()) == pytest.approx(1.0)
    assert sum(share for length, share in drawn.items() if length <= 90) == pytest.approx(0.5, abs=0.02)
