"""A ControlNet of the teacher on a variant: each residual reaches what became of the block that it was made for.

diffusers spreads the residuals of a ControlNet over a transformer's blocks by their numbers alone, so in a shorter one
they land elsewhere, without a word. Here they are spread over the teacher's blocks, and a block of the variant is given
the sum of what the blocks that it stands for would get.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_ARGUMENTS = {
    "controlnet_block_samples": 0,
    "controlnet_single_block_samples": 1,
    "block_controlnet_hidden_states": 0,
}
"""Argument of a transformer's forward that holds residuals -> number of its list of blocks, in execution order."""

Spans = Sequence[Sequence[tuple[int, int]]]
"""List of blocks -> for each block of the variant, the first and the last of the teacher's blocks it stands for."""


def spread_residuals(transformer: nn.Module, spans: Spans) -> RemovableHandle:
    """Let a variant's transformer take the residuals that a ControlNet made for the teacher; stays until removed.

    Args:
        transformer: of diffusers' FLUX.1, Qwen-Image or SD3, or another that takes residuals under the same names.
        spans: as `variant.json` has them.
    """

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        changed = {
            key: _spread(kwargs[key], spans[place], _place_of(key, bool(kwargs.get("controlnet_blocks_repeat"))))
            for key, place in _ARGUMENTS.items()
            if kwargs.get(key) is not None and len(kwargs[key]) and place < len(spans)
        }
        return args, kwargs | changed

    return transformer.register_forward_pre_hook(hook, with_kwargs=True)


def _place_of(key: str, repeat: bool) -> Any:
    """Which residual a block is given, as the transformers of diffusers choose: of block, blocks, residuals."""
    if key == "block_controlnet_hidden_states":
        return lambda block, blocks, count: int(block / (blocks / count))
    if repeat and key == "controlnet_block_samples":
        return lambda block, blocks, count: block % count
    return lambda block, blocks, count: block // math.ceil(blocks / count)


def _spread(residuals: Sequence[Tensor], spans: Sequence[tuple[int, int]], place: Any) -> list[Tensor]:
    blocks, count = spans[-1][1] + 1, len(residuals)
    sums = []
    for first, last in spans:
        total = residuals[place(first, blocks, count)]
        for block in range(first + 1, last + 1):
            total = total + residuals[place(block, blocks, count)]
        sums.append(total)
    return sums
