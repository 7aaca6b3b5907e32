"""Figures as inline SVG: they fill the width there is, their text keeps its size, their colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

HEAT = (
    *("#a2da37", "#73d056", "#4ac16d", "#2db27d", "#1fa188", "#21908d"),
    *("#277e8e", "#2f6c8e", "#375a8c", "#404588", "#472e7c", "#481769"),
)
"""Colours of a map, from what is cheap to what is dear, of viridis: the page's classes `h0` to `h11`."""
LEVELS = len(HEAT)
COLOURS = 8
"""Of curves: the page's classes `s0` to `s7`; this one stands for what is no variant."""
_TICKS = 6
_NARROW, _WIDE = 0.045, 0.12
"""Shares of a strip's width in which a label has room on a wide page, and on every page."""
_INSIDE = 1000
"""Units of a plot's own coordinates, in both directions."""
_NEAR = 0.22, 0.09
"""Shares of a plot's sides within which labels of two points would touch."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One line of a plot.

    Attributes:
        colour: number of it.
        faint: behind the others, as what another curve smooths.
        dashed: its line.
        dots: whether every point is marked; the line is then drawn thin.
        labels: beside the points, one each; none: no labels.
    """

    name: str
    points: Points
    colour: int = 0
    faint: bool = False
    dashed: bool = False
    dots: bool = False
    line: bool = True
    labels: Sequence[str] = ()


