"""The exact planner: the published scenarios, what every plan must keep, small cases by brute force, refusals."""

from __future__ import annotations

import csv
import itertools
import re
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner import capacity, gangs, latency, optimal
from partitioner.catalog import GPU_MODELS
from partitioner.cuts import cuts
from partitioner.gangs import Gang, GangTable
from partitioner.geometry import parse_layout
from partitioner.optimal import Choices
from partitioner.plans import ModelDemand, Plan, PlanError
from scheduler import workload
from scheduler.simulator import SimSlice, simulate

A30, A100 = GPU_MODELS["A30-24GB"], GPU_MODELS["A100-80GB"]
TABLES = gangs.gang_tables(latency.shipped_measurements())
SCENARIOS = [f"S{number}" for number in range(1, 7)]


def scenario(name: str) -> list[ModelDemand]:
    text = files("partitioner").joinpath("data/slo_scenarios.csv").read_text()
    rows = [row for row in csv.DictReader(text.splitlines()) if row["scenario"] == name]
    return [ModelDemand(row["model"], float(row["rate_per_s"]), float(row["slo_ms"])) for row in rows]


def check(plan: Plan, demands: list[ModelDemand], exclusive: bool = False) -> None:
    """What every plan keeps, whatever was asked."""
    served = dict.fromkeys((demand.model for demand in demands), 0.0)
    slo_ms = {demand.model: demand.slo_ms for demand in demands}
    for layout in plan.layouts():
        parse_layout(layout, A100)
    for each in plan.slices:
        assert sum(share.share for share in each.models) <= 1 + 1e-6
        assert not exclusive or len(each.models) <= 1
        shortest = min((slo_ms[share.model] for share in each.models), default=0)
        for share in each.models:
            ms = TABLES[share.model].times_ms(each.gpcs, share.batch, share.processes)[-1]
            assert ms <= 0.55 * slo_ms[share.model] + 1e-6
            assert len(each.models) == 1 or ms <= max(0.5 * shortest, 0) + 1e-6 or slo_ms[share.model] == shortest
            served[share.model] += share.rate_per_s
    assert served == pytest.approx({demand.model: demand.rate_per_s for demand in demands}, rel=0.02)


@pytest.mark.parametrize(("name", "gpus"), list(zip(SCENARIOS, [2, 3, 5, 7, 12, 15], strict=True)))
def test_scenarios_with_a_slice_for_one_model(name: str, gpus: int) -> None:
    demands = scenario(name)
    plan = optimal.plan(demands, TABLES, A100, Choices(5, exclusive=True, slo_share=0.45))
    assert len(plan.gpus) == gpus
    check(plan, demands, exclusive=True)


@pytest.mark.parametrize(("name", "gpus"), list(zip(SCENARIOS, [1, 2, 4, 6, 12, 15], strict=True)))
def test_scenarios_with_shared_slices_take_fewer(name: str, gpus: int) -> None:
    demands = scenario(name)
    plan = optimal.plan(demands, TABLES, A100, Choices(5))
    assert len(plan.gpus) == gpus
    assert plan.bound_gpus <= gpus
    check(plan, demands)


def test_without_the_suspect_points_s6_takes_one_more() -> None:
    kept, _ = latency.without_suspects(latency.shipped_measurements())
    assert len(optimal.plan(scenario("S6"), gangs.gang_tables(kept), A100, Choices(5)).gpus) == 16


@pytest.mark.parametrize("name", ["S1", "S2", "S3"])
def test_a_plan_holds_in_a_simulation(name: str) -> None:
    demands = scenario(name)
    plan = optimal.plan(demands, TABLES, A100, Choices(5))
    slices = [
        SimSlice(
            f"{index}",
            each.gpcs,
            {
                share.model: TABLES[share.model].times_ms(each.gpcs, share.batch, share.processes)
                for share in each.models
            },
        )
        for index, each in enumerate(plan.slices)
    ]
    streams = [workload.poisson(each.model, each.rate_per_s, 5.0, seed) for seed, each in enumerate(demands)]
    report = simulate(slices, workload.merge(*streams), slo_ms={each.model: each.slo_ms for each in demands})
    assert report.worst_within_slo >= 0.99


