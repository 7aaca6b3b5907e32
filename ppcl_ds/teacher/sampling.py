"""Drawing images with any transformer: flow-matching Euler steps by diffusers' own scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ppcl_ds.data.batch import Prompts
from ppcl_ds.recipe import Recipe

Velocity = Callable[[Tensor, Prompts, Tensor], Tensor]
"""Latents (B, C, H, W), B prompts and noise levels (B,) -> the velocity (B, C, H, W), see `Caller`."""


@dataclass(frozen=True)
class Sampling:
    """How latents are drawn.

    Attributes:
        steps: Euler steps.
        shift: time shift of the scheduler.
        guidance: classifier-free guidance scale; 1 asks the model once a step, more asks it twice.
    """

    steps: int
    shift: float = 1.0
    guidance: float = 1.0

    @classmethod
    def of(cls, recipe: Recipe) -> Sampling:
        return cls(recipe.evaluate.steps, recipe.noise.shift, recipe.evaluate.guidance)


def initial_noise(shape: Sequence[int], seed: int) -> Tensor:
    """What drawing begins with, float32 on the CPU: the same for every model."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def draw(velocity: Velocity, noise: Tensor, prompts: Prompts, empty: Prompts, how: Sampling) -> Tensor:
    """Draw latents from noise.

    Args:
        velocity: asks a model; where it is spread over ranks, all of them must call this together.
        noise: (B, C, H, W); the same noise gives the same image.
        prompts: B encoded captions.
        empty: the encoded empty caption, B = 1; read only when `how.guidance` is above 1.

    Returns:
        (B, C, H, W) latents.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=how.shift)
    scheduler.set_timesteps(how.steps)
    latents = noise
    unguided = Prompts.stack([empty] * len(noise)) if how.guidance > 1 else prompts
    for time in scheduler.timesteps:
        sigma = (time / scheduler.config["num_train_timesteps"]).to(noise.device).expand(len(noise))
        step = velocity(latents, prompts, sigma)
        if how.guidance > 1:
            plain = velocity(latents, unguided, sigma)
            step = plain + how.guidance * (step - plain)
        latents = scheduler.step(step, time, latents, return_dict=False)[0]
    return latents
