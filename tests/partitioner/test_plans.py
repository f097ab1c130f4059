from __future__ import annotations

import json

import pytest

from partitioner.plans import (
    DemandError,
    ModelDemand,
    ModelShare,
    Plan,
    PlanError,
    PlannedSlice,
    plan_from_json,
)

PLAN = Plan(
    gpus=(
        (
            PlannedSlice("4g.40gb", 0, 4, (ModelShare("a", 8, 2, 10.5, 0.25), ModelShare("b", 1, 1, 3.0, 0.5))),
            PlannedSlice("3g.40gb", 4, 3),
        ),
        (PlannedSlice("7g.80gb", 0, 7, (ModelShare("a", 16, 1, 20.0, 0.75),)),),
    ),
    bound_gpus=1.25,
    solve_seconds=0.5,
    explanation=("because",),
    warnings=("beware",),
)


def test_json_is_as_documented() -> None:
    assert json.loads(json.dumps(PLAN.to_json())) == {
        "gpus": 2,
        "gpcs": 11,
        "layout": [
            [
                {
                    "mig_profile": "4g.40gb",
                    "start": 0,
                    "models": [
                        {"model": "a", "batch": 8, "processes": 2, "rate_per_s": 10.5, "share": 0.25},
                        {"model": "b", "batch": 1, "processes": 1, "rate_per_s": 3.0, "share": 0.5},
                    ],
                },
                {"mig_profile": "3g.40gb", "start": 4, "models": []},
            ],
            [
                {
                    "mig_profile": "7g.80gb",
                    "start": 0,
                    "models": [{"model": "a", "batch": 16, "processes": 1, "rate_per_s": 20.0, "share": 0.75}],
                }
            ],
        ],
        "bound_gpus": 1.25,
        "solve_seconds": 0.5,
        "explanation": ["because"],
        "warnings": ["beware"],
    }


def test_a_plan_comes_back_from_its_json() -> None:
    assert plan_from_json(json.loads(json.dumps(PLAN.to_json()))) == PLAN


@pytest.mark.parametrize("data", [{}, {"layout": [[{}]]}, {**PLAN.to_json(), "layout": [[{"mig_profile": "x"}]]}])
def test_what_is_no_plan_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="not a plan"):
        plan_from_json(data)


def test_layouts_are_as_parse_layout_reads_them() -> None:
    assert PLAN.layouts() == ["4g.40gb+3g.40gb", "7g.80gb"]


def test_shares_of_items_add_up_to_one() -> None:
    demand = ModelDemand("m", 10, 100, {1: 3, 4: 1})
    assert demand.items == {1: 0.75, 4: 0.25}
    assert demand.items_per_query == 1.75


@pytest.mark.parametrize(
    ("rate", "slo", "items", "message"),
    [
        (0, 100, {1: 1}, "rate_per_s must be a positive number, not 0"),
        (float("nan"), 100, {1: 1}, "rate_per_s"),
        (1, float("inf"), {1: 1}, "slo_ms must be a positive number, not inf"),
        (1, -1, {1: 1}, "slo_ms"),
        (1, 1, {}, "items per query"),
        (1, 1, {0: 1}, "items per query"),
        (1, 1, {1: -1, 2: 2}, "items per query"),
    ],
)
def test_demands_that_make_no_sense_are_refused(rate: float, slo: float, items: dict[int, float], message: str) -> None:
    with pytest.raises(DemandError, match=message):
        ModelDemand("m", rate, slo, items)
