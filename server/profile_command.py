"""`migserve profile`: measures a model on slices, predicts what was not measured, and writes a latency table."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from partitioner import latency
from partitioner.latency import LatencyTableError, Measurement
from partitioner.nvml import NvmlDoor, real_gpus
from partitioner.nvml_errors import NvmlError, NvmlUnavailableError
from partitioner.performance import Point
from partitioner.predictor import Knowledge, learn
from partitioner.profiler import Campaign
from scheduler.backends import ModelLoadError
from scheduler.channel import ModelSource
from scheduler.lengths import shortest, to_measure
from scheduler.measuring import Effort, Failure, Measurer, OutOfMemory, Timed
from scheduler.tensors import Signature
from server import picture, profile_places, profile_plot, progress
from server.config_pbtxt import ModelFileError
from server.gpus import StartError
from server.model_files import read_model, versions_to_serve
from server.out_file import trouble_with, trouble_with_drawing
from server.plan_command import UsageError, complain, nearest
from server.profile_file import TableFile, half_of
from server.profile_places import Machine

IMPOSSIBLE, USAGE, INTERRUPTED = 1, 2, 130
# A predicted row holds what so large a share of measurements would lie below: the margin of plans made on it.
QUANTILE = 0.75
# One point of a small model on a CPU: predictions were off by 12 to 27 on the slice that had none.
FEW = 3
COLUMNS = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
DEVICES = ("cpu", "cuda", "shares", "emulated")


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asked for. `budget`: points, or a share of them with %; empty tuples: by default."""

    model: str
    repository: Path
    device: str | None
    gpu: str
    slices: tuple[str, ...]
    batches: tuple[int, ...]
    processes: tuple[int, ...]
    lengths: tuple[int, ...]
    budget: str | None
    minutes: float | None
    sure: float
    effort: Effort
    memory_mib: int | None
    out: Path | None
    plot: Path | None
    anew: bool = False


def run(request: Request) -> int:
    """Measures; the exit code is 0, 1 if a point failed, 2 for what is unknown, 130 after Ctrl-C."""
    try:
        return _run(request)
    except KeyboardInterrupt:
        return complain("stopped; what was measured is kept, and the same command goes on", INTERRUPTED)


def _run(request: Request) -> int:
    try:
        source = _source(request)
        machine = _machine(request, source)
    except (UsageError, ModelFileError, StartError, NvmlError) as error:
        return complain(str(error), USAGE)
    try:
        return measure_on(machine, request, source)
    finally:
        machine.close()


def measure_on(machine: Machine, request: Request, source: ModelSource) -> int:
    """All points, at the places of that machine; returns the exit code, see `run`."""
    try:
        path = request.out or Path(f"{source.name}.latency.csv")
        _check_writable(path, request.plot)
        file = TableFile(path, source.name, machine.gpu, machine.source, source.digest, anew=request.anew)
        session = _Session(request, source, machine, file)
        session.prepare()
    except (UsageError, ModelFileError, LatencyTableError) as error:
        return complain(str(error), USAGE)
    except (ModelLoadError, MemoryError) as error:
        return complain(f"the model cannot be loaded: {error}", IMPOSSIBLE)
    try:
        session.measure()
        return session.end(path)
    except ModelLoadError as error:
        return complain(f"the model cannot be loaded any more: {error}", IMPOSSIBLE)
    except LatencyTableError as error:
        return complain(str(error), USAGE)


def _draw(rows: Sequence[Measurement], path: Path) -> int:
    try:
        profile_plot.write(rows, path)
    except (OSError, ValueError) as error:
        return complain(f"cannot draw to {path}: {getattr(error, 'strerror', None) or error}", USAGE)
    return 0


def _check_writable(table: Path, plot: Path | None) -> None:
    """Raises UsageError."""
    if trouble := trouble_with(table) or trouble_with(half_of(table)):
        raise UsageError(f"cannot write {table}: {trouble}")
    if plot is not None and (trouble := trouble_with_drawing(plot)):
        raise UsageError(f"cannot draw to {plot}: {trouble}")


def _source(request: Request) -> ModelSource:
    folder = Path(request.model) if Path(request.model).is_dir() else request.repository / request.model
    if not folder.is_dir():
        there = [each.name for each in request.repository.iterdir()] if request.repository.is_dir() else []
        if not there:
            raise UsageError(f"there is no model in {request.repository}; see --model-repository")
        raise UsageError(f"no model {request.model!r} in {request.repository}; {nearest(request.model, sorted(there))}")
    return read_model(folder, max(versions_to_serve(folder)[0]), 0)[0]


