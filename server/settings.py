"""Configuration of the daemon: flags, over MIGSERVE_* environment variables, over a YAML file, over defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from partitioner import yaml_text
from server import wrong_values

MIB = 1024 * 1024
PREFIX = "MIGSERVE_"
# Set by Kubernetes in every pod beside a service that is called migserve.
_OF_KUBERNETES = re.compile(r"SERVICE_(HOST|PORT\w*)|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?")


class ConfigError(ValueError):
    """Settings that make no sense. Each line of the message names one, as it was given, and says what is wrong."""


def _setting(default: Any, group: str, description: str, **bounds: Any) -> Any:
    """A field that the command line shows in `group`."""
    return Field(default, description=description, json_schema_extra={"group": group}, **bounds)


class Settings(BaseSettings):
    """Flag names follow Triton's where it has one. Times in seconds, sizes in MiB where the name says so."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid")

    model_repository: Annotated[list[Path], NoDecode] = _setting(
        [Path("models")],
        "served",
        "Folder of models, as Triton's: MODEL/VERSION/model.pt2. May be given several times; elsewhere A:B.",
        min_length=1,
    )
    http_address: str = _setting("127.0.0.1", "served", "Where HTTP listens; 0.0.0.0 for everywhere.")
    http_port: int = _setting(8000, "served", "0: any that is free, like the other ports.", ge=0, le=65535)
    grpc_address: str = _setting("127.0.0.1", "served", "Where gRPC listens.")
    grpc_port: int = _setting(8001, "served", "Port of gRPC.", ge=0, le=65535)
    metrics_address: str = _setting("127.0.0.1", "served", "Where Prometheus' metrics are.")
    metrics_port: int = _setting(8002, "served", "Port of the metrics.", ge=0, le=65535)
    allow_http: bool = _setting(True, "served", "Serve HTTP.")
    allow_grpc: bool = _setting(True, "served", "Serve gRPC.")
    allow_metrics: bool = _setting(True, "served", "Serve metrics on a port of their own.")

    gpu: str = _setting(
        "auto",
        "gpus",
        "nvml: the GPUs of this machine, as they are cut now. sim:A100-80GB or sim:A100-80GBx4: simulated ones, whose "
        "slices are workers on the CPU. auto: nvml where there is a driver, else sim:A100-80GB.",
    )
    layout: str | None = _setting(None, "gpus", "How to cut each simulated GPU, for instance 4g.40gb+2g.20gb+1g.10gb.")
    simulation_state: Path | None = _setting(
        None, "gpus", "File that simulated GPUs live on in, as real ones do without the daemon. If it exists, it wins."
    )
    workers_per_slice: int = _setting(1, "gpus", "Worker processes on one slice.", ge=1, le=48)
    threads_per_worker: int | None = _setting(
        None, "gpus", "Threads of one operation in a CPU worker; by default the cores, shared out.", ge=1
    )

    http_max_input_size: int = _setting(64 * MIB, "limits", "Longest body in bytes, also once inflated.", ge=1)
    http_read_timeout_secs: float = _setting(60.0, "limits", "For a body to arrive.", gt=0)
    arena_mib: int = _setting(256, "limits", "Shared memory for inputs, a power of two. Full means 429.", ge=1)
    max_queue_size: int = _setting(4096, "limits", "Waiting requests of a model. More are refused with 429.", ge=1)
    batch_timeout_secs: float = _setting(60.0, "limits", "A worker whose batch takes longer is killed.", gt=0)
    load_timeout_secs: float = _setting(300.0, "limits", "A worker that loads a model for longer is killed.", gt=0)
    jobs_max_input_mib: int = _setting(65536, "limits", "Longest input of a batch job, also once unpacked.", ge=1)
    jobs_min_free_mib: int = _setting(
        256, "limits", "Batch jobs pause while the disk of the state folder has less room than that.", ge=0
    )
    jobs_input_dir: Path | None = _setting(
        None, "limits", "Folder whose files batch jobs may name as inputs; by default none."
    )
    preprocess_threads: int | None = _setting(
        None, "limits", "Processes (or threads) that preprocess pictures, sound and text; by default one a core.", ge=1
    )

    preprocess_decoder: str = _setting(
        "cpu",
        "operation",
        "What decodes JPEGs: cpu; nvimagecodec, on an NVIDIA GPU; or what an installed package adds by that name.",
    )
    preprocess_slice: str = _setting(
        "",
        "operation",
        "A slice that is kept for preprocessing, by its name, such as gpu0/1g.10gb+me@6; it serves no model.",
    )
    isolate_decoders: bool = _setting(
        True,
        "operation",
        "Preprocess in processes of their own: quicker, and what a decoder dies of costs one of them, not the daemon.",
    )

    replan: Literal["auto", "propose", "off"] = _setting(
        "off",
        "planning",
        "auto: re-cut the GPUs when the traffic asks for another layout and that pays. propose: only say so, at the "
        "admin endpoint. off: watch nothing.",
    )
    planner: Literal["optimal", "paris"] = _setting(
        "optimal",
        "planning",
        "optimal: an exact programme over layouts and SLOs. paris: by sizes of requests, as published.",
    )
    replan_interval_secs: float = _setting(10.0, "planning", "How often to think.", gt=0)
    replan_dwell_secs: float = _setting(60.0, "planning", "No change sooner after another, or after the start.", ge=0)
    replan_horizon_secs: float = _setting(
        300.0,
        "planning",
        "How long traffic is expected to stay as it is: what a change gains so long must pay for it.",
        gt=0,
    )
    replan_half_life_secs: float = _setting(30.0, "planning", "Traffic so old counts half.", gt=0)
    allow_admin: bool = _setting(True, "planning", "Serve the admin endpoints: layouts and plans.")
    admin_address: str = _setting("127.0.0.1", "planning", "Where the admin endpoints are.")
    admin_port: int = _setting(8003, "planning", "Port of the admin endpoints.", ge=0, le=65535)
    admin_token: str | None = _setting(
        None,
        "planning",
        "What admin requests must bear. By default made anew, in the state folder's admin-token.",
        min_length=8,
    )
    state_dir: Path | None = _setting(
        None,
        "gpus",
        "Where batch jobs are kept, with their inputs and results; the token; and a re-cut while it lasts. One daemon "
        "has it to itself. Default: migserve in XDG_STATE_HOME, or in ~/.local/state.",
    )

    policy: Literal["pool", "elsa", "marginal", "preba", "static", "jsq", "fifs"] = _setting(
        "pool",
        "operation",
        "pool: a request waits in its model's queue until a slice is free, which takes what is most urgent. elsa: it "
        "is bound on arrival to the smallest slice that meets its target, as published. The others are there to "
        "compare with; docs/scheduling.md and migserve simulate tell what each costs.",
    )
    allow_jobs: bool = _setting(True, "operation", "Take batch jobs; they are kept in the state folder.")
    strict_readiness: bool = _setting(True, "operation", "Ready only if every model is served.")
    drain_delay_secs: float = _setting(1.0, "operation", "On SIGTERM: unready, but serving on, for so long.", ge=0)
    exit_timeout_secs: float = _setting(30.0, "operation", "On SIGTERM: gone after this at the latest.", gt=0)
    journal: Path | None = _setting(
        None, "operation", "Write every scheduling event and command to this file; see migserve replay."
    )
    log_verbose: int = _setting(0, "operation", "1: a line for each request. 2: debugging too.", ge=0)
    log_format: Literal["console", "json"] = _setting(
        "console", "operation", "console: lines for people. json: for machines."
    )

    @property
    def state_folder(self) -> Path:
        """By default as the XDG Base Directory Specification has it: a relative XDG_STATE_HOME does not count."""
        if self.state_dir is not None:
            return self.state_dir.expanduser()
        home = Path(os.environ.get("XDG_STATE_HOME", ""))
        return (home if home.is_absolute() else Path("~/.local/state").expanduser()) / "migserve"

    @field_validator("arena_mib")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("must be a power of two")
        return value

    @field_validator("model_repository", mode="before")
    @classmethod
    def _folders(cls, value: Any) -> Any:
        return [path for path in value.split(":") if path] if isinstance(value, str) else value

    @field_validator("jobs_input_dir")
    @classmethod
    def _is_folder(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError("there is no such folder")
        return value

    @model_validator(mode="after")
    def _serves_something(self) -> Settings:
        if not (self.allow_http or self.allow_grpc):
            raise ValueError("nothing would be served: leave out --no-allow-http or --no-allow-grpc")
        return self


def load(config: Path | None, flags: dict[str, Any]) -> Settings:
    """Settings from flags that were given (not None), environment, and file.

    Raises ConfigError for what makes no sense, OSError for a file that cannot be read.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    in_file = {} if config is None else _read(config)

    class Chosen(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, in_file)

    try:
        return Chosen(**given)
    except ValidationError as error:
        lines = [_explain(each, given, config) for each in error.errors()]
        raise ConfigError("\n".join(lines)) from error


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """MIGSERVE_* variables that set nothing, with the nearest that does."""
    names = sorted(name.removeprefix(PREFIX) for name in environment if name.startswith(PREFIX))
    known = {name.upper() for name in Settings.model_fields} | {"CONFIG", "URL"}  # URL: of `migserve jobs`
    return [
        f"{PREFIX}{name} sets nothing{_nearest(name, known, PREFIX)}"
        for name in names
        if name not in known and not _OF_KUBERNETES.fullmatch(name)
    ]


def _read(config: Path) -> dict[str, Any]:
    """What a settings file says; its values are not looked at yet."""
    try:
        data = yaml_text.load(config.read_text())
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{config}{line} is not YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config} is not YAML: it is not text in UTF-8") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{config} must hold settings by their names, a line for each, such as `http_port: 8000`")
    unknown = [str(key) for key in data if key not in Settings.model_fields]
    if unknown:
        known = list(Settings.model_fields)
        lines = [f"{config}: unknown key {key}{_nearest(key.replace('-', '_'), known)}" for key in unknown]
        raise ConfigError("\n".join(lines))
    return data


def _nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    near = get_close_matches(name, known, 1)
    return f"; did you mean {prefix}{near[0]}?" if near else "; see migserve serve --help"


def _explain(error: Mapping[str, Any], given: Mapping[str, Any], config: Path | None) -> str:
    """One line: where the value was given, the value, and what is wrong with it."""
    message = wrong_values.said(error)
    if not error["loc"]:
        return message
    name = str(error["loc"][0])
    if name in given:
        where = "--" + name.replace("_", "-")
    elif any(variable.upper() == PREFIX + name.upper() and value for variable, value in os.environ.items()):
        where = PREFIX + name.upper()
    else:
        where = f"{config}: {name}"
    given_value = error["input"]
    value = "" if name == "admin_token" else f" {given_value if isinstance(given_value, Path) else repr(given_value)}"
    return f"{where}{value}: {message}; see migserve serve --help"
