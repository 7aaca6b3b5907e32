"""What every benchmark prints: rows of ours, other and their ratio, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")]
Quick = Annotated[bool, typer.Option("--quick", help="A smaller table, within a minute.")]


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what is compared.
        ours, other: both sides, in `unit`, measured in the same run.
        ratio: ours over other.
        unit: what the sides are counted in.
        note: how it was measured, and how far single measurements lie apart.
    """

    name: str
    ours: float
    other: float
    ratio: float
    unit: str
    note: str


def row(name: str, ours: float, other: float, unit: str, note: str) -> Row:
    """A row whose ratio is that of its sides."""
    return Row(name, ours, other, ours / other, unit, note)


def row_of_pairs(name: str, ours: Sequence[float], other: Sequence[float], unit: str, note: str) -> Row:
    """A row of repeated measurements: medians of both sides, and the median of the pairs' ratios.

    The sides of a pair were measured one right after the other, so a machine that is slower for a while slows both.
    """
    ratios = sorted(a / b for a, b in zip(ours, other, strict=True))
    spread = f"{len(ratios)} pairs, ratios {ratios[0]:.2f} to {ratios[-1]:.2f}"
    return Row(name, median(ours), median(other), median(ratios), unit, f"{note}; {spread}")


def markdown(title: str, rows: Sequence[Row], facts: Sequence[str]) -> str:
    """The table as a page that can be sent to somebody.

    Args:
        facts: what it was measured on, and what was not measured.
    """
    lines = [
        f"# {title}",
        "",
        *(f"- {fact}" for fact in facts),
        "",
        "| | ours | other | ratio | unit |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.name} | {each.ours:.4g} | {each.other:.4g} | **{each.ratio:.3f}** | {each.unit} |" for each in rows
    ]
    return "\n".join([*lines, "", *(f"- {each.name}: {each.note}." for each in rows)]) + "\n"


def show(title: str, rows: Sequence[Row], file: Path | None) -> None:
    """Print the table with its notes underneath, and write its rows to `file` if there is one."""
    table = Table("", "name", title=title, box=SIMPLE, pad_edge=False, title_justify="left")
    for column in ("ours", "other", "ratio"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    for number, each in enumerate(rows, 1):
        figures = f"{each.ours:.4g}", f"{each.other:.4g}", f"{each.ratio:.3f}"
        table.add_row(f"{number}", each.name, *figures, each.unit)
    console = Console(highlight=False)
    console.print(table)
    for number, each in enumerate(rows, 1):
        console.print(f"{number}  {each.note}", markup=False)
    if file is not None:
        file.write_text(json.dumps([asdict(each) for each in rows], indent=1) + "\n")
