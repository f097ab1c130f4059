from __future__ import annotations

import math

import numpy as np
import pytest

from scheduler.steady import summary


def test_few_runs_are_not_steady() -> None:
    assert summary([5.0]).within == math.inf
    assert summary([5.0, 5.0, 5.0]).within == math.inf
    assert summary([5.0, 7.0]).median_ms == 6.0


def test_equal_runs_are_steady_and_have_no_outliers() -> None:
    found = summary([5.0] * 10)
    assert (found.median_ms, found.within, found.outliers, found.runs) == (5.0, 0.0, 0, 10)


def test_a_slow_run_is_told_apart_and_hardly_moves_the_median() -> None:
    found = summary([5.0, 5.1, 4.9, 5.0, 5.1, 4.9, 5.0, 5.0, 80.0])
    assert found.outliers == 1
    assert found.median_ms == pytest.approx(5.0)


def test_the_interval_holds_the_true_median_19_times_in_20() -> None:
    generator = np.random.default_rng(0)
    holds = []
    for _ in range(400):
        found = summary(list(np.exp(generator.normal(0, 0.3, 60))))
        holds.append(abs(found.median_ms - 1.0) <= 1.5 * found.within * found.median_ms)
    assert np.mean(holds) > 0.93


def test_more_runs_make_it_steadier() -> None:
    generator = np.random.default_rng(1)
    runs = list(generator.normal(10, 1, 400))
    assert summary(runs).within < summary(runs[:50]).within
