"""The files of one model: what `config.pbtxt`, `serving.yaml` and the version folders say."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format, text_format
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tritonclient.grpc import model_config_pb2

from partitioner import latency
from preprocess.pipeline import PipelineError, PipelineFile, checked
from scheduler.channel import ModelSource
from scheduler.tensors import DATATYPES, Signature, TensorSpec

# Model file -> backend. The first one found in a version folder is taken.
MODEL_FILES = {"model.pt2": "torch_export", "model.pt": "pytorch_libtorch"}
EMULATED = "emulated"
# A month or so; what is more is a mistake.
MAX_SLO_MS = 3e9


class ModelFileError(ValueError):
    """A model's files cannot be served as they are. The message names the file and what to change."""


class LatencyTableFile(BaseModel):
    """Where a model's latency table is. Give `file` (beside serving.yaml) or `measured: a100`, which we ship."""

    model_config = ConfigDict(extra="forbid")

    file: Path | None = None
    measured: str | None = Field(None, pattern="^a100$")
    model: str | None = None


class ServingFile(BaseModel):
    """`serving.yaml`. `mig_profiles`: where the model is served; empty means on every slice."""

    model_config = ConfigDict(extra="forbid")

    slo_ms: float | None = Field(None, gt=0, lt=MAX_SLO_MS)
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


def versions_to_serve(folder: Path) -> list[int]:
    """The versions that config.pbtxt's version_policy picks, at least one; the highest by default.

    Raises ModelFileError.
    """
    try:
        found = sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())
    except OSError as error:
        raise ModelFileError(f"{folder} cannot be read: {error}") from error
    if not found:
        raise ModelFileError(f"{folder} has no version folder; expected {folder / '1'} with a {_file_names()} in it")
    config = _read_config(folder)
    policy = config.version_policy if config is not None else model_config_pb2.ModelVersionPolicy()
    match policy.WhichOneof("policy_choice"):
        case "all":
            return found
        case "specific":
            picked = [version for version in found if version in policy.specific.versions]
            if not picked:
                wanted, there = ", ".join(map(str, policy.specific.versions)), ", ".join(map(str, found))
                raise ModelFileError(f"config.pbtxt: version_policy asks for {wanted}; there are {there}")
            return picked
        case "latest":
            return found[-max(policy.latest.num_versions, 1) :]
        case _:
            return found[-1:]


def read_model(folder: Path, version: int, generation: int) -> tuple[ModelSource, ServingFile, dict[str, Any]]:
    """One version, ready to be handed to the fleet, and the version policy it was picked by. Raises ModelFileError."""
    name = folder.name
    config = _read_config(folder)
    serving = _read_serving(folder)
    backend, path = _model_file(folder, version, config)
    source = ModelSource(
        key=f"{name}/{version}#{generation}",
        name=name,
        version=version,
        backend=backend,
        path=str(path),
        inputs=_specs(config.input, "input") if config is not None and config.input else None,
        outputs=_specs(config.output, "output") if config is not None and config.output else None,
        max_batch=_max_batch(config, backend),
        latency_ms=_latency(folder, name, serving.latency_table),
        mig_profiles=tuple(serving.mig_profiles),
    )
    return source, serving, _version_policy(config)


def _version_policy(config: Any) -> dict[str, Any]:
    """As it is told to clients."""
    if config is None or config.version_policy.WhichOneof("policy_choice") is None:
        return {"latest": {"num_versions": 1}}
    return json_format.MessageToDict(config.version_policy, preserving_proto_field_name=True)


def _file_names() -> str:
    return " or ".join(MODEL_FILES)


def _max_batch(config: Any, backend: str) -> int | None:
    """0 in config.pbtxt cannot be told from no entry: then the model file says."""
    if config is None or (config.max_batch_size == 0 and backend == MODEL_FILES["model.pt2"]):
        return None
    return int(config.max_batch_size)


def _read_config(folder: Path) -> Any:
    """config.pbtxt as tritonclient's ModelConfig; None if there is none."""
    path = folder / "config.pbtxt"
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except FileNotFoundError:
        return None
    except (text_format.ParseError, UnicodeDecodeError, OSError) as error:
        raise ModelFileError(f"{path}: {error}") from error


def _read_serving(folder: Path) -> ServingFile:
    path = folder / "serving.yaml"
    try:
        return ServingFile.model_validate(yaml.safe_load(path.read_text()) or {})
    except FileNotFoundError:
        return ServingFile()
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ModelFileError(f"{path}: {error}") from error
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ModelFileError(f"{path}: {reasons}") from error


def _model_file(folder: Path, version: int, config: Any) -> tuple[str, Path]:
    path = folder / str(version)
    if config is not None and EMULATED in (config.backend, config.platform):
        return EMULATED, path
    for name, backend in MODEL_FILES.items():
        if (path / name).is_file():
            return backend, path / name
    raise ModelFileError(f"{path} holds no {_file_names()}")


def _specs(tensors: Any, kind: str) -> tuple[TensorSpec, ...]:
    specs = []
    for tensor in tensors:
        datatype = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
        if datatype not in DATATYPES:
            raise ModelFileError(f"config.pbtxt: {kind} {tensor.name} has type {datatype}, which models cannot take")
        specs.append(TensorSpec(tensor.name, datatype, tuple(tensor.dims)))
    return tuple(specs)


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
