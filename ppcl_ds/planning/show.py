"""A plan for people: its variants as a table, and where they lie on the front of error over size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ppcl_ds.atomic import atomic_write
from ppcl_ds.console import track
from ppcl_ds.pages import as_png, inline, render
from ppcl_ds.planning.budget import Budget
from ppcl_ds.planning.error_model import ErrorModel
from ppcl_ds.planning.programme import cheapest
from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.kinds import parameters_saved
from ppcl_ds.units.plan import Plan, UnitPlan

_LEVELS = 24
"""Most points of the front."""


class Point(NamedTuple):
    """A set of units: the share of the budget that is left, its error, and what it is called."""

    left: float
    error: float
    name: str


class Line(NamedTuple):
    """A row of the table.

    Attributes:
        blocks: that are left.
        units: that are plugged, as a person reads them.
        parameters: in the blocks that are left.
        left: share of the budget that is left.
        error: expected; None where the forecast does not know one of the units.
    """

    name: str
    blocks: int
    units: str
    parameters: int
    left: float
    error: float | None


def lines_of(plan: Plan, teacher: Teacher, forecast: ErrorModel, budget: Budget) -> list[Line]:
    """The variants of a plan."""
    lines = []
    for name in plan.variants:
        units = plan.units_of(name)
        parameters = teacher.anatomy.block_parameters - sum(parameters_saved(unit, teacher) for unit in units)
        left = 1 - budget.saved(units) / budget.total
        lines.append(Line(name, len(plan.places(name)), _words(units), parameters, left, forecast.of(units)))
    return lines


def print_table(lines: Sequence[Line], anatomy: Anatomy, forecast: ErrorModel) -> None:
    """Print the variants."""
    table = Table("variant", "blocks", "block parameters", "units", forecast.title, box=SIMPLE, pad_edge=False)
    for line in lines:
        change = f"{line.parameters:,} ({line.parameters / anatomy.block_parameters - 1:+.0%})"
        error = "not known" if line.error is None else f"{line.error:.4g}"
        table.add_row(escape(line.name), f"{line.blocks} of {len(anatomy)}", change, escape(line.units), error)
    Console().print(table)


def front(forecast: ErrorModel, budget: Budget) -> list[Point]:
    """The least error at each size: sets of units that no smaller set of the forecast beats."""
    candidates, total = forecast.candidates(budget), budget.total
    step = max(float(budget.blocks.max()), total / _LEVELS)
    points: list[Point] = []
    for level in track(range(1, int(total / step) + 1), "front", int(total / step)):
        chosen = cheapest(candidates, (level - 0.5) * step, (level + 0.5) * step)
        if chosen is None:
            continue
        units = [forecast.units[index] for index in chosen]
        error = forecast.of(units)
        assert error is not None, "the forecast knows its own units"
        points.append(Point(1 - float(candidates.saved[chosen].sum()) / total, error, _words(units)))
    best = np.inf
    kept = []
    for point in sorted(points):  # the smallest model first: a larger one has to be better
        if point.error < best:
            kept.append(point)
            best = point.error
    return kept[::-1]


def draw(
    folder: Path,
    lines: Sequence[Line],
    points: Sequence[Point],
    measured: Sequence[Point],
    forecast: ErrorModel,
    budget: str,
    teacher: str,
) -> None:
    """Write `pareto.png` and `report.html` into `folder`.

    Args:
        points: the front.
        measured: sets of units whose error was measured.
        budget: what size is counted in.
    """
    import matplotlib.pyplot as plt  # which takes a second, and few plans are drawn

    figure, axis = plt.subplots(figsize=(7.5, 4.5), constrained_layout=True)
    axis.plot([p.left for p in points], [p.error for p in points], ".-", color="0.6", label="least expected error")
    if measured:
        axis.plot([p.left for p in measured], [p.error for p in measured], "x", ms=5, label="measured sets of units")
    for line in lines:
        if line.error is not None:
            axis.plot(line.left, line.error, "o", ms=9, label=f"{line.name}: {line.blocks} blocks")
    axis.set(xlabel=f"share of the teacher's block {budget}", ylabel=forecast.title, yscale="log")
    axis.legend(fontsize=8)
    plot = as_png(figure)
    atomic_write(folder / "pareto.png", plot)
    page = render(
        "ppcl_ds.planning",
        "report.html.jinja",
        lines=lines,
        points=points,
        measured=measured,
        title=forecast.title,
        teacher=teacher,
        budget=budget,
        plot=inline(plot),
    )
    atomic_write(folder / "report.html", page)


def _words(units: Sequence[UnitPlan]) -> str:
    """Units as a person reads them: [3,5] for a span, text[6,7], ffn[8] for parts of blocks."""
    return " ".join(unit.behaviour.label(unit) for unit in sorted(units, key=lambda unit: unit.span))
