"""Mixes of models, lengths, bursts and overload: what becomes of queries, in the simulator, on measured A100 tables.

    make bench-overload                       prints the tables
    make bench-overload ARGS="--write"        also keeps them, in benchmarks/results/overload.md and overload.svg

W-slo: ParvaGPU's six scenarios (SC'24) at their stated rates, on the layouts of the optimal planner with shared
slices (those of benchmarks/plans.py). W-length: one text of 16 to 512 tokens a query, bert-base, two A100s of
3g+2g+1g+1g. W-paper: 1 to 32 items a query, the same layout. Service times are drawn around the tables (3 %, and 1 %
of the batches a quarter longer in the mean). Everything is as in the daemon: what the policy cannot serve within ten
SLOs is refused, and all that would be late where `strict` is asked for. Bursty: three times the rate in bursts of
half a second, every five seconds, each model by itself; diurnal: a sine, half up and down. The mean rate is the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import overload_text
from benchmarks.kept import Kept, Row, measure_all
from benchmarks.overload_text import LENGTH_LOADS, SCENARIOS
from scheduler import search
from scheduler.mix import ARRIVALS, Mix
from scheduler.policies.named import POLICIES
from scheduler.report import ModelReport
from scheduler.simulator import Noise
from server.simulate_setup import Asked, Setup, prepare

KEPT = Path("build/bench-overload.jsonl")
RESULTS = Path(__file__).parent / "results"
MIXED = ("pool", "elsa", "preba")
# With what is asked to be strict.
OVERLOADED = (("pool", False), ("pool", True), ("elsa", False), ("static", False))
LOADS = (0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0)
NOISE = Noise()
# A run has at least so many queries, and lasts for at least so many SLOs; one of W-slo, where SLOs are from a tenth of
# a second to six, for so many seconds, under overload for half of that.
QUERIES, SLOS, SECONDS = 15_000, 150, 10.0
NOTES = (
    """What is known of why goals are missed:

- Bursty and diurnal W-slo: the stated rates are 0.88 to 0.95 of the fluid bound; in a burst, or for half of a day, more
  comes than the slices can do, whatever the policy. What cannot be in time is refused at once, or late where there is
  time for it, and each model keeps its share.
- W-paper beyond load 2: the more there are to choose from, the more small queries are answered in time.
""",
)


@dataclass(frozen=True, slots=True)
class Case:
    """`workload`: S1 to S6, w-length, or w-paper with a model. `load`: of the fluid bound; 0: the stated rate."""

    workload: str
    arrivals: str
    policy: str
    strict: bool
    load: float
    seed: int


@cache
def _setup(workload: str) -> Setup:
    if workload in SCENARIOS:
        return prepare(Asked(workload="w-slo", scenario=workload))
    name, _, model = workload.partition(" ")
    return prepare(Asked(workload=name, model=model or None))


def measure(case: Case, queries: int) -> Row:
    """`good`: queries answered in time a second, as a share of the fluid bound; shares are of all that were sent."""
    begin = time.perf_counter()
    setup = _setup(case.workload)
    scene = setup.scene
    assert isinstance(scene.load, Mix)
    rate_per_s = case.load * setup.bound_per_s if case.load else setup.rate_per_s
    seconds = SLOS * max(scene.slo_ms.values()) / 1e3
    if case.workload in SCENARIOS:
        seconds = SECONDS
    lasting = int(rate_per_s * seconds)
    load = replace(scene.load, arrivals=case.arrivals)
    scene = replace(scene, load=load, queries=max(queries, lasting), noise=NOISE, strict=case.strict)
    report = scene.run(POLICIES[case.policy], rate_per_s, case.seed)
    models = list(report.models.values())
    sent = sum(model.sent for model in models)
    good = sum(model.within_slo * model.sent for model in models) / sent
    answered = sum(model.answered for model in models) / sent
    return {
        "rate_per_s": round(rate_per_s, 1),
        "of_bound": round(rate_per_s / setup.bound_per_s, 3),
        "queries": sent,
        "in_time": round(good, 5),
        "late": round(answered - good, 5),
        "refused": round(1 - answered, 5),
        "good": round(good * rate_per_s / setup.bound_per_s, 4),
        "worst": round(search.max_lateness(report, scene.slo_ms), 2),
        "waited_ms": round(max(model.refused_after_ms for model in models), 3),
        "models": {name: _of_model(model) for name, model in report.models.items()},
        "seconds": round(time.perf_counter() - begin, 1),
    }


def _of_model(model: ModelReport) -> list[float]:
    """In time, late, refused: shares of what was sent."""
    late = (model.answered - model.within_slo * model.sent) / model.sent
    return [round(model.within_slo, 5), round(late, 5), round(1 - model.answered / model.sent, 5)]


def mixed(seeds: Sequence[int]) -> Iterator[Case]:
    for seed in seeds:
        for policy in MIXED:
            for arrivals in ARRIVALS:
                for scenario in SCENARIOS:
                    yield Case(scenario, arrivals, policy, False, 0.0, seed)
                for load in LENGTH_LOADS:
                    yield Case("w-length", arrivals, policy, False, load, seed)


def overloaded(seeds: Sequence[int]) -> Iterator[Case]:
    for seed in seeds:
        for workload in overload_text.OVERLOADS:
            for policy, strict in OVERLOADED:
                for load in LOADS:
                    yield Case(workload, "poisson", policy, strict, load, seed)


def main(
    workload: Annotated[list[str] | None, typer.Option(help="Measure these only.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Measure these only.")] = None,
    arrivals: Annotated[list[str] | None, typer.Option(help="Measure these only.")] = None,
    seeds: int = 1,
    queries: Annotated[int, typer.Option(help="Of a run, at least.")] = QUERIES,
    jobs: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
    minutes: Annotated[float, typer.Option(help="Then it stops, and prints what there is.")] = float("inf"),
    take_over: Annotated[
        int, typer.Option(help="Runs of older code count, if so many of them, drawn by chance, are the same now.")
    ] = 0,
    write: Annotated[bool, typer.Option("--write", help="Keep the tables in benchmarks/results/overload.md.")] = False,
) -> None:
    """Measures what is missing, and prints all that is known."""
    kept = Kept(Case, (KEPT,), {"length": [queries, SLOS, SECONDS]}, POLICIES)
    for told in kept.take_over(partial(measure, queries=queries), take_over) if take_over else ():
        print(told)
    until = time.monotonic() + 60 * minutes
    for what, cases in (("overload", overloaded(range(seeds))), ("mixes", mixed(range(seeds)))):
        wanted = [
            case
            for case in cases
            if case.workload in (workload or [case.workload])
            and case.policy in (policy or [case.policy])
            and case.arrivals in (arrivals or [case.arrivals])
        ]
        measure_all(wanted, kept, lambda case: partial(measure, case, queries), jobs, until, what)
    everything = [*overloaded(range(seeds)), *mixed(range(seeds))]
    missing = sum(case not in kept.by_case for case in everything)
    state = f"**Not complete**: {missing} of {len(everything)} runs have not been made yet.\n" if missing else ""
    page = overload_text.text(kept.rows(), (__doc__ or "").split("\n\n")[-1].strip(), [state, *NOTES])
    print(page)
    if write:
        (RESULTS / "overload.md").write_text(page)
        (RESULTS / "overload.svg").write_text(overload_text.drawing(kept.rows()))


if __name__ == "__main__":
    typer.run(main)
