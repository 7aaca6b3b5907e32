"""How far a unit's output is from the teacher's boundary.

Shapes: B batch, S tokens, C channels, N tokens that count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST = 1e-6
"""Token norms below this count as this: the gradient of a vanishing token stays bounded."""


def boundary_loss(student: Tensor, teacher: Tensor, mask: Tensor | None, magnitude_weight: float) -> Tensor:
    """Loss of one stream at one boundary, a float32 scalar.

    The mean over tokens of `|| s/|s| - t/|t| ||^2` (PPCL, arXiv 2511.16156), plus `magnitude_weight` times the mean of
    `(log |s| - log |t|)^2`, because direction alone lets token norms shrink.

    Args:
        student, teacher: (B, S, C), any float dtype; computed in float32.
        mask: (B, S) bool, True for tokens that count; None when all do.
    """
    student, teacher = counted(student, mask), counted(teacher, mask)
    direction = (_direction(student) - _direction(teacher)).square().sum(-1)  # (N,)
    magnitude = (_norm(student).log() - _norm(teacher).log()).square()  # (N,)
    return (direction + magnitude_weight * magnitude).mean()


def norm_ratio(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens of `|s| / |t|`, a scalar; 1 where magnitudes are right."""
    return (_norm(counted(student, mask)) / _norm(counted(teacher, mask))).mean()


def counted(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """(B, S, C) -> (N, C) float32: the tokens that count.

    Padding is left out, not multiplied by zero: whatever stands there, even NaN, reaches neither loss nor gradients.
    """
    return (tokens.flatten(0, 1) if mask is None else tokens[mask]).float()


def _direction(tokens: Tensor) -> Tensor:
    return F.normalize(tokens, dim=-1, eps=_SMALLEST)


def _norm(tokens: Tensor) -> Tensor:
    """(N, C) -> (N,) Euclidean norms, never zero so that logarithm and quotient are finite."""
    return torch.linalg.vector_norm(tokens, dim=-1).clamp_min(_SMALLEST)
