"""The files of one model: what `config.pbtxt`, `serving.yaml` and the version folders say."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from partitioner import latency, yaml_text
from partitioner.lengths import LengthTable, length_tables
from preprocess.pipeline import PipelineError, PipelineFile, checked
from scheduler import model_file
from scheduler.channel import ModelSource
from scheduler.lengths import ByLength, Lengths
from scheduler.tensors import Signature
from server import config_pbtxt, wrong_values
from server.config_pbtxt import EMULATED, MODEL_FILES, ModelFileError

# A month or so; what is more is a mistake.
MAX_SLO_MS = 3e9
# What pydantic would call a tuple.
_EXPECTED = {
    "size": "[height, width] in pixels",
    "crop": "a number of pixels, or [height, width]",
    "mean": "a list of one number for each channel",
    "std": "a list of one number for each channel",
    "buckets": "how many lengths, or a list of them",
}


class LatencyTableFile(BaseModel):
    """Where a model's latency table is. Give `file` (beside serving.yaml) or `measured: a100`, which we ship."""

    model_config = ConfigDict(extra="forbid")

    file: Path | None = None
    measured: Literal["a100"] | None = None
    model: str | None = None


class LengthsFile(BaseModel):
    """`lengths` in serving.yaml: see `scheduler.lengths.Lengths`. `buckets`: how many, or their upper edges."""

    model_config = ConfigDict(extra="forbid")

    longest: int | None = Field(None, ge=1, lt=2**31)
    buckets: int | list[int] = 6
    length: str = ""
    mask: str = ""

    @model_validator(mode="after")
    def _makes_sense(self) -> LengthsFile:
        if isinstance(self.buckets, int):
            if self.longest is None:
                raise ValueError("give longest, the greatest length that is taken, or buckets as a list of lengths")
            if not 1 <= self.buckets <= 64:
                raise ValueError("buckets must be 1 to 64, or a list of lengths")
        elif not self.buckets or self.buckets[0] < 1 or any(low >= high for low, high in pairwise(self.buckets)):
            raise ValueError("buckets must be lengths in ascending order")
        elif self.longest is not None and self.longest != self.buckets[-1]:
            raise ValueError(f"longest is {self.longest}, but the last of the buckets {self.buckets[-1]}")
        return self

    def settled(self, length: str, mask: str) -> Lengths:
        """`length`, `mask`: what preprocessing calls them, where they are not given here."""
        length, mask = self.length or length, self.mask or mask
        if isinstance(self.buckets, list):
            return Lengths(self.buckets[-1], tuple(self.buckets), length=length, mask=mask)
        assert self.longest is not None
        return Lengths(self.longest, count=self.buckets, length=length, mask=mask)


class ServingFile(BaseModel):
    """`serving.yaml`. `mig_profiles`: where the model is served; empty means on every slice.

    `strict`: requests that cannot be served in time are refused, not served late. `split`: a request's items may
    run in different batches, since none depends on another. `weight`: its part of slices that it shares with other
    models, when there is not enough for all. `lengths`: of a model with an axis that varies, which is padded.
    """

    model_config = ConfigDict(extra="forbid")

    slo_ms: float | None = Field(None, gt=0, lt=MAX_SLO_MS)
    strict: bool = False
    split: bool = True
    weight: float = Field(1.0, gt=0, le=1000)
    mig_profiles: list[str] = []
    latency_table: LatencyTableFile | None = None
    preprocess: PipelineFile | None = None
    lengths: LengthsFile | None = None

    @property
    def settled_lengths(self) -> Lengths | None:
        pipeline = self.preprocess
        if self.lengths is None:
            return None
        return self.lengths.settled(pipeline.length or "" if pipeline else "", pipeline.mask or "" if pipeline else "")

    def check(self, signature: Signature) -> None:
        """Raises ModelFileError where it does not fit the model."""
        if self.preprocess is None:
            return
        inputs = {spec.name: (spec.datatype, spec.dims) for spec in signature.inputs}
        try:
            checked(self.preprocess, inputs)
        except PipelineError as error:
            raise ModelFileError(f"serving.yaml: {error}") from error


