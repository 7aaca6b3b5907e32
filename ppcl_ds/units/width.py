"""Width units: smaller parts for blocks that stay.

Shapes: B batch, S tokens, C channels, H hidden channels of a feed-forward, N tokens that count.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppcl_ds.teacher.anatomy import Streams
from ppcl_ds.teacher.modeling_pruned import ResidualLinear, narrow_ffn
from ppcl_ds.units.unit import Unit


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
        """Output -> what computes it."""
        return dict(self.core.named_children())

    def compute(self, output: str, x: Tensor) -> Tensor:
        """One output, (B, S, C), from the input that it is computed from."""
        return self.parts[output](x)

    def regressions(self, inputs: Streams, targets: Streams) -> Iterator[Regression]:
        """The least-squares problems of a micro-batch, the same ones in the same order every time."""
        raise NotImplementedError


class TextUnit(WidthUnit):
    """The text stream of a group of blocks as linears.

    Args:
        outputs: what it computes: the text as each block's attention reads it, from that of the group's first block
            (input `modulated`), and under `text` the stream behind the group, from the stream behind its first block.
        channels: C.
    """

    def __init__(self, outputs: Sequence[str], channels: int, dtype: torch.dtype) -> None:
        super().__init__({name: ResidualLinear(channels, dtype=dtype) for name in outputs})

    def forward(self, inputs: Streams, conditioning: dict[str, Any]) -> Streams:
        """Modulated text and text stream of the first block -> all outputs."""
        return {name: self.compute(name, inputs[_input_of(name)]) for name in self.parts}

    def regressions(self, inputs: Streams, targets: Streams) -> Iterator[Regression]:
        """Each linear's own change."""
        for name, linear in self.parts.items():
            x = inputs[_input_of(name)]
            yield Regression(name, x, targets[name].float() - x.float(), linear)


def _input_of(output: str) -> str:
    return output if output == "text" else "modulated"


class FFNUnit(WidthUnit):
    """Feed-forward parts of one block: each a linear, or with fewer hidden channels.

    Which hidden channels stay is decided by `choose`, before training; until then they are the first ones.

    Args:
        parts: the teacher's own feed-forward of each stream; it is kept until channels have been chosen.
        keep: share of the hidden channels that stay; 0: one linear takes the place of all.

    Raises:
        ValueError: the family's feed-forward cannot be narrowed.
    """

    def __init__(self, parts: Mapping[str, Any], keep: float, dtype: torch.dtype) -> None:
        hidden = {stream: hidden_channels(part, keep) for stream, part in parts.items()}
        super().__init__({s: narrow_ffn(copy.deepcopy(part), hidden[s]).to(dtype) for s, part in parts.items()})
        self.whole: dict[str, Any] = {stream: part.float() for stream, part in parts.items() if hidden[stream]}
        """Of what is narrowed: the teacher's own feed-forward, until channels have been chosen. Not trained."""
        for stream in self.whole:
            self.choose(stream, torch.arange(hidden[stream]))

    def forward(self, inputs: Streams, conditioning: dict[str, Any]) -> Streams:
        """What the feed-forwards read -> what they return."""
        return {stream: self.compute(stream, inputs[stream]) for stream in self.parts}

    def settle(self) -> None:
        """Let go of the teacher's feed-forwards."""
        self.whole = {}

    @torch.no_grad()
    def importance(self, stream: str, tokens: Tensor) -> Tensor:
        """How much each hidden channel contributes, summed over tokens: (H,) float64.

        The square of its activation times the squared norm of the weights that read it: what the output loses, in the
        square, where a channel goes and no other makes up for it (compare Wanda, arXiv 2306.11695, eq. 1).

        Args:
            tokens: (N, C) that the feed-forward reads.
        """
        whole = self.whole[stream].to(tokens.device)
        activation = whole.net[0](tokens.float()).double()  # (N, H)
        found = activation.square().sum(0) * whole.net[2].weight.double().square().sum(0)
        whole.cpu()  # at most one of them takes room on an accelerator
        return found

    @torch.no_grad()
    def choose(self, stream: str, channels: Tensor) -> None:
        """Keep these hidden channels, with the teacher's weights.

        Args:
            channels: numbers of as many as stay, ascending.
        """
        whole, own = self.whole[stream], self.parts[stream]
        rows = channels.to(whole.net[2].weight.device)
        own.net[0].proj.weight.copy_(whole.net[0].proj.weight[rows])
        own.net[2].weight.copy_(whole.net[2].weight[:, rows])
        for mine, theirs, part in ((own.net[0].proj, whole.net[0].proj, rows), (own.net[2], whole.net[2], slice(None))):
            if mine.bias is not None:
                mine.bias.copy_(theirs.bias[part])

    def regressions(self, inputs: Streams, targets: Streams) -> Iterator[Regression]:
        """Of a linear, itself; of a narrowed feed-forward, the linear that reads its hidden channels."""
        for stream, part in self.parts.items():
            if isinstance(part, nn.Linear):
                yield Regression(stream, inputs[stream], targets[stream], part)
            else:
                yield Regression(stream, part.net[0](inputs[stream]), targets[stream], part.net[2])


def hidden_channels(ffn: Any, keep: float) -> int:
    """How many hidden channels of a feed-forward stay; at least one, unless the share is zero."""
    return max(1, round(keep * ffn.net[2].in_features)) if keep else 0
