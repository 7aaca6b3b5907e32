"""How far a unit's output is from the teacher's boundary.

Shapes: B batch, S tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def boundary_loss(student: Tensor, teacher: Tensor, mask: Tensor | None, magnitude_weight: float) -> Tensor:
    """Loss of one stream at one boundary, a float32 scalar.

    The mean over tokens of `|| s/|s| - t/|t| ||^2` (PPCL, arXiv 2511.16156), plus `magnitude_weight` times the mean of
    `(log |s| - log |t|)^2`, because direction alone lets token norms shrink.

    Args:
        student, teacher: (B, S, C), any float dtype; computed in float32.
        mask: (B, S) bool, True for tokens that count; None when all do.
    """
    student, teacher = student.float(), teacher.float()
    direction = (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1)  # (B, S)
    magnitude = (token_norm(student).log() - token_norm(teacher).log()).square()  # (B, S)
    return masked_mean(direction + magnitude_weight * magnitude, mask)


def norm_ratio(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens of `|s| / |t|`, a scalar; 1 where magnitudes are right."""
    return masked_mean(token_norm(student.float()) / token_norm(teacher.float()), mask)


def token_norm(tokens: Tensor) -> Tensor:
    """(B, S, C) -> (B, S) Euclidean norms, never zero so that logarithm and quotient are finite."""
    return torch.linalg.vector_norm(tokens, dim=-1).clamp_min(1e-6)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (B, S) values over the tokens that count."""
    if mask is None:
        return values.mean()
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp_min(1)
