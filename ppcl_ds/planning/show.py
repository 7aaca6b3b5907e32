"""A plan for people: its variants as a table, and where they lie on the front of error over size, kept as data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ValidationError
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ppcl_ds.atomic import atomic_write
from ppcl_ds.console import track
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


class Outlook(BaseModel):
    """What is expected of a plan: the content of `plan/outlook.json`, from which the run's page is made.

    Attributes:
        plan: for which this was said.
        budget: what size is counted in.
        title: what is expected.
        points: the front of error over size; none: it has not been asked for (`ppcl plan --show`).
        measured: sets of units whose error was measured.
    """

    plan: Plan
    budget: str
    title: str
    lines: list[Line]
    points: list[Point] = []
    measured: list[Point] = []


_FILE = "outlook.json"


def save_outlook(folder: Path, outlook: Outlook) -> None:
    """Write it into `folder`."""
    atomic_write(folder / _FILE, outlook.model_dump_json(indent=1))


def read_outlook(folder: Path) -> Outlook | None:
    """What was expected; None where there is no readable file."""
    try:
        return Outlook.model_validate_json((folder / _FILE).read_bytes())
    except (OSError, ValidationError):
        return None


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


def _words(units: Sequence[UnitPlan]) -> str:
    """Units as a person reads them: [3,5] for a span, text[6,7], ffn[8] for parts of blocks."""
    return " ".join(unit.behaviour.label(unit) for unit in sorted(units, key=lambda unit: unit.span))
