"""The page's section on what the probe saw: which blocks are cheap in a sentence, maps of span length over block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ppcl_ds.probing.heatmaps import PLOTS, Plot, by_length
from ppcl_ds.probing.report import MEAN, Matrix, ProbeReport
from ppcl_ds.report.charts import Cell, bars, heat, level, number, strip

_SHARES = (0.25, 1 / 3, 0.5, 0.75)
"""Of the blocks that may be given up, for the table of what that costs."""


@dataclass(frozen=True)
class Cost:
    """The spans that give up a number of blocks at the least probed error.

    Attributes:
        gone: blocks given up; each span leaves one.
    """

    gone: int
    spans: Sequence[tuple[int, int]]
    error: float


@dataclass(frozen=True)
class Heat:
    """A map with its scale."""

    title: str
    drawing: Markup
    low: str
    high: str


@dataclass(frozen=True)
class Section:
    """What the page shows of a probe report."""

    report: ProbeReport
    sentence: str
    costs: Sequence[Cost]
    error: Heat
    bars: Markup
    rule: Markup
    more: Sequence[tuple[Plot, Sequence[Heat]]]
    influence: Markup | None
    difference: float | None


def section(report: ProbeReport) -> Section:
    """Everything that is said and drawn of a report."""
    alone = [None, *(report.error[u][u + 1] for u in range(len(report.error) - 1))]
    known = [value for row in report.error for value in row if value is not None and value > 0] or [1.0]
    colours = [0 if value is None else level(value, min(known), max(known)) for value in alone]
    costs = cheapest(report.error)
    mean = report.figures.get(MEAN, {})
    influence = mean["influence"].value[0] if "influence" in mean else None
    return Section(
        report=report,
        sentence=sentence(report, costs),
        costs=_table(costs, len(report.error)),
        error=_heat("probed error", report.error, report, log=True),
        bars=bars(alone, colours, "error of a block alone"),
        rule=_rule(report),
        more=[(plot, list(_maps(report, plot))) for plot in PLOTS if plot.name in mean and plot.name != "influence"],
        influence=bars(influence, [0] * len(influence), "1 - cosine of input and output") if influence else None,
        difference=_difference(report),
    )


def cheapest(error: Matrix) -> list[Cost]:
    """For every number of blocks given up, the spans apart from each other whose probed errors add up to the least."""
    blocks = len(error)
    spans: list[list[tuple[int, float]]] = [[] for _ in range(blocks)]
    for u, row in enumerate(error):
        for v, value in enumerate(row):
            if value is not None and v > u:
                spans[v].append((u, value))
    best = np.full((blocks + 1, blocks), np.inf)  # (blocks looked at, blocks given up)
    best[:, 0] = 0
    came: dict[tuple[int, int], tuple[int, int] | None] = {}
    for end in range(1, blocks + 1):
        for gone in range(1, end):
            best[end, gone], came[end, gone] = best[end - 1, gone], None
            for u, value in spans[end - 1]:
                less = gone - (end - 1 - u)
                if less >= 0 and best[u, less] + value < best[end, gone]:
                    best[end, gone], came[end, gone] = best[u, less] + value, (u, end - 1)
    found = []
    for gone in range(1, blocks):
        if not np.isfinite(best[blocks, gone]):
            continue
        end, left, chosen = blocks, gone, []
        while left:
            span = came[end, left]
            if span is None:
                end -= 1
            else:
                chosen.append(span)
                end, left = span[0], left - (span[1] - span[0])
        found.append(Cost(gone, chosen[::-1], float(best[blocks, gone])))
    return found


def _table(costs: Sequence[Cost], blocks: int) -> list[Cost]:
    """Those nearest to a few round shares."""
    picked = (
        {min(costs, key=lambda cost: abs(cost.gone - share * blocks)).gone for share in _SHARES} if costs else set()
    )
    return [cost for cost in costs if cost.gone in picked]


def sentence(report: ProbeReport, costs: Sequence[Cost]) -> str:
    """What is cheap and what is dear."""
    blocks = len(report.error)
    near = _table(costs, blocks)
    if not near:
        return "No span of blocks was measured."
    first = near[0]
    alone = [(value, u + 1) for u in range(blocks - 1) if (value := report.error[u][u + 1]) is not None]
    dearest = max(alone)
    return (
        f"Blocks {in_words(first.spans)} are cheap: {first.gone} of the {blocks} blocks can go there at a probed "
        f"error of {number(first.error)} in all. Block {dearest[1]} is the dearest: {number(dearest[0])} by itself."
    )


def in_words(spans: Sequence[tuple[int, int]]) -> str:
    """`4-6 and 8-11`: spans that touch are named as one."""
    joined: list[tuple[int, int]] = []
    for u, v in spans:
        if joined and joined[-1][1] + 1 == u:
            u = joined.pop()[0]
        joined.append((u, v))
    each = [f"{u}-{v}" for u, v in joined]
    return f"{', '.join(each[:-1])} and {each[-1]}" if len(each) > 1 else each[0]


def _rule(report: ProbeReport) -> Markup:
    """The paper's spans as a row of blocks."""
    taken = {block for u, v in report.spans for block in range(u, v + 1)}
    cells = [Cell(block, block, "kept", "", f"block {block}") for block in range(len(report.cka)) if block not in taken]
    for u, v in report.spans:
        wavers = (u, v) in report.unstable
        title = f"span {u}-{v}{', unstable' if wavers else ''}"
        cells.append(Cell(u, v, "unit unstable" if wavers else "unit", f"{u}-{v}", title))
    return strip(cells, len(report.cka), f"spans of the paper's rule: {report.spans}")


