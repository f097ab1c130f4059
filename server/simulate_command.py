"""`migserve simulate`: policies in the simulator, in figures or as a report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from partitioner.geometry import IllegalLayoutError
from partitioner.latency import LatencyTableError
from partitioner.plans import DemandError, PlanError
from scheduler import search
from scheduler.policies.named import POLICIES
from scheduler.report import Report
from scheduler.workload import TraceError
from server import picture, progress, simulate_report
from server.out_file import trouble_with
from server.plan_command import IMPOSSIBLE, USAGE, UsageError, complain
from server.simulate_outcome import Outcome, above_bound, to_json
from server.simulate_report import Detail
from server.simulate_setup import Asked, Setup, prepare

COLUMNS = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
GOALS = {"p95": 0.95, "p99": 0.99}
# The loads of the report's curves, as shares of the fluid bound.
LOADS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
# A seed of the curves takes so many runs, a search so many probes.
SEEDS_OF_SEARCH = 3
BAR_CHARS = 40


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asked for. `policies`: names, `all`, or none for what there is by default."""

    asked: Asked
    policies: Sequence[str]
    rate_per_s: float | None
    find_max: str | None
    seed: int
    seeds: int | None
    as_json: bool
    out: Path | None


def run(request: Request) -> int:
    """Simulates; returns the exit code: 0, 1 if no plan meets the demand, 2 for what cannot be read or is unknown."""
    try:
        policies = _policies(request)
        _check(request)
        setup = prepare(request.asked)
    except (UsageError, DemandError, LatencyTableError, IllegalLayoutError, TraceError) as error:
        return complain(str(error), USAGE)
    except PlanError as error:
        return complain(str(error), IMPOSSIBLE)
    with progress.bar(*COLUMNS) as shown:
        bar = _Bar(shown, _runs(request, len(policies)))
        outcomes = [_outcome(request, setup, policy, bar) for policy in policies]
        details = _details(request, setup, outcomes, bar) if request.out else []
    if request.as_json:
        found = [to_json(outcome, setup) for outcome in outcomes]
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
    else:
        picture.console().print(_shown(outcomes, setup))
    if request.out is not None:
        try:
            request.out.write_text(simulate_report.page(setup, outcomes, details))
        except OSError as error:
            return complain(f"cannot write the report {request.out}: {error.strerror}", USAGE)
        Console(stderr=True, highlight=False).print(f"the report is in {request.out}", markup=False)
    return 0


def _policies(request: Request) -> list[str]:
    names = list(dict.fromkeys(request.policies))
    if "all" in names:
        return list(POLICIES)
    for name in names:
        if name not in POLICIES:
            raise UsageError(f"no policy is called {name!r}; there are {', '.join(POLICIES)}, or all")
    ours = next(iter(POLICIES))
    # A curve says little without another one beside it.
    return names or ([ours, "elsa"] if request.out else [ours])


def _check(request: Request) -> None:
    if request.find_max is not None and request.find_max not in GOALS:
        raise UsageError(f"--find-max takes {' or '.join(GOALS)}, not {request.find_max!r}")
    if request.find_max is not None and request.rate_per_s is not None:
        raise UsageError("--rate simulates one rate, --find-max looks for the highest: leave out one of them")
    if request.find_max is not None and request.asked.strict:
        raise UsageError("--find-max counts a rate only if every query is answered: leave out --strict")
    if request.out is not None and request.out.suffix not in (".html", ".htm"):
        raise UsageError(f"--out {request.out}: the report is a page, its name must end in .html")
    if request.out is not None and (trouble := trouble_with(request.out)):
        raise UsageError(f"cannot write the report {request.out}: {trouble}")


# ---- simulating ----


