"""The GPUs we know, as data: `GPU_MODELS["A100-80GB"]`. Pure."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from partitioner.geometry import GpuModel, MigProfile, Placement


def _gpu_model(name: str, row: dict[str, Any]) -> GpuModel:
    return GpuModel(
        name=name,
        memory_mib=row["device_memory_mib"],
        memory_slices=row["memory_slices"],
        compute_slices=row["compute_slices"],
        max_mig_devices=row["max_mig_devices"],
        profiles=tuple(_mig_profile(row, profile) for profile in row["profiles"]),
    )


def _mig_profile(gpu: dict[str, Any], row: dict[str, Any]) -> MigProfile:
    placements = tuple(Placement(**place) for place in row["placements"])
    # Never captured on some boards: then the share of the grid stands in for the memory, and 0 for SMs.
    share = placements[0].size / gpu["memory_slices"]
    return MigProfile(
        name=row["name"],
        enum=row["nvml_profile_enum"],
        profile_id=row["profile_id"],
        gpcs=row["slices"],
        memory_mib=row["memory_mb"] or int(gpu["device_memory_mib"] * share),
        sm_count=row["sm"] or 0,
        max_instances=row["max_instances"],
        placements=placements,
    )


_DATA = json.loads(files("partitioner").joinpath("data/mig_geometry.json").read_text())

GPU_MODELS: dict[str, GpuModel] = {name: _gpu_model(name, row) for name, row in _DATA["gpus"].items()}
