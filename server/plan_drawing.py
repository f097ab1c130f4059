"""A plan as a picture: SVG or PNG, drawn from the same shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont

from partitioner.geometry import GpuModel
from partitioner.plans import Plan, PlannedSlice

GRID_PX, ROW_PX, LEFT_PX, TOP_PX, MARGIN_PX = 800, 64, 72, 56, 16
COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2",
    "#edc948", "#9c755f", "#ff9da7", "#d37295", "#a0cbe8", "#bab0ac",
)  # fmt: skip
IDLE, INK, PAPER = "#ececec", "#222222", "#ffffff"


@dataclass(frozen=True, slots=True)
class Box:
    """A filled rectangle, in pixels from the upper left."""

    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True, slots=True)
class Label:
    """Text from its upper left corner on; not wider than `room` pixels."""

    x: float
    y: float
    text: str
    size: int
    room: float


def write(plan: Plan, gpu: GpuModel, path: Path) -> None:
    """Draws to a file, by its suffix. Raises ValueError for another suffix than .svg and .png, OSError."""
    shapes = list(draw(plan, gpu))
    width = LEFT_PX + GRID_PX + MARGIN_PX
    height = TOP_PX + ROW_PX * len(plan.gpus) + MARGIN_PX + 20 * (1 + len(_models(plan)) // 5)
    if path.suffix == ".svg":
        path.write_text(_svg(shapes, width, height))
    elif path.suffix == ".png":
        _png(shapes, width, height).save(path)
    else:
        raise ValueError("the name must end in .svg or .png")


def draw(plan: Plan, gpu: GpuModel) -> Iterator[Box | Label]:
    """One row of the memory grid a GPU; each slice is divided as its time is, what is free stays grey."""
    models = _models(plan)
    colours = {model: COLOURS[index % len(COLOURS)] for index, model in enumerate(models)}
    title = f"{len(plan.gpus)} x {gpu.name}, {plan.gpcs} GPCs in use; the fluid bound is {plan.bound_gpus:.2f} GPUs"
    yield Label(MARGIN_PX, MARGIN_PX, title, 16, LEFT_PX + GRID_PX)
    for row, slices in enumerate(plan.gpus):
        y = TOP_PX + row * ROW_PX
        yield Label(MARGIN_PX, y + 16, f"GPU {row}", 13, LEFT_PX)
        for each in slices:
            yield from _slice(each, gpu, y, colours)
    y = TOP_PX + len(plan.gpus) * ROW_PX + 8
    for index, model in enumerate(models):
        x = LEFT_PX + index % 5 * GRID_PX / 5
        yield Box(x, y + index // 5 * 20, 12, 12, colours[model])
        yield Label(x + 18, y + index // 5 * 20, model, 12, GRID_PX / 5 - 18)


def _slice(planned: PlannedSlice, gpu: GpuModel, y: float, colours: dict[str, str]) -> Iterator[Box | Label]:
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


def _fitted(label: Label) -> str:
    """As much of the text as there is room for, by a cautious width of its characters."""
    return label.text[: max(0, int(label.room / (0.58 * label.size)))]


def _svg(shapes: list[Box | Label], width: int, height: int) -> str:
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
    ]
    for shape in shapes:
        if isinstance(shape, Box):
            place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}"'
            lines.append(f'<rect {place} rx="2" fill="{shape.colour}"/>')
        else:
            place = f'x="{shape.x:.1f}" y="{shape.y + shape.size:.1f}" font-size="{shape.size}"'
            lines.append(f"<text {place}>{escape(_fitted(shape))}</text>")
    return "\n".join([*lines, "</svg>", ""])


def _png(shapes: list[Box | Label], width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), PAPER)
    canvas = ImageDraw.Draw(image)
    for shape in shapes:
        if isinstance(shape, Box):
            canvas.rectangle((shape.x, shape.y, shape.x + shape.width, shape.y + shape.height), fill=shape.colour)
        else:
            font = ImageFont.load_default(shape.size)
            canvas.text((shape.x, shape.y), _fitted(shape), fill=INK, font=font)
    return image
