"""Linear probes: what each block does to a stream, as the best affine map, from second moments.

Shapes: N tokens, C channels. Everything is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Sums over the same N tokens of two places, x and y.

    Attributes:
        xx: x^T x, (C, C).
        xy: x^T y, (C, C).
        x: sum of x, (C,).
        y: sum of y, (C,).
        tokens: N.
    """

    xx: Tensor
    xy: Tensor
    x: Tensor
    y: Tensor
    tokens: float


class Affine(NamedTuple):
    """The map `h -> h @ weight + bias`: weight (C, C), bias (C,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return tokens.to(self.weight) @ self.weight + self.bias

    def then(self, other: Affine) -> Affine:
        """This map, and `other` behind it."""
        return Affine(self.weight @ other.weight, self.bias @ other.weight + other.bias)


def centred(product: Tensor, x: Tensor, y: Tensor, count: float) -> Tensor:
    """(C, C) sums of products of deviations from the mean, from sums of products; up to rounding, free of the means."""
    return product - torch.outer(x, y / count)


def fit_probe(sums: Moments, ridge: float) -> Affine:
    """The residual linear probe of a block, `y - x ~ x W + b` (PPCL, arXiv 2511.16156), as a map from x to y.

    The least-squares solution by the normal equations. The constant is not penalised, so it is solved for by centring,
    which is also what keeps large means from spoiling the equations.

    Args:
        sums: x enters the block, y leaves it.
        ridge: relative to the mean diagonal of x^T x; keeps the solution finite when tokens are fewer than channels.
    """
    covariance = centred(sums.xx, sums.x, sums.x, sums.tokens)
    change = centred(sums.xy, sums.x, sums.y, sums.tokens) - covariance
    penalty = ridge * sums.xx.diagonal().mean()
    weight = torch.linalg.solve(covariance + penalty * torch.eye(len(covariance)).to(covariance), change)
    weight.diagonal().add_(1)
    return Affine(weight, (sums.y - sums.x @ weight) / sums.tokens)
