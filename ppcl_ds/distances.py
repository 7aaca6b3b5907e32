"""How far two sets of points are apart: Fréchet, KID's and CMMD's distance. Points are float64, (N, D)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SIGMA, _SCALE = 10.0, 1000.0
"""CMMD's own: the kernel's width, and what its distance is multiplied by."""
_ROWS = 2048
"""Of a kernel matrix that are in memory at a time."""


def frechet_distance(mean_a: Array, covariance_a: Array, mean_b: Array, covariance_b: Array) -> float:
    """Frechet distance of two Gaussians, means (D,) and covariances (D, D).

    `|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))`. The trace of the root is taken from the symmetric
    `A^(1/2) B A^(1/2)`, which has the same eigenvalues as `A B` and stays real for singular covariances.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ covariance_b @ root)
    shift = mean_a - mean_b
    distance = shift @ shift + np.trace(covariance_a + covariance_b) - 2.0 * np.sqrt(cross.clip(min=0.0)).sum()
    return float(max(distance, 0.0))


def frechet(a: Array, b: Array) -> float:
    """FID's distance of two sets of features (arXiv 1706.08500): of the Gaussians with their moments."""
    return frechet_distance(a.mean(axis=0), np.cov(a, rowvar=False), b.mean(axis=0), np.cov(b, rowvar=False))


def kernel_distance(a: Array, b: Array) -> float:
    """KID's distance (arXiv 1801.01401): the unbiased squared MMD under the kernel (x y / D + 1)^3; may be below 0."""

    def total(x: Array, y: Array) -> float:
        rows = range(0, len(x), _ROWS)
        return float(sum(((x[i : i + _ROWS] @ y.T / x.shape[1] + 1) ** 3).sum() for i in rows))

    def own(x: Array) -> float:
        alone = float((((x * x).sum(axis=1) / x.shape[1] + 1) ** 3).sum())
        return (total(x, x) - alone) / (len(x) * (len(x) - 1))

    return own(a) + own(b) - 2 * total(a, b) / (len(a) * len(b))


def cmmd(a: Array, b: Array) -> float:
    """CMMD's distance (arXiv 2401.09603) of CLIP embeddings: 1000 times the squared MMD, under a Gaussian kernel."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))

    def mean(x: Array, y: Array) -> float:
        total = 0.0
        for i in range(0, len(x), _ROWS):
            total += float(np.exp(-(2 - 2 * x[i : i + _ROWS] @ y.T) / (2 * _SIGMA**2)).sum())
        return total / (len(x) * len(y))

    return _SCALE * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
