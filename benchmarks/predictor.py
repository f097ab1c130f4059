"""Latency tables predicted from a tenth of their points, each model by what is known of the others.

    make bench-predictor                    on the table that comes along, ParvaGPU's measurements
    make bench-predictor TABLE=file.csv     on any table of that form; exits with 1 where a goal is missed
    python -m benchmarks.predictor --write  also keeps the tables, in benchmarks/results/predictor.md

What is known is every row of the table, and of the one that comes along, whose model has another name. The first point
of a seed is drawn, the others are chosen by `partitioner.sampling` within a tenth of the points and 13 % of the time.
Time is that of the batches themselves: every point is run as often as every other.

Layouts are chosen for each model alone on one GPU, and for all models at once on four; the goal is for the mean of the
models alone, and for all at once. They are judged on the real table, once with all its points and once without the
suspect ones (`trusted`); goals are set for the second: a single wrong point, such as a time copied from one process
less, can decide a layout alone. What is measured, learned from and predicted is never cleaned.

Baselines: linear interpolation of the logarithms between measured points (the nearest one outside of them); and a ridge
regression on the logarithms, their squares and products, and the known models' mean time at the point.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import PolynomialFeatures

from benchmarks.layout_loss import Times, alone, gpu_of, lost, slo_ms, trusted
from partitioner import latency, sampling
from partitioner.latency import LatencyTableError, Measurement
from partitioner.performance import Point, Vector, features, point_of
from partitioner.predictor import Estimate, Knowledge, Predictor, learn
from partitioner.sampling import Budget

RESULTS = Path(__file__).parent / "results" / "predictor.md"
PICTURE = RESULTS.with_suffix(".svg")
PANEL_PX, GAP_PX = 200, 24
SHARE, TIME_SHARE = 0.1, 0.13
MEDIAN_GOAL, P90_GOAL, LOSS_GOAL, SAVED_GOAL = 0.08, 0.20, 0.03, 0.85
SLO_FACTORS = (1.5, 2.0, 3.0)
# Layouts for all models at once.
GPUS = 4
METHODS = ("interpolation", "ridge", "ours, drawn points", "ours")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model on a kind of GPU, all that was measured of it, and what is known of others."""

    model: str
    gpu: str
    truth: Times
    knowledge: Knowledge
    predictor: Predictor
    usual: Times

    @property
    def points(self) -> tuple[Point, ...]:
        return self.predictor.points

    @property
    def budget(self) -> int:
        return max(2, round(SHARE * len(self.truth)))


@dataclass(frozen=True, slots=True)
class Trial:
    """One seed: what was measured, our whole table, every method's errors on the rest."""

    measured: Times
    table: Times
    errors: Mapping[str, Vector]
    covered: Vector

    def saved(self, truth: Times) -> float:
        return 1 - sum(self.measured.values()) / sum(truth.values())


def subjects(rows: Sequence[Measurement]) -> list[Subject]:
    """Every model of the table that has points enough to choose from."""
    shipped = latency.shipped_measurements()
    every = {(each.source, each.gpu, each.model, point_of(each)): each for each in [*shipped, *rows]}
    found = []
    for model in track(sorted({each.model for each in rows}), description="learning", transient=True):
        known = [each for each in every.values() if each.model != model]
        knowledge = learn(known)
        for gpu in sorted({each.gpu for each in rows if each.model == model}):
            truth = {point_of(each): each.latency_ms for each in rows if (each.model, each.gpu) == (model, gpu)}
            if len(truth) >= 10:
                found.append(
                    Subject(model, gpu, truth, knowledge, Predictor(knowledge, list(truth)), _usual(known, truth))
                )
    return found


