"""The last words of each command: for a person, for programs, and about the samples that were left out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_tools.work import write_shared
from ppcl_ds.atomic import atomic_write
from ppcl_ds.errors import UserError

NAMED = 10
"""Samples that are named at a terminal; the log names all."""


@dataclass
class Summary:
    """What a command says at its end.

    Attributes:
        headline: one line.
        figures: the same for programs; JSON can hold it.
        lines: more lines for a person.
        tables: and tables.
        found: whether there is something wrong with what was looked at: exit code 1.
    """

    headline: str
    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    found: bool = False

    def show(self) -> None:
        """Print it for a person."""
        for line in (self.headline, *self.lines):
            print(line)
        # In a log there is no width to keep to.
        console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
        for table in self.tables:
            console.print(table)
        sys.stdout.flush()

    def write(self, place: str) -> None:
        """Write the figures as JSON: to a file, or, for `-`, to stdout; of one launch's ranks the first does."""
        if not place or int(os.environ.get("RANK", "0")):
            return
        text = json.dumps({"summary": self.headline, **self.figures}, indent=2) + "\n"
        if place == "-":
            sys.stdout.write(text)
            return
        try:
            atomic_write(Path(place), text)
        except OSError as fault:
            raise UserError(f"--json {place}: {fault.strerror}") from None


def named(skipped: Sequence[str], log: Path | str) -> list[str]:
    """Lines that name the first of the skipped samples and say where all are."""
    if not skipped:
        return []
    return [f"{len(skipped)} skipped; {log} names all:", *(f"  {line}" for line in skipped[:NAMED])]


def check_bad(skipped: Sequence[str], total: int, limit: float, log: Path) -> None:
    """Stop where too many samples could not be used.

    Args:
        skipped: all so far, a line each.
        total: samples in all, good or not.
        limit: `data.max_bad_fraction`.
        log: gets the lines, if it comes to that.

    Raises:
        UserError: they are more than `limit` of all.
    """
    if len(skipped) > limit * total:
        write_log(log, skipped)
        raise UserError(
            f"{len(skipped)} of {total} samples cannot be used, more than data.max_bad_fraction ({limit:g}): "
            f"{'; '.join(skipped[:NAMED])}{'; ...' if len(skipped) > NAMED else ''}; {log} names those found so far"
        )


def write_log(path: Path, lines: Iterable[str]) -> None:
    """Write `skipped.log`, a line a sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shared(path, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
