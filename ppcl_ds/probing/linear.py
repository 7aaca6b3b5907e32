"""Linear probes: what each block does to a stream, as the best linear map, from streamed sums.

The sums are all that is kept, so memory does not grow with the number of tokens and the sums of many workers add up.
Shapes: N tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NormalEquations:
    """Sums of `x^T x` and `x^T y` with `x = [h_in, 1]` and `y = h_out - h_in`, in float64.

    Attributes:
        gram: (C + 1, C + 1).
        cross: (C + 1, C).
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.gram = torch.zeros(channels + 1, channels + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(channels + 1, channels, dtype=torch.float64, device=device)

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add tokens: what entered a block and what left it, (N, C) each."""
        x = _with_one(before)
        self.gram += x.T @ x
        self.cross += x.T @ (after.double() - before.double())

    def solve(self, ridge: float) -> Tensor:
        """The probe as one affine map of `[h, 1]`, (C + 1, C): `h_out ~ h_in + [h_in, 1] @ map`.

        Args:
            ridge: relative to the mean diagonal of the Gram matrix; keeps the solution finite when there are fewer
                tokens than channels. The constant is not penalised.
        """
        penalty = torch.full((len(self.gram),), ridge * float(self.gram.diagonal()[:-1].mean()))
        penalty[-1] = 0
        return torch.linalg.solve(self.gram + penalty.to(self.gram).diag(), self.cross)


def apply_probe(probe: Tensor, tokens: Tensor) -> Tensor:
    """One step of the chain: (N, C) -> (N, C), float64."""
    return tokens.double() + _with_one(tokens) @ probe


def _with_one(tokens: Tensor) -> Tensor:
    tokens = tokens.double()
    return torch.cat([tokens, tokens.new_ones(len(tokens), 1)], dim=1)


def linear_cka(x_gram: Tensor, cross: Tensor, y_gram: Tensor) -> float:
    """Linear centred kernel alignment of X and Y, in feature space (Kornblith et al., arXiv 1905.00414, eq. 3).

    Args:
        x_gram: X^T X, (C, C), of centred X (N, C).
        cross: X^T Y.
        y_gram: Y^T Y.
    """
    return float(cross.square().sum() / (x_gram.norm() * y_gram.norm()))