def _usual(known: Sequence[Measurement], truth: Times) -> Times:
    """The geometric mean of the known models at each point; where there is none, of the points with as many items."""
    at: dict[tuple[int, int, int], list[float]] = {}
    for each in known:
        at.setdefault((each.gpcs, each.batch, each.processes), []).append(np.log(each.latency_ms))
    logs = {key: float(np.mean(values)) for key, values in at.items()}
    keys, values = np.log(list(logs)), list(logs.values())
    nearest = NearestNDInterpolator(keys, values)
    return {
        point: logs.get((point.gpcs, point.batch, point.processes))
        or float(nearest(np.log([(point.gpcs, point.batch, point.processes)]))[0])
        for point in truth
    }


def chosen(subject: Subject, first: Point) -> Times:
    """Measures a tenth of the points, each where it helps most; the SLOs that will be asked for are known."""
    measured = {first: subject.truth[first]}
    slos_ms = [slo_ms(alone(subject.truth), factor) for factor in SLO_FACTORS]
    while len(measured) < subject.budget:
        estimate = subject.predictor.given(measured)
        left_ms = TIME_SHARE * float(np.exp(estimate.mean).sum()) - sum(measured.values())
        left = Budget(subject.budget - len(measured), left_ms)
        point = sampling.next_point(estimate, left, sampling.doubt(estimate, slos_ms).weights)
        if point is None:
            break
        measured[point] = subject.truth[point]
    return measured


def trial(subject: Subject, seed: int) -> Trial:
    generator = np.random.default_rng(seed)
    drawn = [subject.points[index] for index in generator.permutation(len(subject.points))[: subject.budget]]
    at_random = {point: subject.truth[point] for point in drawn}
    measured = chosen(subject, drawn[0])
    estimate = subject.predictor.given(measured)
    table = {**estimate.ms(), **measured}
    ways: dict[str, tuple[Times, Times]] = {
        "interpolation": (measured, interpolated(subject, measured)),
        "ridge": (measured, ridge(subject, measured)),
        "ours, drawn points": (at_random, subject.predictor.given(at_random).ms()),
        "ours": (measured, table),
    }
    errors = {name: _errors(subject.truth, found, given) for name, (given, found) in ways.items()}
    return Trial(measured, table, errors, _covered(subject, estimate))


def _errors(truth: Times, found: Times, given: Times) -> Vector:
    return np.array([abs(found[point] / ms - 1) for point, ms in truth.items() if point not in given])


def _covered(subject: Subject, estimate: Estimate) -> Vector:
    """Whether the points that were not measured lie below the 90 % quantile."""
    high = estimate.ms(0.9)
    return np.array([ms <= high[point] for point, ms in subject.truth.items() if point not in estimate.measured])


def interpolated(subject: Subject, measured: Times) -> Times:
    every, known = _plain(subject.points), _plain(list(measured))
    logs = np.log(list(measured.values()))
    moves = [axis for axis in range(every.shape[1]) if np.ptp(known[:, axis]) > 0]
    nearest = NearestNDInterpolator(known, logs)(every)
    found = np.full(len(every), np.nan)
    if len(moves) > 1 and len(known) > len(moves) + 1:
        found = LinearNDInterpolator(known[:, moves], logs)(every[:, moves])
    elif len(moves) == 1:
        order = known[:, moves[0]].argsort()
        found = np.interp(every[:, moves[0]], known[order, moves[0]], logs[order])
    found = np.where(np.isnan(found), nearest, found)
    return dict(zip(subject.points, np.exp(found).tolist(), strict=True))


def ridge(subject: Subject, measured: Times) -> Times:
    every = np.column_stack([features(subject.points), [subject.usual[point] for point in subject.points]])
    place = {point: index for index, point in enumerate(subject.points)}
    polynomial = PolynomialFeatures(2, include_bias=False).fit_transform(every)
    polynomial = (polynomial - polynomial.mean(axis=0)) / np.maximum(polynomial.std(axis=0), 1e-9)
    rows = [place[point] for point in measured]
    fitted = RidgeCV(np.logspace(-3, 3, 13)).fit(polynomial[rows], np.log(list(measured.values())))
    return dict(zip(subject.points, np.exp(fitted.predict(polynomial)).tolist(), strict=True))


