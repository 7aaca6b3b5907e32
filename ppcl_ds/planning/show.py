"""A plan for people: its variants as a table, and where they lie on the front of error over size, kept as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from ppcl_ds.planning.error_model import TITLES, Forecast
from ppcl_ds.planning.swaps import Errors, Swaps
from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.kinds import parameters_saved
from ppcl_ds.units.plan import Plan, UnitPlan

_LEVELS = 24
"""Most points of the front."""


class Point(NamedTuple):
    """A set of units: the share of the budget that is left, its errors by measure, and what it is called."""

    left: float
    errors: Errors
    name: str


class Line(NamedTuple):
    """A row of the table.

    Attributes:
        blocks: that are left.
        units: that are plugged, as a person reads them.
        parameters: in the blocks that are left.
        left: share of the budget that is left.
        errors: expected, by measure; None where the forecast does not know one of the units.
        removed: what it costs to take out the same blocks without training, likewise; empty where it was not measured.
        by_noise: measured errors at each noise level, the noisiest first, by measure; empty likewise.
    """

    name: str
    blocks: int
    units: str
    parameters: int
    left: float
    errors: Errors | None
    removed: Errors
    by_noise: Mapping[str, Sequence[float]]

    def cell(self, measure: str) -> str:
        """An error, and its share of what removal costs."""
        if self.errors is None:
            return "not known"
        share = f" ({self.errors[measure] / self.removed[measure]:.1%})" if self.removed.get(measure) else ""
        return f"{self.errors[measure]:.4g}{share}"


class Outlook(BaseModel):
    """What is expected of a plan: the content of `plan/outlook.json`, from which the run's page is made.

    Attributes:
        plan: for which this was said.
        budget: what size is counted in.
        title: what is to be small.
        measures: what is expected, and what it is called.
        points: the front of error over size; none: it has not been asked for (`ppcl plan --show`).
        measured: sets of units whose errors were measured.
    """

    plan: Plan
    budget: str
    title: str
    measures: dict[str, str]
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


def lines_of(
    plan: Plan, teacher: Teacher, forecast: Forecast, budget: Budget, swaps: Swaps | None = None
) -> list[Line]:
    """The variants of a plan.

    Args:
        swaps: what was measured.
    """
    lines = []
    for name in plan.variants:
        units = plan.units_of(name)
        parameters = teacher.anatomy.block_parameters - sum(parameters_saved(unit, teacher) for unit in units)
        left = 1 - budget.saved(units) / budget.total
        own = swaps.set_of(unit.name for unit in units) if swaps else None
        known = (own.removed, own.by_noise) if own else ({}, {})
        lines.append(Line(name, len(plan.places(name)), _words(units), parameters, left, forecast.of(units), *known))
    return lines


def print_table(lines: Sequence[Line], anatomy: Anatomy, forecast: Forecast) -> None:
    """Print the variants; errors with their share of what removing the same blocks without training costs."""
    titles = [TITLES[measure] for measure in forecast.models]
    table = Table("variant", "blocks", "block parameters", "units", *titles, box=SIMPLE, pad_edge=False)
    for line in lines:
        change = f"{line.parameters:,} ({line.parameters / anatomy.block_parameters - 1:+.0%})"
        cells = [line.cell(measure) for measure in forecast.models]
        table.add_row(escape(line.name), f"{line.blocks} of {len(anatomy)}", change, escape(line.units), *cells)
    Console().print(table)
    if any(line.removed for line in lines):
        print("in brackets: over what it costs to remove the same blocks and train nothing")


def print_outlook(plan: Plan, forecast: Forecast, swaps: Swaps, unit_steps: int | None, steps: int) -> None:
    """Print what every variant is forecast to cost at the end of training, and what twice the steps would gain it.

    Args:
        unit_steps: `plan.unit_steps`.
        steps: `distill.steps`.
    """
    if not any(swaps.falls):
        return
    end = swaps.last_step(unit_steps, steps, len(plan.units))
    table = Table("variant", f"after {swaps.trained} steps", f"after {end:.0f}", f"after {2 * end:.0f}", box=SIMPLE)
    for name in plan.variants:
        values = []
        for each in (swaps.trained, end, 2 * end):
            errors = forecast.grown(swaps.factors(each)).of(plan.units_of(name))
            values.append(forecast.value(errors) if errors else float("nan"))
        gain = f"{values[2]:.4g} ({values[2] / values[1] - 1:+.0%})"
        table.add_row(escape(name), f"{values[0]:.4g}", f"{values[1]:.4g}", gain)
    Console().print(f"{forecast.title}, forecast by the units' own loss curves", table)
    if unit_steps is not None:
        print(
            f"plan.unit_steps leaves each of the {len(plan.units)} units {end:.0f} steps: "
            f"train them with distill.steps: {end:.0f}"
        )


def front(forecast: Forecast, budget: Budget) -> list[Point]:
    """The least objective at each size: sets of units that no smaller set of the forecast beats."""
    saved, total = forecast.saved(budget), budget.total
    step = max(float(budget.blocks.max()), total / _LEVELS)
    points: list[Point] = []
    for level in track(range(1, int(total / step) + 1), "front", int(total / step)):
        chosen = forecast.best(budget, (level - 0.5) * step, (level + 0.5) * step)
        if chosen is None:
            continue
        units = [forecast.units[index] for index in chosen]
        errors = forecast.of(units)
        assert errors is not None, "the forecast knows its own units"
        points.append(Point(1 - float(saved[chosen].sum()) / total, errors, _words(units)))
    best = np.inf
    kept = []
    for point in sorted(points, key=lambda point: point.left):  # the smallest first: a larger one has to be better
        if (value := forecast.value(point.errors)) < best:
            kept.append(point)
            best = value
    return kept[::-1]


def _words(units: Sequence[UnitPlan]) -> str:
    """Units as a person reads them: [3,5] for a span, text[6,7], ffn[8] for parts of blocks."""
    return " ".join(unit.behaviour.label(unit) for unit in sorted(units, key=lambda unit: unit.span))
