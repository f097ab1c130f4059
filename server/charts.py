"""Charts as SVG, for a page that has STYLE: lines, bars, batches over time; light and dark by the page. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

# Hues that stay apart, the first eight also for the colour-blind; a little lighter on dark paper. More series take
# them again.
_LIGHT = (
    "#2a6fb8", "#d9622b", "#1f9e77", "#b58900", "#c2568c", "#5b4ab0",
    "#6b8e23", "#a33b3b", "#7d5a3c", "#6c7a89", "#2aa5c4", "#9c2fae",
)  # fmt: skip
_DARK = (
    "#62a5ea", "#f08b57", "#43c59b", "#e0b93a", "#ea88b5", "#9d8df0",
    "#a5c858", "#e07777", "#c79a73", "#a9b6c3", "#5fd0e8", "#d57be6",
)  # fmt: skip
HUES = len(_LIGHT)
_PAPER = ("#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#f4f6f8", "#ffffff")
_NIGHT = ("#14171b", "#e8ebee", "#9aa4ae", "#3a424b", "#1f242a", "#10141a")
_NAMES = ("paper", "ink", "muted", "rule", "panel", "on-hue")


def _variables(colours: Sequence[str], hues: Sequence[str]) -> str:
    pairs = [*zip(_NAMES, colours, strict=True), *((f"hue{index}", hue) for index, hue in enumerate(hues))]
    return " ".join(f"--{name}: {value};" for name, value in pairs)


STYLE = f"""
:root {{ color-scheme: light dark; {_variables(_PAPER, _LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(_NIGHT, _DARK)} }} }}
svg {{ display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }}
svg text {{ fill: var(--ink); }}
svg .muted {{ fill: var(--muted); }}
svg .rule {{ stroke: var(--rule); stroke-width: 1; }}
svg .limit {{ stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 5 4; }}
svg .line {{ fill: none; stroke-width: 2; stroke-linejoin: round; }}
svg .on-hue {{ fill: var(--on-hue); font-size: 11px; }}
svg .idle {{ fill: var(--panel); }}
"""
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 44


@dataclass(frozen=True, slots=True)
class Series:
    """Values of one name and colour. `hue`: its number; `dashed` tells those of the same hue apart."""

    name: str
    hue: int
    points: Sequence[tuple[float, float]]

    @property
    def colour(self) -> str:
        return f"var(--hue{self.hue % HUES})"


@dataclass(frozen=True, slots=True)
class Frame:
    """A chart's plot: its size in pixels, and what its edges stand for."""

    width: float
    height: float
    x_most: float
    y_most: float

    def x(self, value: float) -> float:
        return LEFT + value / self.x_most * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return self.height - BOTTOM - value / self.y_most * (self.height - BOTTOM - TOP)


def lines(
    title: str, x_label: str, y_label: str, series: Sequence[Series], limits: Sequence[tuple[float, str]], y_most: float
) -> str:
    """Curves from zero up to `y_most`, where they are cut off; `limits`: dashed level lines with what they say."""
    x_most = max((x for each in series for x, _ in each.points), default=1.0)
    frame = Frame(380, 280, x_most, y_most)
    clip = "clip-" + title.replace(" ", "-")
    parts = [
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP}" width="{frame.width - LEFT - RIGHT + 3}" '
        f'height="{frame.height - TOP - BOTTOM}"/></clipPath>',
        *_axes(frame, x_label, y_label),
    ]
    for value, says in limits:
        y = frame.y(value)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{frame.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT + 6, y - 5, says))
    for each in series:
        path = " ".join(
            f"{frame.x(x):.1f},{frame.y(min(y, 3 * y_most)):.1f}" for x, y in each.points if math.isfinite(y)
        )
        parts.append(f'<polyline class="line" clip-path="url(#{clip})" stroke="{each.colour}" points="{path}"/>')
        for x, y in each.points:
            if y <= y_most:
                says = f"{each.name}: {y:.1f} at {x:.0f}"
                dot = f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5" fill="{each.colour}">'
                parts.append(f"{dot}<title>{escape(says)}</title></circle>")
    return _svg(title, frame.width, frame.height, parts)


def columns(title: str, x_label: str, y_label: str, groups: Sequence[str], series: Sequence[Series]) -> str:
    """Shares as columns beside each other; a series has a point for each group, its x the group's number."""
    most = max((y for each in series for _, y in each.points if math.isfinite(y)), default=0.0)
    frame = Frame(760, 280, float(len(groups)), max(0.05, min(1.0, 1.1 * most)))
    parts = list(_axes(frame, x_label, y_label, x_ticks=False, percent=True))
    room = frame.x(1) - frame.x(0)
    width = min(46.0, 0.8 * room / max(len(series), 1))
    for number, name in enumerate(groups):
        parts.append(_text(frame.x(number + 0.5), frame.height - BOTTOM + 16, name, "middle"))
    for place, each in enumerate(series):
        for group, share in each.points:
            if not math.isfinite(share):
                continue
            x = frame.x(group + 0.5) + (place - len(series) / 2) * width
            y = frame.y(share)
            says = f"<title>{escape(each.name)}: {share:.2%}</title>"
            height = frame.height - BOTTOM - y
            parts.append(_box(x + 1, y, width - 2, height, f'fill="{each.colour}"', says))
            if width >= 30:
                parts.append(_text(x + width / 2, y - 4, f"{share:.1%}", "middle", "muted"))
    return _svg(title, frame.width, frame.height, parts)