def versions_to_serve(folder: Path) -> tuple[list[int], list[str]]:
    """The versions that config.pbtxt's version_policy picks, at least one, and what it says that is ignored.

    By default it is the highest one. A model that is emulated needs no folder for its version 1. Raises ModelFileError.
    """
    try:
        found = sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())
    except OSError as error:
        raise ModelFileError(f"{folder} cannot be read: {error}") from error
    config = config_pbtxt.read(folder)
    if not found and not _emulated(config):
        raise ModelFileError(f"{folder} has no version folder; expected {folder / '1'} with a {_file_names()} in it")
    return config_pbtxt.picked(config, found or [1]), config_pbtxt.ignored(config)


def needs_torch(folder: Path) -> bool:
    """Whether the files of a model look so: its own, or those of preprocessing, which computes with torch too."""
    if any(path.name in MODEL_FILES for path in folder.glob("*/*")):
        return True
    try:
        return "preprocess" in (folder / "serving.yaml").read_text(errors="replace")
    except OSError:
        return False


def read_model(folder: Path, version: int, generation: int) -> tuple[ModelSource, ServingFile, dict[str, Any]]:
    """One version, ready to be handed to the fleet, and the version policy it was picked by. Raises ModelFileError."""
    name = folder.name
    config = config_pbtxt.read(folder)
    serving = _read_serving(folder)
    backend, path = _model_file(folder, version, config)
    source = ModelSource(
        key=f"{name}/{version}#{generation}",
        name=name,
        version=version,
        backend=backend,
        path=str(path),
        inputs=config_pbtxt.specs(config.input, "input"),
        outputs=config_pbtxt.specs(config.output, "output"),
        max_batch=_max_batch(config, backend),
        latency_ms=_latency(folder, name, serving.latency_table),
        latency_origin=_latency_origin(folder, name, serving.latency_table),
        lengths=serving.settled_lengths,
        lengths_ms=_latency_by_length(folder, name, serving) if serving.lengths is not None else None,
        mig_profiles=tuple(serving.mig_profiles),
        weight=serving.weight,
        digest=model_file.digest(str(path)),
    )
    return source, serving, config_pbtxt.version_policy(config)


def _file_names() -> str:
    return " or ".join(MODEL_FILES)


def _max_batch(config: Any, backend: str) -> int | None:
    """0 in config.pbtxt cannot be told from no entry: then the model file says."""
    if config.max_batch_size == 0 and backend == MODEL_FILES["model.pt2"]:
        return None
    return int(config.max_batch_size)


def _read_serving(folder: Path) -> ServingFile:
    path = folder / "serving.yaml"
    try:
        data = yaml_text.load(path.read_text()) or {}
    except FileNotFoundError:
        return ServingFile()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ModelFileError(f"{path}{line} is not YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path} is not YAML: it is not text in UTF-8") from error
    except OSError as error:
        raise ModelFileError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ModelFileError(f"{path} must hold settings by their names, a line for each, such as `slo_ms: 50`")
    try:
        serving = ServingFile.model_validate(data)
        if serving.preprocess is not None:
            if "longest" in serving.preprocess.model_fields_set:
                raise ModelFileError(f"{path}: unknown key preprocess.longest; did you mean lengths.longest?")
            lengths = serving.settled_lengths
            longest = lengths.longest if lengths is not None else None
            serving.preprocess = serving.preprocess.placed(str(folder), longest)
        return serving
    except ValidationError as error:
        reasons = dict.fromkeys(map(_explain, error.errors()))
        raise ModelFileError(f"{path}: {'; '.join(reasons)}") from error


