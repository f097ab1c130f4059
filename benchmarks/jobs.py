"""A batch job beside online traffic, in the simulator: 200,000 sentences on slices of two A100s.

    make bench-jobs                  prints the tables; exit code 1 where a goal is missed
    make bench-jobs ARGS=--write     also keeps them, in benchmarks/results/jobs.md and jobs.svg

Online: Poisson queries of resnet50 with 1 to 32 items (W-paper), whose rate swings by half around 40 % of the fluid
bound of the slices, one and a half swings in the time of the longest deadline; SLO 27 ms, twice the time of 32 items on
a whole GPU. The job: texts of 16 to 512 tokens (W-length), by bert-base's table by length, padded to 32, 64, 128, 256
or 512. Service times 3 % noise and a tail, as in all simulations. The job comes after 30 s; all slices serve both.

The clairvoyant schedule is a linear programme that knows the texts, and what online work leaves of every slice to the
end, as it was without the job: the least GPC-time. Once with batches of any size up to 64, and once with batches that
are as short as a job's may be here. Without MIG a GPU is for the job or for online queries; as few as meet the deadline
are for the job, and it may use batches of any size there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from partitioner import latency
from partitioner.latency import per_batch, shipped_measurements
from partitioner.lengths import LengthTable, length_tables
from scheduler import workload
from scheduler.domain import BatchTable
from scheduler.elastic import EARLY, EARLY_NS, Place, Work, batch_for, decide, patience_ns
from scheduler.job_simulation import SimJob, SimulatedJobs
from scheduler.report import Report
from scheduler.simulator import SimSlice, simulate
from scheduler.workload import Arrival

RESULTS = Path(__file__).parent / "results"
ONLINE, JOB, GPU = "resnet50", "bert-base", "A100-40GB"
ITEMS, LARGEST = 200_000, 64
CUT, GPUS, WHOLE = (3, 2, 1, 1), 2, (7,)
SLO_MS, LOAD, WARM_S, SEED = 27.0, 0.4, 30, 1
DEADLINES_S = (200, 300, 450, 600)
# The goals: of what whole GPUs need, of p95 without the job, of the clairvoyant's GPU time.
SLICES, SLOWER, MORE = 0.5, 1.10, 1.06
CHOSEN_S = 450
HEADINGS = (
    "deadline",
    "ends after",
    "slices held, mean (most)",
    "GPCs held, mean (most)",
    "GPCs of whole GPUs without MIG",
    "of these",
    "GPU time, GPC-s",
    "clairvoyant, any batch",
    "clairvoyant, short batches",
    "goals missed",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run. `held`: (seconds since the job came, slices, GPCs) from each decision on."""

    report: Report
    ended_s: float
    gpc_s: float
    held: Sequence[tuple[float, int, int]]

    def mean(self, index: int) -> float:
        """Slices (1) or GPCs (2) held on average, from when the job came to its end."""
        ends = [each[0] for each in self.held[1:]] + [self.ended_s]
        total = sum(each[index] * (end - each[0]) for each, end in zip(self.held, ends, strict=True))
        return total / self.ended_s

    def most(self, index: int) -> int:
        return max(each[index] for each in self.held)


def texts() -> Counter[int]:
    """Items by padded length."""
    lengths = tables()[1].lengths
    drawn = workload.W_LENGTH(np.random.default_rng(SEED), ITEMS)
    return Counter(lengths[int(index)] for index in np.searchsorted(lengths, drawn))


def tables() -> Mapping[int, LengthTable]:
    rows = [each for each in shipped_measurements("migprofiler") if each.gpu == GPU]
    return length_tables(rows, JOB, LARGEST)


def slices(layout: Sequence[int], gpus: int) -> list[SimSlice]:
    by_length, online = tables(), latency.shipped(ONLINE)
    found = []
    for gpu in range(gpus):
        for place, gpcs in enumerate(layout):
            table = by_length[max(size for size in by_length if size <= gpcs)]
            times = {ONLINE: per_batch(online.points(gpcs), LARGEST), JOB: [ms for row in table.rows for ms in row]}
            found.append(SimSlice(f"gpu{gpu}/{gpcs}g#{place}", gpcs, times, lengths={JOB: table.lengths}))
    return found


