"""Every legal layout of every GPU of the catalogue, applied through the door and read back."""

from __future__ import annotations

import pytest

from partitioner.catalog import GPU_MODELS
from partitioner.geometry import legal_layouts
from partitioner.nvml import NvmlDoor
from partitioner.nvml_types import Instance
from partitioner.simulated_nvml import SimulatedNvml, parse_gpus


@pytest.mark.parametrize("name", sorted(GPU_MODELS))
def test_every_legal_layout_is_applied_and_read_back(name: str) -> None:
    """In the order of the enumeration, which goes from each layout to the next in few steps."""
    door = NvmlDoor(SimulatedNvml(parse_gpus(name, "empty")), simulated=True)
    (gpu,) = door.gpus()
    assert gpu.model == GPU_MODELS[name]
    made: list[Instance] = []
    for layout in legal_layouts(gpu.model):
        while len(made) >= len(layout):
            door.destroy(gpu.uuid, made.pop().gi_id)
        made.append(door.create(gpu.uuid, layout[-1].profile, layout[-1].placement))
        there = door.instances(gpu.uuid)
        assert tuple(each.placed for each in there) == layout
        assert there == made
        assert all(each.ci_ids == (0,) for each in there)


@pytest.mark.parametrize("name", sorted(GPU_MODELS))
def test_a_gpu_that_starts_with_any_layout_shows_it_as_slices(name: str) -> None:
    model = GPU_MODELS[name]
    for layout in list(legal_layouts(model))[:: len(model.profiles) * 5]:
        text = "+".join(placed.profile.name for placed in layout)
        (gpu,) = NvmlDoor(SimulatedNvml(parse_gpus(name, text)), simulated=True).gpus()
        assert sorted(each.mig_profile for each in gpu.slices) == sorted(placed.profile.name for placed in layout)
        for each in gpu.slices:
            profile = model.profile(each.mig_profile)
            assert (each.gpcs, each.memory_mib, each.size) == (profile.gpcs, profile.memory_mib, profile.size)
            assert each.grid == model.memory_slices
