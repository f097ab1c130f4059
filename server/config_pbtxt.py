"""Triton's `config.pbtxt`: what of it is served here, what is refused, and what is ignored, which is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from scheduler.tensors import DATATYPES, TensorSpec

# Model file -> backend. The first one found in a version folder is taken.
MODEL_FILES = {"model.pt2": "torch_export", "model.pt": "pytorch_libtorch"}
EMULATED = "emulated"
# What `platform` and `backend` may call each of them; "pytorch" is Triton's backend for both.
_WORDS = {
    "torch_export": ("torch_export", "pytorch"),
    "pytorch_libtorch": ("pytorch_libtorch", "pytorch"),
    EMULATED: (EMULATED,),
}
_HEEDED = ("name", "platform", "backend", "max_batch_size", "input", "output", "version_policy", "dynamic_batching")
_HEEDED_OF_TENSORS = ("name", "data_type", "dims")
# Of these ModelConfig is made, and they are not served.
_REFUSED = {"ensemble_scheduling": "ensembles are", "sequence_batching": "sequences are"}


class ModelFileError(ValueError):
    """A model's files cannot be served as they are. The message names the file and what to change."""


def read(folder: Path) -> Any:
    """A model's config.pbtxt as tritonclient's ModelConfig; an empty one if there is none.

    Raises ModelFileError for what cannot be read, and for what says another thing than we could serve.
    """
    path = folder / "config.pbtxt"
    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(path.read_text(), config)
    except FileNotFoundError:
        return config
    except (text_format.ParseError, UnicodeDecodeError, OSError) as error:
        raise ModelFileError(f"{path}: {error}") from error
    if config.name not in ("", folder.name):
        raise ModelFileError(f"{path}: name is {config.name!r}, the folder is {folder.name!r}; leave the name out")
    scheduling = config.WhichOneof("scheduling_choice")
    if config.platform == "ensemble":
        scheduling = "ensemble_scheduling"
    if scheduling in _REFUSED:
        raise ModelFileError(f"{path}: {_REFUSED[scheduling]} not supported")
    return config


def backend_of(config: Any, backend: str) -> bool:
    """Whether `platform` and `backend` mean this backend, or are silent."""
    return all(word in ("", *_WORDS[backend]) for word in (config.platform, config.backend))


def words_of(config: Any) -> str:
    """What `platform` and `backend` say, for an error; empty if nothing."""
    given = {"platform": config.platform, "backend": config.backend}
    return ", ".join(f"{name} {word!r}" for name, word in given.items() if word)


def all_words() -> str:
    """What they may say, for an error."""
    files = [f"{' or '.join(_WORDS[backend])} for a {file}" for file, backend in MODEL_FILES.items()]
    return ", ".join([*files, f"{EMULATED} for a model without a file"])


def ignored(config: Any) -> list[str]:
    """Fields that are set, and that change nothing here."""
    names = [field.name for field, _ in config.ListFields() if field.name not in _HEEDED]
    names += [f"dynamic_batching.{field.name}" for field, _ in config.dynamic_batching.ListFields()]
    for kind in ("input", "output"):
        fields = {field.name for tensor in getattr(config, kind) for field, _ in tensor.ListFields()}
        names += [f"{kind}.{name}" for name in sorted(fields.difference(_HEEDED_OF_TENSORS))]
    return names


def specs(tensors: Any, kind: str) -> tuple[TensorSpec, ...] | None:
    """Declared inputs or outputs; None where none are. Raises ModelFileError."""
    found = []
    for tensor in tensors:
        datatype = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
        if datatype not in DATATYPES:
            raise ModelFileError(f"config.pbtxt: {kind} {tensor.name} has type {datatype}, which models cannot take")
        found.append(TensorSpec(tensor.name, datatype, tuple(tensor.dims)))
    return tuple(found) or None


def picked(config: Any, versions: list[int]) -> list[int]:
    """Which of the versions that there are, ascending, are to be served. Raises ModelFileError."""
    policy = config.version_policy
    match policy.WhichOneof("policy_choice"):
        case "all":
            return versions
        case "specific":
            found = [version for version in versions if version in policy.specific.versions]
            if not found:
                wanted, there = ", ".join(map(str, policy.specific.versions)), ", ".join(map(str, versions))
                raise ModelFileError(f"config.pbtxt: version_policy asks for {wanted}; there are {there}")
            return found
        case "latest":
            return versions[-max(policy.latest.num_versions, 1) :]
        case _:
            return versions[-1:]


def version_policy(config: Any) -> dict[str, Any]:
    """As it is told to clients."""
    if config.version_policy.WhichOneof("policy_choice") is None:
        return {"latest": {"num_versions": 1}}
    return json_format.MessageToDict(config.version_policy, preserving_proto_field_name=True)