def _plain(points: Sequence[Point]) -> Any:
    return np.log([(point.gpcs, point.batch, point.processes, point.seq_len or 1) for point in points])


# ---- tables ----


def report(every: Sequence[Subject], seeds: int) -> tuple[list[Table], list[str]]:
    """What is shown, and the goals that were missed."""
    trials = {
        (each.model, each.gpu): [trial(each, seed) for seed in range(seeds)]
        for each in track(every, description="predicting", transient=True)
    }
    missed: list[str] = []
    not_judged: list[str] = []
    return [
        _error_table(every, trials, missed),
        _layout_table(every, trials, missed, trust=True),
        _layout_table(every, trials, not_judged, trust=False),
    ], missed


Trials = Mapping[tuple[str, str], Sequence[Trial]]


def _error_table(every: Sequence[Subject], trials: Trials, missed: list[str]) -> Table:
    seeds = len(next(iter(trials.values())))
    title = f"error of the points that were not measured: median / 90th percentile, {seeds} seeds together"
    shown = Table("model", "points", *METHODS, "worst seed", "below the 90 % quantile", title=title)
    for each in every:
        found = trials[each.model, each.gpu]
        row = []
        for method in METHODS:
            errors = np.concatenate([one.errors[method] for one in found])
            median, p90 = np.median(errors), np.quantile(errors, 0.9)
            row.append(f"{median:.1%} / {p90:.1%}")
        if median > MEDIAN_GOAL or p90 > P90_GOAL:
            missed.append(f"{each.model}, {each.gpu}: median {median:.1%}, 90th percentile {p90:.1%}")
        ours = [one.errors["ours"] for one in found]
        worst = f"{max(map(np.median, ours)):.1%} / {max(np.quantile(errors, 0.9) for errors in ours):.1%}"
        covered = np.concatenate([one.covered for one in found]).mean()
        shown.add_row(f"{each.model} {each.gpu}", f"{each.budget} of {len(each.truth)}", *row, worst, f"{covered:.0%}")
    return shown


def _layout_table(every: Sequence[Subject], trials: Trials, missed: list[str], trust: bool) -> Table:
    kept = {(each.model, each.gpu): alone(each.truth) for each in every}
    size = sum(map(len, kept.values()))
    kept = {key: trusted(times) for key, times in kept.items()} if trust else kept
    dropped = size - sum(map(len, kept.values()))
    title = "layouts chosen from predicted tables: loss, mean over seeds; judged on " + (
        f"the table without {dropped} suspect points" if trust else "all points"
    )
    shown = Table(
        "GPUs", "model", "time saved, least", *(f"{each:g} x SLO" for each in SLO_FACTORS), "worst", title=title
    )
    for gpu in sorted({each.gpu for each in every}):
        there = [each for each in every if each.gpu == gpu]
        singles = [_add_losses(shown, [each], trials, kept) for each in there]
        _judge("one model alone, mean of the models", gpu, np.mean(singles, axis=0), missed)
        if len(there) > 1:
            _judge("all models at once", gpu, np.array(_add_losses(shown, there, trials, kept)), missed)
        for each in there:
            saved = min(one.saved(each.truth) for one in trials[each.model, gpu])
            if saved < SAVED_GOAL:
                missed.append(f"{each.model}, {gpu}: {saved:.1%} of the time saved")
    return shown


def _judge(who: str, gpu: str, losses: Vector, missed: list[str]) -> None:
    if max(losses) > LOSS_GOAL:
        missed.append(f"{who}, {gpu}: the layout loses {max(losses):.2%}")