class Axis:
    """From values to shares of a length.

    Args:
        values: that must fit.
        log: a logarithmic axis; values that are not above 0 count for nothing.
    """

    def __init__(self, values: Sequence[float], log: bool = False, zero: bool = False) -> None:
        known = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
        self.log = log
        low, high = self._place(min(known)), self._place(max(known))
        if zero:
            low = min(low, 0.0)
        space = (high - low or abs(high) or 1.0) * 0.05
        self.low, self.high = low - (0 if zero else space), high + space

    def _place(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def share(self, value: float) -> float:
        """0 to 1 from the axis's beginning to its end; what a logarithm does not know lies at the beginning."""
        if self.log and value <= 0:
            return 0.0
        return (self._place(value) - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        if not self.log:
            return _steps(self.low, self.high)
        each = range(math.floor(self.low), math.ceil(self.high) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [digit * 10.0**power for power in each for digit in digits]
            found = [value for value in found if self.low <= math.log10(value) <= self.high]
            if 2 <= len(found) <= _TICKS:
                return found
        if len(found) > _TICKS:
            return found[:: -(-len(found) // _TICKS)]
        return [value for value in _steps(10**self.low, 10**self.high) if value > 0]


def _steps(low: float, high: float) -> list[float]:
    """Round numbers between two, a few."""
    rough = (high - low) / (_TICKS - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number for a tick or a table: three digits, grouped, no exponent where it can be helped."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-4:
        return f"{value:.2g}"
    digits = max(0, 2 - math.floor(math.log10(size)))
    text = f"{value:.{digits}f}"
    return text


def tick(value: float) -> str:
    """The same without zeros that say nothing."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def plot(
    curves: Sequence[Curve], x: str, y: str, *, log: bool = False, height: int = 240, frame: Axis | None = None
) -> Markup:
    """Lines and points over a common pair of axes.

    Args:
        x, y: what the axes count, with units.
        log: whether y is logarithmic.
        height: pixels.
        frame: the y axis, where several plots share one; else it fits the curves.
    """
    across = Axis([place for curve in curves for place, _ in curve.points])
    up = frame or Axis([value for curve in curves for _, value in curve.points], log)
    inside, above = [], []
    labelled: list[tuple[float, float]] = []
    for curve in sorted(curves, key=lambda curve: (not curve.faint, curve.points[:1])):
        places = [(across.share(place), 1 - up.share(value)) for place, value in curve.points]
        style = "s8" if curve.colour == COLOURS else f"s{curve.colour % COLOURS}"
        if curve.line:
            kind = style + " faint" * curve.faint + " dashed" * curve.dashed
            inside.append(f'<path class="{kind}" d="{_path(places)}"/>')
        if curve.dots:
            for place, (left, top) in enumerate(places):
                says = f"<title>{escape(curve.name)}: {number(curve.points[place][1])}</title>"
                above.append(f'<circle class="{style}" cx="{left:.2%}" cy="{top:.2%}" r="4">{says}</circle>')
                if curve.labels:
                    crowded = any(abs(left - x) < _NEAR[0] and abs(top - y) < _NEAR[1] for x, y in labelled)
                    labelled.append((left, top))
                    anchor, dx = ("end", "-7") if left > 0.7 else ("start", "7")
                    dy = "14" if crowded else "-5"  # under its point, where another's label is above
                    label = curve.labels[place]
                    above.append(_text(label, f"{left:.2%}", f"{top:.2%}", "label", anchor, dy, dx))
    return _framed(across, up, x, y, height, "".join(inside), "".join(above))


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{left * _INSIDE:.0f} {top * _INSIDE:.0f}" for left, top in places)


def _framed(across: Axis, up: Axis, x: str, y: str, height: int, inside: str, above: str) -> Markup:
    below = "".join(_text(tick(value), f"{across.share(value):.2%}", "100%", *_UNDER) for value in across.ticks)
    frame = '<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>'
    own = _stretched(_INSIDE, _INSIDE, inside)
    return _figure("plot", f"{y} over {x}", height, x, y, _grid(up, up.ticks) + below + frame + own + above)


_UNDER = ("tick", "middle", "1.4em")
_BESIDE = ("tick", "end", ".35em")


def _text(words: str, x: str, y: str, kind: str, anchor: str = "", dy: str = "", dx: str = "") -> str:
    given = {"class": kind, "x": x, "y": y, "text-anchor": anchor, "dy": dy, "dx": dx}
    return f"<text{_attributes(given)}>{escape(words)}</text>"


def _attributes(given: Mapping[str, str]) -> str:
    return "".join(f' {name}="{value}"' for name, value in given.items() if value)


def _stretched(width: int, height: int, drawn: str) -> str:
    """What is drawn in coordinates of its own, stretched over the plot."""
    box = f'viewBox="0 0 {width} {height}" preserveAspectRatio="none" width="100%" height="100%"'
    return f"<svg {box}>{drawn}</svg>"


def _figure(kind: str, says: str, height: int, x: str, y: str, body: str) -> Markup:
    """A figure with the names of its axes; in a strip they go without saying."""
    names = _text(y, "-7", "-10", "name") + _text(x, "100%", "100%", "name", "end", "2.9em") if x else ""
    return Markup(f'<svg class="{kind}" role="img" aria-label="{escape(says)}" height="{height}">{body}{names}</svg>')


def _grid(up: Axis, values: Sequence[float]) -> str:
    lines = []
    for value in values:
        top = f"{1 - up.share(value):.2%}"
        lines.append(f'<line class="grid" x1="0" x2="100%" y1="{top}" y2="{top}"/>')
        lines.append(_text(tick(value), "-7", top, *_BESIDE))
    return "".join(lines)


def block_numbers(blocks: int) -> str:
    """Numbers of blocks, under a plot whose width is all of them."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, blocks) if blocks <= 16 * step)
    return "".join(
        _text(str(block), f"{(block + 0.5) / blocks:.2%}", "100%", *_UNDER) for block in range(0, blocks, step)
    )


def level(value: float, low: float, high: float) -> int:
    """The colour of a value between the least and the largest, on a logarithmic scale."""
    if value <= 0 or low <= 0 or high <= low:
        return 0
    share = math.log(value / low) / math.log(high / low)
    return min(LEVELS - 1, max(0, int(share * LEVELS)))


def heat(
    rows: Sequence[Sequence[int | None]],
    names: Sequence[str],
    marked: Mapping[tuple[int, int], bool],
    title: str,
    y: str,
) -> Markup:
    """A map with a column a block.

    Args:
        rows: colours, from the top row to the bottom one; None: nothing there.
        names: of the rows.
        marked: (row, block) -> whether its outline is dashed.
        y: what the rows are.
    """
    blocks, count = len(rows[0]), len(rows)
    cells: dict[int, list[str]] = {}
    for top, row in enumerate(rows):
        for left, colour in enumerate(row):
            if colour is not None:
                cells.setdefault(colour, []).append(f"M{left} {top}h1v1h-1z")
    paths = "".join(f'<path class="h{colour}" d="{"".join(each)}"/>' for colour, each in sorted(cells.items()))
    marks = "".join(
        f'<rect class="mark{" dashed" if dashed else ""}" x="{left / blocks:.2%}" y="{top / count:.2%}" '
        f'width="{1 / blocks:.2%}" height="{1 / count:.2%}"/>'
        for (top, left), dashed in marked.items()
    )
    step = -(-count // 12)
    labels = "".join(
        _text(name, "-7", f"{(top + 0.5) / count:.2%}", *_BESIDE)
        for top, name in enumerate(names)
        if (count - 1 - top) % step == 0
    )
    body = _stretched(blocks, count, paths) + marks + labels + block_numbers(blocks)
    return _figure("plot map", title, min(300, max(90, 18 * count)), "first block of the span", y, body)


def bars(values: Sequence[float | None], colours: Sequence[int], y: str) -> Markup:
    """A bar a block, from 0."""
    up, blocks = Axis([value for value in values if value is not None], zero=True), len(values)
    drawn = []
    for block, (value, colour) in enumerate(zip(values, colours, strict=True)):
        if value is not None:
            place = f'x="{(block + 0.08) / blocks:.2%}" width="{0.84 / blocks:.2%}"'
            height = f'y="{1 - up.share(value):.2%}" height="{up.share(value):.2%}"'
            says = f"<title>block {block}: {number(value)}</title>"
            drawn.append(f'<rect class="h{colour}" {place} {height}>{says}</rect>')
    few = up.ticks[:: 2 if len(up.ticks) > 4 else 1]
    body = _grid(up, few) + "".join(drawn) + block_numbers(blocks)
    return _figure("plot map", f"{y}, a bar a block", 110, "block", y, body)


@dataclass(frozen=True)
class Cell:
    """A part of a row of blocks.

    Attributes:
        kind: `kept`, `unit` or `narrowed`, the page's classes.
        label: what is written into it where there is room.
        title: what a pointer is told.
    """

    first: int
    last: int
    kind: str
    label: str = ""
    title: str = ""


def strip(cells: Sequence[Cell], blocks: int, says: str) -> Markup:
    """A row of blocks, and their numbers under it.

    Args:
        says: the same in words.
    """
    drawn = []
    for cell in cells:
        left, width = cell.first / blocks, (cell.last - cell.first + 1) / blocks
        place = f'x="{left:.3%}" width="{width:.3%}" y="0"'
        drawn.append(f'<g><title>{escape(cell.title)}</title><rect class="{cell.kind}" {place} height="100%" rx="3"/>')
        if cell.kind == "narrowed":
            drawn.append(f'<rect class="gone" {place} height="50%" rx="3"/>')
        if cell.label and width >= _NARROW:
            kind = "in" if width >= _WIDE else "in wide"
            drawn.append(_text(cell.label, f"{left + width / 2:.3%}", "50%", kind, "middle", ".35em"))
        drawn.append("</g>")
    return _figure("plot strip", says, 30, "", "", "".join(drawn) + block_numbers(blocks))
