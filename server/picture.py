"""The layout, drawn: GPUs as bars of slices, with what each slice serves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from partitioner.geometry import Slice
from partitioner.nvml_types import Gpu

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
        legend = Text(" MIG is on, but the GPU has no instances: cut it with nvidia-smi mig -cgi ... -C", "red")
    title = Text.assemble((f"GPU {gpu.index} ", "bold"), gpu.name)
    return Panel(Group(_bar(gpu), legend), title=title, title_align="left", width=FULL_WIDTH, border_style="dim")


def _legend(gpu: Gpu, serves: Callable[[Slice], Sequence[str]]) -> Table:
    """A line for each slice; what does not fit goes on under its beginning."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for index, each in enumerate(gpu.slices):
        name = Text.assemble(" ", ("■", _colour(index)), " ", (each.mig_profile or "whole GPU", "bold"))
        table.add_row(name, f"{each.memory_mib / 1024:5.1f} GiB", Text(", ".join(serves(each)) or "nothing"))
    return table


def _bar(gpu: Gpu) -> Text:
    """One row of the memory-slice grid; free slots are dots."""
    bar = Text(" ")
    at = 0
    for index, each in enumerate(gpu.slices):
        cell = WIDTH // each.grid
        bar.append("·" * ((each.start - at) * cell), "dim")
        name = each.mig_profile or gpu.name
        bar.append(name[: each.size * cell - 1].center(each.size * cell - 1), f"bold white on {_colour(index)}")
        bar.append(" ")
        at = each.start + each.size
    if gpu.slices:
        grid = gpu.slices[0].grid
        bar.append("·" * ((grid - at) * (WIDTH // grid)), "dim")
    return bar


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]
