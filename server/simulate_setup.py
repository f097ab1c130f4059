"""What `migserve simulate` was asked for, as a scene: slices with their tables, queries, SLOs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from partitioner import gangs, latency, optimal
from partitioner.catalog import GPU_MODELS
from partitioner.cuts import cuts
from partitioner.gangs import GangTable
from partitioner.geometry import GpuModel, Layout, parse_layout
from partitioner.latency import Measurement
from partitioner.lengths import LengthTable, length_tables
from partitioner.optimal import Choices
from partitioner.plans import ModelDemand, Plan
from scheduler import workload
from scheduler.mix import Load, Mix, Stream, Trace
from scheduler.search import Scene, fluid_bound_per_s
from scheduler.simulator import EXACT, Noise, SimSlice
from scheduler.workload import TraceError
from server.plan_command import UsageError, measured, nearest, quiet, read_demand

WORKLOADS = ("w-paper", "w-length", "w-slo")
ADJECTIVES = {"poisson": "Poisson", "bursty": "bursty", "diurnal": "diurnal"}
DEFAULT_MODEL, DEFAULT_GPUS, DEFAULT_SLO_FACTOR = "resnet50", 2, 2.0
# The one that the shipped table has by length, and who measured it.
LENGTH_MODEL, BY_LENGTH = "bert-base", "migprofiler"
LARGEST_BATCH = 64
# The SLO is a multiple of the time of so many items on a whole GPU, the most that a query of w-paper carries.
MOST_ITEMS = 32
# Of one model in a slice, where the planner cuts.
PROCESSES = 5
# What lasts for fewer SLOs is a short run.
SHORT_SLOS = 200
LENGTHS_OF_TRACES = (
    "The trace has lengths: only queries of the same one share a batch, but no latency depends on it, since those of "
    "the table do not."
)
# Without a rate: this share of the fluid bound.
DEFAULT_LOAD = 0.8


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says; None where it says nothing."""

    gpu: str = "A100-80GB"
    gpus: int | None = None
    layout: str | None = None
    model: str | None = None
    workload: str = "w-paper"
    scenario: str | None = None
    arrivals: str = "poisson"
    slo_factor: float | None = None
    latency_table: Path | None = None
    skip_suspects: bool = False
    queries: int = 10_000
    noise: float = 0.03
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Setup:
    """A scene, with what is to be said of it. `rate_per_s`: where nothing else is asked for."""

    scene: Scene
    layout: str
    about: str
    bound_per_s: float
    rate_per_s: float
    notes: Sequence[str]


def prepare(asked: Asked) -> Setup:
    """Raises UsageError, DemandError, LatencyTableError, IllegalLayoutError, TraceError; PlanError: no plan holds."""
    if asked.gpu not in GPU_MODELS:
        raise UsageError(f"no GPU is called {asked.gpu!r}; {nearest(asked.gpu, list(GPU_MODELS))}")
    if asked.arrivals not in ADJECTIVES:
        raise UsageError(f"no arrivals are called {asked.arrivals!r}; there are {', '.join(ADJECTIVES)}")
    gpu = GPU_MODELS[asked.gpu]
    measurements, notes = measured(asked.latency_table, asked.skip_suspects, gpu)
    if elsewhere := latency.measured_elsewhere(measurements, gpu.name):
        notes.append(elsewhere)
    if asked.workload == "w-slo":
        return _w_slo(asked, gpu, measurements, notes)
    if asked.scenario is not None:
        raise UsageError("--scenario is for --workload w-slo")
    if asked.workload == "w-length":
        return _w_length(asked, gpu)
    if asked.workload == "w-paper":
        return _w_paper(asked, gpu, measurements, notes)
    return _recorded(asked, gpu, measurements, notes)


# ---- the workloads ----


def _w_paper(asked: Asked, gpu: GpuModel, measurements: Sequence[Measurement], notes: Sequence[str]) -> Setup:
    model = asked.model or DEFAULT_MODEL
    load = Mix([Stream(model, 1.0, workload.W_PAPER)], asked.arrivals)
    about = f"w-paper: {ADJECTIVES[asked.arrivals]} queries of {model}, 1 to 32 items each (log-normal, median 6)"
    return _cut_alike(asked, gpu, measurements, load, about, None, notes)


