"""Linear probes: what each block does to a stream, as the best affine map, from second moments.

Shapes: N tokens, C channels of x, D of y. Everything is float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Sums over the same N tokens of two places, x and y.

    Attributes:
        xx: x^T x, (C, C).
        xy: x^T y, (C, D).
        x: sum of x, (C,).
        y: sum of y, (D,).
        tokens: N, a number or ().
    """

    xx: Tensor
    xy: Tensor
    x: Tensor
    y: Tensor
    tokens: Any


class Affine(NamedTuple):
    """The map `h -> h @ weight + bias`: weight (C, D), bias (D,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        return tokens.to(self.weight) @ self.weight + self.bias

    def then(self, other: Affine) -> Affine:
        """This map, and `other` after it."""
        return Affine(self.weight @ other.weight, self.bias @ other.weight + other.bias)


def centred(product: Tensor, x: Tensor, y: Tensor, count: float | Tensor) -> Tensor:
    """(C, D) sums of products of deviations from the mean, from sums of products; up to rounding, free of the means."""
    return product - torch.outer(x, y / count)


def fit_linear(sums: Moments, ridge: float) -> Affine:
    """The least-squares solution of `y ~ x W + b`, by the normal equations.

    The constant is not penalised, so it is solved for by centring, which is also what keeps large means from spoiling
    the equations.

    Args:
        ridge: penalty on W, relative to the mean diagonal of x^T x; keeps the solution finite when tokens are fewer
            than channels.
    """
    covariance = centred(sums.xx, sums.x, sums.x, sums.tokens)
    covariance.diagonal().add_(ridge * sums.xx.diagonal().mean())
    right = centred(sums.xy, sums.x, sums.y, sums.tokens)
    weight = torch.linalg.solve(covariance, right)
    return Affine(weight, (sums.y - sums.x @ weight) / sums.tokens)


def fit_probe(sums: Moments, ridge: float) -> Affine:
    """The residual linear probe of a block, `y - x ~ x W + b` (PPCL, arXiv 2511.16156), as a map from x to y.

    Args:
        sums: x enters the block, y leaves it.
        ridge: see `fit_linear`.
    """
    change = fit_linear(sums._replace(xy=sums.xy - sums.xx, y=sums.y - sums.x), ridge)
    weight = change.weight.clone()
    weight.diagonal().add_(1)
    return Affine(weight, change.bias)
