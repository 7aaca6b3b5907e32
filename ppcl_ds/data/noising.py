"""Micro-batches as the teacher reads them: noise levels and noise, drawn as diffusers' flow-matching scripts draw them.

Shapes: B batch, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from ppcl_ds.data.batch import Batch, Prompts
from ppcl_ds.data.stream import MicroBatchStream, empty_prompt
from ppcl_ds.recipe import Recipe
from ppcl_ds.sections import Noise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

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


@dataclass(frozen=True)
class NoisyBatch:
    """A micro-batch as the teacher reads it.

    Attributes:
        latents: (B, C, H, W), noisy.
        prompts: B captions, some of them replaced by the empty one.
        sigmas: (B,) float32 noise levels in (0, 1]; families round them themselves, if at all.
        velocity: (B, C, H, W) float32, `noise - data`: what flow matching asks for.
    """

    latents: Tensor
    prompts: Prompts
    sigmas: Tensor
    velocity: Tensor


class NoisyStream:
    """Endless numbered micro-batches with noise; number j is the same whoever reads it.

    Everything random about micro-batch j (noise, noise levels, dropped captions) is drawn from a generator seeded by
    (seed, j), so neither the number of ranks nor a restart changes it, and no random state needs saving.

    Args:
        split: `train` in shuffled order, `heldout` in stored order.
        micro_batch: samples in a micro-batch.
        lanes: micro-batches in an optimizer step; the recipe's distillation by default.
    """

    def __init__(
        self,
        recipe: Recipe,
        split: Literal["train", "heldout"],
        micro_batch: int,
        device: torch.device,
        lanes: int | None = None,
    ) -> None:
        self.noise: Noise = recipe.noise
        self.seed, self.device, self.dtype = recipe.seed, device, DTYPES[recipe.teacher.precision]
        self.empty = empty_prompt(recipe.data)
        self.clean = MicroBatchStream(
            recipe.data,
            split,
            micro_batch,
            recipe.seed,
            recipe.bad_samples,
            lanes=lanes or recipe.distill.micro_batches_per_step,
        )

    def take(self, start: int, stride: int) -> Iterator[tuple[int, NoisyBatch]]:
        """Micro-batches start, start + stride, ... with their numbers, on the device."""
        for number, batch in self.clean.take(start, stride):
            yield number, self.with_noise(number, batch)

    def with_noise(self, number: int, batch: Batch) -> NoisyBatch:
        """Micro-batch `number` with its noise, on the device."""
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(seed)
        batch = batch.drop_captions(self.empty, self.noise.caption_dropout, generator)
        sigmas = draw_sigmas(self.noise, len(batch.keys), generator)
        noisy, velocity = add_noise(batch.latents, sigmas, generator)
        return NoisyBatch(
            noisy.to(self.device, self.dtype),
            batch.prompts.to(self.device, self.dtype),
            sigmas.to(self.device),
            velocity.to(self.device, torch.float32),
        )
