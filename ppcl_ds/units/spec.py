"""A unit as the plan names it, and what a kind of unit answers to the rest of the house.

Each kind is one module of this folder: it derives from `Kind` and holds everything that is done differently for it.
Nobody else asks a unit of which kind it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from ppcl_ds.teacher.anatomy import Anatomy, Block, Capture, Streams, Wanted
from ppcl_ds.teacher.files import Source, Sources
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.unit import Unit, UnitBatch

Stream = str
"""A tensor that flows from block to block, see `ListFlow.reads`."""

Part = tuple[int, str]
"""Something that one unit alone can take the place of: a block's number and the name of a part of it."""

PARTS = ("rest", "text", "image ffn", "text ffn")
"""The parts of a block."""


class UnitPlan(BaseModel):
    """One unit: what it takes the place of, and what it is trained on.

    Attributes:
        name: how variants refer to it.
        kind: a key of `KINDS`; the module of the kind says what it is.
        span: first and last block.
        streams: that it is trained on; each kind says which are possible.
        keep: share of what is narrowed that stays, of kinds that narrow; 0: nothing, a linear takes its place.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str = "depth"
    span: Annotated[tuple[int, int], Field(min_length=2, max_length=2)]
    streams: tuple[Stream, ...]
    keep: float = Field(default=0.0, ge=0.0, lt=1.0)

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(f"'{kind}' is not one of {', '.join(KINDS)}")
        return kind

    @property
    def behaviour(self) -> Kind:
        return KINDS[self.kind]

    @property
    def takes_blocks(self) -> bool:
        return self.behaviour.takes_blocks

    @property
    def members(self) -> range:
        """The blocks of the span but its first."""
        return range(self.span[0] + 1, self.span[1] + 1)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.behaviour.outputs(self)

    @property
    def footprint(self) -> frozenset[Part]:
        return self.behaviour.footprint(self)

    @property
    def replaces(self) -> tuple[str, frozenset[Part], float]:
        """What the unit is, whatever its name: two units alike replace the same by the same."""
        return self.kind, self.footprint, self.keep

    @property
    def changed(self) -> Sequence[int]:
        return self.behaviour.changed(self)


@dataclass
class Export:
    """A variant of the stock class on its way to one that lacks parts of blocks; kinds change it.

    Attributes:
        keys: the teacher's block -> prefix of the variant's block in its state dict, without blocks that are gone.
        config: its configuration, with the keys of `modeling_pruned.py`.
        tensors: its state dict.
        stock: the variant of the stock class, on the meta device.
    """

    keys: Mapping[int, str]
    config: dict[str, Any]
    tensors: dict[str, Source]
    stock: nn.Module

    def take_out(self, part: str) -> Source:
        """Remove a part's tensors; returns one of them, for its dtype."""
        gone = [self.tensors.pop(name) for name in list(self.tensors) if name.startswith(f"{part}.")]
        return gone[0]


class Kind(ABC):
    """A kind of unit. The defaults are those of a unit in the place of parts of one block that stays."""

    name: ClassVar[str]
    """As plans name it."""
    takes_blocks: ClassVar[bool] = False
    """Whether one block stands in the place of the whole span."""
    one_block: ClassVar[bool] = True
    """Whether its span is a single block; else it is two blocks or more."""
    narrows: ClassVar[bool] = False
    """Whether `keep` means something."""

    def outputs(self, unit: UnitPlan) -> tuple[str, ...]:
        """Names of what the unit computes and is judged by."""
        return unit.streams

    @abstractmethod
    def footprint(self, unit: UnitPlan) -> frozenset[Part]:
        """The parts of the teacher that the unit takes the place of, or that it needs left as they are."""

    def changed(self, unit: UnitPlan) -> Sequence[int]:
        """The teacher's blocks in whose place the unit is, or in parts of which."""
        return unit.span[:1]

    def boundary(self, unit: UnitPlan, blocks: int) -> tuple[Stream, ...]:
        """The streams after the unit's span by which a whole variant can be compared with its teacher.

        Attention mixes the streams, so the image is always among them; nobody reads the text after the last block.

        Args:
            blocks: of the teacher.
        """
        text = "text" in unit.streams and unit.span[1] < blocks - 1
        return ("image", "text") if text else ("image",)

    @abstractmethod
    def problem(self, unit: UnitPlan, teacher: Teacher) -> str:
        """Why the teacher cannot have the unit, for a person; empty where it can. The span is one of the teacher's."""

    @abstractmethod
    def taps(self, unit: UnitPlan, anatomy: Anatomy) -> Wanted:
        """What of a teacher forward the unit reads and is judged by."""

    @abstractmethod
    def batch(self, unit: UnitPlan, capture: Capture, text_mask: Tensor | None, anatomy: Anatomy) -> UnitBatch:
        """The same, from a forward in which it was recorded; references, not copies."""

    @abstractmethod
    def build(self, unit: UnitPlan, teacher: Teacher, dtype: torch.dtype) -> Unit:
        """The unit as it is before training, on the CPU."""

    @abstractmethod
    def empty(self, unit: UnitPlan, teacher: Teacher, dtype: torch.dtype) -> Unit:
        """The same on the meta device; no weights are read."""

    @abstractmethod
    def plug(self, unit: UnitPlan, own: Any, model: nn.Module, anatomy: Anatomy, stack: ExitStack) -> None:
        """Have `model` compute what it would with the unit; `stack` undoes it.

        Args:
            own: the unit itself, on the device.
        """

    @abstractmethod
    def saves(self, unit: UnitPlan, teacher: Teacher) -> int:
        """Parameters that the unit gives up, less its own."""

    @abstractmethod
    def export(self, unit: UnitPlan, own: Sources, anatomy: Anatomy, model: Export) -> None:
        """Put the unit's tensors into a variant. Not asked of units that take blocks: `surgery.lay_out` puts them in.

        Args:
            own: by their name inside the unit.
            anatomy: the teacher's.
        """

    @abstractmethod
    def shrink(self, unit: UnitPlan, module: Any, block: Block, streams: Streams) -> None:
        """Give a block by itself the parts that the unit would give it, weights aside: it takes as long to run.

        Args:
            module: one of `changed`, changed in place.
            streams: that enter the block.
        """

    def parts(self, unit: UnitPlan, ffn: Mapping[str, str], text_only: frozenset[str]) -> frozenset[str]:
        """Names of the parts that the unit replaces in each block that it changes, as LoRA files may have them.

        Args:
            ffn: stream -> feed-forward part of the teacher's blocks.
            text_only: parts that serve the text alone.
        """
        return frozenset()

    @abstractmethod
    def label(self, unit: UnitPlan) -> str:
        """The unit as plots and tables name it, such as `[3,5]`."""

    @abstractmethod
    def facts(self, unit: UnitPlan) -> tuple[str, str]:
        """What it replaced, and by what, for a model card."""


KINDS: dict[str, Kind] = {}
"""Name -> kind; `plan.py` registers the ones that ship."""


def register(kind: Kind) -> None:
    """Make a kind known to plans."""
    KINDS[kind.name] = kind