def _w_length(asked: Asked, gpu: GpuModel) -> Setup:
    """Texts, batched by padded length; the SLO is by the time of the longest ones."""
    model = asked.model or LENGTH_MODEL
    found = (
        latency.read_measurements(asked.latency_table)
        if asked.latency_table
        else latency.shipped_measurements(BY_LENGTH)
    )
    of_gpu = [each for each in found if each.gpu in ("", gpu.name)]
    known = sorted({each.model for each in found if each.seq_len})
    if model not in known:
        raise UsageError(f"no latencies by length for {model!r}; there are those of {', '.join(known) or 'no model'}")
    notes = [
        "Few batch sizes were measured at other lengths than 64; there an item weighs as much as in the one that was."
    ]
    if not of_gpu:
        notes.append(f"The latencies were measured on another GPU than {gpu.name}.")
    tables = length_tables(of_gpu or found, model, LARGEST_BATCH)
    layout = parse_layout(asked.layout, gpu) if asked.layout else varied_cut(gpu)
    gpus = asked.gpus or DEFAULT_GPUS
    slices = [
        _of_lengths(_name(index, placed.profile.name, placed.placement.start), placed.profile.gpcs, model, tables)
        for index in range(gpus)
        for placed in layout
    ]
    whole = tables[_stand_in(tables, gpu.compute_slices)]
    slo_ms = {model: (asked.slo_factor or DEFAULT_SLO_FACTOR) * whole.rows[-1][MOST_ITEMS - 1]}
    load = Mix([Stream(model, 1.0, None, workload.W_LENGTH)], asked.arrivals)
    about = f"w-length: {ADJECTIVES[asked.arrivals]} queries of {model}, one text of 16 to 512 tokens each (log-normal)"
    return _setup(asked, slices, load, slo_ms, f"{gpus} x {_text(layout)}", f"{about}; {gpu.name}", None, notes)


def _of_lengths(name: str, gpcs: int, model: str, tables: Mapping[int, LengthTable]) -> SimSlice:
    table = tables[_stand_in(tables, gpcs)]
    return SimSlice(name, gpcs, {model: [ms for row in table.rows for ms in row]}, lengths={model: table.lengths})


def _stand_in(tables: Mapping[int, LengthTable], gpcs: int) -> int:
    """The measured size that speaks for this one: the nearest smaller, else the smallest."""
    return max((size for size in tables if size <= gpcs), default=min(tables))


def _recorded(asked: Asked, gpu: GpuModel, measurements: Sequence[Measurement], notes: Sequence[str]) -> Setup:
    load = read_trace(asked.workload)
    if asked.model is not None or asked.arrivals != "poisson":
        raise UsageError("a trace names its own models and times; leave out --model and --arrivals")
    about = f"{asked.workload}: {len(load.arrivals)} recorded queries of {', '.join(load.shares)}"
    if any(arrival.length for arrival in load.arrivals):
        notes = (*notes, LENGTHS_OF_TRACES)
    return _cut_alike(asked, gpu, measurements, load, about, load.rate_per_s, notes)


def read_trace(name: str) -> Trace:
    """Raises UsageError where there is no such file, TraceError."""
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        known = ", ".join(WORKLOADS)
        raise UsageError(f"no workload and no file is called {name!r}; there are {known}, or a trace.csv") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"trace {name}: {getattr(error, 'strerror', None) or error}") from error
    try:
        arrivals = list(workload.trace(text.splitlines()))
    except TraceError as error:
        raise TraceError(f"{name}, {error}") from error
    if not arrivals:
        raise TraceError(f"{name} has no queries; a line is such as 0.25,resnet50,4 (seconds, model, items)")
    return Trace(arrivals)


def _cut_alike(
    asked: Asked,
    gpu: GpuModel,
    measurements: Sequence[Measurement],
    load: Load,
    about: str,
    rate_per_s: float | None,
    notes: Sequence[str],
) -> Setup:
    """Every GPU with the same layout, every slice for all models; SLOs by the time of a whole GPU."""
    tables = _single_tables(load.shares, measurements)
    factor = DEFAULT_SLO_FACTOR if asked.slo_factor is None else asked.slo_factor
    slo_ms = {
        model: factor * latency.per_batch(tables[model].points(gpu.compute_slices), MOST_ITEMS)[-1]
        for model in load.shares
    }
    gpus = asked.gpus or DEFAULT_GPUS
    layout = parse_layout(asked.layout, gpu) if asked.layout else varied_cut(gpu)
    slices = _alike(layout, gpus, tables)
    text = f"{gpus} x {_text(layout)}"
    return _setup(asked, slices, load, slo_ms, text, f"{about}; {gpu.name}", rate_per_s, notes)


