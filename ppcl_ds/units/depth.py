"""Depth units: one block that takes the place of a span of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ppcl_ds.families.anatomy import Anatomy, Block, Streams
from ppcl_ds.families.files import ModelFiles


@dataclass(frozen=True)
class Parcel:
    """Everything a unit needs from one teacher forward.

    Attributes:
        inputs: streams entering the span, stream -> (B, S, C).
        conditioning: the other arguments of the span's first block.
        targets: streams leaving the span that the unit is trained on.
        text_mask: (B, S_txt) bool, or None when every text token counts.
    """

    inputs: Streams
    conditioning: dict[str, Any]
    targets: Streams
    text_mask: Tensor | None

    def mask_of(self, stream: str) -> Tensor | None:
        """The token mask of a stream (image tokens all count)."""
        return self.text_mask if stream == "text" else None


class DepthUnit(nn.Module):
    """One block of the teacher's own class, initialised from the first block of its span.

    It is called with the very arguments the teacher's block was called with.
    """

    def __init__(self, files: ModelFiles, first: int, dtype: torch.dtype) -> None:
        super().__init__()
        model = files.empty_model()
        anatomy = Anatomy(model)
        self.shape: Block = anatomy.blocks[first]
        self.block = anatomy.module(model, self.shape)
        prefix = f"{self.shape.key}."
        state = {k.removeprefix(prefix): files.tensor(k) for k in sorted(files.keys) if k.startswith(prefix)}
        self.block.load_state_dict(state, assign=True)
        self.block.to(dtype).requires_grad_(True)

    def train(self, mode: bool = True) -> DepthUnit:
        """Stay as in inference, as the teacher does: no dropout, so that nothing about training is left to chance."""
        return super().train(False)

    def forward(self, streams: Streams, conditioning: dict[str, Any]) -> Streams:
        """Streams entering the span -> streams leaving it."""
        return self.shape.call(self.block, streams, conditioning)


def recompute_parts(block: nn.Module) -> None:
    """Have every part of a block (attention, feed-forward) compute its activations again in the backward pass.

    What stays in between is what goes into the parts; of their insides, only one at a time is there.
    """
    for part in block.children():
        if next(part.parameters(), None) is not None:
            # Nothing in a unit is random, so there is no random state to bring back.
            recomputed = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
            part.forward = recomputed
