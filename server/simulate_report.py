"""The report of `migserve simulate`: one page that needs nothing else. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from scheduler import search
from scheduler.report import NS_PER_MS, SIZES, ModelReport, Report, Span
from server import charts
from server.charts import Piece, Series
from server.simulate_outcome import Outcome, above_bound
from server.simulate_setup import Setup

# Latencies above so many SLOs are cut off; the timeline shows so many, of at most so many slices.
SHOWN_SLOS, TIMELINE_SLOS, TIMELINE_SLICES = 2.0, 4.0, 28
PERCENTILES: tuple[tuple[str, Callable[[ModelReport], float]], ...] = (
    ("p50", lambda model: model.p50_ms),
    ("p95", lambda model: model.p95_ms),
    ("p99", lambda model: model.p99_ms),
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; background: var(--paper); color: var(--ink); max-width: 1160px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 0.3rem; }
p { margin: 0.3rem 0; max-width: 75ch; } .muted, footer { color: var(--muted); }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1rem; }
.half { max-width: 800px; } .scroll { overflow-x: auto; } .scroll svg { min-width: 900px; }
.legend span { margin-right: 1.2rem; white-space: nowrap; }
.legend i { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; margin-right: 0.4em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: right; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; } th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
details { margin: 0.5rem 0; } summary { cursor: pointer; color: var(--muted); }
"""


@dataclass(frozen=True, slots=True)
class Detail:
    """Of one policy: a report at each rate of its curve, and one with a timeline at `rate_per_s`."""

    policy: str
    curve: Sequence[tuple[float, Report]]
    rate_per_s: float
    shown: Report


def page(setup: Setup, outcomes: Sequence[Outcome], details: Sequence[Detail]) -> str:
    """The whole page; `details` go with `outcomes`."""
    hues = {detail.policy: hue for hue, detail in enumerate(details)}
    rate = details[0].rate_per_s
    at = f"{rate:.0f} queries/s, {rate / setup.bound_per_s:.0%} of the fluid bound"
    parts = [
        "<h1>Simulated scheduling</h1>",
        f"<p>{escape(setup.about)}.</p>",
        f"<p>Layout: {escape(setup.layout)}. Fluid bound: {setup.bound_per_s:.0f} queries/s (every slice always at its "
        "best batch that ends within the SLO).</p>",
        _about_noise(setup),
        *(f'<p class="muted">{escape(note)}</p>' for note in setup.notes),
        "<h2>Figures</h2>",
        _figures(setup, outcomes),
        "<h2>Latency against load</h2>",
        _curve_words(setup),
        charts.legend(list(hues.items())),
        f'<div class="row">{"".join(_curves(setup, details, hues))}</div>',
        f"<h2>Utilisation of the slices at {at}</h2>",
        "<p>Share of the time in which a batch ran.</p>",
        charts.legend(list(hues.items())),
        f'<div class="half">{_utilisation(details, hues)}</div>',
        f"<h2>Late queries by size at {at}</h2>",
        "<p>Of the queries with so many items, the share that was answered after the SLO, or refused.</p>",
        charts.legend(list(hues.items())),
        f'<div class="half">{_lateness(details, hues)}</div>',
        f"<h2>Batches on slices at {at}</h2>",
        *_timelines(setup, details),
        "<footer><p>Made by migserve simulate.</p></footer>",
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Simulated scheduling</title>'
    )
    body = "\n".join(parts)
    head = f"<head>{head}<style>{charts.STYLE}{STYLE}</style></head>"
    return f'<!doctype html>\n<html lang="en">{head}\n<body>\n{body}\n</body></html>\n'


def _about_noise(setup: Setup) -> str:
    noise = setup.scene.noise
    drawn = "exactly as the table says"
    if noise.sigma > 0:
        drawn = (
            f"drawn around the table: log-normal, {noise.sigma:.0%}, and {noise.tail_share:.0%} of the batches longer "
            f"by {noise.tail_mean:.0%} in the mean"
        )
    refused = (
        "What would be late is refused."
        if setup.scene.strict
        else "Only what would end more than ten SLOs late is refused."
    )
    return (
        "<p>Nothing here ran on a GPU: arrivals and slices are simulated, the decisions are those of the scheduler "
        f"that <code>migserve serve</code> runs. Times of batches come from the latency table and are {drawn}. "
        f"{refused} About {setup.scene.queries} queries a run.</p>"
    )


# ---- figures ----


def _figures(setup: Setup, outcomes: Sequence[Outcome]) -> str:
    goal = outcomes[0].goal
    seeds = len(outcomes[0].seeds)
    columns = ("policy", "model", "SLO, ms", f"highest rate at {goal}, /s" if goal else "queries/s", "of the bound",
               "in time", "refused", "p50, ms", "p95, ms", "p99, ms", "longest, SLOs",
               "late, 20 items or more")  # fmt: skip
    rows = [row for outcome in outcomes for row in _rows(setup, outcome)]
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    words = f"Medians of {seeds} seeds; the longest time of all." if seeds > 1 else "One seed."
    counts = f" A rate counts if {goal} is within the SLO and every query ends within 10 SLOs." if goal else ""
    above = escape(above_bound(outcomes, setup.bound_per_s))
    return f'<p>{words}{counts} {above}</p><div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _rows(setup: Setup, outcome: Outcome) -> Iterator[list[str]]:
    figures = [outcome.of_models(figure) for _, figure in PERCENTILES]
    within = outcome.of_models(lambda model: model.within_slo)
    refused = outcome.of_models(lambda model: model.refused_share)
    of_policy = [f"{outcome.rate_per_s:.1f}", f"{outcome.rate_per_s / setup.bound_per_s:.3f}"]
    longest = f"{outcome.max_lateness(setup.scene.slo_ms):.1f}"
    last = [longest, _percent(search.late_share_large(outcome.reports))]
    name = outcome.policy
    if not within:
        yield [name, "no rate counts", "", *of_policy]
    for model, share in within.items():
        times = [f"{by_model[model]:.1f}" for by_model in figures]
        slo = f"{setup.scene.slo_ms[model]:.1f}"
        yield [name, model, slo, *of_policy, _percent(share), _percent(refused[model]), *times, *last]
        name, of_policy, last = "", ["", ""], ["", ""]  # of all models together