def _w_slo(asked: Asked, gpu: GpuModel, measurements: Sequence[Measurement], notes: Sequence[str]) -> Setup:
    if asked.model is not None or asked.slo_factor is not None:
        raise UsageError("w-slo names its own models and SLOs; leave out --model and --slo-factor")
    demands = read_demand(None, asked.scenario)
    total = sum(demand.rate_per_s for demand in demands)
    load = Mix([Stream(demand.model, demand.rate_per_s / total) for demand in demands], asked.arrivals)
    slo_ms = {demand.model: demand.slo_ms for demand in demands}
    queries = f"{ADJECTIVES[asked.arrivals]} queries of {len(demands)} models, one item each"
    about = f"w-slo {asked.scenario}: {queries}; {gpu.name}"
    if asked.layout:
        layout = parse_layout(asked.layout, gpu)
        gpus = asked.gpus or DEFAULT_GPUS
        slices = _alike(layout, gpus, _single_tables(load.shares, measurements))
        text = f"{gpus} x {_text(layout)}"
        notes = (*notes, "Every slice is taken to hold all models; whether their memory fits is not checked.")
    else:
        tables = gangs.gang_tables(measurements)
        plan = _planned(demands, tables, gpu, asked.gpus)
        slices = planned_slices(plan, tables)
        text = " / ".join(plan.layouts())
        notes = (*notes, f"Layout, and who serves what, by the optimal planner, up to {PROCESSES} processes a slice.")
    return _setup(asked, slices, load, slo_ms, text, about, total, notes)


def _setup(
    asked: Asked,
    slices: Sequence[SimSlice],
    load: Load,
    slo_ms: Mapping[str, float],
    layout: str,
    about: str,
    rate_per_s: float | None,
    notes: Sequence[str],
) -> Setup:
    bound_per_s = fluid_bound_per_s(slices, load, slo_ms)
    if bound_per_s <= 0:
        short = ", ".join(f"{model} {ms:.1f} ms" for model, ms in slo_ms.items())
        raise UsageError(
            f"no slice ends even one item within its SLO ({short}): raise --slo-factor, or cut larger slices"
        )
    if not isinstance(load, Trace):
        notes = (*notes, *_short_run(asked.queries, bound_per_s, min(slo_ms.values())))
    noise = Noise(asked.noise) if asked.noise > 0 else EXACT
    scene = Scene(slices, load, slo_ms, asked.queries, noise, asked.strict)
    return Setup(scene, layout, about, bound_per_s, rate_per_s or DEFAULT_LOAD * bound_per_s, notes)


def _short_run(queries: int, rate_per_s: float, slo_ms: float) -> list[str]:
    """What is to be said of a run at about that rate, if it is short."""
    slos = 1e3 * queries / rate_per_s / slo_ms
    if slos >= SHORT_SLOS:
        return []
    enough = math.ceil(queries * SHORT_SLOS / slos)
    return [
        f"{queries} queries last for {slos:.0f} SLOs only: what still waits when they end flatters the figures; "
        f"--queries {enough} last for {SHORT_SLOS}."
    ]


# ---- slices and their tables ----


def _single_tables(models: Iterable[str], measurements: Sequence[Measurement]) -> dict[str, latency.LatencyTable]:
    known = sorted({each.model for each in measurements if each.processes == 1})
    for model in models:
        if model not in known:
            raise UsageError(f"no latency table for {model!r}; {nearest(model, known)}")
    return {model: latency.single_process(measurements, model) for model in models}


def _alike(layout: Layout, gpus: int, tables: Mapping[str, latency.LatencyTable]) -> list[SimSlice]:
    times: dict[int, dict[str, list[float]]] = {}
    for placed in layout:
        gpcs = placed.profile.gpcs
        times[gpcs] = {model: latency.per_batch(table.points(gpcs), LARGEST_BATCH) for model, table in tables.items()}
    return [
        SimSlice(
            _name(index, placed.profile.name, placed.placement.start), placed.profile.gpcs, times[placed.profile.gpcs]
        )
        for index in range(gpus)
        for placed in layout
    ]


def _name(gpu: int, mig_profile: str, start: int) -> str:
    return f"gpu{gpu}/{mig_profile}@{start}"


def planned_slices(plan: Plan, tables: Mapping[str, GangTable]) -> list[SimSlice]:
    """The slices of a plan that serve something; the gang of a slice counts as one worker."""
    return [
        SimSlice(_name(gpu, each.mig_profile, each.start), each.gpcs, {
            share.model: tables[share.model].times_ms(each.gpcs, share.batch, share.processes) for share in each.models
        })
        for gpu, layout in enumerate(plan.gpus)
        for each in layout
        if each.models
    ]  # fmt: skip


def _planned(demands: Sequence[ModelDemand], tables: Mapping[str, GangTable], gpu: GpuModel, gpus: int | None) -> Plan:
    with quiet() as say:
        return optimal.plan(demands, tables, gpu, Choices(PROCESSES, gpus=gpus), say)


def varied_cut(gpu: GpuModel) -> Layout:
    """The maximal layout with the most different sizes, of these the one with the most slices."""

    def variety(layout: Layout) -> tuple[int, int]:
        return len({placed.profile.gpcs for placed in layout}), len(layout)

    return max(cuts(gpu), key=variety)


def _text(layout: Layout) -> str:
    largest_first = sorted((placed.profile for placed in layout), key=lambda profile: -profile.gpcs)
    return "+".join(profile.name for profile in largest_first)