def _maps(report: ProbeReport, plot: Plot) -> Iterator[Heat]:
    log = plot.name == "error"
    for stream, figures in report.figures.items():
        if stream == MEAN or len(report.figures) > 2:
            yield _heat(
                "average of the streams" if stream == MEAN else f"{stream} stream",
                figures[plot.name].value,
                report,
                log,
            )
    yield _heat(
        "spread of the average: half the distance of the halves", report.figures[MEAN][plot.name].spread, None, log
    )


def _heat(title: str, matrix: Matrix, report: ProbeReport | None, log: bool) -> Heat:
    """Similarities are drawn by what they lack, so that dark is bad in every map."""
    rows = by_length(matrix)[1:] or [[None] * len(matrix)]
    values = [value for row in rows for value in row if value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    least = min((value for value in values if value > 0), default=1.0)
    flip = not log and report is not None

    def colour(value: float | None) -> int | None:
        if value is None:
            return None
        if log:
            return level(value, least, high)
        share = (value - low) / (high - low) if high > low else 0.0
        return min(11, int(12 * (1 - share if flip else share)))

    drawn = [[colour(value) for value in row] for row in rows[::-1]]
    spans = report.spans if report else []
    places = {(len(rows) - (v - u), u): report is not None and (u, v) in report.unstable for u, v in spans}
    marked = {(top, u): dashed for (top, u), dashed in places.items() if top >= 0 and drawn[top][u] is not None}
    names = [str(length) for length in range(len(rows) + 1, 1, -1)]
    ends = (high, low) if flip else (least if log else low, high)
    return Heat(title, heat(drawn, names, marked, title, "blocks in the span"), *map(number, ends))


def _difference(report: ProbeReport) -> float | None:
    """The most that the rule's CKA and its unbiased estimate lie apart."""
    mean = report.figures.get(MEAN, {})
    if "cka_unbiased" not in mean:
        return None
    apart = np.abs(np.array(report.cka, dtype=float) - np.array(mean["cka_unbiased"].value, dtype=float))
    return float(np.nanmax(apart)) if np.isfinite(apart).any() else None