def arrivals(rate_per_s: float, seconds: float) -> list[Arrival]:
    period_s = (WARM_S + max(DEADLINES_S)) / 1.5
    return list(workload.diurnal(ONLINE, rate_per_s, seconds, SEED, workload.W_PAPER, swing=0.5, period_s=period_s))


def bound_per_s(where: Sequence[SimSlice]) -> float:
    """Of queries."""
    mean = np.mean(workload.W_PAPER(np.random.default_rng(0), 100_000))
    rates = (max(b / ms for b, ms in enumerate(each.tables[ONLINE], 1) if ms <= SLO_MS) for each in where)
    return 1e3 * sum(rates) / float(mean)


def run(
    where: Sequence[SimSlice], online: Sequence[Arrival], job: SimJob, only: Sequence[int] | None = None
) -> Outcome:
    """`only`: worker ids for the job, which online queries then do not use."""
    if only is not None:
        keeps = {index: (JOB if index in only else ONLINE) for index in range(len(where))}
        where = [_serving(each, keeps[index]) for index, each in enumerate(where)]
    jobs = SimulatedJobs([job], {ONLINE: SLO_MS}, only=only)
    report = simulate(where, online, slo_ms={ONLINE: SLO_MS}, background=jobs, timeline=True, seed=SEED)
    gpcs = {each.name: each.gpcs for each in where}
    spent = sum((s.end_ns - s.start_ns) * gpcs[s.slice_name] for s in report.timeline if s.model == JOB)
    begin = job.arrives_ns
    held = [((each.at_ns - begin) / 1e9, each.slices, each.gpcs) for each in jobs.held]
    return Outcome(report, (jobs.ended_ns[job.name] - begin) / 1e9, spent / 1e9, held)


def _serving(each: SimSlice, model: str) -> SimSlice:
    lengths = each.lengths if model == JOB else {}
    return SimSlice(each.name, each.gpcs, {model: each.tables[model]}, lengths=lengths)


def clairvoyant(where: Sequence[SimSlice], alone: Report, job: SimJob, *, short: bool) -> float:
    """GPC-s. `alone`: online traffic without the job. `short`: with batches no longer than a job's may be."""
    seconds = (job.deadline_ns - job.arrives_ns) / 1e9
    busy: Counter[str] = Counter()
    for span in alone.timeline:
        begin, end = max(span.start_ns, job.arrives_ns), min(span.end_ns, job.deadline_ns)
        busy[span.slice_name] += max(end - begin, 0)
    limit_ns = patience_ns(SLO_MS * 1e6, len(where)) if short else math.inf
    places = []
    for number, each in enumerate(where):
        rows = dict(zip(each.lengths[JOB], _rows(each), strict=True))
        batches = {
            length: batch_for(BatchTable([int(ms * 1e6) for ms in row]), limit_ns) for length, row in rows.items()
        }
        places.append(Place(number, each.gpcs, 1 - busy[each.name] / seconds / 1e9, batches))
    # The decision rule itself, told everything at once; what it keeps in hand is added, so that nothing is.
    within_ns = (seconds * 1e9 + EARLY_NS) / (1 - EARLY)
    holding = decide([Work("job", dict(job.items), within_ns)], {"job": places}, {})["job"]
    return holding.gpc_ns / 1e9 if holding.feasible else math.nan


def _rows(each: SimSlice) -> list[Sequence[float]]:
    table, rows = each.tables[JOB], len(each.lengths[JOB])
    return [table[index * LARGEST : (index + 1) * LARGEST] for index in range(rows)]


