"""What was measured of the policies, as a page: the goals first, then tables. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.cells import LAYOUTS, LEAST, MODELS, STEP, STEPS, layouts
from benchmarks.kept import Row

OURS = "pool"
GOAL_FACTOR = 2.0
LARGE_LOAD = "0.8"
# By GPUs: the goals for the median over the models, and for each.
GOALS = {8: (0.97, 0.95), 2: (0.92, 0.89)}
NOISE_LOSS, TIMES_ELSA, LARGE_LATE = 0.02, 1.4, 0.10


class Ratio(NamedTuple):
    """Of the fluid bound of `layout`: the median over the seeds, and how far apart these are."""

    layout: str
    median: float
    spread: float
    seeds: int
    per_s: float


class Figures:
    """Rows, by what they are of."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: dict[tuple[object, ...], list[Row]] = defaultdict(list)
        for row in rows:
            of = (row["model"], row["gpus"], row["factor"], row["policy"], row["noisy"], row["what"], row["layout"])
            self._rows[of].append(row)

    def rows(self, model: str, gpus: int, factor: float, policy: str, noisy: bool, what: str, layout: str) -> list[Row]:
        return self._rows.get((model, gpus, factor, policy, noisy, what, layout), [])

    def ratio(
        self, model: str, gpus: int, factor: float, policy: str, noisy: bool, layout: str, what: str = "p95"
    ) -> Ratio | None:
        rows = self.rows(model, gpus, factor, policy, noisy, what, layout)
        if not rows:
            return None
        found = [row["ratio"] for row in rows]
        per_s = statistics.median(row["per_s"] for row in rows)
        return Ratio(layout, statistics.median(found), max(found) - min(found), len(found), per_s)

    def best_layouts(self, model: str, gpus: int, factor: float, policy: str, noisy: bool = False) -> list[Ratio]:
        """Where it was measured, by the ratio, the best first."""
        found = [self.ratio(model, gpus, factor, policy, noisy, layout) for layout in layouts(model, gpus)]
        return sorted((each for each in found if each), key=lambda each: -each.median)

    def best(self, model: str, gpus: int, factor: float, policy: str, noisy: bool = False) -> Ratio | None:
        return next(iter(self.best_layouts(model, gpus, factor, policy, noisy)), None)

    def bests(self, gpus: int, policy: str, noisy: bool = False) -> dict[str, Ratio]:
        """By model, at the factor of the goals."""
        found = {model: self.best(model, gpus, GOAL_FACTOR, policy, noisy) for model in MODELS}
        return {model: best for model, best in found.items() if best}

    def policies(self) -> list[str]:
        return list(dict.fromkeys(str(of[3]) for of in self._rows))

    def factors(self) -> list[float]:
        return sorted({float(str(of[2])) for of in self._rows})

    def numbers_of_gpus(self, factor: float) -> list[int]:
        return sorted({int(str(of[1])) for of in self._rows if of[2] == factor})


# ---- the goals ----


def goals(figures: Figures) -> Iterator[str]:
    """A line each: reached, missed by how much, or not measured."""
    for gpus, (median, least) in GOALS.items():
        bests = figures.bests(gpus, OURS)
        ratios = {model: best.median for model, best in bests.items()}
        name = f"{gpus} GPUs, SLO factor 2, p95, best layout"
        yield _least(f"{name}: median of the models at least {median}", _median(ratios), median)
        yield _least(f"{name}: none below {least}", min(ratios.values(), default=None), least, _where_least(ratios))
    for gpus in GOALS:
        yield from _noise(figures, gpus)
    yield from _elsa(figures)
    for gpus in GOALS:
        late = large_late(figures, gpus, OURS, LARGE_LOAD)
        worst = max(late.values(), default=None)
        names = ", ".join(f"{model} {share:.1%}" for model, share in late.items() if share > LARGE_LATE)
        goal = f"{gpus} GPUs: of the queries with 20 items or more at load 0.8 at most {LARGE_LATE:.0%} late, any model"
        yield _verdict(goal, worst, worst is not None and worst <= LARGE_LATE, f"{worst or 0:.1%} at most", names)
    yield from _lateness(figures)
    yield from _never_below(figures)


def _verdict(goal: str, value: object, reached: bool, found: str, why: str = "") -> str:
    if value is None:
        return f"- not measured: {goal}"
    return f"- {'reached' if reached else '**missed**'}: {goal}: {found}{f' ({why})' if why else ''}"


def _least(goal: str, value: float | None, wanted: float, why: str = "") -> str:
    found = "" if value is None else f"{value:.3f}" if value >= wanted else f"{value:.3f}, {wanted - value:.3f} short"
    return _verdict(goal, value, value is not None and value >= wanted, found, why)