class _Bar:
    """One for everything that is to be simulated, whatever the policies and seeds."""

    def __init__(self, shown: Progress, runs: int) -> None:
        self._progress = shown
        self._task = shown.add_task("simulating", total=runs)

    def says(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def advance(self) -> None:
        self._progress.advance(self._task)


def _runs(request: Request, policies: int) -> int:
    of_outcome = len(_seeds(request)) * (search.STEPS if request.find_max else 1)
    of_details = len(LOADS) + 1 if request.out else 0
    return policies * (of_outcome + of_details)


def _seeds(request: Request) -> list[int]:
    count = request.seeds or (SEEDS_OF_SEARCH if request.find_max else 1)
    return list(range(request.seed, request.seed + count))


def _outcome(request: Request, setup: Setup, policy: str, bar: _Bar) -> Outcome:
    seeds = _seeds(request)
    if request.find_max is None:
        rate_per_s = request.rate_per_s or setup.rate_per_s
        bar.says(f"{policy} at {rate_per_s:.0f}/s")
        reports = [_run(setup, policy, rate_per_s, seed, bar) for seed in seeds]
        return Outcome(policy, rate_per_s, seeds, [rate_per_s] * len(seeds), reports)
    bar.says(f"{policy}: highest rate")
    share, bound_per_s = GOALS[request.find_max], setup.bound_per_s
    found = [
        search.highest_rate(setup.scene, POLICIES[policy], share, bound_per_s, seed, bar.advance) for seed in seeds
    ]
    reports = [each.report for each in found if each.report is not None]
    rates = [each.rate_per_s for each in found]
    return Outcome(policy, search.median_rate(found), seeds, rates, reports, request.find_max)


def _details(request: Request, setup: Setup, outcomes: Sequence[Outcome], bar: _Bar) -> list[Detail]:
    """Of each policy, its curve, and a run with a timeline at the rate of the first one, ours."""
    rate_per_s = outcomes[0].rate_per_s or setup.rate_per_s
    details = []
    for outcome in outcomes:
        bar.says(f"{outcome.policy}: latency against load")
        rates = [load * setup.bound_per_s for load in LOADS]
        curve = [(rate, _run(setup, outcome.policy, rate, request.seed, bar)) for rate in rates]
        shown = _run(setup, outcome.policy, rate_per_s, request.seed, bar, timeline=True)
        details.append(Detail(outcome.policy, curve, rate_per_s, shown))
    return details


def _run(setup: Setup, policy: str, rate_per_s: float, seed: int, bar: _Bar, *, timeline: bool = False) -> Report:
    report = setup.scene.run(POLICIES[policy], rate_per_s, seed, timeline=timeline)
    bar.advance()
    return report


# ---- as text ----


def _shown(outcomes: Sequence[Outcome], setup: Setup) -> RenderableType:
    head = Text.assemble((setup.about, "bold"), f"\n{setup.layout}; fluid bound {setup.bound_per_s:.0f} queries/s\n")
    above = above_bound(outcomes, setup.bound_per_s)
    notes = [Text(f" - {note}") for note in (*setup.notes, *([above] if above else []))]
    words = (
        "Times in ms. Load: as a share of the fluid bound. Worst: the longest time of any query, in SLOs.\n"
        "In time: of all queries. p50 to p99, worst: of those that were not refused.\n"
        "Large: of the queries with 20 items or more, those that were late or refused."
    )
    return Group(head, _figures(outcomes, setup), Text(words, "dim"), Text(), _bars(outcomes[0]), *notes)


def _figures(outcomes: Sequence[Outcome], setup: Setup) -> Table:
    """A line a policy and model."""
    rate = "most\n/s" if outcomes[0].goal else "rate\n/s"
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("policy", "model"):
        table.add_column(name, no_wrap=True)
    # Names of two lines: a figure that a terminal of 80 columns cuts off is none.
    for name in ("SLO", rate, "load", "in\ntime", "re-\nfused", "p50", "p95", "p99", "worst", "large"):
        table.add_column(name, no_wrap=True, justify="right")
    for outcome in outcomes:
        p50, p95, p99 = (
            outcome.of_models(figure) for figure in (lambda m: m.p50_ms, lambda m: m.p95_ms, lambda m: m.p99_ms)
        )
        within = outcome.of_models(lambda m: m.within_slo)
        refused = outcome.of_models(lambda m: m.refused_share)
        load = f"{outcome.rate_per_s / setup.bound_per_s:.3f}"
        longest = f"{outcome.max_lateness(setup.scene.slo_ms):.1f}"
        large = _percent(search.late_share_large(outcome.reports))
        first = [outcome.policy, f"{outcome.rate_per_s:.1f}", load, longest, large]
        if not p50:
            table.add_row(outcome.policy, "-", "-", f"{outcome.rate_per_s:.1f}", load, "no rate counts")
        for model in p50:
            policy, per_s, of_bound, most, late = first
            table.add_row(
                policy, model, f"{setup.scene.slo_ms[model]:.4g}", per_s, of_bound, _percent(within[model]),
                _percent(refused[model]), f"{p50[model]:.4g}", f"{p95[model]:.4g}", f"{p99[model]:.4g}", most, late,
            )  # fmt: skip
            first = [""] * len(first)
    return table


def _bars(outcome: Outcome) -> Table:
    """How busy each slice was."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, share in outcome.utilisation().items():
        filled = round(min(share, 1.0) * BAR_CHARS)
        bar = Text.assemble(("█" * filled, "cyan"), ("░" * (BAR_CHARS - filled), "dim"))
        table.add_row(name, bar, f"{share:.0%} busy")
    return table


def _percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "-"