@dataclass(frozen=True, slots=True)
class Row:
    """All about one deadline."""

    deadline_s: int
    alone: Report
    elastic: Outcome
    least_gpc_s: float
    short_gpc_s: float
    whole: Outcome
    whole_gpus: int

    @property
    def slices(self) -> float:
        """GPCs held on average, of those that whole GPUs need."""
        return self.elastic.mean(2) / (7 * self.whole_gpus)

    @property
    def slower(self) -> float:
        return self.elastic.report.models[ONLINE].p95_ms / self.alone.models[ONLINE].p95_ms

    @property
    def in_time(self) -> bool:
        return self.elastic.ended_s <= self.deadline_s

    def missed(self) -> list[str]:
        """Goals, in words."""
        found = [] if self.in_time else ["the deadline"]
        found += ["slices"] if self.slices > SLICES else []
        found += ["online p95"] if self.slower > SLOWER else []
        return found + (["GPU time"] if self.elastic.gpc_s > MORE * self.least_gpc_s else [])


def measure(deadline_s: int, items: Mapping[int, int], say: Console) -> Row:
    job = SimJob("job", JOB, items, int(WARM_S * 1e9), int((WARM_S + deadline_s) * 1e9))
    where, whole = slices(CUT, GPUS), slices(WHOLE, GPUS)
    online = arrivals(LOAD * bound_per_s(where), WARM_S + deadline_s)
    say.print(f"{deadline_s} s: {len(online)} queries, without the job, with it, and without MIG")
    alone = simulate(where, online, slo_ms={ONLINE: SLO_MS}, timeline=True, seed=SEED)
    least, short = (clairvoyant(where, alone, job, short=each) for each in (False, True))
    elastic = run(where, online, job)
    for gpus in range(1, GPUS):
        found = run(whole, online, job, only=range(gpus))
        if found.ended_s <= deadline_s:
            break
    return Row(deadline_s, alone, elastic, least, short, found, gpus)


def text(rows: Sequence[Row]) -> str:
    about = "\n\n".join((__doc__ or "").split("\n\n")[2:]).strip()
    parts = ["# A batch job beside online traffic\n", about + "\n", "![slices held over time](jobs.svg)\n"]
    parts += ["## The job\n", _line(*HEADINGS), _line(*["---"] * len(HEADINGS))]
    for row in rows:
        one = row.elastic
        parts.append(
            _line(
                f"{row.deadline_s} s",
                f"{one.ended_s:.0f} s",
                f"{one.mean(1):.1f} ({one.most(1)})",
                f"{one.mean(2):.1f} ({one.most(2)})",
                f"{7 * row.whole_gpus} for {row.whole.ended_s:.0f} s",
                f"{row.slices:.0%}",
                f"{one.gpc_s:.0f}",
                f"{row.least_gpc_s:.0f} ({one.gpc_s / row.least_gpc_s - 1:+.1%})",
                f"{row.short_gpc_s:.0f} ({one.gpc_s / row.short_gpc_s - 1:+.1%})",
                ", ".join(row.missed()) or "none",
            )
        )
    parts += ["\n## Online queries\n", _line("deadline", "", "p50", "p95", "p99", "within SLO"), _line(*["---"] * 6)]
    for row in rows:
        cases = {"no job": row.alone, "with the job": row.elastic.report, "without MIG": row.whole.report}
        for name, report in cases.items():
            model = report.models[ONLINE]
            figures = (f"{ms:.1f} ms" for ms in (model.p50_ms, model.p95_ms, model.p99_ms))
            parts.append(_line(f"{row.deadline_s} s", name, *figures, f"{model.within_slo:.2%}"))
    parts.append(
        f"\nGoals: the deadline is met; on average, while the job runs, it holds at most {SLICES:.0%} of the GPCs "
        f"that whole GPUs without MIG need; online p95 at most {SLOWER - 1:.0%} above that without the job; GPU time "
        f"at most {MORE - 1:.0%} above the clairvoyant's with any batch. The exit code is that of {CHOSEN_S} s.\n\n"
        "A whole GPU does the same work in about the same GPC-time, sooner: what a job saves are GPCs that must be "
        "there at one time. It saves most where its deadline would leave a whole GPU idle; where it just fills one, "
        "it saves little.\n"
    )
    return "\n".join(parts)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def picture(row: Row) -> str:
    """An SVG: GPCs that the job holds over time, and below how busy the slices are with online work."""
    scale = 640 / row.deadline_s
    held = [(at, gpcs) for at, _, gpcs in row.elastic.held] + [(row.elastic.ended_s, 0)]
    whole = [(0.0, 7 * row.whole_gpus), (row.whole.ended_s, 0)]
    most = max(14, *(gpcs for _, gpcs in held + whole))
    busy = _busy(row)
    parts = [
        _steps(held, scale, 10 / most * 16, 190, "#2a6fb8", ""),
        _steps(whole, scale, 10 / most * 16, 190, "#d9622b", ' stroke-dasharray="6 4"'),
        _text(60, 22, "GPCs of the job: held with MIG (blue), of whole GPUs without it (dashed)"),
        _text(60, 222, "share of the slices' time that is busy with online work"),
        _text(60, 352, "0 s"),
        _text(680, 352, f"{row.deadline_s} s: the deadline"),
        *(_level(190 - gpcs * 10 / most * 16, str(gpcs)) for gpcs in range(0, most + 1, 7)),
        *(_level(330 - share * 100, f"{share:.0%}") for share in (0.0, 0.5, 1.0)),
        '<polyline fill="none" stroke="#1f9e77" stroke-width="2" points="'
        + " ".join(f"{60 + at * scale:.1f},{330 - 100 * share:.1f}" for at, share in busy)
        + '"/>',
        '<line x1="700" x2="700" y1="20" y2="335" stroke="#59636e" stroke-dasharray="2 3"/>',
    ]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 365" font-family="system-ui, sans-serif">'
    return "\n".join([head, '<rect width="800" height="365" fill="#ffffff"/>', *parts, "</svg>\n"])


