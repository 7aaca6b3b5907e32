"""What a tiny teacher is, and the tensors that many of their forward calls take.

B = 2, five text tokens of 16 channels of which the second caption has three, two noise levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TinyTeacher:
    """A transformer of a few narrow blocks, and one call of its forward."""

    class_name: str
    """The class in diffusers."""
    config: dict[str, Any]
    inputs: dict[str, Any]
    """Arguments of its forward."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal noise of this shape, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def ones(*shape: int) -> Tensor:
    """An integer mask that hides nothing."""
    return torch.ones(shape, dtype=torch.long)


def grid(*sizes: int) -> Tensor:
    """Coordinates (S, axes) of every token of a grid, row by row."""
    return torch.cartesian_prod(*(torch.arange(float(size)) for size in sizes))


TIMES = torch.tensor([200.0, 700.0])
STEPS = TIMES.long()
SHARES = TIMES / 1000
TEXT = noise(2, 5, 16)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
IMAGE_IDS, TEXT_IDS = grid(1, 4, 4), torch.zeros(5, 3)
IMAGE_IDS_4 = torch.cat([grid(1, 4, 4), torch.zeros(16, 1)], 1)
TEXT_IDS_4 = torch.cat([torch.zeros(5, 3), torch.arange(5.0)[:, None]], 1)

PACKED: dict[str, Any] = {"hidden_states": noise(2, 16, 4), "encoder_hidden_states": TEXT}
LATENTS: dict[str, Any] = {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": TEXT}
CLIP: dict[str, Any] = {"hidden_states": noise(2, 4, 2, 4, 4), "encoder_hidden_states": TEXT}
