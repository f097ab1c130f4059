"""Layout files: mig-parted's YAML, read, understood for the GPUs that there are, and written. Pure.

The format is NVIDIA mig-parted's `version: v1`: named configs, each a list of entries; an entry says by filter and
index which GPUs it is about, whether MIG is on, and how many slices of which MIG profile they have.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from partitioner import yaml_text
from partitioner.geometry import GpuModel, IllegalLayoutError, MigProfile, place

VERSION = "v1"


class LayoutFileError(ValueError):
    """A layout file that cannot be used. The message says where it is wrong and what would be right."""


class Entry(BaseModel):
    """One list entry of a config. `devices` are indexes among the machine's GPUs."""

    model_config = ConfigDict(extra="forbid", alias_generator=lambda name: name.replace("_", "-"), strict=True)

    device_filter: list[str] = []
    devices: Literal["all"] | list[Annotated[int, Field(ge=0)]]
    mig_enabled: bool
    mig_devices: dict[str, Annotated[int, Field(ge=0)]] = {}

    @field_validator("device_filter", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Entry:
        if not self.mig_enabled and self.mig_devices:
            raise ValueError("mig-devices must be empty where mig-enabled is false")
        if self.mig_devices and not any(self.mig_devices.values()):
            raise ValueError("at least one count in mig-devices must be more than 0; for no slices write {}")
        return self


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=lambda name: name.replace("_", "-"), strict=True)

    version: Literal["v1"]
    mig_configs: dict[str, Annotated[list[Entry], Field(min_length=1)]] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as a layout file sees it. `pci_id`: `0x<device><vendor>`; `subsystem_id` in the same form, or empty.

    `model` is None where the GPU has no MIG.
    """

    index: int
    pci_id: str
    subsystem_id: str
    model: GpuModel | None


@dataclass(frozen=True, slots=True)
class Target:
    """What a layout file asks of one GPU."""

    mig_enabled: bool
    profiles: tuple[MigProfile, ...]


def parse(text: str) -> dict[str, list[Entry]]:
    """The named configs of a layout file. Raises LayoutFileError."""
    try:
        data = yaml_text.load(text)
    except yaml.YAMLError as error:
        raise LayoutFileError(f"not YAML: {error}") from error
    if not isinstance(data, dict):
        raise LayoutFileError("expected a mapping with the keys version and mig-configs")
    try:
        return _File.model_validate(data).mig_configs
    except ValidationError as error:
        raise LayoutFileError("; ".join(_explain(each) for each in error.errors())) from error


def select(configs: Mapping[str, list[Entry]], name: str | None) -> tuple[str, list[Entry]]:
    """The config called `name`; the only one if there is no name. Raises LayoutFileError."""
    if name is None:
        if len(configs) > 1:
            raise LayoutFileError(f"the file has several configs, say which: {', '.join(configs)}")
        name = next(iter(configs))
    if name not in configs:
        near = difflib.get_close_matches(name, configs, n=3, cutoff=0.3) or list(configs)
        raise LayoutFileError(f"no config is called {name!r}; did you mean {', '.join(near)}?")
    return name, configs[name]


def targets(entries: Sequence[Entry], devices: Sequence[Device]) -> dict[int, Target]:
    """What each GPU should become, by index; GPUs that no entry matches are not in it. Later entries win.

    Raises LayoutFileError for what a GPU cannot be.
    """
    indexes = {device.index for device in devices}
    found: dict[int, Target] = {}
    for entry in entries:
        strangers = [index for index in entry.devices if index not in indexes] if entry.devices != "all" else []
        if strangers:
            raise LayoutFileError(f"the file names GPU {strangers[0]}; there are {sorted(indexes)}")
        for device in devices:
            if _matches(entry, device):
                found[device.index] = _target(entry, device)
    return found


def export(name: str, targets: Mapping[int, Target]) -> str:
    """A layout file with one config that describes these GPUs, those that are alike together."""
    groups: dict[tuple[bool, tuple[tuple[str, int], ...]], list[int]] = {}
    for index, target in sorted(targets.items()):
        counts = tuple(sorted(Counter(profile.name for profile in target.profiles).items()))
        groups.setdefault((target.mig_enabled, counts), []).append(index)
    entries = []
    for (mig_enabled, counts), indexes in groups.items():
        entry: dict[str, Any] = {"devices": indexes if len(groups) > 1 else "all", "mig-enabled": mig_enabled}
        if mig_enabled:
            entry["mig-devices"] = dict(counts)
        entries.append(entry)
    return yaml.safe_dump({"version": VERSION, "mig-configs": {name: entries}}, sort_keys=False)


def _matches(entry: Entry, device: Device) -> bool:
    if entry.devices == "all":
        if device.model is None:
            return False
    elif device.index not in entry.devices:
        return False
    ids = {device.pci_id.lower(), f"{device.pci_id}:{device.subsystem_id}".lower()}
    return not entry.device_filter or any(wanted.lower() in ids for wanted in entry.device_filter)


def _target(entry: Entry, device: Device) -> Target:
    if not entry.mig_enabled:
        return Target(mig_enabled=False, profiles=())
    if device.model is None:
        raise LayoutFileError(f"GPU {device.index} has no MIG, and the file wants it on: leave it out of devices")
    try:
        profiles = [device.model.profile(name) for name, count in entry.mig_devices.items() for _ in range(count)]
        place(profiles, device.model)
    except IllegalLayoutError as error:
        raise LayoutFileError(f"GPU {device.index}: {error}") from error
    return Target(mig_enabled=True, profiles=tuple(profiles))


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if part not in ("literal['all']", "list[constrained-int]"))
    if error["type"] == "extra_forbidden":
        known = [name.replace("_", "-") for name in (*Entry.model_fields, *_File.model_fields)]
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.3)
        return f"{where}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"
