"""The plan file: what gets a unit, which variants plug which units. Written by `ppcl plan`, edited by people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Set
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ppcl_ds.atomic import write_whole
from ppcl_ds.errors import UserError
from ppcl_ds.teacher.anatomy import Anatomy, block_shapes
from ppcl_ds.teacher.teacher import Teacher

_HEADER = """\
# Plan: what the units replace, and which variants plug which units.
# Blocks are numbered from 0 in execution order; a span [u, v] holds both its ends.
# kind: depth (default: one block for the span), text (linears for the text stream of all blocks of the span but the
# first) or ffn (a linear for the feed-forward of one block; keep: 0.25 keeps a quarter of its hidden channels).
# Edit freely: units of one variant must not replace the same thing twice, nor leave a block list; variants share units.
"""


Stream = Literal["image", "text"]

Part = tuple[int, str]
"""Something that one unit alone can take the place of: a block's number and the name of a part of it."""

_WIDTH = 118
"""Longest line of a plan file, where names allow."""

UNDISTILLED, FINETUNED = "-undistilled", "-finetuned"
"""Endings of what a variant is called before its units are trained, and after it is fine-tuned as a whole."""

_BLOCK = ("rest", "text", "image ffn", "text ffn")
"""The parts of a block."""


class UnitPlan(BaseModel):
    """One unit: what it takes the place of, and what it is trained on.

    Attributes:
        name: how variants refer to it.
        kind: `depth`: a block in the place of a span. `text`: the text stream of a group of blocks as linears: the
            attention of all but the group's first block reads a linear of that block's modulated text, and the stream
            jumps by one linear from behind the first block to the group's end. `ffn`: a feed-forward part as a linear,
            or with fewer hidden channels.
        span: first and last block; of kind `ffn` the same one twice.
        streams: of kind `depth`, the streams it is trained on (one that the teacher never reads afterwards is left
            out); of kind `ffn`, the streams whose feed-forward it replaces; of kind `text`, `text`, or nothing where
            the group ends with the last block, behind which nobody reads it.
        keep: of kind `ffn`, the share of hidden channels that stay; 0: none, one linear takes the place of all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["depth", "text", "ffn"] = "depth"
    span: Annotated[tuple[int, int], Field(min_length=2, max_length=2)]
    streams: tuple[Stream, ...]
    keep: float = Field(default=0.0, ge=0.0, lt=1.0)

    @property
    def members(self) -> range:
        """Of kind `text`: the blocks whose attention reads a linear; of other kinds, the blocks that go."""
        return range(self.span[0] + 1, self.span[1] + 1)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what the unit computes and is judged by."""
        if self.kind == "text":
            return (*(modulated(block) for block in self.members), *self.streams)
        return self.streams

    @property
    def footprint(self) -> frozenset[Part]:
        """The parts of the teacher that the unit takes the place of, or that it needs left as they are."""
        first, last = self.span
        blocks = range(first, last + 1)
        if self.kind == "depth":
            return frozenset((block, part) for block in blocks for part in _BLOCK)
        if self.kind == "text":  # the first block's text has to be the teacher's own: the linears read it
            return frozenset([(block, "text") for block in blocks] + [(block, "text ffn") for block in self.members])
        return frozenset((first, f"{stream} ffn") for stream in self.streams)

    @property
    def replaces(self) -> tuple[str, tuple[int, int], tuple[str, ...], float]:
        """What the unit is, whatever its name: two units alike replace the same by the same."""
        return self.kind, self.span, self.streams if self.kind == "ffn" else (), self.keep

    def as_yaml(self) -> str:
        """The unit on one line."""
        kind = "" if self.kind == "depth" else f", kind: {self.kind}"
        keep = f", keep: {self.keep:g}" if self.keep else ""
        streams = ", ".join(self.streams)
        return f"{{name: {_quoted(self.name)}{kind}, span: {list(self.span)}, streams: [{streams}]{keep}}}"


