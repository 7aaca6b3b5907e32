"""A look at models while they train: drawn from the same held-out prompts and noise every time."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from ppcl_ds.data.batch import Prompts
from ppcl_ds.data.encoders import ImageEncoder, image_encoder
from ppcl_ds.data.noising import NoisyStream
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.sampling import Sampling, Velocity, draw, initial_noise

_IMAGES = 8
"""Held-out samples, and images of each model."""


class Preview:
    """What every model is drawn from; every rank makes one.

    Attributes:
        clean: the first held-out samples as they are stored.
        noisy: the same as the teacher reads them in training.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        stream = NoisyStream(recipe, "heldout", _IMAGES, device)
        _, self.clean = next(stream.clean.take(0, 1))
        self.noisy = stream.with_noise(0, self.clean)
        self.noise = initial_noise(self.clean.latents.shape, recipe.seed).to(device, stream.dtype)
        self.empty = stream.empty.to(device, stream.dtype)
        self.how = Sampling.of(recipe)
        self.data, self.device = recipe.data, device

    def draw(self, velocity: Velocity, prompts: Prompts) -> Tensor | None:
        """Images (N, C, H, W) in [-1, 1] on rank 0's CPU, None on others; all ranks must call this together."""
        latents = draw(velocity, self.noise, prompts, self.empty, self.how)
        return self.decoder.decode(latents.float()).cpu() if dist.get_rank() == 0 else None  # only that rank writes

    @cached_property
    def decoder(self) -> ImageEncoder:
        """From latents to images; it takes memory from when the first model has been drawn on."""
        return image_encoder(self.data, self.device)