def _busy(row: Row) -> list[tuple[float, float]]:
    """(seconds, share) in the middle of every five seconds."""
    step = 5
    gpcs = {each.name: each.gpcs for each in slices(CUT, GPUS)}
    busy: Counter[int] = Counter()
    for span in row.elastic.report.timeline:
        if span.model == ONLINE:
            busy[int((span.start_ns / 1e9 - WARM_S) // step)] += (span.end_ns - span.start_ns) * gpcs[span.slice_name]
    whole = step * 1e9 * sum(gpcs.values())
    return [(step * (at + 0.5), busy[at] / whole) for at in range(row.deadline_s // step)]


def _steps(points: Sequence[tuple[float, int]], x: float, y: float, base: float, colour: str, how: str) -> str:
    path, level = [f"{60:.1f},{base:.1f}"], 0
    for at, value in points:
        if value != level:
            path += [f"{60 + at * x:.1f},{base - level * y:.1f}", f"{60 + at * x:.1f},{base - value * y:.1f}"]
            level = value
    return f'<polyline fill="none" stroke="{colour}" stroke-width="2"{how} points="{" ".join(path)}"/>'


def _level(y: float, says: str) -> str:
    line = f'<line x1="60" x2="720" y1="{y:.1f}" y2="{y:.1f}" stroke="#d1d9e0"/>'
    return line + f'<text x="52" y="{y + 4:.1f}" text-anchor="end" font-size="12" fill="#59636e">{says}</text>'


def _text(x: float, y: float, says: str) -> str:
    return f'<text x="{x}" y="{y}" font-size="13" fill="#1f2328">{says}</text>'


def main(
    deadline: Annotated[list[int] | None, typer.Option(help="In seconds; these only.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Keep tables and picture in benchmarks/results.")] = False,
) -> None:
    """Exit code 1 where the job with the deadline of 450 s misses a goal."""
    say = Console(stderr=True, highlight=False)
    items = texts()
    rows = [measure(each, items, say) for each in deadline or DEADLINES_S]
    page = text(rows)
    print(page)
    if write:
        (RESULTS / "jobs.md").write_text(page)
        (RESULTS / "jobs.svg").write_text(picture(next((r for r in rows if r.deadline_s == CHOSEN_S), rows[0])))
    if any(row.missed() for row in rows if row.deadline_s == CHOSEN_S):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
