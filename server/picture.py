"""The layout, drawn: GPUs as bars of slices, with what each slice serves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from partitioner.geometry import GpuModel, Slice
from partitioner.nvml_types import Gpu
from partitioner.plans import Plan, PlannedSlice

WIDTH = 64
FULL_WIDTH = WIDTH + 26
_COLOURS = ["blue", "magenta", "cyan", "green", "yellow", "red", "white"]


def console(*, stderr: bool = False) -> Console:
    """As wide as the terminal; where there is none, as wide as the drawing, whatever reads it."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else FULL_WIDTH)


def layout(gpus: Sequence[Gpu], serves: Callable[[Slice], Sequence[str]]) -> RenderableType:
    """`serves`: the lines that stand under a slice's name, its models first."""
    return Group(*(_gpu(gpu, serves) for gpu in gpus))


def _gpu(gpu: Gpu, serves: Callable[[Slice], Sequence[str]]) -> Panel:
    legend: RenderableType = _legend(gpu, serves)
    if not gpu.slices:
        legend = Text(" MIG is on, but the GPU has no instances: see migserve layout apply", "red")
    title = Text.assemble((f"GPU {gpu.index} ", "bold"), gpu.name)
    return Panel(Group(_bar(gpu), legend), title=title, title_align="left", width=FULL_WIDTH, border_style="dim")


def _legend(gpu: Gpu, serves: Callable[[Slice], Sequence[str]]) -> Table:
    """A line for each slice; what does not fit goes on under its beginning."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for index, each in enumerate(gpu.slices):
        name = Text.assemble(" ", ("■", _colour(index)), " ", (each.mig_profile or "whole GPU", "bold"))
        table.add_row(name, f"{each.memory_mib / 1024:5.1f} GiB", Text(", ".join(serves(each)) or "nothing"))
    return table


class Cell(NamedTuple):
    """A slice on the grid, for its bar."""

    name: str
    start: int
    size: int


def _bar(gpu: Gpu) -> Text:
    """One row of the memory-slice grid."""
    cells = [Cell(each.mig_profile or gpu.name, each.start, each.size) for each in gpu.slices]
    return bar(cells, gpu.slices[0].grid) if cells else Text(" ")


def bar(cells: Sequence[Cell], grid: int) -> Text:
    """One row of a grid of so many memory slices; free slots are dots."""
    row = Text(" ")
    at = 0
    slot = WIDTH // grid
    for index, cell in enumerate(cells):
        row.append("·" * ((cell.start - at) * slot), "dim")
        room = cell.size * slot - 1
        row.append(cell.name[:room].center(room), f"bold white on {_colour(index)}")
        row.append(" ")
        at = cell.start + cell.size
    row.append("·" * ((grid - at) * slot), "dim")
    return row


def plan(planned: Plan, gpu: GpuModel) -> RenderableType:
    """A plan: every GPU as a bar with what each slice serves, then the reasons."""
    panels = [_planned_gpu(index, slices, gpu) for index, slices in enumerate(planned.gpus)]
    head = Text.assemble(
        (f"{len(planned.gpus)} x {gpu.name}", "bold"),
        f", {planned.gpcs} GPCs in use; no plan can do with less than {planned.bound_gpus:.2f} GPUs; "
        f"found in {planned.solve_seconds:.2f} s\n",
    )
    warnings = [Text(f"WARNING: {warning}\n", "bold yellow") for warning in planned.warnings]
    reasons = [Text(f" - {reason}") for reason in planned.explanation]
    return Group(head, *warnings, *panels, Text(), *reasons)


def _planned_gpu(index: int, slices: Sequence[PlannedSlice], gpu: GpuModel) -> Panel:
    cells = [Cell(each.mig_profile, each.start, gpu.profile(each.mig_profile).size) for each in slices]
    legend = Text()
    for colour, each in enumerate(slices):
        legend.append("\n ■ ", _colour(colour))
        legend.append(f"{each.mig_profile:<9} ", "bold")
        parts = [f"{share.model} {share.batch}x{share.processes} {share.share:.0%}" for share in each.models]
        legend.append(", ".join(parts) or "nothing")
    title = Text(f"GPU {index}", "bold")
    return Panel(
        Group(bar(cells, gpu.memory_slices), legend[1:]),
        title=title,
        title_align="left",
        width=FULL_WIDTH,
        border_style="dim",
    )


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]
