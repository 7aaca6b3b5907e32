"""The emoji pipeline's VAE, which is not trained: a cosine transform.

This file also travels in pipeline folders, see `pipeline`: it imports torch and diffusers only.
Shapes: B batch, H and W height and width of latents.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor


class CosineVae(ModelMixin, ConfigMixin):
    """Squares of 4 x 4 RGB pixels as 16 of their 48 cosine coefficients, as JPEG keeps them: the rest is hardly seen.

    The transform runs over colours, rows and columns; kept are frequencies u + v < 4 of what is common to the colours
    and u + v < 2 of each of their two differences. Natural images have coefficients about inverse to their frequency,
    so each is multiplied by (1 + u + v) / 2. Sums are in float32.
    """

    home = "ppcl_ds.demo.cosines"
    """Where its code lies, in a folder's index."""
    side = 4
    """Pixels of a square's side."""

    @register_to_config
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(1))  # says on which device it is, and in which dtype
        colours, places = _cosines(3), _cosines(self.side)
        kept = [
            (colour, u, v)
            for colour in range(3)
            for u, v in product(range(self.side), repeat=2)
            if u + v < (4 if colour == 0 else 2)
        ]
        self._basis = torch.stack([torch.einsum("c,y,x->cyx", colours[k], places[u], places[v]) for k, u, v in kept])
        self._scale = torch.tensor([(1 + u + v) / 2 for _, u, v in kept]).view(-1, 1, 1, 1)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Images (B, 3, 4 H, 4 W) in [-1, 1] -> a distribution that is a point, (B, 16, H, W)."""
        z = F.conv2d(x.float(), (self._basis * self._scale).to(x.device), stride=self.side).to(x.dtype)
        posterior = DiagonalGaussianDistribution(torch.cat([z, torch.full_like(z, -30)], dim=1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """(B, 16, H, W) -> images (B, 3, 4 H, 4 W), clamped to [-1, 1]."""
        x = F.conv_transpose2d(z.float(), (self._basis / self._scale).to(z.device), stride=self.side)
        image = x.clamp(-1, 1).to(z.dtype)
        return DecoderOutput(sample=image) if return_dict else (image,)


def _cosines(count: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of so many values, a row each frequency, (count, count)."""
    place = torch.arange(count, dtype=torch.float64)
    rows = torch.cos(math.pi * (place[None] + 0.5) * place[:, None] / count) * math.sqrt(2 / count)
    rows[0] /= math.sqrt(2)
    return rows.float()
