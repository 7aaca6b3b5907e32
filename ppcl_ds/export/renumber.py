"""The names inside a LoRA file, whatever tool wrote it: those of blocks get the variant's numbers.

A name is `HEAD LIST NUMBER TAIL`, with dots (diffusers, PEFT, ComfyUI) or underscores (kohya, OneTrainer) between them.
Only the number is changed, so the file stays in the layout that it came in. What a unit replaces, a block or a part of
one, gets no new name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ppcl_ds.errors import UserError
from ppcl_ds.export.parts import Parts
from ppcl_ds.units.plan import Plan

_HEAD = (
    r"(?:base_model\.model\.)?"
    r"(?:transformer\.|(?:model\.)?diffusion_model\.|(?:pipe\.)?dit\.|lora_unet_|lora_transformer_|lycoris_)?"
)
"""Before a list: of PEFT, diffusers, ComfyUI and ai-toolkit, DiffSynth, kohya and musubi, OneTrainer, LyCORIS."""
_TEXT_ENCODER = re.compile(r"(?:lora|lycoris)_te\d*_|text_encoder")
_NUMBERED = re.compile(r"(\w*?(?:block|layer)s?)[._]\d+(?=[._]|$)")
"""What looks like a block of some list."""


@dataclass(frozen=True)
class Renamed:
    """What becomes of one name.

    Attributes:
        name: the new name; None where the block, or the part of it, has gone.
        block: list and number of the teacher's block; None outside the blocks.
        tail: what stands after the number, such as `attn.to_q.lora_A.weight`.
        unit: the unit that took its place; None where it stays.
    """

    name: str | None
    block: tuple[str, int] | None = None
    tail: str = ""
    unit: str | None = None


class Numbering:
    """From the teacher's block numbers to a variant's.

    Args:
        lists: length of each of the teacher's block lists, in execution order.
        others: names of the teacher's other modules.
        parts: of the blocks of each list, what width units can replace.
        plan: checked; its blocks are those of `lists`.
        variant: one of the plan's.
        authors: names of lists and modules in the family's first release -> diffusers'.
        nearest: a depth unit takes over what belongs to the block that it started from.

    Raises:
        UserError: a width unit replaces what the teacher's blocks do not have.
    """

    def __init__(
        self,
        lists: Mapping[str, int],
        others: Collection[str],
        parts: Mapping[str, Parts],
        plan: Plan,
        variant: str,
        authors: Mapping[str, str],
        nearest: bool = False,
    ) -> None:
        self.lists, self.parts = lists, parts
        self.others = (*others, *(theirs for theirs, ours in authors.items() if theirs and ours not in lists))
        blocks = [(name, position) for name, length in lists.items() for position in range(length)]
        units = plan.units_of(variant)
        self.units = [unit.name for unit in units]
        """The variant's, in the order of their spans."""
        self.unit_of: dict[tuple[str, int], str] = {}
        """The unit that replaces a block; blocks that stay are left out."""
        self.unit_of_part: dict[tuple[tuple[str, int], str], str] = {}
        """The unit that replaces a part of a block that stays."""
        for unit in units:
            if unit.takes_blocks:
                self.unit_of |= dict.fromkeys(blocks[unit.span[0] : unit.span[1] + 1], unit.name)
                continue
            for index in unit.changed:
                gone = parts[blocks[index][0]].replaced(unit)
                self.unit_of_part |= {(blocks[index], part): unit.name for part in gone}
        self.new: dict[tuple[str, int], int] = {}
        counts = dict.fromkeys(lists, 0)
        for origin, depth_unit in plan.places(variant):
            name, position = blocks[origin]
            # A unit is another function than its span's first block, which a change to that block may not suit.
            if nearest:
                self.unit_of.pop((name, position), None)
            if depth_unit is None or nearest:
                self.new[name, position] = counts[name]
            counts[name] += 1
        self.list_of = {theirs: ours for theirs, ours in authors.items() if ours in lists}
        self.list_of |= {name: name for name in lists}
        either = "|".join(map(re.escape, self.list_of))
        self.pattern = re.compile(rf"(?P<head>{_HEAD}(?P<list>{either})[._])(?P<number>\d+)(?P<tail>(?:[._].*)?)")

    def rename(self, key: str) -> Renamed:
        """The name of a tensor of the LoRA in the variant's LoRA.

        Raises:
            UserError: it is of a block that the teacher does not have.
        """
        found = self.pattern.fullmatch(key)
        if found is None:
            self._check_outside(key)
            return Renamed(key)
        block = self.list_of[found["list"]], int(found["number"])
        if block[1] >= self.lists[block[0]]:
            raise UserError(f"'{key}' is beyond the {self.lists[block[0]]} blocks of the teacher's {block[0]}")
        tail = found["tail"][1:]
        unit = self.unit_of.get(block, self._unit_inside(block, tail))
        if unit is not None:
            return Renamed(None, block, tail, unit)
        return Renamed(f"{found['head']}{self.new[block]}{found['tail']}", block, tail)

    def _unit_inside(self, block: tuple[str, int], tail: str) -> str | None:
        """The width unit that replaces the part of the block that a tensor belongs to."""
        part = self.parts[block[0]].holding(tail)
        return None if part is None else self.unit_of_part.get((block, part))

    def _check_outside(self, key: str) -> None:
        """Refuse what may be a block under a name that is not known, rather than leave it with a wrong number."""
        body = re.sub(f"^{_HEAD}", "", key)
        if _TEXT_ENCODER.match(key) or body.startswith(tuple(f"{name}{mark}" for name in self.others for mark in "._")):
            return
        if found := _NUMBERED.search(body):
            known = ", ".join(self.lists)
            raise UserError(f"'{key}' looks like one of '{found[1]}', but the teacher's lists of blocks are: {known}")


