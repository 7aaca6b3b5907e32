"""Drawing pictures with any transformer: flow-matching Euler steps by diffusers' own scheduler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ppcl_ds.data.batch import Prompts

Velocity = Callable[[Tensor, Prompts, Tensor], Tensor]
"""Latents (B, C, H, W), B prompts and noise levels (B,) -> the velocity (B, C, H, W), see `Caller`."""


@torch.no_grad()
def draw(
    velocity: Velocity,
    noise: Tensor,
    prompts: Prompts,
    empty: Prompts,
    *,
    steps: int,
    shift: float = 1.0,
    guidance: float = 1.0,
) -> Tensor:
    """Draw latents from noise.

    Args:
        velocity: asks a model; where it is spread over ranks, all of them must call this together.
        noise: (B, C, H, W); the same noise gives the same picture.
        prompts: B encoded captions.
        empty: the encoded empty caption, B = 1; read only when `guidance` is above 1.
        steps: Euler steps.
        shift: time shift of the scheduler.
        guidance: classifier-free guidance scale; 1 asks the model once a step, more asks it twice.

    Returns:
        (B, C, H, W) latents.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    latents = noise
    unguided = Prompts.stack([empty] * len(noise)) if guidance > 1 else prompts
    for time in scheduler.timesteps:
        sigma = (time / scheduler.config["num_train_timesteps"]).to(noise.device).expand(len(noise))
        step = velocity(latents, prompts, sigma)
        if guidance > 1:
            plain = velocity(latents, unguided, sigma)
            step = plain + guidance * (step - plain)
        latents = scheduler.step(step, time, latents, return_dict=False)[0]
    return latents