def modulated(block: int) -> str:
    """Name of the text as the attention of a block reads it."""
    return f"modulated_{block}"


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
        """The variant's blocks in order: the teacher block each is shaped like, and its depth unit, if it has one."""
        first = {unit.span[0]: unit for unit in self.units_of(variant) if unit.kind == "depth"}
        gone = {block for unit in first.values() for block in unit.members}
        return [(block, first.get(block)) for block in range(self.blocks) if block not in gone]

    def width_units(self, variant: str) -> list[UnitPlan]:
        """The units of a variant that take the place of parts of blocks."""
        return [unit for unit in self.units_of(variant) if unit.kind != "depth"]

    def save(self, path: Path) -> None:
        """Write the plan as a small commented YAML file."""
        lines = [_HEADER, f"teacher: {self.teacher}", f"blocks: {self.blocks}"]
        lines += ["units:" if self.units else "units: []"]
        lines += [f"  - {unit.as_yaml()}" for unit in self.units]
        lines += ["variants:" if self.variants else "variants: {}"]
        lines += [_wrapped(f"  {_quoted(variant)}: [", names) for variant, names in self.variants.items()]
        write_whole(path, "\n".join(lines) + "\n")


def _wrapped(start: str, names: Sequence[str]) -> str:
    """A list in YAML, on as many lines as it takes."""
    lines = [start]
    for place, name in enumerate(names, 1):
        item = _quoted(name) + (", " if place < len(names) else "")
        if len(lines[-1]) + len(item) > _WIDTH:
            lines.append("    ")
        lines[-1] += item
    return "\n".join(line.rstrip() for line in lines) + "]"


def _quoted(name: str) -> str:
    """A name as YAML, in quotes where it would read as something else."""
    plain = name.replace("_", "").replace("-", "").isalnum() and yaml.safe_load(name) == name
    return name if plain else json.dumps(name)


def load_plan(path: Path, teacher: Teacher) -> Plan:
    """Read a plan and check it against its teacher.

    Raises:
        UserError: one line that names the file and the unit or variant that is wrong.
    """
    plan, complaints = check_plan(path, teacher)
    if plan is None or complaints:
        raise UserError(f"plan {path}: {complaints[0]}")
    return plan


def check_plan(path: Path, teacher: Teacher) -> tuple[Plan | None, list[str]]:
    """Read a plan, and say everything that is wrong with it; None where it cannot even be read."""
    try:
        plan = Plan.model_validate(yaml.safe_load(path.read_text()))
    except OSError:
        return None, ["not found; make it with `ppcl plan`"]
    except yaml.YAMLError as fault:
        return None, [f"not valid YAML: {' '.join(str(fault).split())}"]
    except ValidationError as fault:
        return None, [f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in fault.errors()]
    if (plan.teacher, plan.blocks) != (teacher.class_name, len(teacher.blocks)):
        own = f"the teacher is {teacher.class_name} with {len(teacher.blocks)}"
        return plan, [f"made for {plan.teacher} with {plan.blocks} blocks, but {own}"]
    return plan, list(_complaints(plan, teacher))


def _complaints(plan: Plan, teacher: Teacher) -> Iterator[str]:
    names = [unit.name for unit in plan.units]
    yield from (f"two units are called '{name}'" for name in sorted({n for n in names if names.count(n) > 1}))
    spans = teacher.allowed_spans
    for unit in plan.units:
        complaint = _unit_complaint(unit, spans, teacher.anatomy)
        if complaint:
            yield f"unit '{unit.name}': {complaint}"
    for variant in plan.variants:
        yield from _variant_complaints(plan, variant)


def _unit_complaint(unit: UnitPlan, spans: Set[tuple[int, int]], anatomy: Anatomy) -> str:
    first, last = unit.span
    if not 0 <= first <= last < len(anatomy):
        return f"span {list(unit.span)} is not possible; this teacher has blocks 0 to {len(anatomy) - 1}"
    if len(set(unit.streams)) < len(unit.streams):
        return "a stream is listed twice"
    if unit.keep and unit.kind != "ffn":
        return "keep goes with kind ffn"
    return {"depth": _depth_complaint, "text": _text_complaint, "ffn": _ffn_complaint}[unit.kind](unit, spans, anatomy)


