"""What every unit is: a small trainable module that reads teacher activations and is judged by teacher activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ppcl_ds.teacher.anatomy import Streams


@dataclass(frozen=True)
class Parcel:
    """Everything a unit needs from one teacher forward.

    Attributes:
        inputs: what the unit reads, name -> (B, S, C); of a depth unit, the streams entering its span.
        conditioning: of a depth unit, the other arguments of the span's first block.
        targets: what the unit's outputs should be, name -> (B, S, C).
        text_mask: (B, S_txt) bool, or None when every text token counts.
    """

    inputs: Streams
    conditioning: dict[str, Any]
    targets: Streams
    text_mask: Tensor | None

    def mask_of(self, name: str) -> Tensor | None:
        """The token mask of an input or output (image tokens all count)."""
        return None if name == "image" else self.text_mask


class Unit(nn.Module):
    """Base of all units.

    Attributes:
        core: holds everything that is trained; its parameter names are those of checkpoints.
    """

    core: nn.Module

    def train(self, mode: bool = True) -> Unit:
        """Stay as in inference, as the teacher does: no dropout, so that nothing about training is left to chance."""
        return super().train(False)

    def settle(self) -> None:
        """Let go of what is only needed before training."""

    def forward(self, inputs: Streams, conditioning: dict[str, Any]) -> Streams:
        """A parcel's inputs -> an output for each of its targets."""
        raise NotImplementedError
