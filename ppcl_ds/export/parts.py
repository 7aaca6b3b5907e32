"""The parts of blocks that width units take the place of, under every name that LoRA files have for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ppcl_ds.errors import UserError
from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.units.plan import UnitPlan

_OTHER_NAMES = {
    "ff": ("img_mlp", "x_block.mlp"),
    "ff_context": ("txt_mlp", "context_block.mlp"),
    "norm1_context": ("txt_mod", "context_block.adaLN_modulation"),
    "attn.to_add_out": ("txt_attn.proj", "context_block.attn.proj", "processor.proj_lora2"),
}
"""A part as diffusers calls it, and as the authors of FLUX and of SD3 do, and the last one as XLabs does."""


@dataclass(frozen=True)
class Parts:
    """The parts of the blocks of one list that width units can take the place of.

    A part that only some blocks of the list have (SD3's last has no feed-forward for its text) is among them: the LoRA
    says nothing of it in the others.

    Attributes:
        ffn: stream -> name of its feed-forward.
        text_only: names of what serves the text alone.
    """

    ffn: Mapping[str, str]
    text_only: frozenset[str]

    def replaced(self, unit: UnitPlan) -> frozenset[str]:
        """The parts that a width unit replaces in each of its blocks.

        Raises:
            UserError: these blocks do not have them.
        """
        gone = unit.behaviour.parts(unit, self.ffn, self.text_only)
        if not gone:
            raise UserError(
                f"unit '{unit.name}': the teacher's blocks have no such parts for kind {unit.behaviour.name}"
            )
        return gone

    def holding(self, tail: str) -> str | None:
        """The part that a tensor belongs to, as diffusers calls it; None where it belongs to none of these.

        A footgun: kohya's `ff_context_net_2` is a `ff_context`, though it begins with `ff_`, so the longest name wins.

        Args:
            tail: what stands after the block's number, in any layout.
        """
        flat = tail.replace(".", "_")
        fits = {len(name): part for name, part in self._names() if f"{flat}_".startswith(f"{name}_")}
        return fits[max(fits)] if fits else None

    def _names(self) -> Iterator[tuple[str, str]]:
        for part in {*self.ffn.values(), *self.text_only}:
            for name in (part, *_OTHER_NAMES.get(part, ())):
                yield name.replace(".", "_"), part


def parts_of(anatomy: Anatomy) -> dict[str, Parts]:
    """The parts of each list's blocks; the number of blocks does not matter."""
    found: dict[str, Parts] = {}
    for block in anatomy.blocks:
        before = found.get(block.list_name, Parts({}, frozenset()))
        found[block.list_name] = Parts({**before.ffn, **block.ffn}, before.text_only | {*block.text_only})
    return found
