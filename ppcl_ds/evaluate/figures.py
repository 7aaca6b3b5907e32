"""What one model is worth: size, speed, and how far its velocities and images are from the teacher's.

Shapes: N images, B batch, C latent channels, H and W latent height and width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from ppcl_ds.data.batch import Prompts
from ppcl_ds.data.noising import DTYPES, NoisyBatch
from ppcl_ds.data.stream import MicroBatchStream, empty_prompt
from ppcl_ds.errors import UserError
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.anatomy import Anatomy
from ppcl_ds.teacher.call import Caller
from ppcl_ds.teacher.heldout import HeldOut, mean_squared
from ppcl_ds.teacher.sampling import Sampling, draw, initial_noise

Judge = Callable[[Tensor, Sequence[str]], dict[str, float]]
"""Scores images (N, C, H, W) in [-1, 1] against their captions."""


class ModelFigures(BaseModel):
    """One row of the report.

    Attributes:
        name: `teacher`, a variant, or a variant with `-undistilled`.
        params: parameters of the whole transformer.
        block_params_ratio: parameters in its blocks over those in the teacher's.
        latency_ms: milliseconds of one forward of one sample, the median over a second.
        accuracy: share of images that show what was asked; None where the recipe names no judge.
        frechet: Frechet distance of the images to real ones; None likewise.
        velocity_mse: mean squared difference from the teacher's velocity on held-out data.
        sample_mse: mean squared difference from the teacher's latents drawn from the same noise.
        weights: which files were measured (`weights_digest` of the variant's folder); None for other models.
    """

    name: str
    params: int
    block_params_ratio: float
    latency_ms: float
    accuracy: float | None = None
    frechet: float | None = None
    velocity_mse: float
    sample_mse: float
    weights: str | None = None


class Figures(BaseModel):
    """The content of report.json."""

    models: Sequence[ModelFigures]


class Bench:
    """The same held-out data, prompts and noise for every model.

    The first model measured must be the teacher; the others are compared with it.
    """

    def __init__(self, recipe: Recipe, caller: Caller, device: torch.device) -> None:
        self.recipe, self.caller, self.device = recipe, caller, device
        self.dtype = DTYPES[recipe.teacher.precision]
        settings = recipe.evaluate
        self.heldout = HeldOut(recipe, caller, device)
        stored = MicroBatchStream(recipe.data, "heldout", 1, recipe.seed, recipe.bad_samples)
        samples = [batch for _, batch in islice(stored.take(0, 1), settings.samples)]
        self.captions = [batch.captions[0] for batch in samples]
        self.prompts = [batch.prompts for batch in samples]
        shape = (settings.samples, *self.heldout.batches[0].latents.shape[1:])
        self.noise = initial_noise(shape, recipe.seed)
        self.judge = load_judge(settings.judge) if settings.judge else None
        self.teacher_velocities: list[Tensor] = []
        self.teacher_latents: Tensor | None = None
        self.teacher_blocks = 0

    def measure(self, name: str, model: nn.Module, decode: Callable[[Tensor], Tensor]) -> tuple[ModelFigures, Tensor]:
        """All figures of one model, and its images (N, C, H, W) in [-1, 1].

        Args:
            model: already in the recipe's dtype.
        """
        velocities = self.heldout.velocities(model)
        latents = self._draw(model)
        blocks = Anatomy(model).block_parameters
        if self.teacher_latents is None:
            self.teacher_velocities, self.teacher_latents, self.teacher_blocks = velocities, latents, blocks
        images = decode(latents)
        scores = self.judge(images, self.captions) if self.judge else {}
        figures = ModelFigures(
            name=name,
            params=sum(p.numel() for p in model.parameters()),
            block_params_ratio=blocks / self.teacher_blocks,
            latency_ms=self.latency(model),
            accuracy=scores.get("accuracy"),
            frechet=scores.get("frechet"),
            velocity_mse=mean_squared(velocities, self.teacher_velocities),
            sample_mse=float((latents - self.teacher_latents).square().mean()),
        )
        return figures, images

    def _draw(self, model: nn.Module) -> Tensor:
        settings = self.recipe.evaluate
        empty = empty_prompt(self.recipe.data).to(self.device, self.dtype)
        drawn = []
        for start in range(0, settings.samples, settings.batch_size):
            part = slice(start, start + settings.batch_size)
            latents = draw(
                partial(self.caller, model),
                self.noise[part].to(self.device, self.dtype),
                Prompts.stack(self.prompts[part]).to(self.device, self.dtype),
                empty,
                Sampling.of(self.recipe),
            )
            drawn.append(latents.float().cpu())
        return torch.cat(drawn)

    def latency(self, model: nn.Module) -> float:
        """Milliseconds of one forward of one sample, the median over a second."""
        batch = self.heldout.batches[0]
        one = NoisyBatch(batch.latents[:1], batch.prompts.row(0), batch.sigmas[:1], batch.velocity[:1])
        forward = partial(self.heldout.velocity, model, one)
        timer = Timer("forward()", globals={"forward": forward}, num_threads=torch.get_num_threads())
        return 1000 * timer.blocked_autorange(min_run_time=1.0).median


def load_judge(path: str) -> Judge:
    """The function that `evaluate.judge` names as `module:function`.

    Raises:
        UserError: there is no such function.
    """
    module, _, function = path.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as fault:
        raise UserError(f"evaluate.judge: cannot load '{path}' ({fault}); write it as module:function") from None
