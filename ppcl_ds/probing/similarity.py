"""Linear centred kernel alignment: from covariances over all tokens, and unbiased over minibatches of tokens.

Shapes: N tokens, C channels, K minibatches of at most S tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FEWEST = 4
"""The unbiased estimator needs so many tokens in a minibatch."""


def linear_cka(x: Tensor, cross: Tensor, y: Tensor) -> float:
    """Linear CKA of X and Y (N, C), centred, in feature space (Kornblith et al., arXiv 1905.00414, eq. 3).

    Biased upwards, by about C / N; here N is all tokens.

    Args:
        x: X^T X, (C, C).
        cross: X^T Y.
        y: Y^T Y.
    """
    return float(cross.square().sum() / (x.norm() * y.norm()))


def unbiased_hsic(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """The unbiased estimator HSIC_1 of each minibatch (Song et al. 2012, JMLR 13, eq. 5), (K,).

    Args:
        left, right: (K, S, S) Gram matrices; rows and columns from `counts` on are zero.
        counts: (K,) tokens of each minibatch, at least `FEWEST`.
    """
    left, right = (gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)) for gram in (left, right))
    n = counts.to(left)
    rows_left, rows_right = left.sum(-1), right.sum(-1)  # (K, S)
    trace = (left * right).sum((-2, -1))
    sums = rows_left.sum(-1) * rows_right.sum(-1) / ((n - 1) * (n - 2))
    mixed = (rows_left * rows_right).sum(-1) * 2 / (n - 2)
    return (trace + sums - mixed) / (n * (n - 3))


class Minibatches:
    """Tokens in minibatches, for minibatch CKA (Nguyen et al., arXiv 2010.15327, eq. 3).

    Args:
        tokens: (K, S, C); what stands after a minibatch's count does not matter.
        counts: (K,); minibatches of fewer than `FEWEST` tokens are left out.
    """

    def __init__(self, tokens: Tensor, counts: Tensor) -> None:
        self.use = counts >= FEWEST
        self.counts = counts[self.use]
        there = torch.arange(tokens.shape[1], device=counts.device) < self.counts[:, None]
        tokens = torch.where(there[..., None], tokens[self.use].double(), 0.0)
        # HSIC_1 does not depend on the means; without them there is less to round.
        means = tokens.sum(1, keepdim=True) / self.counts[:, None, None]
        tokens = (tokens - means) * there[..., None]
        self.gram = tokens @ tokens.mT  # (K, S, S)

    def cka(self, other: Minibatches) -> float:
        """Sums of HSIC_1 over minibatches of the same tokens, then their quotient; NaN where it is not defined."""
        both, own, its = (
            float(unbiased_hsic(a.gram, b.gram, self.counts).sum())
            for a, b in ((self, other), (self, self), (other, other))
        )
        return both / math.sqrt(own * its) if own > 0 and its > 0 else math.nan
