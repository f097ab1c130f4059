"""Plans and layouts as pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from partitioner.geometry import GpuModel, Slice
from partitioner.nvml_types import Gpu
from partitioner.plans import Plan, PlannedSlice
from server.shapes import COLOURS, GRID_PX, IDLE, LEFT_PX, MARGIN_PX, ROW_PX, TOP_PX, Box, Label, Shape, save

LINE_CHARS, LINE_PX = 120, 14


def write(plan: Plan, gpu: GpuModel, path: Path) -> None:
    """Draws to a file, by its suffix. Raises ValueError for another suffix than .svg and .png, OSError."""
    shapes = list(draw(plan, gpu))
    height = _top_px(plan) + ROW_PX * len(plan.gpus) + MARGIN_PX + 20 * (1 + len(_models(plan)) // 5)
    save(shapes, height, path)


def _warning(plan: Plan) -> list[str]:
    return textwrap.wrap(" ".join(plan.warnings), LINE_CHARS)


def _top_px(plan: Plan) -> int:
    """There is room for a line of warning without it."""
    return TOP_PX + LINE_PX * max(0, len(_warning(plan)) - 1)


def draw(plan: Plan, gpu: GpuModel) -> Iterator[Shape]:
    """One row of the memory grid a GPU; each slice is divided as its time is, what is free stays grey."""
    models = _models(plan)
    colours = {model: COLOURS[index % len(COLOURS)] for index, model in enumerate(models)}
    title = f"{len(plan.gpus)} x {gpu.name}, {plan.gpcs} GPCs in use; the fluid bound is {plan.bound_gpus:.2f} GPUs"
    yield Label(MARGIN_PX, MARGIN_PX, title, 16, LEFT_PX + GRID_PX)
    for index, line in enumerate(_warning(plan)):
        yield Label(MARGIN_PX, MARGIN_PX + 22 + LINE_PX * index, line, 12, LEFT_PX + GRID_PX)
    for row, slices in enumerate(plan.gpus):
        y = _top_px(plan) + row * ROW_PX
        yield Label(MARGIN_PX, y + 16, f"GPU {row}", 13, LEFT_PX)
        for each in slices:
            yield from _slice(each, gpu, y, colours)
    y = _top_px(plan) + len(plan.gpus) * ROW_PX + 8
    for index, model in enumerate(models):
        x = LEFT_PX + index % 5 * GRID_PX / 5
        yield Box(x, y + index // 5 * 20, 12, 12, colours[model])
        yield Label(x + 18, y + index // 5 * 20, model, 12, GRID_PX / 5 - 18)


def _slice(planned: PlannedSlice, gpu: GpuModel, y: float, colours: dict[str, str]) -> Iterator[Shape]:
    cell = GRID_PX / gpu.memory_slices
    size = gpu.profile(planned.mig_profile).placements[0].size
    x, width, height = LEFT_PX + planned.start * cell, size * cell - 4, ROW_PX - 10
    yield Box(x, y, width, height, IDLE)
    scale = 1 / max(1.0, sum(share.share for share in planned.models))
    at = x
    for share in planned.models:
        part = width * share.share * scale
        yield Box(at, y + 18, part, height - 18, colours[share.model])
        yield Label(at + 3, y + 21, f"{share.model} {share.batch}x{share.processes}", 11, part - 4)
        at += part
    yield Label(x + 3, y + 2, planned.mig_profile, 12, width - 4)


def _models(plan: Plan) -> list[str]:
    return sorted({share.model for each in plan.slices for share in each.models})


def write_layout(gpus: Sequence[Gpu], serves: Callable[[Slice], Sequence[str]], path: Path) -> None:
    """How GPUs are cut, and what each slice serves. Raises ValueError and OSError, as `write`."""
    shapes: list[Shape] = []
    for row, gpu in enumerate(gpus):
        y = MARGIN_PX + row * (ROW_PX + 24)
        shapes.append(Label(MARGIN_PX, y, f"GPU {gpu.index}: {gpu.name}", 13, LEFT_PX + GRID_PX))
        shapes.append(Box(LEFT_PX, y + 20, GRID_PX - 4, ROW_PX - 10, IDLE))
        for index, each in enumerate(gpu.slices):
            cell = GRID_PX / each.grid
            x, width = LEFT_PX + each.start * cell, each.size * cell - 4
            shapes.append(Box(x, y + 20, width, ROW_PX - 10, COLOURS[index % len(COLOURS)]))
            shapes.append(Label(x + 4, y + 23, each.mig_profile or "whole GPU", 12, width - 6))
            shapes.append(Label(x + 4, y + 42, ", ".join(serves(each)), 11, width - 6))
    save(shapes, 2 * MARGIN_PX + len(gpus) * (ROW_PX + 24), path)
