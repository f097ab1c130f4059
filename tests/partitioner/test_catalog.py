"""The catalogue against its own captures, and names of MIG profiles as drivers make them."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest

from partitioner.catalog import GPU_MODELS, model_of_board
from partitioner.geometry import conventional_name

ROWS: dict[str, Any] = json.loads(files("partitioner").joinpath("data/mig_geometry.json").read_text())["gpus"]
CAPTURED = [(gpu, row) for gpu in ROWS for row in ROWS[gpu]["profiles"] if row["memory_mb"]]


def test_every_row_has_its_two_numbers_apart() -> None:
    """`enum` is none of the ids on these boards but by chance; a few coincide with another row's id."""
    for gpu in GPU_MODELS.values():
        assert len({profile.enum for profile in gpu.profiles}) == len(gpu.profiles)
        assert len({profile.profile_id for profile in gpu.profiles}) == len(gpu.profiles)
        assert len({profile.name for profile in gpu.profiles}) == len(gpu.profiles)
        assert all(profile.enum != profile.profile_id for profile in gpu.profiles)


def test_grids_are_4_8_and_12_wide() -> None:
    assert {name: gpu.memory_slices for name, gpu in GPU_MODELS.items() if gpu.memory_slices != 8} == {
        "A30-24GB": 4,
        "RTX-PRO-6000-96GB": 12,
    }
    for gpu in GPU_MODELS.values():
        assert max(at.start + at.size for profile in gpu.profiles for at in profile.placements) == gpu.memory_slices
        assert max(profile.gpcs for profile in gpu.profiles) == gpu.compute_slices


@pytest.mark.parametrize(
    ("gpu", "profile", "engines"),
    [
        # (copy engines, NVDEC, NVENC, JPEG, OFA): H100 has JPEG engines in every slice, A100 in two only.
        ("A100-80GB", "1g.10gb", (1, 0, 0, 0, 0)),
        ("A100-80GB", "1g.10gb+me", (1, 1, 0, 1, 1)),
        ("A100-80GB", "7g.80gb", (7, 5, 0, 1, 1)),
        ("H100-80GB", "1g.10gb", (1, 1, 0, 1, 0)),
        ("H100-80GB", "7g.80gb", (8, 7, 0, 7, 1)),
        ("RTX-PRO-6000-96GB", "1g.24gb-me", (1, 0, 0, 0, 0)),
        ("RTX-PRO-6000-96GB", "1g.24gb+me.all", (1, 4, 4, 4, 1)),
    ],
)
def test_media_engines_are_those_of_the_captures(gpu: str, profile: str, engines: tuple[int, ...]) -> None:
    found = GPU_MODELS[gpu].profile(profile)
    assert (found.copy_engines, found.nvdec, found.nvenc, found.jpeg, found.ofa) == engines


@pytest.mark.parametrize(("gpu", "row"), CAPTURED, ids=[f"{gpu}/{row['name']}" for gpu, row in CAPTURED])
def test_a_name_follows_from_memory_as_go_nvlib_has_it(gpu: str, row: dict[str, Any]) -> None:
    name = conventional_name(row["nvml_profile_enum"], row["slices"], row["memory_mb"], ROWS[gpu]["device_memory_mib"])
    assert name == row["name"]


@pytest.mark.parametrize("gpu", sorted(GPU_MODELS))
def test_what_the_name_says_beside_the_size_is_the_attribute(gpu: str) -> None:
    for profile in GPU_MODELS[gpu].profiles:
        assert profile.name.split("gb")[1] == profile.attribute


@pytest.mark.parametrize(
    ("pci_device_id", "nvml_name", "model"),
    [
        ("0x20B210DE", "", "A100-80GB"),
        ("0x233510DE", "NVIDIA H200", "H200-141GB"),
        ("0x2BB510DE", "anything", "RTX-PRO-6000-96GB"),
        ("0x00000000", "NVIDIA A100-80GB (simulated)", "A100-80GB"),
        ("0x318210DE", "NVIDIA B300", None),
        ("", "NVIDIA L4", None),
    ],
)
def test_boards_are_known_by_their_pci_id_and_else_by_name(
    pci_device_id: str, nvml_name: str, model: str | None
) -> None:
    found = model_of_board(pci_device_id, nvml_name)
    assert (found.name if found else None) == model