def renumber_metadata(text: str, renamed: Mapping[str, Renamed]) -> str:
    """PEFT's own description of a LoRA (`lora_adapter_metadata`), for what is left of it.

    Its names may be endings of names or regular expressions. They are read as PEFT reads them, against the old names,
    and written as whole new names.

    Args:
        text: JSON; a pipeline's keys begin with the name of the component, such as `transformer.`.
        renamed: every tensor of the file.

    Raises:
        ValueError: it is not JSON, or not such a description.
    """
    adapter = dict(json.loads(text))
    for prefix in [key.removesuffix("target_modules") for key in adapter if key.endswith("target_modules")]:
        if _TEXT_ENCODER.match(prefix):
            continue
        kept = {
            _module(old, prefix): _module(new.name, prefix)
            for old, new in renamed.items()
            if new.name is not None and old.startswith(prefix) and ".lora_" in old
        }
        # An expression and no list, whose items PEFT takes for endings: `proj_out` is one of FLUX's blocks' names, too.
        adapter[f"{prefix}target_modules"] = "|".join(re.escape(name) for name in sorted(set(kept.values())))
        for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if f"{prefix}{key}" in adapter:
                adapter[f"{prefix}{key}"] = None
        for key in ("rank_pattern", "alpha_pattern"):
            values = dict(adapter.get(f"{prefix}{key}") or {})
            adapter[f"{prefix}{key}"] = {
                f"^{new}": value for old, new in kept.items() if (value := _of_pattern(values, old)) is not None
            }
    return json.dumps(adapter, indent=2, sort_keys=True)


def _module(key: str, prefix: str) -> str:
    return key.removeprefix(prefix).split(".lora_")[0]


def _of_pattern(values: Mapping[str, float], module: str) -> float | None:
    """The value for a module, as PEFT's `get_pattern_key` finds it."""
    return next((value for key, value in values.items() if re.match(rf"(.*\.)?({key})$", module)), None)