def _depth_complaint(unit: UnitPlan, spans: Set[tuple[int, int]], anatomy: Anatomy) -> str:
    last = anatomy.blocks[unit.span[1]]
    if unit.span not in spans:
        return (
            f"span {list(unit.span)} is not possible; it must hold at least two blocks of one list of this teacher's "
            f"{len(anatomy)}, and at the end of a list its first block must be shaped like its last"
        )
    if not unit.streams:
        return "streams is empty; name those that it is trained on"
    return "" if set(unit.streams) <= set(last.returns) else f"block {last.index} returns only {list(last.returns)}"


def _text_complaint(unit: UnitPlan, spans: Set[tuple[int, int]], anatomy: Anatomy) -> str:
    blocks = anatomy.blocks[unit.span[0] : unit.span[1] + 1]
    if len(blocks) < 2 or blocks[0].list_name != blocks[-1].list_name:
        return f"span {list(unit.span)} is not possible; a text group holds at least two blocks of one list"
    if without := next((block for block in blocks if not block.text_only), None):
        return f"block {without.index} has no text stream of its own that could become linear"
    if unit.span[1] == len(anatomy) - 1:
        return "streams must be []: nobody reads the text behind the last block" if unit.streams else ""
    if unit.streams != ("text",):
        return f"streams must be [text]: block {unit.span[1] + 1} reads the text behind the group"
    return ""


def _ffn_complaint(unit: UnitPlan, spans: Set[tuple[int, int]], anatomy: Anatomy) -> str:
    block = anatomy.blocks[unit.span[0]]
    if unit.span[0] != unit.span[1]:
        return f"span {list(unit.span)} is not possible; kind ffn is for one block: [{unit.span[0]}, {unit.span[0]}]"
    if not block.ffn:
        return f"the feed-forward of block {block.index} is fused with its attention; only depth units can replace it"
    if not unit.streams or not set(unit.streams) <= set(block.ffn):
        return f"streams must be of {list(block.ffn)}: those that have a feed-forward in block {block.index}"
    return ""


def _variant_complaints(plan: Plan, variant: str) -> Iterator[str]:
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
    for a, b in combinations(plan.units_of(variant), 2):
        if reason := conflict(a, b):
            yield f"variant '{variant}': {reason}"


def conflict(a: UnitPlan, b: UnitPlan) -> str:
    """Why two units cannot be plugged together; empty where they can."""
    shared = sorted(a.footprint & b.footprint)
    if not shared:
        return ""
    if a.kind == b.kind == "depth":
        return f"spans {list(a.span)} of '{a.name}' and {list(b.span)} of '{b.name}' overlap"
    block, part = shared[0]
    depth = next((unit for unit in (a, b) if unit.kind == "depth"), None)
    if depth is not None:
        other = b if depth is a else a
        return f"'{other.name}' needs block {block}, which '{depth.name}' replaces with its span {list(depth.span)}"
    return f"'{a.name}' and '{b.name}' both need the {part} of block {block}"


def allowed_spans(teacher: Teacher) -> set[tuple[int, int]]:
    """All spans [u, v], u < v, whose place a copy of block u can take in a stock model.

    A span stays inside one list. If it closes the list, block u must have the shapes of the list's last block, which
    the stock class builds there (SD3's last block has no text output).
    """
    model = teacher.empty
    shapes = [block_shapes(teacher.anatomy.module(model, block)) for block in teacher.blocks]
    return {
        (u.index, v.index)
        for u in teacher.blocks
        for v in teacher.blocks[u.index + 1 :]
        if u.list_name == v.list_name and (not v.last or shapes[u.index] == shapes[v.index])
    }