# ---- charts ----


def _curve_words(setup: Setup) -> str:
    what = "in ms" if len(setup.scene.slo_ms) == 1 else "of the worst model, as a share of its SLO"
    return (
        f"<p>Time from arrival to answer {what}; half of the queries took less than p50, 95 % less than p95, 99 % less "
        f"than p99. Dashed: the SLO. What is above {SHOWN_SLOS:g} SLOs is cut off.</p>"
    )


def _curves(setup: Setup, details: Sequence[Detail], hues: Mapping[str, int]) -> Iterator[str]:
    slo_ms = setup.scene.slo_ms
    single = len(slo_ms) == 1
    unit = next(iter(slo_ms.values())) if single else 1.0
    label = "latency, ms" if single else "latency / SLO, worst model"
    for name, figure in PERCENTILES:
        series = [Series(each.policy, hues[each.policy], _points(each, figure, slo_ms, unit)) for each in details]
        limit = f"SLO {unit:.1f} ms" if single else "SLO"
        chart = charts.lines(
            f"{name} against load", "queries/s", f"{name} {label}", series, [(unit, limit)], SHOWN_SLOS * unit
        )
        yield f"<div>{chart}</div>"


def _points(
    detail: Detail, figure: Callable[[ModelReport], float], slo_ms: Mapping[str, float], unit: float
) -> list[tuple[float, float]]:
    return [(rate, unit * _worst(report, figure, slo_ms)) for rate, report in detail.curve]


def _worst(report: Report, figure: Callable[[ModelReport], float], slo_ms: Mapping[str, float]) -> float:
    found = [figure(each) / slo_ms[model] for model, each in report.models.items() if each.answered]
    return max(found, default=math.nan)


def _utilisation(details: Sequence[Detail], hues: Mapping[str, int]) -> str:
    names = list(details[0].shown.utilisation)
    series = [
        Series(each.policy, hues[each.policy], [(row, each.shown.utilisation[name]) for row, name in enumerate(names)])
        for each in details
    ]
    return charts.bars("Utilisation of each slice", names, series)


def _lateness(details: Sequence[Detail], hues: Mapping[str, int]) -> str:
    lowest = [1, *(highest + 1 for highest in SIZES[:-1])]
    sizes = [
        (low, high)
        for low, high in zip(lowest, SIZES, strict=True)
        if any(math.isfinite(_late_share(each.shown, low)) for each in details)
    ]
    groups = [_size_name(low, high) for low, high in sizes]
    series = []
    for each in details:
        shares = [_late_share(each.shown, low) for low, _ in sizes]
        series.append(Series(each.policy, hues[each.policy], list(enumerate(shares))))
    return charts.columns("Late queries by size", "items of a query", "late", groups, series)


def _size_name(low: int, high: int) -> str:
    if high == SIZES[-1]:
        return f"{low} or more"
    return f"{low}" if low == high else f"{low} to {high}"


def _late_share(report: Report, from_items: int) -> float:
    sizes = [size for model in report.models.values() for size in model.late_by_items if size.from_items == from_items]
    sent = sum(size.sent for size in sizes)
    return sum(size.late for size in sizes) / sent if sent else math.nan


def _timelines(setup: Setup, details: Sequence[Detail]) -> Iterator[str]:
    models = sorted(setup.scene.slo_ms)
    hues = {model: hue for hue, model in enumerate(models)}
    span_ms = TIMELINE_SLOS * min(setup.scene.slo_ms.values())
    yield f"<p>{TIMELINE_SLOS:g} SLOs from the middle of the run; a box is a batch, its number the items in it.</p>"
    yield charts.legend(list(hues.items()))
    for number, each in enumerate(details):
        chart = _timeline(each, hues, span_ms)
        opened = " open" if number == 0 else ""
        yield f'<details{opened}><summary>{escape(each.policy)}</summary><div class="scroll">{chart}</div></details>'


def _timeline(detail: Detail, hues: Mapping[str, int], span_ms: float) -> str:
    names = list(detail.shown.utilisation)[:TIMELINE_SLICES]
    rows = {name: row for row, name in enumerate(names)}
    from_ms = max(0.0, (detail.shown.seconds * 1e3 - span_ms) / 2)
    pieces = [
        _piece(span, rows[span.slice_name], hues)
        for span in detail.shown.timeline
        if span.slice_name in rows
        and span.end_ns / NS_PER_MS > from_ms
        and span.start_ns / NS_PER_MS < from_ms + span_ms
    ]
    return charts.timeline(f"Batches of {detail.policy}", names, pieces, from_ms, from_ms + span_ms)


def _piece(span: Span, row: int, hues: Mapping[str, int]) -> Piece:
    start_ms, end_ms = span.start_ns / NS_PER_MS, span.end_ns / NS_PER_MS
    says = f"{span.model}: {span.items} items, {end_ms - start_ms:.1f} ms"
    return Piece(row, start_ms, end_ms, hues.get(span.model, 0), str(span.items), says)


def _percent(share: float) -> str:
    return f"{share:.2%}" if math.isfinite(share) else "-"
