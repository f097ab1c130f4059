"""The layout, drawn: GPUs as bars of slices, with what each slice serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from partitioner.nvml_types import Gpu
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from partitioner.geometry import Slice

WIDTH = 64
_COLOURS = ["blue", "magenta", "cyan", "green", "yellow", "red", "white"]


def layout(gpus: Sequence[Gpu], serves: Callable[[Slice], Sequence[str]]) -> RenderableType:
    """`serves`: the lines that stand under a slice's name, its models first."""
    return Group(*(_gpu(gpu, serves) for gpu in gpus))


def _gpu(gpu: Gpu, serves: Callable[[Slice], Sequence[str]]) -> Panel:
    legend = Text()
    for index, each in enumerate(gpu.slices):
        legend.append(" ■ ", _colour(index))
        legend.append(f"{each.mig_profile or 'whole GPU':<9}", "bold")
        legend.append(f" {each.memory_mib / 1024:6.1f} GiB  ")
        legend.append(", ".join(serves(each)) or "nothing")
        legend.append("\n" if index + 1 < len(gpu.slices) else "")
    if not gpu.slices:
        legend.append(" MIG is on, but the GPU has no instances: cut it with nvidia-smi mig -cgi ... -C", "red")
    title = Text.assemble((f"GPU {gpu.index} ", "bold"), gpu.name)
    return Panel(Group(_bar(gpu), legend), title=title, title_align="left", width=WIDTH + 26, border_style="dim")


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