def _machine(request: Request, source: ModelSource) -> Machine:
    kind = request.device or ("emulated" if source.backend == "emulated" else "cuda" if _has_gpu() else "cpu")
    if kind not in DEVICES:
        raise UsageError(f"no device is called {kind!r}; there are {', '.join(DEVICES)}")
    if (kind == "emulated") != (source.backend == "emulated"):
        raise UsageError(f"{source.name} is {'' if kind != 'emulated' else 'not '}emulated: leave --device out")
    if kind == "cpu":
        made = profile_places.cpu(request.slices, request.memory_mib)
    elif kind == "emulated":
        made = profile_places.emulated(request.gpu, source, request.memory_mib)
    elif kind == "shares":
        made = profile_places.shares(_door())
    else:
        made = profile_places.cuda(_door())
    unknown = [name for name in request.slices if name not in made.places]
    if unknown:
        raise UsageError(f"no slice {unknown[0]!r}; {nearest(unknown[0], list(made.places))}")
    return made


def _door() -> NvmlDoor:
    """Raises UsageError where there is no driver: what `serve` advises then, to simulate GPUs, measures nothing."""
    try:
        return real_gpus()
    except NvmlUnavailableError as error:
        raise UsageError(
            f"no usable NVIDIA driver here ({error.__cause__ or error}). If there is a GPU, nvidia-smi "
            f"must list it first: install or load the driver, or start the container with --gpus all. "
            f"--device cpu measures on the CPU, which is no latency table of a GPU"
        ) from error


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


