"""What is served of each of diffusers' transformer classes, as it was measured: `families.yaml`, and the table of it.

The file is written by `python -m tests.families.verdicts`, which tries tiny models; nobody edits it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from ppcl_ds.errors import UserError

FILE = Path(__file__).with_name("families.yaml")
ASPECTS: Mapping[str, str] = {
    "depth": "depth",
    "text": "text",
    "ffn": "ffn",
    "narrow": "narrow",
    "single_file": "single file",
    "lora": "LoRA",
}
"""What may be served -> what its column is called."""

_WIDTH = 130
"""Of the table where it is not printed to a terminal."""


@dataclass(frozen=True)
class Verdict:
    """What is served of a transformer class.

    Attributes:
        family: what people call it.
        tried: names of the tiny models that it was measured with; none where nobody has tried it.
        served: of `ASPECTS`, those that at least one of them is served for.
        why: aspect -> why another, or the same one, is not served for it; `all` -> why nothing is.
    """

    family: str
    tried: Sequence[str] = ()
    served: Sequence[str] = ()
    why: Mapping[str, str] = field(default_factory=dict)

    def cell(self, aspect: str) -> str:
        """In a word."""
        if not self.tried:
            return "-"
        return ("partly" if aspect in self.why else "yes") if aspect in self.served else "no"


def load_verdicts() -> dict[str, Verdict]:
    """Class name -> verdict, in the order of the families' names."""
    return {name: Verdict(**verdict) for name, verdict in yaml.safe_load(FILE.read_text()).items()}


def summary(verdicts: Mapping[str, Verdict]) -> str:
    """How many are served for what, in a line."""
    counts = (f"{what} {sum(a in each.served for each in verdicts.values())}" for a, what in ASPECTS.items())
    tried = sum(bool(each.tried) for each in verdicts.values())
    return f"{len(verdicts)} transformer classes, {tried} tried; served for: {', '.join(counts)}"


def print_families(name: str = "") -> None:
    """Print the table, and why not for those that a name was given of.

    Args:
        name: part of a class's or a family's name, in capitals or not.

    Raises:
        UserError: there is none of that name.
    """
    verdicts = load_verdicts()
    asked = {key: verdict for key, verdict in verdicts.items() if name.lower() in f"{key} {verdict.family}".lower()}
    if not asked:
        raise UserError(f"no transformer class or family of diffusers is called '{name}'; `ppcl families` lists all")
    table = Table("family", Column("class", overflow="fold"), *ASPECTS.values(), box=SIMPLE, pad_edge=False)
    for key, verdict in asked.items():
        table.add_row(verdict.family, key, *map(verdict.cell, ASPECTS))
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, markup=False, highlight=False)
    console.print(table)
    for key, verdict in asked.items() if name else ():
        for reason in dict.fromkeys(verdict.why.values()):
            what = [ASPECTS.get(aspect, "all") for aspect, other in verdict.why.items() if other == reason]
            console.print(f"{key}, {', '.join(what)}: {reason}", soft_wrap=True)
    console.print(summary(asked), soft_wrap=True)
