"""`migserve plan`: reads a demand and latency tables, plans, and prints, draws or writes what came out."""

from __future__ import annotations

import csv
import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from partitioner import capacity, gangs, latency, optimal, paris
from partitioner.catalog import GPU_MODELS
from partitioner.cuts import slice_profiles
from partitioner.demand import job_demand
from partitioner.geometry import GpuModel
from partitioner.latency import LatencyTableError, Measurement
from partitioner.optimal import Choices
from partitioner.plans import DemandError, ModelDemand, Plan, PlanError
from partitioner.programme import InfeasibleError
from server import picture, plan_drawing, progress
from server.out_file import trouble_with_drawing

IMPOSSIBLE, USAGE = 1, 2
PLANNERS = ("optimal", "paris")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
COLUMNS = ("model", "rate_per_s", "slo_ms")


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asked for."""

    demand: Path | None
    scenario: str | None
    planner: str
    gpu: str
    latency_table: Path | None
    skip_suspects: bool
    as_json: bool
    out: Path | None
    choices: Choices
    jobs: Sequence[str] = ()


class UsageError(ValueError):
    """Something asked for that does not exist; the message suggests what does."""


def run(request: Request) -> int:
    """Plans; returns the exit code: 0, 1 if nothing can meet the demand, 2 for what cannot be read or is unknown."""
    if request.out is not None and (trouble := trouble_with_drawing(request.out)):
        return complain(f"cannot draw to {request.out}: {trouble}", USAGE)
    try:
        plan, gpu = _plan(request)
    except (UsageError, DemandError, LatencyTableError) as error:
        return complain(str(error), USAGE)
    except PlanError as error:
        return complain(str(error), IMPOSSIBLE)
    if request.as_json:
        print(json.dumps(plan.to_json(), indent=2))
    else:
        Console(highlight=False).print(picture.plan(plan, gpu))
    if request.out is not None:
        try:
            plan_drawing.write(plan, gpu, request.out)
        except (OSError, ValueError) as error:
            return complain(f"cannot draw to {request.out}: {error}", USAGE)
    return 0


def read_demand(path: Path | None, scenario: str | None) -> list[ModelDemand]:
    """The demand of a CSV file, or one of the shipped scenarios where no file is given.

    Columns: model, rate_per_s, slo_ms; `scenario` where the file has several; `items` for queries of more than one
    item, such as `1:0.7 4:0.3` (shares of the queries). Raises DemandError, naming the line; UsageError for an unknown
    scenario.
    """
    origin, text = _demand_text(path)
    rows = list(csv.DictReader(text.splitlines()))
    missing = [column for column in COLUMNS if rows and column not in rows[0]]
    if missing or not rows:
        wanted = ",".join(COLUMNS)
        raise DemandError(
            f"{origin}: expected CSV with the columns {wanted}" + (f"; {missing[0]} is missing" if missing else "")
        )
    chosen = _of_scenario(list(enumerate(rows, start=2)), scenario, origin)
    demands = [_model_demand(row, f"{origin}, line {line}") for line, row in chosen]
    twice = [demand.model for index, demand in enumerate(demands) if demand.model in [d.model for d in demands[:index]]]
    if twice:
        raise DemandError(f"{origin}: {twice[0]} is there twice; add up its rates, or pick a scenario with --scenario")
    return demands


def _demand_text(path: Path | None) -> tuple[str, str]:
    if path is None:
        return "slo_scenarios.csv", files("partitioner").joinpath("data/slo_scenarios.csv").read_text()
    try:
        return str(path), path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DemandError(f"demand {path}: {getattr(error, 'strerror', None) or error}") from error


def _of_scenario(
    rows: list[tuple[int, dict[str, str]]], scenario: str | None, origin: str
) -> list[tuple[int, dict[str, str]]]:
    names = list(dict.fromkeys(row.get("scenario") or "" for _, row in rows))
    if scenario is None:
        if len(names) > 1:
            raise UsageError(f"{origin} has several scenarios: pick one with --scenario, of {', '.join(names)}")
        return rows
    if names == [""]:
        raise UsageError(f"{origin} has no column scenario: leave out --scenario")
    if scenario not in names:
        raise UsageError(f"{origin} has no scenario {scenario!r}; {nearest(scenario, names)}")
    return [(line, row) for line, row in rows if row.get("scenario") == scenario]


def _model_demand(row: Mapping[str, str], where: str) -> ModelDemand:
    if not row["model"] or None in row or None in row.values():
        raise DemandError(f"{where}: {len(COLUMNS)} or more values expected, as in the header: {list(row.values())}")
    numbers = {}
    for column in COLUMNS[1:]:
        try:
            numbers[column] = float(row[column])
        except ValueError as error:
            raise DemandError(f"{where}: {column} is {row[column]!r}, not a number") from error
    try:
        items = {int(count): float(share) for count, _, share in _pairs(row.get("items") or "1:1")}
        return ModelDemand(row["model"], numbers["rate_per_s"], numbers["slo_ms"], items)
    except DemandError as error:
        raise DemandError(f"{where}: {error}") from error
    except ValueError as error:
        raise DemandError(f"{where}: items is {row.get('items')!r}, not of the form 1:0.7 4:0.3") from error


def _pairs(text: str) -> list[tuple[str, str, str]]:
    return [pair.partition(":") for pair in text.split()]


def _plan(request: Request) -> tuple[Plan, GpuModel]:
    if request.planner not in PLANNERS:
        raise UsageError(f"no planner is called {request.planner!r}; there are {' and '.join(PLANNERS)}")
    if request.gpu not in GPU_MODELS:
        raise UsageError(f"no GPU is called {request.gpu!r}; {nearest(request.gpu, list(GPU_MODELS))}")
    gpu = GPU_MODELS[request.gpu]
    demands = read_demand(request.demand, request.scenario)
    measurements, notes = measured(request.latency_table, request.skip_suspects, gpu)
    elsewhere = _measured_elsewhere(measurements, demands, request.jobs, gpu)
    tables = gangs.gang_tables(measurements)
    if request.jobs:
        if request.planner != "optimal":
            raise UsageError("--job is for the optimal planner: PARIS sizes slices by online queries")
        for model, items, within_s in map(_job, request.jobs):
            if model not in tables:
                raise UsageError(f"no latency table for {model!r}; {nearest(model, sorted(tables))}")
            largest = max(gang.batch for gangs_of in tables[model].by_gpcs.values() for gang in gangs_of)
            demand = job_demand(model, items, within_s, largest)
            demands.append(demand)
            tables[demand.model] = tables[model]
    unknown = [demand.model for demand in demands if demand.model not in tables]
    if unknown:
        raise UsageError(f"no latency table for {unknown[0]!r}; {nearest(unknown[0], sorted(tables))}")
    begin = time.perf_counter()
    with quiet() as say:
        if request.planner == "optimal":
            plan = optimal.plan(demands, tables, gpu, request.choices, say)
        else:
            plan = _paris(demands, measurements, gpu, request.choices)
    seconds = time.perf_counter() - begin
    explanation = (*plan.explanation, *notes)
    return replace(plan, solve_seconds=seconds, explanation=explanation, warnings=elsewhere), gpu


def _measured_elsewhere(
    measurements: Sequence[Measurement], demands: Sequence[ModelDemand], jobs: Sequence[str], gpu: GpuModel
) -> tuple[str, ...]:
    """The warning of those latencies that the plan is made of."""
    models = {each.model for each in demands} | {job.partition(",")[0] for job in jobs}
    warning = latency.measured_elsewhere([each for each in measurements if each.model in models], gpu.name)
    return (warning,) if warning else ()


def _job(text: str) -> tuple[str, float, float]:
    """MODEL,ITEMS,DEADLINE. Raises UsageError."""
    model, _, rest = text.partition(",")
    items, _, deadline = rest.partition(",")
    try:
        seconds = float(deadline[:-1]) * _SECONDS[deadline[-1:]]
        if model and float(items) > 0 and seconds > 0:
            return model, float(items), seconds
    except (ValueError, KeyError):
        pass
    raise UsageError(f"--job {text!r} is not of the form MODEL,ITEMS,DEADLINE, such as bert,200000,8h")


def _paris(
    demands: Sequence[ModelDemand], measurements: Sequence[Measurement], gpu: GpuModel, choices: Choices
) -> Plan:
    singles = {each.model: latency.single_process(measurements, each.model) for each in demands}
    plan = paris.plan(demands, singles, gpu, choices.gpus)
    sizes = [profile.gpcs for profile in slice_profiles(gpu)]
    tables = gangs.gang_tables(measurements)
    can = capacity.capacities(capacity.query_classes(demands), tables, sizes, 1, 1.0)
    try:
        return replace(plan, bound_gpus=capacity.fluid_bound(can, gpu))
    except InfeasibleError:
        note = "No slice size meets every SLO: PARIS does not look at SLOs, so there is no bound to compare with."
        return replace(plan, explanation=(*plan.explanation, note))


def measured(table: Path | None, skip_suspects: bool, gpu: GpuModel) -> tuple[list[Measurement], list[str]]:
    """Rows of the latency table that are about this GPU, or else all of them; and what is to be said of them."""
    found = latency.shipped_measurements() if table is None else latency.read_measurements(table)
    notes = []
    of_gpu = [each for each in found if each.gpu in ("", gpu.name)]
    predicted = sum(latency.is_predicted(each.source) for each in of_gpu or found)
    if predicted:
        notes.append(f"{predicted} of {len(of_gpu or found)} points of the latency table are predicted, not measured.")
    kept, suspect = latency.without_suspects(of_gpu or found)
    if skip_suspects:
        notes.append(f"{len(suspect)} suspect points of the latency table were left out.")
        return kept, notes
    if suspect:
        notes.append(f"The latency table has {len(suspect)} suspect points; --skip-suspects leaves them out.")
    return of_gpu or found, notes


@contextmanager
def quiet() -> Iterator[Callable[[str], None]]:
    """Shows what is being tried. HiGHS prints a line of its own now and then: kept off stdout."""
    sys.stdout.flush()
    stdout = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        with progress.status("planning") as say:
            yield say
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def nearest(name: str, names: Sequence[str]) -> str:
    """What to say of a name that there is not, after a semicolon."""
    folded = {each.lower(): each for each in names}
    near = [folded[each] for each in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)]
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"


def complain(message: str, code: int) -> int:
    """In red on stderr; returns the exit code that is to be."""
    Console(stderr=True, highlight=False).print(message, style="red", markup=False, soft_wrap=True)
    return code
