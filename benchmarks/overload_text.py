"""What was measured of mixes and overload, as a page and a drawing. Pure."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.kept import Row
from benchmarks.policies_text import pipe
from scheduler.mix import ARRIVALS
from server import charts
from server.charts import Series

OVERLOADS = ("w-paper resnet50", "w-paper bert", "S3", "w-length")
SCENARIOS = ("S1", "S2", "S3", "S4", "S5", "S6")
IN_TIME, GOODPUT, TWICE = 0.99, 0.95, 2.0
LENGTH_LOADS = (0.6, 0.8, 0.9)
STATED = 0.0  # the load of a scenario at its stated rates


def text(rows: Sequence[Row], about: str, notes: Sequence[str]) -> str:
    parts = [
        "# Mixes, bursts and overload\n",
        "## Goals\n",
        "\n".join(_goals(rows)) + "\n",
        *notes,
        "## How\n",
        about + "\n",
    ]
    parts += [
        "## W-slo at its stated rates\n",
        "Within their SLO, in per cent: of the worst model / of all together.\n",
        _slo_table(rows),
    ]
    parts += ["Models below 99 % with pool: share in time, late, refused.\n", "\n".join(_below(rows)) + "\n"]
    parts += ["## W-length\n", "In time, late, refused; the longest time in SLOs.\n", _length_table(rows)]
    parts += ["## Overload\n", "![goodput against load](overload.svg)\n"]
    parts += [
        "Goodput: answered in time, as a share of the fluid bound. Then shares of what was sent: late, refused, how "
        "long\nthe longest took, in SLOs, and how long, in ms, one had waited that was refused.\n"
    ]
    for workload in OVERLOADS:
        parts += [f"### {workload}\n", _overload_table(rows, workload)]
    return "\n".join(parts)


# ---- goals ----


def _goals(rows: Sequence[Row]) -> Iterator[str]:
    for arrivals in ARRIVALS:
        shares = {
            scenario: statistics.median(_worst_share(row) for row in found)
            for scenario in SCENARIOS
            if (found := _of(rows, workload=scenario, arrivals=arrivals, policy="pool", load=STATED))
        }
        if shares:
            each = ", ".join(f"{scenario} {share:.2%}" for scenario, share in shares.items())
            yield _verdict(
                f"W-slo, {arrivals}: every model at least 99 % in time", min(shares.values()) >= IN_TIME, each
            )
    for workload in OVERLOADS:
        for policy, strict in _policies(rows, workload):
            if policy == "pool":
                good = _curve(rows, workload, policy, strict)
                for most, until in ((TWICE, "up to it"), (max(good), "at any load")):
                    peak = max(share for load, share in good.items() if load <= most)
                    if TWICE in good:
                        kept = good[TWICE] / peak
                        case = f"overload, {workload}, {_name(policy, strict)}"
                        goal = f"{case}: at load 2 at least 95 % of the peak {until}"
                        yield _verdict(goal, kept >= GOODPUT, f"{kept:.1%} of {peak:.3f}")
    waited = [row["waited_ms"] for row in rows if row["policy"] == "pool" and row["refused"]]
    if waited:
        yield _verdict("nobody waits who is refused, pool, all runs", max(waited) == 0, f"{max(waited):.1f} ms at most")


def _verdict(goal: str, reached: bool, found: str) -> str:
    return f"- {'reached' if reached else '**missed**'}: {goal}: {found}"


def _worst_share(row: Row) -> float:
    return min(float(in_time) for in_time, _, _ in row["models"].values())


def _of(rows: Iterable[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


# ---- tables ----


def _slo_table(rows: Sequence[Row]) -> str:
    stated = _of(rows, load=STATED)
    table = []
    for arrivals in ARRIVALS:
        for policy in dict.fromkeys(row["policy"] for row in stated):
            found = [_of(stated, workload=scenario, arrivals=arrivals, policy=policy) for scenario in SCENARIOS]
            if any(found):
                table.append((f"{arrivals}, {policy}", *(_shares(each) for each in found)))
    return pipe(("", *SCENARIOS), table)


def _shares(found: Sequence[Row]) -> str:
    if not found:
        return ""
    worst = statistics.median(_worst_share(row) for row in found)
    return f"{100 * worst:.1f} / {100 * statistics.median(row['in_time'] for row in found):.1f}"


def _below(rows: Sequence[Row]) -> Iterator[str]:
    for row in _of(rows, load=STATED, policy="pool"):
        for model, (in_time, late, refused) in row["models"].items():
            if in_time < IN_TIME:
                yield f"- {row['workload']}, {row['arrivals']}, {model}: {in_time:.2%}, {late:.2%}, {refused:.2%}"


def _length_table(rows: Sequence[Row]) -> str:
    table = []
    mixed = [
        row
        for row in _of(rows, workload="w-length", strict=False)
        if row["load"] in LENGTH_LOADS and row["policy"] != "static"
    ]
    for row in sorted(mixed, key=lambda row: (ARRIVALS.index(row["arrivals"]), row["load"])):
        figures = [f"{row[name]:.2%}" for name in ("in_time", "late", "refused")]
        table.append((f"{row['arrivals']} at {row['load']:g}", row["policy"], *figures, f"{row['worst']:.1f}"))
    return pipe(("", "policy", "in time", "late", "refused", "longest"), table)


def _overload_table(rows: Sequence[Row], workload: str) -> str:
    table = []
    for policy, strict in _policies(rows, workload):
        found = _of(rows, workload=workload, arrivals="poisson", policy=policy, strict=strict)
        for row in sorted(found, key=lambda row: float(row["load"])):
            if row["load"]:
                shares = f"{row['good']:.3f}", f"{row['late']:.1%}", f"{row['refused']:.1%}"
                name = f"{_name(policy, strict)} at {row['load']:g}"
                table.append((name, *shares, f"{row['worst']:.1f}", f"{row['waited_ms']:.0f}"))
    return pipe(("", "goodput", "late", "refused", "longest", "waited"), table)


def _policies(rows: Sequence[Row], workload: str) -> list[tuple[str, bool]]:
    found = [row for row in _of(rows, workload=workload, arrivals="poisson") if row["load"] > 1]
    return list(dict.fromkeys((row["policy"], row["strict"]) for row in found))


def _name(policy: str, strict: bool) -> str:
    return f"{policy}, strict" if strict else policy


def _curve(rows: Sequence[Row], workload: str, policy: str, strict: bool) -> dict[float, float]:
    """Goodput by load, the medians of the seeds."""
    found: dict[float, list[float]] = {}
    for row in _of(rows, workload=workload, arrivals="poisson", policy=policy, strict=strict):
        if row["load"]:
            found.setdefault(row["load"], []).append(row["good"])
    return {load: statistics.median(values) for load, values in sorted(found.items())}


# ---- the drawing ----


def drawing(rows: Sequence[Row]) -> str:
    """Goodput against load, a plot a workload, side by side; by itself, so with its own colours."""
    names = list(dict.fromkeys(each for workload in OVERLOADS for each in _policies(rows, workload)))
    width, height = 380, 280
    parts = [_key(names)]
    for place, workload in enumerate(OVERLOADS):
        curves = [
            Series(_name(*each), hue, list(_curve(rows, workload, *each).items()))
            for hue, each in enumerate(names)
            if each in _policies(rows, workload)
        ]
        if curves:
            most = 1.1 * max(good for curve in curves for _, good in curve.points)
            plot = charts.lines(
                workload, "load, as a share of the fluid bound", f"{workload}: goodput", curves, [], most
            )
            x, y = place % 2 * (width + 20), 30 + place // 2 * (height + 10)
            parts.append(plot.replace("<svg ", f'<svg x="{x}" y="{y}" width="{width}" height="{height}" ', 1))
    style = re.sub(r"svg \{[^}]*\}", "svg { font: 12px system-ui, sans-serif; }", charts.STYLE, count=1)
    box = f"{2 * width + 20} {40 + 2 * (height + 10)}"
    paper = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {box}">'
    return "\n".join([head, f"<style>{style}</style>", paper, *parts, "</svg>\n"])


def _key(names: Sequence[tuple[str, bool]]) -> str:
    keys = []
    for place, (policy, strict) in enumerate(names):
        x = 52 + 120 * place
        keys.append(f'<rect x="{x}" y="10" width="12" height="12" fill="var(--hue{place})"/>')
        keys.append(f'<text x="{x + 17}" y="20">{_name(policy, strict)}</text>')
    return "".join(keys)
