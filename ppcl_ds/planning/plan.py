"""The plan file: which spans get a unit, which variants plug which units. Written by `ppcl plan`, edited by people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ppcl_ds.errors import UserError
from ppcl_ds.families.anatomy import Anatomy
from ppcl_ds.families.files import ModelFiles
from ppcl_ds.families.surgery import block_shapes
from ppcl_ds.whole import write_whole

_HEADER = """\
# Plan: what the units replace, and which variants plug which units.
# Blocks are numbered from 0 in execution order; a span [u, v] holds both its ends.
# Edit freely: spans of one variant must not overlap, nor leave a block list; a variant may share units with others.
"""


class UnitPlan(BaseModel):
    """One depth unit: a block that takes the place of a span.

    Attributes:
        name: how variants refer to it.
        span: first and last block.
        streams: the streams it is trained on; one that the teacher never reads afterwards is left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    span: Annotated[tuple[int, int], Field(min_length=2, max_length=2)]
    streams: Annotated[tuple[Literal["image", "text"], ...], Field(min_length=1)]


class Plan(BaseModel):
    """Units and variants for one teacher.

    Attributes:
        teacher: class name of the teacher.
        blocks: its number of blocks; guards against a plan of another teacher.
        units: the library.
        variants: name -> names of the units it plugs; all other blocks stay the teacher's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str
    blocks: int
    units: tuple[UnitPlan, ...]
    variants: dict[str, tuple[str, ...]]

    def unit(self, name: str) -> UnitPlan:
        """The unit called `name`."""
        return next(unit for unit in self.units if unit.name == name)

    def units_of(self, variant: str) -> list[UnitPlan]:
        """The units that a variant plugs, in the order of their spans.

        Raises:
            UserError: there is no such variant.
        """
        if variant not in self.variants:
            raise UserError(f"variant '{variant}' is not in the plan; it has: {', '.join(self.variants)}")
        return sorted((self.unit(name) for name in self.variants[variant]), key=lambda unit: unit.span)

    def places(self, variant: str) -> list[tuple[int, UnitPlan | None]]:
        """The variant's blocks in order: the teacher block each is shaped like, and its unit (None: the teacher's)."""
        first = {unit.span[0]: unit for unit in self.units_of(variant)}
        gone = {block for unit in first.values() for block in range(unit.span[0] + 1, unit.span[1] + 1)}
        return [(block, first.get(block)) for block in range(self.blocks) if block not in gone]

    def save(self, path: Path) -> None:
        """Write the plan as a small commented YAML file."""
        lines = [_HEADER, f"teacher: {self.teacher}", f"blocks: {self.blocks}"]
        lines += ["units:" if self.units else "units: []"]
        lines += [
            f"  - {{name: {_quoted(u.name)}, span: {list(u.span)}, streams: [{', '.join(u.streams)}]}}"
            for u in self.units
        ]
        lines += ["variants:" if self.variants else "variants: {}"]
        lines += [f"  {_quoted(v)}: [{', '.join(map(_quoted, names))}]" for v, names in self.variants.items()]
        write_whole(path, "\n".join(lines) + "\n")


def _quoted(name: str) -> str:
    """A name as YAML, in quotes where it would read as something else."""
    plain = name.replace("_", "").replace("-", "").isalnum() and yaml.safe_load(name) == name
    return name if plain else json.dumps(name)


def load_plan(path: Path, files: ModelFiles, anatomy: Anatomy) -> Plan:
    """Read a plan and check it against its teacher.

    Raises:
        UserError: one line that names the file and the unit or variant that is wrong.
    """
    plan, complaints = check_plan(path, files, anatomy)
    if plan is None or complaints:
        raise UserError(f"plan {path}: {complaints[0]}")
    return plan


def check_plan(path: Path, files: ModelFiles, anatomy: Anatomy) -> tuple[Plan | None, list[str]]:
    """Read a plan, and say everything that is wrong with it; None where it cannot even be read."""
    try:
        plan = Plan.model_validate(yaml.safe_load(path.read_text()))
    except OSError:
        return None, ["not found; make it with `ppcl plan`"]
    except yaml.YAMLError as fault:
        return None, [f"not valid YAML: {' '.join(str(fault).split())}"]
    except ValidationError as fault:
        return None, [f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in fault.errors()]
    if (plan.teacher, plan.blocks) != (files.class_name, len(anatomy)):
        teacher = f"the teacher is {files.class_name} with {len(anatomy)}"
        return plan, [f"made for {plan.teacher} with {plan.blocks} blocks, but {teacher}"]
    return plan, list(_complaints(plan, files, anatomy))


def _complaints(plan: Plan, files: ModelFiles, anatomy: Anatomy) -> Iterator[str]:
    names = [unit.name for unit in plan.units]
    yield from (f"two units are called '{name}'" for name in sorted({n for n in names if names.count(n) > 1}))
    spans = allowed_spans(files, anatomy)
    for unit in plan.units:
        if unit.span not in spans:
            yield (
                f"unit '{unit.name}': span {list(unit.span)} is not possible; it must hold at least two blocks of one "
                f"list of this teacher's {plan.blocks}, and at the end of a list its first block must be shaped like "
                "its last"
            )
        elif len(set(unit.streams)) < len(unit.streams):
            yield f"unit '{unit.name}': a stream is listed twice"
        elif not set(unit.streams) <= set(anatomy.blocks[unit.span[1]].returns):
            yield f"unit '{unit.name}': block {unit.span[1]} returns only {list(anatomy.blocks[unit.span[1]].returns)}"
    for variant in plan.variants:
        yield from _variant_complaints(plan, variant)


def _variant_complaints(plan: Plan, variant: str) -> Iterator[str]:
    if "/" in variant or variant in ("", ".", "..", "teacher") or variant.endswith("-undistilled"):
        yield f"variant '{variant}' needs another name: one that can be a folder, not 'teacher' or '...-undistilled'"
    known = {unit.name for unit in plan.units}
    unknown = [name for name in plan.variants[variant] if name not in known]
    if unknown:
        yield f"variant '{variant}' plugs unit '{unknown[0]}', which is not under units"
        return
    for a, b in pairwise(plan.units_of(variant)):
        if b.span[0] <= a.span[1]:
            yield f"variant '{variant}': spans {list(a.span)} of '{a.name}' and {list(b.span)} of '{b.name}' overlap"


def allowed_spans(files: ModelFiles, anatomy: Anatomy) -> set[tuple[int, int]]:
    """All spans [u, v], u < v, whose place a copy of block u can take in a stock model.

    A span stays inside one list. If it closes the list, block u must have the shapes of the list's last block, which
    the stock class builds there (SD3's last block has no text output).
    """
    model = files.empty_model()
    shapes = [block_shapes(anatomy.module(model, block)) for block in anatomy.blocks]
    return {
        (u.index, v.index)
        for u in anatomy.blocks
        for v in anatomy.blocks[u.index + 1 :]
        if u.list_name == v.list_name and (not v.last or shapes[u.index] == shapes[v.index])
    }
