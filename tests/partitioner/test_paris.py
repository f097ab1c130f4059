"""PARIS line by line: a worked example on an A30 (slices of 1, 2 and 4 GPCs), then ResNet-50 and random demands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner import latency, paris
from partitioner.catalog import GPU_MODELS
from partitioner.cuts import cuts, layout_counts
from partitioner.geometry import parse_layout
from partitioner.latency import LatencyTable
from partitioner.plans import ModelDemand, PlanError

A30, A100 = GPU_MODELS["A30-24GB"], GPU_MODELS["A100-80GB"]

# Throughput of 1g: .10 .125 .125 .125 items a ms, of 2g: .12 .18 .20 .20, of 4g: .125 .20 .32 .40.
TABLE = LatencyTable(
    {
        1: {1: 10.0, 2: 16.0, 4: 32.0, 8: 64.0},
        2: {1: 1 / 0.12, 2: 2 / 0.18, 4: 20.0, 8: 40.0},
        4: {1: 8.0, 2: 10.0, 4: 12.5, 8: 20.0},
    }
)
ITEMS = {1: 0.5, 2: 0.25, 4: 0.25}


def test_line_1_the_knee_is_the_first_batch_with_four_fifths_of_the_peak_throughput() -> None:
    # 1g: .10 of .125 is just four fifths; 2g: .18 of .20; 4g: .32 of .40, but the largest takes all up to Bmax.
    assert paris.knees(TABLE, [1, 2, 4], max_batch=8) == {1: 1, 2: 2, 4: 8}


def test_line_1_where_utilisation_was_measured_it_decides() -> None:
    utilisation = {1: {1: 0.5, 2: 0.8, 4: 0.9}, 2: {1: 0.2, 2: 0.4, 4: 0.79}}
    assert paris.knees(TABLE, [1, 2, 4], 8, utilisation) == {1: 2, 2: 8, 4: 8}


def test_line_2_each_size_serves_the_batches_between_the_knees() -> None:
    assert paris.segments({1: 1, 2: 2, 4: 8}) == {1: range(1, 2), 2: range(2, 3), 4: range(3, 9)}


def test_line_3_busy_time_per_query_is_the_batches_share_times_its_latency() -> None:
    segments = paris.segments({1: 1, 2: 2, 4: 8})
    times = {gpcs: latency.per_batch(TABLE.points(gpcs), 8) for gpcs in (1, 2, 4)}
    busy = paris.busy_ms(segments, ITEMS, times)
    assert busy == pytest.approx({1: 0.5 * 10.0, 2: 0.25 * 2 / 0.18, 4: 0.25 * 12.5})


def test_line_4_counts_are_in_proportion_and_use_all_gpcs() -> None:
    # R = 5, 2.5, 2: the sum of k R is 5 + 5 + 8 = 18, so 36 GPCs are 2 for each.
    counts = paris.real_counts({1: 5.0, 2: 2.5, 4: 2.0}, gpcs=36)
    assert counts == pytest.approx({1: 10.0, 2: 5.0, 4: 4.0})
    assert sum(gpcs * count for gpcs, count in counts.items()) == pytest.approx(36)


@pytest.mark.parametrize(
    ("counts", "gpus", "expected"),
    [
        ({1: 4.0, 2: 2.0, 4: 1.0}, 3, ["4g", "2g+2g", "1g+1g+1g+1g"]),  # whole already
        ({1: 2.0, 2: 2.8, 4: 1.1}, 3, ["4g", "2g+2g", "2g+1g+1g"]),  # the remainder of 2g is rounded up, of 4g down
        ({1: 7.9, 2: 1.7, 4: 0.2}, 3, ["4g", "2g+1g+1g", "1g+1g+1g+1g"]),  # one of the largest size used is kept
        ({1: 0.0, 2: 2.0, 4: 0.0}, 1, ["2g+2g"]),
        ({1: 0.3, 4: 0.1}, 1, ["4g"]),
    ],
)
def test_line_5_counts_are_rounded_to_legal_layouts(counts: dict[int, float], gpus: int, expected: list[str]) -> None:
    layouts = paris.rounded(counts, A30, gpus)
    names = ["+".join(f"{placed.profile.gpcs}g" for placed in layout) for layout in layouts]
    assert sorted(names) == sorted(expected)


@given(
    st.dictionaries(st.sampled_from([1, 2, 3, 4, 7]), st.floats(0.01, 30), min_size=1),
    st.integers(1, 8),
)
def test_rounding_keeps_the_largest_size_used(counts: dict[int, float], gpus: int) -> None:
    layouts = paris.rounded(counts, A100, gpus)
    assert len(layouts) == gpus
    assert all(layout in cuts(A100) for layout in layouts)
    assert any(max(counts) in dict(layout_counts(layout)) for layout in layouts)


@given(
    st.lists(st.sampled_from(range(12)), min_size=1, max_size=6),
)
def test_counts_that_are_whole_and_fit_are_kept_in_gpcs(chosen: list[int]) -> None:
    """Counts that some legal layouts have: what is chosen overshoots them by no more than one GPU."""
    wanted: dict[int, float] = {}
    for index in chosen:
        for gpcs, count in layout_counts(cuts(A100)[index]):
            wanted[gpcs] = wanted.get(gpcs, 0) + count
    got = dict.fromkeys(wanted, 0.0)
    for layout in paris.rounded(wanted, A100, len(chosen)):
        for gpcs, count in layout_counts(layout):
            got[gpcs] = got.get(gpcs, 0) + count
    assert sum(gpcs * max(0.0, count - wanted.get(gpcs, 0)) for gpcs, count in got.items()) <= 7


def test_resnet50s_knees_are_made_monotone() -> None:
    table = latency.shipped("resnet50")
    measured = {gpcs: latency.measured_knee(table.points(gpcs)) for gpcs in (1, 2, 3, 4, 7)}
    assert measured == {1: 8, 2: 8, 3: 16, 4: 8, 7: 16}
    assert paris.knees(table, [1, 2, 3, 4, 7], 32) == {1: 8, 2: 8, 3: 16, 4: 16, 7: 32}
    segments = paris.segments({1: 8, 2: 8, 3: 16, 4: 16, 7: 32})
    assert [len(segments[gpcs]) for gpcs in (1, 2, 3, 4, 7)] == [8, 0, 8, 0, 16]


@pytest.mark.parametrize("model", ["resnet50", "mobilenetv2", "vgg16"])
def test_small_queries_get_small_slices_and_large_ones_large(model: str) -> None:
    tables = {model: latency.shipped(model)}
    small = paris.plan([ModelDemand(model, 100, 200, {1: 1, 2: 1})], tables, A100, gpus=2)
    assert small.layouts() == ["+".join(["1g.10gb"] * 7)] * 2
    large = paris.plan([ModelDemand(model, 100, 200, {16: 1, 24: 1, 32: 1})], tables, A100, gpus=2)
    assert min(each.gpcs for each in large.slices) >= 3
    assert "7g.80gb" in large.layouts()


def test_several_models_get_gpcs_by_their_share_of_the_work() -> None:
    tables = {"a": TABLE, "b": TABLE}
    demands = [ModelDemand("a", 300, 100, {1: 1}), ModelDemand("b", 12, 100, {8: 1})]
    # a: 300/s * 10 ms on 1g = 3 GPCs of work; b: 12/s * 20 ms on 4g = 0.96 GPCs. 16 GPCs: 12.1 x 1g, 0.97 x 4g.
    plan = paris.plan(demands, tables, A30, gpus=4)
    assert sorted(each.gpcs for each in plan.slices) == [1] * 12 + [4]
    ones = [share for each in plan.slices if each.gpcs == 1 for share in each.models if share.model == "a"]
    assert sum(share.rate_per_s for share in ones) == pytest.approx(300)
    assert sum(share.share for share in ones) == pytest.approx(3.0)


def test_without_gpus_as_many_as_keep_the_slices_four_fifths_busy() -> None:
    plan = paris.plan([ModelDemand("a", 700, 100)], {"a": TABLE}, A30)
    assert len(plan.gpus) == 3  # 7 GPCs of work / 0.8 / 4
    assert all(parse_layout(layout, A30) for layout in plan.layouts())


@given(
    st.dictionaries(st.integers(1, 40), st.floats(0.1, 1.0), min_size=1, max_size=6),
    st.floats(1, 2000),
    st.integers(1, 4),
    st.sampled_from(["A100-80GB", "A30-24GB", "H200-141GB", "RTX-PRO-6000-96GB"]),
)
def test_every_demand_gets_a_legal_layout_that_all_its_work_is_divided_over(
    items: dict[int, float], rate: float, gpus: int, name: str
) -> None:
    gpu = GPU_MODELS[name]
    plan = paris.plan([ModelDemand("m", rate, 100, items)], {"m": latency.shipped("vgg16")}, gpu, gpus)
    assert len(plan.gpus) == gpus
    for layout in plan.layouts():
        parse_layout(layout, gpu)
    assert sum(share.rate_per_s for each in plan.slices for share in each.models) == pytest.approx(rate)


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(PlanError, match="no demand"):
        paris.plan([], {}, A100)
    with pytest.raises(PlanError, match="no latency table for nobody; there are a"):
        paris.plan([ModelDemand("nobody", 1, 1)], {"a": TABLE}, A100)
