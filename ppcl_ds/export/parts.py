"""The parts of blocks that width units take the place of, under every name that LoRA files have for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ppcl_ds.errors import UserError
from ppcl_ds.export.names import Names
from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.units.plan import UnitPlan

_OTHER_NAMES = {"attn.to_add_out": ("processor.proj_lora2",)}
"""A part as diffusers calls it, and as XLabs does; what a family's authors call it stands in `names.yaml`."""


@dataclass(frozen=True)
class Parts:
    """The parts of the blocks of one list that width units can take the place of.

    A part that only some blocks of the list have (SD3's last has no feed-forward for its text) is among them: the LoRA
    says nothing of it in the others.

    Attributes:
        ffn: stream -> name of its feed-forward.
        text_only: names of what serves the text alone.
        authors: part -> what the family's authors call it, or pieces of it.
    """

    ffn: Mapping[str, str]
    text_only: frozenset[str]
    authors: Mapping[str, Sequence[str]] = field(default_factory=dict)

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
            for name in (part, *_OTHER_NAMES.get(part, ()), *self.authors.get(part, ())):
                yield name.replace(".", "_"), part


def parts_of(anatomy: Anatomy, names: Names) -> dict[str, Parts]:
    """The parts of each list's blocks; the number of blocks does not matter.

    Args:
        names: of the family, in its first release.
    """
    found: dict[str, Parts] = {}
    for block in anatomy.blocks:
        before = found.get(block.list_name, Parts({}, frozenset()))
        found[block.list_name] = Parts({**before.ffn, **block.ffn}, before.text_only | {*block.text_only})
    return {
        name: replace(parts, authors={p: names.tails(name, p) for p in {*parts.ffn.values(), *parts.text_only}})
        for name, parts in found.items()
    }
