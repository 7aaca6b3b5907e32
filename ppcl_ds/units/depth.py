"""Depth units: one block that takes the place of a span of blocks."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ppcl_ds.teacher.anatomy import Anatomy, Block, Capture, Streams, Wanted
from ppcl_ds.teacher.files import Sources
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.compiled import Compiled
from ppcl_ds.units.plugging import replace_forward
from ppcl_ds.units.spec import PARTS, Export, Kind, Part, Stream, UnitPlan
from ppcl_ds.units.unit import Unit, UnitBatch


class DepthUnit(Unit):
    """One block of the teacher's own class, initialised from the first block of its span.

    It is called with the very arguments the teacher's block was called with.

    Args:
        shape: the span's first block.
        module: a copy of its module.
    """

    def __init__(self, shape: Block, module: nn.Module) -> None:
        super().__init__()
        self.shape, self.core = shape, module

    def forward(self, inputs: Streams, conditioning: dict[str, Any]) -> Streams:
        return self.shape.call(self.core, inputs, conditioning)

    def recompute(self) -> None:
        recompute_parts(self.core)

    def compile_block(self) -> None:
        what = f"a unit's {type(self.core).__name__}"
        self.core.forward = Compiled(self.core.forward, what, self.core.parameters())


def depth_unit(teacher: Teacher, first: int, dtype: torch.dtype) -> DepthUnit:
    """A depth unit as it is before training, on the CPU: the teacher's block `first`."""
    block = teacher.blocks[first]
    return DepthUnit(block, teacher.filled(block.key).to(dtype).requires_grad_(True))


def recompute_parts(block: nn.Module) -> None:
    """Have every part of a block (attention, feed-forward) compute its activations again in the backward pass.

    What stays in between is what goes into the parts; of their insides, only one at a time is there.
    """
    for part in block.children():
        if next(part.parameters(), None) is not None:
            part.kept_forward = part.forward  # type: ignore[assignment]
            part.forward = MethodType(_recomputed, part)


def _recomputed(part: Any, *args: Any, **kwargs: Any) -> Any:
    """A part's forward. One function for all: torch.compile tells functions apart, not what they are bound to."""
    # Nothing in a unit is random, so there is no random state to bring back.
    return checkpoint(part.kept_forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class DepthKind(Kind):
    """One block for a span.

    Its streams are those that it is trained on; one that the teacher never reads afterwards is left out.
    """

    name = "depth"
    takes_blocks = True
    one_block = False

    def footprint(self, unit: UnitPlan) -> frozenset[Part]:
        first, last = unit.span
        parts = {*PARTS, *(f"{stream} ffn" for stream in unit.streams)}
        return frozenset((block, part) for block in range(first, last + 1) for part in parts)

    def boundary(self, unit: UnitPlan, blocks: int) -> tuple[Stream, ...]:
        return unit.streams

    def problem(self, unit: UnitPlan, teacher: Teacher) -> str:
        """A copy of its first block has to fit where the span stood."""
        last = teacher.blocks[unit.span[1]]
        if unit.span not in teacher.allowed_spans:
            return (
                f"span {list(unit.span)} is not possible; it must hold at least two blocks of one list of this "
                f"teacher's {len(teacher.blocks)}, and at the end of a list its first block must be shaped like its "
                "last"
            )
        if not unit.streams:
            return "streams is empty; name those that it is trained on"
        return "" if set(unit.streams) <= set(last.returns) else f"block {last.index} returns only {list(last.returns)}"

    def taps(self, unit: UnitPlan, anatomy: Anatomy) -> Wanted:
        return Wanted(frozenset(unit.span[:1]), frozenset(unit.span[1:]))

    def batch(self, unit: UnitPlan, capture: Capture, text_mask: Tensor | None, anatomy: Anatomy) -> UnitBatch:
        first, last = (anatomy.blocks[index] for index in unit.span)
        return UnitBatch(
            inputs=capture.streams[first.entering],
            conditioning=capture.conditioning[first.index],
            targets={stream: capture.streams[last.leaving][stream] for stream in unit.streams},
            text_mask=text_mask,
        )

    def build(self, unit: UnitPlan, teacher: Teacher, dtype: torch.dtype) -> Unit:
        return depth_unit(teacher, unit.span[0], dtype)

    def empty(self, unit: UnitPlan, teacher: Teacher, dtype: torch.dtype) -> Unit:
        block = teacher.blocks[unit.span[0]]
        return DepthUnit(block, copy.deepcopy(teacher.module(block)).to("meta", dtype))

    def plug(self, unit: UnitPlan, own: Any, model: nn.Module, anatomy: Anatomy, stack: ExitStack) -> None:
        """The first block runs the unit; streams pass through the others."""
        first = anatomy.blocks[unit.span[0]]
        module = anatomy.module(model, first)
        replace_forward(module, partial(_run, first, module, own), stack)
        stack.enter_context(anatomy.bypassed(model, unit.members))

    def saves(self, unit: UnitPlan, teacher: Teacher) -> int:
        return sum(teacher.blocks[block].parameters for block in unit.members)

    def export(self, unit: UnitPlan, own: Sources, anatomy: Anatomy, model: Export) -> None:
        """Its tensors stand in the model of the stock class already."""

    def shrink(self, unit: UnitPlan, module: Any, block: Block, streams: Streams) -> None:
        """It is shaped like its first block."""

    def label(self, unit: UnitPlan) -> str:
        return f"[{unit.span[0]},{unit.span[1]}]"

    def facts(self, unit: UnitPlan) -> tuple[str, str]:
        return f"blocks {unit.span[0]} to {unit.span[1]}", "one block"


def _run(block: Block, module: nn.Module, own: Any, *args: Any, **kwargs: Any) -> Any:
    streams, conditioning = block.split_call(module, args, kwargs)
    outputs = own(streams, conditioning)
    return block.write_output({s: outputs.get(s, streams[s]) for s in block.returns})  # nobody reads another stream