class _Session:
    """Processes come and go with the slice and the number of processes that are measured."""

    def __init__(self, request: Request, source: ModelSource, machine: Machine, file: TableFile) -> None:
        self._request, self._source, self._machine, self._file = request, source, machine, file
        names = request.slices or tuple(machine.places)
        self._places = {machine.places[name].mig_profile: machine.places[name] for name in names}
        self._measurer: Measurer | None = None
        self._where: tuple[str, int] | None = None
        self._failures: list[str] = []
        self._too_large: list[Point] = []
        self._widest = 0.0

    def prepare(self) -> None:
        """Loads the model once, to see what it takes, and what was measured before."""
        try:
            self._signature = self._load()
            self._points = list(self._grid(self._signature))
            self._campaign = self._new_campaign()
            self._kept = len(self._campaign.measured)
            if self._request.anew:
                self._file.forget()
        except BaseException:
            self._close()
            raise

    def _load(self) -> Signature:
        """At the first place that has memory enough for it. Raises ModelLoadError, MemoryError."""
        *others, last = self._places
        for name in others:
            try:
                return self._at(name, 1).load()
            except MemoryError:
                continue  # of its points it is said that they are too large
        return self._at(last, 1).load()

    def _grid(self, signature: Signature) -> Iterator[Point]:
        most = max(signature.max_batch, 1)
        batches = self._request.batches or sorted({most, *(1 << n for n in range(most.bit_length()))})
        if max(batches) > most:
            raise UsageError(f"--batches: the model takes at most {most} items")
        lengths = self._lengths(signature)
        for place in self._places.values():
            for processes in self._request.processes or (1,):
                for length in lengths or (None,):
                    for batch in batches:
                        yield Point(place.mig_profile, place.gpcs, batch, processes, length)

    def _lengths(self, signature: Signature) -> tuple[int, ...]:
        """At which to measure; none if the model has none. By default those at which a daemon would."""
        varying = any(dim == -1 for spec in signature.inputs for dim in spec.dims)
        asked, declared = self._request.lengths, self._source.lengths
        if not varying and asked:
            raise UsageError("--lengths: the model's inputs have no axis that varies")
        if varying and not asked and declared is None:
            raise UsageError("the model's inputs vary in length: say at which to measure, such as --lengths 32,128,512")
        if declared is None:
            return asked
        if asked and max(asked) > declared.longest:
            raise UsageError(f"--lengths: serving.yaml says that the longest is {declared.longest}")
        return asked or to_measure(declared, shortest(signature))

    def _new_campaign(self) -> Campaign:
        known = self._file.known()
        budget = _budget(self._request.budget, len(self._points))
        knowledge = None
        if budget is not None or self._request.minutes is not None:
            knowledge = self._learned()
            budget = len(self._points) if budget is None else budget
        return Campaign(self._points, known, budget, knowledge, self._request.sure)

    def _learned(self) -> Knowledge:
        rows = [*latency.shipped_measurements(), *latency.shipped_measurements("migprofiler")]
        return learn(each for each in rows if each.model != self._source.name)

    def measure(self) -> None:
        """Until the campaign ends or the time is up."""
        begin = time.monotonic()
        try:
            with progress.bar(*COLUMNS) as bar:
                task = bar.add_task(self._source.name, total=self._campaign.left)
                while (point := self._campaign.next()) is not None:
                    minutes = (time.monotonic() - begin) / 60
                    if self._request.minutes is not None and minutes >= self._request.minutes:
                        break
                    bar.update(task, description=_words(point))
                    self._measure(point)
                    done = bar.tasks[0].completed + 1
                    bar.update(task, completed=done, total=done + self._campaign.left)
        finally:
            self._close()

    def _measure(self, point: Point) -> None:
        varying = sum(dim == -1 for spec in self._signature.inputs for dim in spec.dims)
        dims = (point.seq_len,) * varying if point.seq_len else ()
        measurer = self._at(point.mig_profile, point.processes)
        match measurer.measure(point.batch, dims, self._request.effort):
            case Timed() as found:
                self._keep(point, found, measurer.versions)
            case OutOfMemory():
                self._too_large.append(point)
                self._campaign.does_not_fit(point)
            case Failure(detail):
                self._failures.append(f"{_words(point)}: {detail}")
                self._campaign.failed(point)

    def _keep(self, point: Point, found: Timed, versions: str) -> None:
        row = Measurement(
            self._source.name,
            point.mig_profile,
            point.gpcs,
            point.batch,
            point.processes,
            found.latency_ms,
            found.memory_mib,
            self._machine.gpu,
            self._machine.source,
            point.seq_len,
        )
        within = found.within if math.isfinite(found.within) else None
        how = {
            "runs": found.runs,
            "outliers": found.outliers,
            "within": within,
            "driver": self._machine.driver,
            "versions": versions,
            "energy_j": found.energy_j,
            "sm_activity": found.sm_activity,
        }
        self._file.add(row, how)
        self._campaign.took(point, found.latency_ms)
        self._widest = max(self._widest, found.within)

    def _at(self, mig_profile: str, processes: int) -> Measurer:
        if self._where != (mig_profile, processes) or self._measurer is None:
            self._close()
            place = self._places[mig_profile]
            self._measurer = Measurer(self._source, place.device, processes, place.gauges)
            self._where = mig_profile, processes
        return self._measurer

    def _close(self) -> None:
        if self._measurer is not None:
            self._measurer.close()
            self._measurer = None

    def end(self, path: Path) -> int:
        """Writes predictions, draws, and says what there is now."""
        rest = self._campaign.rest(self._source.name, self._machine.gpu, QUANTILE)
        predicted = [replace(row, source=latency.predicted_from(self._machine.source)) for row in rest]
        measured = self._campaign.measured
        for failure in self._failures:
            complain(failure, IMPOSSIBLE)
        if not measured:
            return complain("nothing could be measured", IMPOSSIBLE)
        self._file.finish(predicted, {})
        console = picture.console()
        console.print(profile_plot.summary(measured))
        console.print(f"{path}: {self._counted(len(measured), len(predicted))}", soft_wrap=True)
        if self._too_large:
            console.print(f"too large for memory: {', '.join(map(_words, self._too_large))} and what is larger")
        if self._widest > self._request.effort.within:
            how = f"the widest is known to {self._widest:.0%}" if math.isfinite(self._widest) else "some had few runs"
            console.print(f"not every median is steady: {how}; more --seconds would help", style="yellow")
        if self._machine.source == latency.SHARES:
            console.print("shares of a GPU's SMs stood for its slices: an approximation, see docs/profiling.md")
        if predicted:
            console.print(f"what was predicted says so in the column source: {latency.PREDICTED}")
            if len(measured) < FEW:
                few = f"made from fewer than {FEW} points, it can be off by a factor of ten and more"
                console.print(f"{few}; a larger --budget adds to these", style="yellow", soft_wrap=True)
        if self._request.plot is not None:
            rows = latency.read_measurements(path)
            mine = [each for each in rows if (each.model, each.gpu) == (self._source.name, self._machine.gpu)]
            if trouble := _draw(mine, self._request.plot):
                return trouble
        return IMPOSSIBLE if self._failures else 0

    def _counted(self, measured: int, predicted: int) -> str:
        kept = f", {self._kept} kept from an earlier run" if self._kept else ""
        now = measured - self._kept
        return f"{now} point{'' if now == 1 else 's'} measured{kept}, {predicted} predicted"


def _words(point: Point) -> str:
    length = f", length {point.seq_len}" if point.seq_len else ""
    return f"{point.mig_profile}: {point.processes} x {point.batch}{length}"


def _budget(text: str | None, points: int) -> int | None:
    """Points. Raises UsageError."""
    if text is None:
        return None
    number = text.removesuffix("%")
    if not number.isdecimal() or not int(number) or (text.endswith("%") and int(number) > 100):
        raise UsageError(f"--budget is a number of points, or a share such as 10%, not {text!r}")
    return max(1, round(points * int(number) / 100)) if text.endswith("%") else int(number)


def numbers(text: str | None, option: str) -> tuple[int, ...]:
    """Of an option such as 1,2,4, each once, by size. Raises UsageError."""
    parts: Sequence[str] = text.split(",") if text else ()
    if any(not part.strip().isdecimal() or not int(part) for part in parts):
        raise UsageError(f"{option} takes numbers such as 1,2,4, not {text!r}")
    return tuple(sorted({int(part) for part in parts}))
