"""How far a unit's output is from the teacher's boundary.

Shapes: B batch, S tokens, C channels, N tokens that count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST = 1e-6
"""Token norms below this count as this: the gradient of a vanishing token stays bounded."""


def boundary_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None, magnitude_weight: float, weights: Tensor | None = None
) -> Tensor:
    """Loss of one stream at one boundary, a float32 scalar.

    The mean over tokens of `|| s/|s| - t/|t| ||^2` (PPCL, arXiv 2511.16156), plus `magnitude_weight` times the mean of
    `(log |s| - log |t|)^2`, because direction alone lets token norms shrink.

    Args:
        student, teacher: (B, S, C), any float dtype; computed in float32.
        mask: (B, S) bool, True for tokens that count; None when all do.
        weights: (B,) float32, by which what is found of each sample is multiplied; None: all 1.
    """
    student, teacher = _without_padding(student, mask), _without_padding(teacher, mask)
    direction = (_direction(student) - _direction(teacher)).square().sum(-1)  # (B, S)
    magnitude = (_norm(student).log() - _norm(teacher).log()).square()  # (B, S)
    return _mean(_weighted(direction + magnitude_weight * magnitude, weights), mask)


def branch_loss(student: Tensor, teacher: Tensor, twins: Tensor) -> Tensor:
    """Error of what the prompt changes at one boundary, relative to what it changes in the teacher, (), float32.

    Over the samples p that have a twin q, the same one with a prompt: the sum of `|| (s_q - s_p) - (t_q - t_p) ||^2`
    over the sum of `|| t_q - t_p ||^2`. 1 where the student does not hear the prompt; 0 where no sample has a twin.

    Args:
        student, teacher: (B, S, C) of a stream all of whose tokens count, any float dtype; computed in float32.
        twins: (B,) int64, see `NoisyBatch`; on the same device.
    """
    true, own = (tokens.float().reshape(len(twins), -1) for tokens in (teacher, student))
    changes = true[twins] - true  # (B, S C); zero where a sample has no twin
    error = (own[twins] - own - changes).square().sum()
    return error / changes.square().sum().clamp_min(_SMALLEST)


def norm_ratio(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens of `|s| / |t|`, a scalar; 1 where magnitudes are right."""
    return _mean(_norm(_without_padding(student, mask)) / _norm(_without_padding(teacher, mask)), mask)


def counted(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """(B, S, C) -> (N, C) float32: the tokens that count. With a mask, the host waits to learn how many."""
    return (tokens.flatten(0, 1) if mask is None else tokens[mask]).float()


def _without_padding(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """(B, S, C) in float32, padding filled with ones.

    It is replaced, not multiplied by zero: whatever stands there, even NaN, reaches neither loss nor gradients. It is
    not cut out either: the host would have to wait for the device, to learn how much is left.
    """
    return tokens.float() if mask is None else torch.where(mask[..., None], tokens.float(), 1.0)


def _weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """(B, S), or the tokens of all samples one after the other as (1, B S): each times its sample's weight."""
    return values if weights is None else (values.reshape(len(weights), -1) * weights[:, None]).view_as(values)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, S) -> the mean over tokens that count."""
    return values.mean() if mask is None else torch.where(mask, values, 0.0).sum() / mask.sum()


def _direction(tokens: Tensor) -> Tensor:
    return F.normalize(tokens, dim=-1, eps=_SMALLEST)


def _norm(tokens: Tensor) -> Tensor:
    """(B, S, C) -> (B, S) Euclidean norms, never zero so that logarithm and quotient are finite."""
    return torch.linalg.vector_norm(tokens, dim=-1).clamp_min(_SMALLEST)
