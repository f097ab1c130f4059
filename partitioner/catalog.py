"""The GPUs we know, as data: `GPU_MODELS["A100-80GB"]`. Pure."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from partitioner.geometry import GpuModel, MigProfile, Placement


def model_of_board(pci_device_id: str, nvml_name: str = "") -> GpuModel | None:
    """The model with this PCI device id (`0x20B210DE`); else one whose name is part of NVML's; else None."""
    for model in GPU_MODELS.values():
        if pci_device_id in model.pci_device_ids:
            return model
    words = set(nvml_name.replace("-", " ").split())
    return next((model for name, model in GPU_MODELS.items() if set(name.split("-")) <= words), None)


def _gpu_model(name: str, row: dict[str, Any]) -> GpuModel:
    return GpuModel(
        name=name,
        memory_mib=row["device_memory_mib"],
        memory_slices=row["memory_slices"],
        compute_slices=row["compute_slices"],
        max_mig_devices=row["max_mig_devices"],
        profiles=tuple(_mig_profile(row, profile) for profile in row["profiles"]),
        architecture=row["architecture"],
        pci_device_ids=tuple(row["pci_device_ids"]),
    )


def _mig_profile(gpu: dict[str, Any], row: dict[str, Any]) -> MigProfile:
    placements = tuple(Placement(**place) for place in row["placements"])
    # Never captured on some boards: then the share of the grid stands in for the memory, and 0 for counts.
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
        copy_engines=row["copy_engines"] or 0,
        nvdec=row["nvdec"] or 0,
        nvenc=row["nvenc"] or 0,
        jpeg=row["jpeg"] or 0,
        ofa=row["ofa"] or 0,
    )


_DATA = json.loads(files("partitioner").joinpath("data/mig_geometry.json").read_text())

GPU_MODELS: dict[str, GpuModel] = {name: _gpu_model(name, row) for name, row in _DATA["gpus"].items()}
