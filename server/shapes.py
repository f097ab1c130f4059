"""Boxes and labels as a picture: SVG or PNG, drawn from the same shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont

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


Shape = Box | Label


def save(shapes: Sequence[Shape], height: int, path: Path) -> None:
    """Writes a file, by its suffix. Raises ValueError for another suffix than .svg and .png, OSError."""
    width = LEFT_PX + GRID_PX + MARGIN_PX
    if path.suffix == ".svg":
        path.write_text(_svg(shapes, width, height))
    elif path.suffix == ".png":
        _png(shapes, width, height).save(path)
    else:
        raise ValueError("the name must end in .svg or .png")


def _fitted(label: Label) -> str:
    """As much of the text as there is room for, by a cautious width of its characters."""
    return label.text[: max(0, int(label.room / (0.58 * label.size)))]


def _svg(shapes: Sequence[Shape], width: int, height: int) -> str:
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


def _png(shapes: Sequence[Shape], width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), PAPER)
    canvas = ImageDraw.Draw(image)
    for shape in shapes:
        if isinstance(shape, Box):
            canvas.rectangle((shape.x, shape.y, shape.x + shape.width, shape.y + shape.height), fill=shape.colour)
        else:
            font = ImageFont.load_default(shape.size)
            canvas.text((shape.x, shape.y), _fitted(shape), fill=INK, font=font)
    return image