def _median(ratios: dict[str, float]) -> float | None:
    return statistics.median(ratios.values()) if ratios else None


def _where_least(ratios: dict[str, float]) -> str:
    return min(ratios, key=lambda model: ratios[model], default="")


def _noise(figures: Figures, gpus: int) -> Iterator[str]:
    exact, noisy = figures.bests(gpus, OURS), figures.bests(gpus, OURS, True)
    lost = {model: exact[model].median - noisy[model].median for model in exact if model in noisy}
    for which, loss in (("median of the models", _median(lost)), ("every model", max(lost.values(), default=None))):
        goal = f"{gpus} GPUs: 5 % noise on service times costs at most {NOISE_LOSS} of the bound, {which}"
        yield _verdict(goal, loss, loss is not None and loss <= NOISE_LOSS + 1e-9, f"{loss or 0:.3f}", _each(lost, 3))


def _elsa(figures: Figures) -> Iterator[str]:
    ours, theirs = figures.bests(2, OURS), figures.bests(2, "elsa")
    both = [model for model in ours if model in theirs and theirs[model].median]
    for what, times in (
        ("shares of the bounds", {model: ours[model].median / theirs[model].median for model in both}),
        ("queries a second", {model: ours[model].per_s / theirs[model].per_s for model in both}),
    ):
        for which, value in (("median", _median(times)), ("every model", min(times.values(), default=None))):
            goal = f"2 GPUs: {TIMES_ELSA} times ELSA, each at its own best layout, {what}, {which}"
            yield _verdict(goal, value, value is not None and value >= TIMES_ELSA, f"{value or 0:.3f}", _each(times, 2))


def _each(figures: dict[str, float], digits: int) -> str:
    return ", ".join(f"{model} {figure:.{digits}f}" for model, figure in figures.items())


def large_late(figures: Figures, gpus: int, policy: str, load: str) -> dict[str, float]:
    """By model, on its best layout: the share of large queries that is late at that load, median of the seeds."""
    found = {}
    for model, best in figures.bests(gpus, policy).items():
        rows = figures.rows(model, gpus, GOAL_FACTOR, policy, False, load, best.layout)
        if rows:
            found[model] = statistics.median(row["large_late"] for row in rows)
    return found


def _lateness(figures: Figures) -> Iterator[str]:
    for gpus in GOALS:
        worst = [
            row["worst"]
            for model, best in figures.bests(gpus, OURS).items()
            for row in figures.rows(model, gpus, GOAL_FACTOR, OURS, False, "p95", best.layout)
            if "worst" in row
        ]
        most = max(worst, default=None)
        goal = f"{gpus} GPUs: every query ends within 10 SLOs at that rate (a rate counts only then)"
        yield _verdict(goal, most, most is not None and most <= 10, f"{most or 0:.1f} SLOs at most")


class Lead(NamedTuple):
    """Ours over a baseline in one cell; `noise`: how far apart seeds and steps of the search may put them."""

    by: float
    noise: float
    policy: str
    where: str


def leads(figures: Figures) -> list[Lead]:
    """Of every cell that has both, the least first."""
    found = []
    for factor in figures.factors():
        for gpus in figures.numbers_of_gpus(factor):
            for model in MODELS:
                for layout in layouts(model, gpus):
                    ours = figures.ratio(model, gpus, factor, OURS, False, layout)
                    for policy in figures.policies():
                        theirs = figures.ratio(model, gpus, factor, policy, False, layout)
                        if policy != OURS and ours and theirs:
                            noise = max(ours.spread, theirs.spread, STEPS.get(policy, STEP))
                            where = f"{gpus} GPUs, factor {factor:g}, {model}, {layout}"
                            found.append(Lead(ours.median - theirs.median, noise, policy, where))
    return sorted(found)


def _never_below(figures: Figures) -> Iterator[str]:
    found = leads(figures)
    below = [lead for lead in found if lead.by < -lead.noise]
    goal = "never below any baseline, on any layout, by more than the noise"
    cells = len({lead.where for lead in found})
    least = f"{len(below)} of {len(found)} comparisons in {cells} cells are below" if below else ""
    least = least or (f"{len(found)} comparisons in {cells} cells, the least lead {found[0].by:+.3f}" if found else "")
    yield _verdict(goal, found or None, not below, least, f"{found[0].policy}; {found[0].where}" if found else "")
    for lead in below:
        yield f"  - {lead.policy} is ahead by {-lead.by:.3f}: {lead.where}"


# ---- tables ----


