"""Depth units: one block that takes the place of a span of blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppcl_ds.teacher.anatomy import Block, Streams
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.unit import Unit


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
        """Streams entering the span -> streams leaving it."""
        return self.shape.call(self.core, inputs, conditioning)


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
            # Nothing in a unit is random, so there is no random state to bring back.
            recomputed = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
            part.forward = recomputed
