"""Noise levels and noisy latents, drawn as diffusers' flow-matching training scripts draw them.

Shapes: B batch, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from ppcl_ds.sections import Noise

_DIFFUSERS_NAME = {"logit_normal": "logit_normal", "uniform": "none"}


def draw_sigmas(noise: Noise, batch: int, generator: torch.Generator) -> Tensor:
    """Draw noise levels as the recipe says: density, share of uniform ones, time shift.

    Args:
        noise: the recipe's `noise` section.
        batch: how many levels.
        generator: CPU generator; how much is drawn from it depends on `batch` alone.

    Returns:
        (B,) float32 in (0, 1]: one of the thousand levels that diffusers' scheduler knows.
    """
    places = compute_density_for_timestep_sampling(
        _DIFFUSERS_NAME[noise.density], batch, logit_mean=0.0, logit_std=1.0, generator=generator
    )
    uniform = torch.rand(batch, generator=generator)
    chosen = torch.rand(batch, generator=generator) < noise.uniform_share
    table = _sigma_table(noise.shift)
    return table[(torch.where(chosen, uniform, places) * len(table)).long()]


def sigma_quantiles(noise: Noise, shares: Sequence[float]) -> Tensor:
    """The noise levels below which these shares of `draw_sigmas`'s lie; (S,), as good as 2^16 draws tell."""
    drawn = draw_sigmas(noise, 2**16, torch.Generator().manual_seed(0))
    return drawn.quantile(torch.tensor(shares), interpolation="nearest")


def add_noise(latents: Tensor, sigmas: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mix `latents` with fresh noise.

    Args:
        latents: (B, C, H, W), clean.
        sigmas: (B,) in [0, 1]; 0 leaves the latents clean, 1 leaves noise alone.
        generator: CPU generator; the draw does not depend on the device or dtype of `latents`.

    Returns:
        The noisy latents `(1 - sigma) * latents + sigma * noise` and the velocity `noise - latents`, both (B, C, H, W).
    """
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    clean, level = latents.float(), sigmas.to(latents.device).view(-1, 1, 1, 1)
    return torch.lerp(clean, noise, level).to(latents.dtype), (noise - clean).to(latents.dtype)


@lru_cache
def _sigma_table(shift: float) -> Tensor:
    """The scheduler's (1000,) noise levels from 1 downwards, after the time shift."""
    return FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.float()