def pipe(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """As Markdown, in columns that can be read as text too."""
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def _shown(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio.median:.3f}".lstrip("0") if ratio.median else f"<{LEAST:g}".replace("0.", ".")


def _with_spread(ratio: Ratio | None) -> str:
    spread = f" ±{ratio.spread / 2:.3f}".replace("0.", ".") if ratio and ratio.seeds > 1 else ""
    return _shown(ratio) + spread


def _name(layout: str, model: str, gpus: int) -> str:
    """As it is called: by its slices, where all GPUs are alike, and by who chose it."""
    names = layouts(model, gpus).get(layout, [])
    _, _, slices = layout.partition("x")
    alike = "/" not in layout and slices in LAYOUTS
    slices = "7x1g" if slices == LAYOUTS[0] else "+".join(f"{gpcs}g" for gpcs in slices.split("+"))
    return ", ".join([*([slices] if alike else []), *names])


def best_table(figures: Figures, gpus: int, factor: float) -> str:
    rows = []
    for policy in figures.policies():
        for noisy in (False, True):
            bests = {model: figures.best(model, gpus, factor, policy, noisy) for model in MODELS}
            if any(bests.values()):
                ratios = [best.median for best in bests.values() if best]
                name = policy + (", 5 % noise" if noisy else "")
                rows.append(
                    (name, *(_with_spread(best) for best in bests.values()), f"{statistics.median(ratios):.3f}")
                )
    return pipe(("best layout of each", *MODELS, "median"), rows)


def layout_table(figures: Figures, gpus: int, factor: float) -> str:
    policies = figures.policies()
    rows = []
    for model in MODELS:
        for layout in layouts(model, gpus):
            ours = figures.ratio(model, gpus, factor, OURS, False, layout)
            noisy = figures.ratio(model, gpus, factor, OURS, True, layout)
            others = [
                figures.ratio(model, gpus, factor, policy, False, layout) for policy in policies if policy != OURS
            ]
            if ours or any(others):
                name = f"{model}, {_name(layout, model, gpus)}"
                rows.append((name, _with_spread(ours), _shown(noisy), *map(_shown, others)))
    return pipe(("", OURS, "noise", *(policy for policy in policies if policy != OURS)), rows)


def lateness_table(figures: Figures, gpus: int) -> str:
    """p99, and who is late, on the best layout of each policy."""
    rows = []
    for policy, noisy in ((OURS, False), (OURS, True), ("elsa", False)):
        name = policy + (", 5 % noise" if noisy else "")
        bests = figures.bests(gpus, policy)
        p99 = {
            model: figures.ratio(model, gpus, GOAL_FACTOR, policy, noisy, best.layout, "p99")
            for model, best in bests.items()
        }
        if any(p99.values()):
            rows.append((f"{name}: highest rate at p99", *(_with_spread(p99.get(model)) for model in MODELS)))
    for policy in (OURS, "elsa"):
        for load in ("0.7", "0.8", "0.9"):
            for what, figure in _LATENESS.items():
                cells = [_of_load(figures, model, gpus, policy, load, figure) for model in MODELS]
                if any(cells):
                    rows.append((f"{policy} at {load}: {what}", *cells))
    return pipe(("best layout at p95", *MODELS), rows)


_LATENESS: dict[str, Callable[[Row], str]] = {
    "late, of 20 items or more": lambda row: f"{row['large_late']:.1%}",
    "late, of all": lambda row: f"{1 - row['within']:.1%}",
    "longest, in SLOs": lambda row: f"{row['worst']:.1f}",
}


def _of_load(figures: Figures, model: str, gpus: int, policy: str, load: str, figure: Callable[[Row], str]) -> str:
    best = figures.best(model, gpus, GOAL_FACTOR, policy)
    rows = figures.rows(model, gpus, GOAL_FACTOR, policy, False, load, best.layout) if best else []
    rows = sorted(rows, key=lambda row: row["large_late"])
    return figure(rows[len(rows) // 2]) if rows else ""


# ---- the page ----


def text(figures: Figures, about: str, notes: Sequence[str]) -> str:
    """`about`: what was measured, and how; `notes`: what is known of why a goal is missed."""
    parts = ["# Policies on W-paper\n", "## Goals\n", "\n".join(goals(figures)) + "\n", *notes, "## How\n", about]
    for factor in sorted(figures.factors(), key=lambda each: (each != GOAL_FACTOR, each)):
        for gpus in figures.numbers_of_gpus(factor):
            parts.append(f"## {gpus} GPUs, SLO factor {factor:g}\n")
            parts.append(best_table(figures, gpus, factor))
            if factor == GOAL_FACTOR:
                parts.append(lateness_table(figures, gpus))
            parts.append(f"By layout, of {gpus} GPUs alike unless a planner chose:\n")
            parts.append(layout_table(figures, gpus, factor))
    return "\n".join(parts)