def _explain(error: Mapping[str, Any]) -> str:
    loc = error["loc"]
    where = ".".join(map(str, loc))
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] != "extra_forbidden":
        special = next((index for index, name in enumerate(loc) if name in _EXPECTED), None)
        if special is not None and error["type"] != "finite_number":
            return f"{'.'.join(map(str, loc[: special + 1]))}: expected {_EXPECTED[loc[special]]}"
        return f"{where}: {wrong_values.said(error)}" if where else wrong_values.said(error)
    known = _keys(loc[:-1])
    near = get_close_matches(str(loc[-1]), known, 1)
    return f"unknown key {where}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")


def _keys(loc: Sequence[int | str]) -> list[str]:
    """The keys that serving.yaml may have in this section."""
    section: type[BaseModel] = ServingFile
    for name in loc:
        annotation = section.model_fields[str(name)].annotation
        candidates = get_args(annotation) or (annotation,)
        section = next(each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel))
    # That one `lengths` sets.
    return [name for name in section.model_fields if (section, name) != (PipelineFile, "longest")]


def _emulated(config: Any) -> bool:
    return EMULATED in (config.backend, config.platform)


def _model_file(folder: Path, version: int, config: Any) -> tuple[str, Path]:
    path = folder / str(version)
    if _emulated(config) and config_pbtxt.backend_of(config, EMULATED):
        return EMULATED, path
    there = {name: backend for name, backend in MODEL_FILES.items() if (path / name).is_file()}
    for name, backend in there.items():
        if config_pbtxt.backend_of(config, backend):
            return backend, path / name
    if there or config_pbtxt.words_of(config):
        raise ModelFileError(
            f"{folder / 'config.pbtxt'}: {config_pbtxt.words_of(config)}, but {path} holds "
            f"{' and '.join(there) or f'no {_file_names()}'}; they may be {config_pbtxt.all_words()}"
        )
    raise ModelFileError(f"{path} holds no {_file_names()}")


def _latency_by_length(folder: Path, name: str, serving: ServingFile) -> dict[int, ByLength] | None:
    """Of a latency table whose rows name a seq_len; it was read before, as one without. None: of no such one."""
    table = serving.latency_table
    if table is None or table.file is None:
        return None
    model = table.model or name
    rows = [row for row in latency.read_measurements(folder / table.file) if row.model == model]
    if not any(row.seq_len for row in rows):
        return None
    found = length_tables(rows, model, max(row.batch for row in rows))
    return {gpcs: _points_by_length(of_size) for gpcs, of_size in found.items()}


def _points_by_length(table: LengthTable) -> ByLength:
    return tuple(
        (length, tuple(enumerate(row, start=1))) for length, row in zip(table.lengths, table.rows, strict=True)
    )


def _latency(
    folder: Path, name: str, table: LatencyTableFile | None
) -> dict[int, tuple[tuple[int, float], ...]] | None:
    if table is None:
        return None
    try:
        if table.file is not None:
            found = latency.read_csv(folder / table.file, table.model or name)
        else:
            found = latency.shipped(table.model or name)
    except ZeroDivisionError as error:
        raise ModelFileError("serving.yaml, latency_table: items_per_s must be more than 0") from error
    except (ValueError, csv.Error) as error:
        raise ModelFileError(f"serving.yaml, latency_table: {error}") from error
    return {gpcs: tuple(found.points(gpcs)) for gpcs in found.by_gpcs}


def _latency_origin(folder: Path, name: str, table: LatencyTableFile | None) -> str:
    """Of a table of the model's own, which was read before, those that are dispatched by; empty where none says."""
    if table is None or table.file is None:
        return ""
    found = latency.read_measurements(folder / table.file)
    rows = [row for row in found if row.model == (table.model or name) and row.processes == 1]
    if not any(row.source for row in rows):
        return ""
    counted = Counter((row.source or "of unknown origin") + (f" on {row.gpu}" if row.gpu else "") for row in rows)
    return ", ".join(f"{count} {source}" for source, count in counted.most_common())