def _add_losses(
    shown: Table, group: Sequence[Subject], trials: Trials, kept: Mapping[tuple[str, str], Times]
) -> list[float]:
    """A row: one model on one GPU, or all models of a kind of GPU at once, all of them predicted."""
    gpu, name = group[0].gpu, group[0].model if len(group) == 1 else "all at once"
    gpus = 1 if len(group) == 1 else GPUS
    truth = {each.model: kept[each.model, gpu] for each in group}
    seeds = range(len(trials[group[0].model, gpu]))
    tables = [
        {
            each.model: {point: trials[each.model, gpu][seed].table[point] for point in truth[each.model]}
            for each in group
        }
        for seed in seeds
    ]
    by_factor = [[lost(table, truth, factor, gpu_of(gpu), gpus) for table in tables] for factor in SLO_FACTORS]
    means = [float(np.mean(losses)) for losses in by_factor]
    saved = min(one.saved(each.truth) for each in group for one in trials[each.model, gpu])
    worst = f"{max(map(max, by_factor)):.2%}"
    shown.add_row(f"{gpus} {gpu}", name, f"{saved:.1%}", *(f"{mean:.2%}" for mean in means), worst)
    return means


def picture(every: Sequence[Subject]) -> str:
    """Predicted against measured ms, both in logarithms, a panel a model; the points that were measured stand out."""
    columns = 4
    rows = -(-len(every) // columns)
    width, height = columns * (PANEL_PX + GAP_PX) + GAP_PX, rows * (PANEL_PX + 2 * GAP_PX) + GAP_PX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, subject in enumerate(every):
        x = GAP_PX + index % columns * (PANEL_PX + GAP_PX)
        y = 2 * GAP_PX + index // columns * (PANEL_PX + 2 * GAP_PX)
        parts += [f'<g transform="translate({x} {y})">', *_panel(subject), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def _panel(subject: Subject) -> list[str]:
    measured = chosen(subject, subject.points[0])
    found = subject.predictor.given(measured).ms()
    logs = np.log([*subject.truth.values(), *found.values()])
    low, room = logs.min(), np.ptp(logs)
    parts = [
        f'<text y="-6">{subject.model}, {len(measured)} of {len(subject.truth)} measured</text>',
        f'<path d="M0 0V{PANEL_PX}H{PANEL_PX}M0 {PANEL_PX}L{PANEL_PX} 0" fill="none" stroke="#bbbbbb"/>',
    ]
    for point in sorted(subject.truth, key=lambda each: each in measured):
        across = (np.log(subject.truth[point]) - low) / room * PANEL_PX
        up = PANEL_PX - (np.log(found[point]) - low) / room * PANEL_PX
        radius, colour = (3.5, "#f28e2b") if point in measured else (2, "#4e79a7")
        parts.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="{radius}" fill="{colour}"/>')
    return parts


def main(
    table: Annotated[Path | None, typer.Option(help="Any latency table of the documented form.")] = None,
    seeds: int = 10,
    write: Annotated[bool, typer.Option("--write", help="Keep the tables in benchmarks/results/predictor.md.")] = False,
) -> None:
    """Predicts every model of a table, and prints what was missed of the goals."""
    console = Console(record=True, width=150)
    try:
        rows = latency.shipped_measurements() if table is None else latency.read_measurements(table)
        every = subjects(rows)
    except LatencyTableError as error:
        console.print(str(error), style="red")
        sys.exit(2)
    if not every:
        console.print("no model of the table has ten points or more", style="red")
        sys.exit(2)
    shown, missed = report(every, seeds)
    for each in shown:
        console.print(each)
    console.print(
        f"Goals: median {MEDIAN_GOAL:.0%}, 90th percentile {P90_GOAL:.0%}, layout loss {LOSS_GOAL:.0%} "
        f"(mean of the models alone, and all at once), "
        f"{SAVED_GOAL:.0%} of the time saved. " + ("All met." if not missed else "MISSED:\n" + "\n".join(missed))
    )
    if write:
        PICTURE.write_text(picture(every))
        RESULTS.write_text(f"# Predicted tables\n\n`make bench-predictor`\n\n```\n{console.export_text()}```\n")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)
