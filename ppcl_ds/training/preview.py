"""A look at models while they train: drawn from the same held-out prompts and noise every time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppcl_ds.data.stream import has_images, read_texts
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.drawing import Drawing
from ppcl_ds.teacher.encoding import Decoder
from ppcl_ds.teacher.noising import NoisyBatch, NoisyStream
from ppcl_ds.teacher.pipeline_call import Arguments
from ppcl_ds.teacher.samples import read_samples
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.training.delivery import send

_IMAGES = 8
"""Held-out samples, and images of each model; one, where captions cannot be read together."""


class Preview:
    """What every model is drawn from; every rank makes one.

    Attributes:
        clean: the first held-out samples as they are stored.
        noiser: adds noise to them.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher, device: torch.device) -> None:
        together = read_texts(recipe.data).joining.padded
        self.count = _IMAGES if together else 1
        stream = NoisyStream(
            recipe, teacher.call, "heldout", self.count, captions=not has_images(recipe.data, "heldout")
        )
        [(_, self.clean)] = islice(stream.clean.take(0, 1), 1)
        self.stream, self.noiser = stream, stream.noiser
        self.drawings = Drawing.several(recipe, teacher.call, stream.noiser, self.clean.samples, _IMAGES)
        self.recipe, self.teacher, self.device = recipe, teacher, device

    @property
    def has_images(self) -> bool:
        """Whether the samples are more than captions."""
        return bool(self.clean.latents.numel())

    def noisy(self, sharded: Any) -> NoisyBatch:
        """The samples as the teacher reads them in training, on the device; all ranks must call this together.

        Args:
            sharded: the teacher, which draws them where there are captions alone.
        """
        if self.has_images:
            return send(self.stream.with_noise(0, self.clean), self.device)
        return next(read_samples(self.recipe, self.teacher, sharded, "heldout", self.count, 0, 1, self.device))[1]

    def draw(self, answer: Callable[[Arguments], Tensor]) -> Tensor | None:
        """Images (N, C, H, W) in [-1, 1] on rank 0's CPU, None on others; all ranks must call this together.

        None everywhere for a pipeline of two transformers: only one of them is here.

        Args:
            answer: what a model puts out for arguments on the device.
        """
        if len(self.teacher.call.transformers()) > 1:
            return None
        decode = self.decoder if dist.get_rank() == 0 else None  # only that rank writes

        def asked(arguments: Arguments) -> Tensor:
            return answer(send(arguments, self.device)).cpu()

        drawn = [drawing.draw({self.teacher.component: asked}, decode)[1] for drawing in self.drawings]
        return torch.cat([images for images in drawn if images is not None]) if decode else None

    @cached_property
    def decoder(self) -> Decoder:
        """From latents to images; it takes memory from when the first model has been drawn on."""
        return Decoder(self.teacher.path, self.device)