def test_the_same_demand_gives_the_same_plan() -> None:
    plans = {str(optimal.plan(scenario("S3"), TABLES, A100, Choices(3)).to_json()["layout"]) for _ in range(3)}
    assert len(plans) == 1


DEMANDS = st.lists(
    st.tuples(st.sampled_from(sorted(TABLES)), st.floats(1, 2000), st.floats(60, 2000)),
    min_size=1,
    max_size=4,
    unique_by=lambda demand: demand[0],
).map(lambda rows: [ModelDemand(*row) for row in rows])


@settings(max_examples=10, deadline=None)
@given(DEMANDS, st.booleans(), st.sampled_from([1, 3]))
def test_every_plan_keeps_its_promises(demands: list[ModelDemand], exclusive: bool, processes: int) -> None:
    plan = optimal.plan(demands, TABLES, A100, Choices(processes, exclusive))
    check(plan, demands, exclusive)
    assert all(share.processes <= processes for each in plan.slices for share in each.models)
    assert len(plan.gpus) >= plan.bound_gpus - 1e-6


QUICKEST_MS = {
    model: min(gang.latency_ms for gangs_there in table.by_gpcs.values() for gang in gangs_there)
    for model, table in TABLES.items()
}


def test_many_rare_models_beside_a_busy_one_share_its_gpu() -> None:
    rates = dict.fromkeys(sorted(TABLES)[:11], 0.01) | {"resnet50": 200.0}
    demands = [ModelDemand(model, rate, 20 * QUICKEST_MS[model]) for model, rate in rates.items()]
    assert len(optimal.plan(demands, TABLES, A100).gpus) == 1


# By model: the power of ten of its rate, and its SLO as a multiple of the quickest batch.
UNEQUAL_DEMANDS = st.lists(
    st.tuples(st.sampled_from(sorted(TABLES)), st.floats(-2, 2.7), st.floats(5, 300)),
    min_size=1,
    max_size=11,
    unique_by=lambda demand: demand[0],
).map(lambda rows: [ModelDemand(model, 10**power, slo * QUICKEST_MS[model]) for model, power, slo in rows])


@settings(max_examples=8, deadline=None)
@given(UNEQUAL_DEMANDS, st.sampled_from([1, 3]))
def test_sharing_never_takes_more_gpus(demands: list[ModelDemand], processes: int) -> None:
    try:
        alone = optimal.plan(demands, TABLES, A100, Choices(processes, exclusive=True))
    except PlanError:
        return
    assert len(optimal.plan(demands, TABLES, A100, Choices(processes)).gpus) <= len(alone.gpus)


# Two models on slices of 1, 2 and 4 GPCs; queries per second of a slice, whatever the batch.
RATES = {"a": {1: 10, 2: 22, 4: 40}, "b": {1: 5, 2: 9, 4: 26}}
TOY = {
    model: GangTable({gpcs: (Gang(1, 1, 1e3 / rate),) for gpcs, rate in rates.items()})
    for model, rates in RATES.items()
}


def most_by_brute_force(need: dict[str, float], gpus: int) -> float:
    """The most that both rates can grow by: every multiset of layouts, every way to give its slices to two models."""
    sizes = [[placed.profile.gpcs for placed in layout] for layout in cuts(A30)]
    best = 0.0
    for layouts in itertools.combinations_with_replacement(sizes, gpus):
        slices = [gpcs for layout in layouts for gpcs in layout]
        for mask in range(2 ** len(slices)):
            a = sum(RATES["a"][gpcs] for bit, gpcs in enumerate(slices) if mask >> bit & 1)
            b = sum(RATES["b"][gpcs] for bit, gpcs in enumerate(slices) if not mask >> bit & 1)
            best = max(best, min(a / need["a"], b / need["b"]))
    return best


