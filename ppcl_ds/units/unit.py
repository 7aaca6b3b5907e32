"""What every unit is: a small trainable module that reads teacher activations and is judged by teacher activations.

Shapes: B batch, S tokens, C channels, H hidden channels of a feed-forward, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ppcl_ds.teacher.anatomy import Streams


@dataclass(frozen=True)
class UnitBatch:
    """Everything a unit needs from one teacher forward.

    Attributes:
        inputs: what the unit reads, name -> (B, S, C); of a depth unit, the streams entering its span.
        conditioning: of a depth unit, the other arguments of the span's first block.
        targets: what the unit's outputs should be, name -> (B, S, C).
        text_mask: (B, S_txt) bool, or None when every text token counts.
        weights: (B,) float32, of the samples; None: all 1.
        twins: (B,) int64, see `NoisyBatch`; None where nobody asks.
    """

    inputs: Streams
    conditioning: dict[str, Any]
    targets: Streams
    text_mask: Tensor | None
    weights: Tensor | None = None
    twins: Tensor | None = None

    def mask_of(self, name: str) -> Tensor | None:
        """The token mask of an input or output; the tokens of all but the text count."""
        return self.text_mask if name.startswith(("text", "modulated")) else None


class Unit(nn.Module):
    """Base of all units.

    Attributes:
        core: holds everything that is trained; its parameter names are those of checkpoints.
    """

    core: nn.Module

    def train(self, mode: bool = True) -> Unit:
        """Stay as in inference, as the teacher does: no dropout, so that nothing about training is left to chance."""
        return super().train(False)

    def free_calibration(self) -> None:
        """Free what only calibration needs."""

    def recompute(self) -> None:
        """Compute activations again in the backward pass, where that saves memory."""

    def compile_block(self) -> None:
        """Run under torch.compile what a unit has of a block; after `recompute`."""

    def forward(self, inputs: Streams, conditioning: dict[str, Any]) -> Streams:
        raise NotImplementedError


class Regression(NamedTuple):
    """What least squares can say of one linear of a unit: `linear(x)` should be `y`.

    Attributes:
        name: of the output.
        x: (B, S, C_in).
        y: (B, S, C_out).
        linear: the stock linear; what it adds to its input, if it is a residual one, has been taken off `y`.
    """

    name: str
    x: Tensor
    y: Tensor
    linear: nn.Linear


class WidthUnit(Unit):
    """A unit made of linears, which least squares starts off before they are trained.

    Each output is computed from one input.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.core = nn.ModuleDict(parts)

    @property
    def parts(self) -> dict[str, Any]:
        return dict(self.core.named_children())

    def compute(self, output: str, x: Tensor) -> Tensor:
        """One output, (B, S, C), from the input that it is computed from."""
        return self.parts[output](x)

    @property
    def undecided(self) -> Mapping[str, int]:
        """Outputs whose hidden channels are chosen before anything is solved -> how many of them stay."""
        return {}

    def importance(self, output: str, tokens: Tensor) -> Tensor:
        """How much each hidden channel contributes, summed over tokens (N, C): (H,) float64."""
        raise NotImplementedError

    def choose(self, output: str, channels: Tensor) -> None:
        """Keep these hidden channels, ascending, with the teacher's weights."""
        raise NotImplementedError

    def regressions(self, inputs: Streams, targets: Streams) -> Iterator[Regression]:
        """The least-squares problems of a micro-batch, the same ones in the same order every time; none by default."""
        return iter(())


def count_parameters(module: nn.Module) -> int:
    """Elements of all its parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
