"""The plan file: what gets a unit, which variants plug which units. Written by `ppcl plan`, edited by people."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import combinations, count
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ppcl_ds.atomic import atomic_write
from ppcl_ds.early import FINETUNED, UNDISTILLED
from ppcl_ds.errors import UserError, brief, worded
from ppcl_ds.teacher.surgery import shorten
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.depth import DepthKind
from ppcl_ds.units.ffn import FFNKind
from ppcl_ds.units.spec import KINDS, UnitPlan, register
from ppcl_ds.units.text import TextKind

register(DepthKind())
register(TextKind())
register(FFNKind())

_HEADER = """\
# Plan: what the units replace, and which variants plug which units.
# Blocks are numbered from 0 in execution order; a span [u, v] holds both its ends.
# kind: depth (default: one block for the span), text (linears for the text stream of all blocks of the span but the
# first) or ffn (a linear for the feed-forward of one block; keep: 0.25 keeps a quarter of its hidden channels).
# Edit freely: units of one variant must not replace the same thing twice, nor leave a block list; variants share units.
"""


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
        """The variant's blocks in order: the teacher block each is shaped like, and its depth unit, if it has one."""
        first = {unit.span[0]: unit for unit in self.units_of(variant) if unit.takes_blocks}
        gone = {block for unit in first.values() for block in unit.members}
        return [(block, first.get(block)) for block in range(self.blocks) if block not in gone]

    def width_units(self, variant: str) -> list[UnitPlan]:
        """The units of a variant that take the place of parts of blocks."""
        return [unit for unit in self.units_of(variant) if not unit.takes_blocks]

    def save(self, path: Path) -> None:
        """Write the plan as a small commented YAML file."""
        atomic_write(path, self.written)

    @property
    def written(self) -> str:
        """What its file holds."""
        plan = self.model_dump(mode="json") | {"units": list(self.units)}
        content = yaml.dump(
            plan, Dumper=_PlanFile, default_flow_style=None, sort_keys=False, allow_unicode=True, width=118
        )
        content = f"{_HEADER}\n{content}"
        return f"{_SEAL}{_digest(content)}\n{content}"


_SEAL = "# Written by ppcl, with this digest of what follows: "


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def refuse_edited(path: Path) -> None:
    """Nothing if there is no plan file, or one as `Plan.save` has written it.

    Raises:
        UserError: somebody else has written it, or into it.
    """
    if not path.exists():
        return
    first, _, rest = path.read_bytes().decode(errors="replace").partition("\n")
    if first != _SEAL + _digest(rest):
        raise UserError(f"{path} has been edited, and is not overwritten; move it away to have a plan written there")


def replace_plan(path: Path, plan: Plan) -> Path | None:
    """Write a plan file; another one that stands there is kept as `plan-1.yaml`, `plan-2.yaml`, ... beside it.

    Returns:
        Where that one is now, if there was one.

    Raises:
        UserError: that one has been edited.
    """
    refuse_edited(path)
    kept = None
    if path.exists() and path.read_text() != plan.written:
        names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1))
        kept = path.replace(next(name for name in names if not name.exists()))
    plan.save(path)
    return kept


class _PlanFile(yaml.SafeDumper):
    """Writes a unit on one line."""


_PlanFile.add_representer(
    UnitPlan,
    lambda file, unit: file.represent_mapping(
        file.DEFAULT_MAPPING_TAG, unit.model_dump(mode="json", exclude_defaults=True), flow_style=True
    ),
)


def load_plan(path: Path, teacher: Teacher) -> Plan:
    """Read a plan and check it against its teacher.

    Raises:
        UserError: one line that names the file and the unit or variant that is wrong.
    """
    plan, problems = check_plan(path, teacher)
    if plan is None or problems:
        raise UserError(f"plan {path}: {problems[0]}")
    return plan


def check_plan(path: Path, teacher: Teacher) -> tuple[Plan | None, list[str]]:
    """Read a plan, and say everything that is wrong with it; None where it cannot even be read."""
    try:
        plan = Plan.model_validate(yaml.safe_load(path.read_text()))
    except OSError:
        return None, ["not found; make it with `ppcl plan`"]
    except yaml.YAMLError as fault:
        return None, [f"not valid YAML: {brief(fault)}"]
    except ValidationError as fault:
        return None, [worded(each) for each in fault.errors()]
    if (plan.teacher, plan.blocks) != (teacher.class_name, len(teacher.blocks)):
        own = f"the teacher is {teacher.class_name} with {len(teacher.blocks)}"
        return plan, [f"made for {plan.teacher} with {plan.blocks} blocks, but {own}"]
    return plan, list(_problems(plan, teacher))


def _problems(plan: Plan, teacher: Teacher) -> Iterator[str]:
    names = [unit.name for unit in plan.units]
    yield from (f"two units are called '{name}'" for name in sorted({n for n in names if names.count(n) > 1}))
    for unit in plan.units:
        problem = _unit_problem(unit, teacher)
        if problem:
            yield f"unit '{unit.name}': {problem}"
    for variant in plan.variants:
        yield from _variant_problems(plan, variant, teacher)


def _unit_problem(unit: UnitPlan, teacher: Teacher) -> str:
    first, last = unit.span
    if not 0 <= first <= last < len(teacher.blocks):
        return f"span {list(unit.span)} is not possible; this teacher has blocks 0 to {len(teacher.blocks) - 1}"
    if len(set(unit.streams)) < len(unit.streams):
        return "a stream is listed twice"
    if unit.keep and not unit.behaviour.narrows:
        return f"keep goes with kind {', '.join(name for name, kind in KINDS.items() if kind.narrows)}"
    return unit.behaviour.problem(unit, teacher)


def _variant_problems(plan: Plan, variant: str, teacher: Teacher) -> Iterator[str]:
    if "/" in variant or variant in ("", ".", "..", "teacher") or variant.endswith((UNDISTILLED, FINETUNED)):
        yield (
            f"variant '{variant}' needs another name: one that can be a folder, not 'teacher', '...{UNDISTILLED}' or "
            f"'...{FINETUNED}'"
        )
    known = {unit.name for unit in plan.units}
    unknown = [name for name in plan.variants[variant] if name not in known]
    if unknown:
        yield f"variant '{variant}' plugs unit '{unknown[0]}', which is not under units"
        return
    problems = [reason for a, b in combinations(plan.units_of(variant), 2) if (reason := conflict(a, b))]
    if not problems and all(unit.span in teacher.allowed_spans for unit in plan.units_of(variant) if unit.takes_blocks):
        try:
            shorten(teacher, [origin for origin, _ in plan.places(variant)])
        except UserError as fault:
            problems = [str(fault)]
    yield from (f"variant '{variant}': {problem}" for problem in problems)


def conflict(a: UnitPlan, b: UnitPlan) -> str:
    """Why two units cannot be plugged together; empty where they can."""
    shared = sorted(a.footprint & b.footprint)
    if not shared:
        return ""
    if a.takes_blocks and b.takes_blocks:
        return f"spans {list(a.span)} of '{a.name}' and {list(b.span)} of '{b.name}' overlap"
    block, part = shared[0]
    depth = next((unit for unit in (a, b) if unit.takes_blocks), None)
    if depth is not None:
        other = b if depth is a else a
        return f"'{other.name}' needs block {block}, which '{depth.name}' replaces with its span {list(depth.span)}"
    return f"'{a.name}' and '{b.name}' both need the {part} of block {block}"