@settings(max_examples=25, deadline=None)
@given(st.floats(1, 50), st.floats(1, 30))
def test_exclusive_plans_are_optimal_by_brute_force(a: float, b: float) -> None:
    demands = [ModelDemand("a", a, 1e6), ModelDemand("b", b, 1e6)]
    plan = optimal.plan(demands, TOY, A30, Choices(1, exclusive=True, slo_share=0.5))
    most = [most_by_brute_force({"a": a, "b": b}, gpus) for gpus in (1, 2, 3)]
    assert len(plan.gpus) == 1 + sum(factor < 1 - 1e-9 for factor in most)
    if len(plan.gpus) <= 3:
        wanted = most[len(plan.gpus) - 1]
        rates = {"a": 0.0, "b": 0.0}
        for each in plan.slices:
            for share in each.models:
                rates[share.model] += RATES[share.model][each.gpcs]
        assert min(rates["a"] / a, rates["b"] / b) >= wanted * 0.99


def test_queries_of_several_items_need_slices_that_are_quick_enough() -> None:
    # 16 items of resnet50 take 60 ms on 1g and 13 ms on 7g: within half of 40 ms only larger slices do.
    demand = ModelDemand("resnet50", 50, 40, {16: 1})
    plan = optimal.plan([demand], TABLES, A100, Choices())
    for each in plan.slices:
        for share in each.models:
            assert TABLES["resnet50"].times_ms(each.gpcs, share.batch, 1)[15] <= 0.55 * 40
    assert min(share.batch for each in plan.slices for share in each.models) >= 16


def test_bursts_need_more_the_shorter_the_slo() -> None:
    gang = Gang(8, 1, 10.0)

    def worth(slo_ms: float, rate: float) -> float:
        (query_class,) = capacity.query_classes([ModelDemand("m", rate, slo_ms)], bursts=True)
        return query_class.served_per_s(gang) / gang.queries_per_s(1)

    assert worth(20, 100) < worth(40, 100) < worth(1000, 100) < 1
    assert worth(40, 100) < worth(40, 10_000)
    assert worth(10, 100) == 0


@pytest.mark.parametrize(
    ("demands", "choices", "message"),
    [
        ([], Choices(), "there is no demand"),
        ([ModelDemand("nobody", 1, 1)], Choices(), "no latency table for nobody"),
        (
            [ModelDemand("vgg16", 10, 100), ModelDemand("bert", 10, 5)],
            Choices(),
            "no number of A100-80GB meets this demand: bert needs at least .* ms for a query of 1 item .* within reach",
        ),
        ([ModelDemand("bert", 10, 5000, {4096: 1})], Choices(), "bert was never measured with 4096 items"),
        (
            [ModelDemand("vgg16", 9000, 100), ModelDemand("bert", 10, 1000)],
            Choices(gpus=2),
            "2 GPUs of A100-80GB serve .*% of this demand at most; .* GPUs would do. What binds is vgg16",
        ),
        ([ModelDemand("vgg16", 1, 100)], Choices(slo_share=1.5), "between 0 and 1"),
        ([ModelDemand("vgg16", 1, 100)], Choices(gpus=0), "at least one GPU"),
        ([ModelDemand("vgg16", 1, 100)], Choices(max_processes=0), "at least one process"),
    ],
)
def test_what_nothing_can_meet_is_refused(demands: list[ModelDemand], choices: Choices, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        optimal.plan(demands, TABLES, A100, choices)


def test_the_slo_that_is_told_to_be_within_reach_is() -> None:
    """Large queries that are rare, and come in bursts, leave no time to wait for the slice that serves them."""

    def demand(slo_ms: float) -> list[ModelDemand]:
        return [ModelDemand("resnet50", 100, slo_ms, {1: 0.5, 8: 0.4, 24: 0.08, 32: 0.02})]

    for slo_ms in (26.7, 10):
        with pytest.raises(PlanError, match=r"resnet50 needs at least .* ms for a query of 32") as refused:
            optimal.plan(demand(slo_ms), TABLES, A100, Choices())
        said = re.search(r"an SLO of (\d+) ms is within reach", str(refused.value))
        assert said is not None
        assert optimal.plan(demand(float(said[1])), TABLES, A100, Choices()).gpus


def test_too_much_can_be_planned_for_where_that_is_wanted() -> None:
    demands = [ModelDemand("vgg16", 9000, 100), ModelDemand("bert", 10, 1000)]
    plan = optimal.plan(demands, TABLES, A100, Choices(gpus=2, overload=True))
    assert {share.model for each in plan.slices for share in each.models} == {"vgg16", "bert"}
