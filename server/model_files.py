"""The files of one model: what `config.pbtxt`, `serving.yaml` and the version folders say."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from partitioner import latency
from preprocess.pipeline import PipelineError, PipelineFile, checked
from scheduler.channel import ModelSource
from scheduler.tensors import Signature
from server import config_pbtxt
from server.config_pbtxt import EMULATED, MODEL_FILES, ModelFileError

# A month or so; what is more is a mistake.
MAX_SLO_MS = 3e9


class LatencyTableFile(BaseModel):
    """Where a model's latency table is. Give `file` (beside serving.yaml) or `measured: a100`, which we ship."""

    model_config = ConfigDict(extra="forbid")

    file: Path | None = None
    measured: str | None = Field(None, pattern="^a100$")
    model: str | None = None


class ServingFile(BaseModel):
    """`serving.yaml`. `mig_profiles`: where the model is served; empty means on every slice.

    `strict`: requests that cannot be served in time are refused, not served late. `split`: a request's items may
    run in different batches, since none depends on another. `weight`: its part of slices that it shares with other
    models, when there is not enough for all.
    """

    model_config = ConfigDict(extra="forbid")

    slo_ms: float | None = Field(None, gt=0, lt=MAX_SLO_MS)
    strict: bool = False
    split: bool = True
    weight: float = Field(1.0, gt=0, le=1000)
    mig_profiles: list[str] = []
    latency_table: LatencyTableFile | None = None
    preprocess: PipelineFile | None = None

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
        mig_profiles=tuple(serving.mig_profiles),
        weight=serving.weight,
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
        data = yaml.safe_load(path.read_text()) or {}
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
            serving.preprocess = serving.preprocess.beside(str(folder))
        return serving
    except ValidationError as error:
        reasons = "; ".join(_explain(each["loc"], each["type"], each["msg"]) for each in error.errors())
        raise ModelFileError(f"{path}: {reasons}") from error


def _explain(loc: Sequence[int | str], kind: str, message: str) -> str:
    where = ".".join(map(str, loc))
    if kind != "extra_forbidden":
        return f"{where}: {message}"
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
    return list(section.model_fields)


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