def bars(title: str, rows: Sequence[str], series: Sequence[Series]) -> str:
    """Shares of 0 to 100 % as lying bars; a series has a point for each row, its x the row's number."""
    thick, gap = (14, 10) if len(rows) <= 16 else (7, 5)
    step = thick * len(series) + gap
    left, width = 130.0, 760.0
    long = width - left - 60
    parts = []
    for number, name in enumerate(rows):
        parts.append(_text(left - 8, 4 + number * step + (step - gap) / 2 + 4, name, "end"))
    for place, each in enumerate(series):
        for group, share in each.points:
            y = 4 + group * step + place * thick
            says = f"<title>{escape(each.name)}: {share:.1%}</title>"
            parts.append(_box(left, y, long, thick - 2, 'class="idle"'))
            parts.append(_box(left, y, long * min(share, 1.0), thick - 2, f'fill="{each.colour}"', says))
            if thick >= 12:
                parts.append(_text(left + long + 8, y + thick - 3, f"{share:.0%}"))
    return _svg(title, width, 4 + len(rows) * step, parts)


@dataclass(frozen=True, slots=True)
class Piece:
    """A bar in a timeline, of so many ms; `label` is written on it where there is room, `says` shown at the pointer."""

    row: int
    start_ms: float
    end_ms: float
    hue: int
    label: str
    says: str


def timeline(title: str, rows: Sequence[str], pieces: Iterable[Piece], from_ms: float, to_ms: float) -> str:
    """What ran when, a row a slice; time counts from the left edge."""
    left, width, thick = 130.0, 1120.0, 24.0
    bottom = 4 + len(rows) * thick
    scale = (width - left - RIGHT) / (to_ms - from_ms)
    parts = []
    for number, name in enumerate(rows):
        y = 4 + number * thick
        parts.append(_box(left, y + 2, width - left - RIGHT, thick - 4, 'class="idle"'))
        parts.append(_text(left - 8, y + thick / 2 + 4, name, "end"))
    for piece in pieces:
        begin, end = max(piece.start_ms, from_ms), min(piece.end_ms, to_ms)
        x, long = left + (begin - from_ms) * scale, (end - begin) * scale
        y = 4 + piece.row * thick
        says = f"<title>{escape(piece.says)}</title>"
        parts.append(_box(x, y + 2, max(long - 1, 0.5), thick - 4, f'fill="var(--hue{piece.hue % HUES})"', says))
        if long > 7 * len(piece.label) + 4:
            parts.append(_text(x + long / 2, y + thick / 2 + 4, piece.label, "middle", "on-hue"))
    for tick in ticks(to_ms - from_ms, 10):
        x = left + tick * scale
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(_text(x, bottom + 18, f"{tick:g}", "middle", "muted"))
    parts.append(_text((left + width) / 2, bottom + 36, "ms", "middle"))
    return _svg(title, width, bottom + BOTTOM, parts)


def legend(names: Sequence[tuple[str, int]]) -> str:
    """As HTML: (name, hue) each."""
    keys = (f'<span><i style="background: var(--hue{hue % HUES})"></i>{escape(name)}</span>' for name, hue in names)
    return f'<p class="legend">{"".join(keys)}</p>'


def ticks(most: float, about: int) -> list[float]:
    """Round numbers from 0 to at most `most`, about so many."""
    rough = most / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    return list(itertools.takewhile(lambda tick: tick <= most * 1.0001, (step * n for n in range(10 * about))))


def _axes(frame: Frame, x_label: str, y_label: str, *, x_ticks: bool = True, percent: bool = False) -> Iterator[str]:
    base = frame.height - BOTTOM
    for tick in ticks(frame.y_most, 5):
        y = frame.y(tick)
        yield f'<line class="rule" x1="{LEFT}" x2="{frame.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text(LEFT - 6, y + 4, f"{100 * tick:g} %" if percent else f"{tick:g}", "end", "muted")
    if x_ticks:
        for tick in ticks(frame.x_most, 6):
            yield _text(frame.x(tick), base + 16, f"{tick:g}", "middle", "muted")
    yield _text((LEFT + frame.width - RIGHT) / 2, frame.height - 8, x_label, "middle")
    yield _text(4, 14, y_label)


def _box(x: float, y: float, width: float, height: float, how: str, inside: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
    return f'<rect {place} rx="2" {how}>{inside}</rect>' if inside else f'<rect {place} rx="2" {how}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _svg(title: str, width: float, height: float, parts: Iterable[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>"])
