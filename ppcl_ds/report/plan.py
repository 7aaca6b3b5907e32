"""The page's section on the plan: a row of blocks a variant, and its place between error and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from markupsafe import Markup
from pydantic import ValidationError

from ppcl_ds.errors import UserError, brief
from ppcl_ds.planning.show import Line, Outlook, Point, read_outlook
from ppcl_ds.recipe import Recipe
from ppcl_ds.report.charts import COLOURS, Cell, Curve, plot, strip
from ppcl_ds.teacher.branches import LEVELS, level_name
from ppcl_ds.units.plan import Plan


@dataclass(frozen=True)
class Row:
    """A variant.

    Attributes:
        counts: how many of its blocks are the teacher's own, units, and the teacher's with narrower parts.
        line: what is expected of it; None: the plan was edited since that was said.
    """

    name: str
    colour: int
    blocks: int
    counts: str
    drawing: Markup
    line: Line | None


@dataclass(frozen=True)
class Section:
    """What the page shows of a plan."""

    plan: Plan
    rows: Sequence[Row]
    outlook: Outlook | None
    fronts: Sequence[Markup]
    noise: Sequence[Markup]
    points: Sequence[Point]
    narrowed: bool


def read_plan(path: Path) -> Plan:
    """A plan file by itself, whatever its teacher.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Plan.model_validate(yaml.safe_load(path.read_text()))
    except OSError:
        raise UserError(f"plan {path}: not found") from None
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as fault:
        raise UserError(f"plan {path} cannot be read ({brief(fault)}); see `ppcl plan RECIPE --check`") from None


def section(recipe: Recipe) -> Section:
    """Everything that is said and drawn of the plan file.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    plan = read_plan(recipe.plan_file)
    said = read_outlook(recipe.swaps_file.parent)
    outlook = said if said and said.plan == plan else None
    lines = {line.name: line for line in outlook.lines} if outlook else {}
    try:
        rows = [_row(plan, name, colour, lines.get(name)) for colour, name in enumerate(plan.variants)]
    except StopIteration:
        raise UserError(f"plan {recipe.plan_file} is not in order; see `ppcl plan RECIPE --check`") from None
    points = outlook.points if outlook else []
    narrowed = any(not unit.takes_blocks for name in plan.variants for unit in plan.units_of(name))
    fronts, noise = [], []
    if outlook is not None:
        if points or outlook.measured:
            fronts = [_front(outlook, rows, measure) for measure in outlook.measures]
        noise = [drawn for measure in outlook.measures if (drawn := _noise(outlook, rows, measure))]
    return Section(plan, rows, outlook, fronts, noise, points, narrowed)


def _row(plan: Plan, name: str, colour: int, line: Line | None) -> Row:
    units = plan.units_of(name)
    spans = [unit.span for unit in units if unit.takes_blocks]
    taken = {block for u, v in spans for block in range(u, v + 1)}
    narrow: dict[int, list[str]] = {}
    for unit in units:
        if not unit.takes_blocks:
            for block in unit.changed:
                narrow.setdefault(block, []).append(unit.behaviour.label(unit))
    cells = []
    for block in range(plan.blocks):
        if block in narrow:
            cells.append(Cell(block, block, "narrowed", "", f"block {block}, narrowed: {', '.join(narrow[block])}"))
        elif block not in taken:
            cells.append(Cell(block, block, "kept", "", f"block {block}, the teacher's own"))
    cells += [Cell(u, v, "unit", f"{u}-{v}", f"blocks {u} to {v}: one trained block") for u, v in spans]
    own = plan.blocks - len(taken) - len(narrow)
    counts = f"{own} of the teacher's own" + (f", {len(spans)} trained for a span" if spans else "")
    counts += f", {len(narrow)} narrowed" if narrow else ""
    says = f"{name}: {counts}; spans {spans}" + (f"; narrowed {sorted(narrow)}" if narrow else "")
    return Row(
        name,
        colour,
        len(plan.places(name)),
        counts,
        strip(sorted(cells, key=lambda c: c.first), plan.blocks, says),
        line,
    )


def _front(outlook: Outlook, rows: Sequence[Row], measure: str) -> Markup:
    """Error by one measure over what is left, in percent."""

    def places(points: Sequence[Point]) -> list[tuple[float, float]]:
        return [(100 * point.left, point.errors[measure]) for point in points]

    curves = [Curve("least expected", places(outlook.points), colour=COLOURS, faint=True)] if outlook.points else []
    if outlook.measured:
        curves.append(Curve("measured", places(outlook.measured), colour=COLOURS, line=False, dots=True))
    for row in rows:
        if row.line and row.line.errors:
            own = [(100 * row.line.left, row.line.errors[measure])]
            curves.append(Curve(row.name, own, row.colour, dots=True, line=False, labels=[row.name]))
    curves = [replace(each, points=[(x, y) for x, y in each.points if y > 0]) for each in curves]
    title = f"{outlook.measures[measure]}, log scale"
    return plot(curves, f"{outlook.budget} left, % of the teacher's blocks", title, log=True)


def _noise(outlook: Outlook, rows: Sequence[Row], measure: str) -> Markup | None:
    """Measured errors of the variants by noise level; None where none was measured."""
    levels = [float(level_name(level)) for level in range(LEVELS)]
    curves = [
        Curve(row.name, list(zip(levels, row.line.by_noise[measure], strict=True)), row.colour, dots=True)
        for row in rows
        if row.line and row.line.by_noise.get(measure)
    ]
    title = f"{outlook.measures[measure]}, log scale"
    return plot(curves, "quantile of training's noise levels: 1 is the noisiest", title, log=True) if curves else None
