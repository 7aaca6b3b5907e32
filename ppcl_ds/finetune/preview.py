"""A look at a variant while it is fine-tuned: held-out losses by noise level, and pictures beside the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from ppcl_ds.data.encoders import image_encoder
from ppcl_ds.data.noising import NoisyStream, add_noise, sigma_quantiles
from ppcl_ds.finetune.pipeline import VariantEngine
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.call import Caller
from ppcl_ds.teacher.heldout import mean_squared
from ppcl_ds.teacher.sampling import Velocity, draw

_PICTURES = 8
"""Held-out samples, and pictures of each model."""


def look(
    recipe: Recipe,
    quantiles: Sequence[float],
    caller: Caller,
    sharded: deepspeed.DeepSpeedEngine,
    engine: VariantEngine,
    device: torch.device,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Held-out losses and pictures; the same samples and noise every time. Collective over all ranks.

    Args:
        quantiles: of the noise levels that training draws.

    Returns:
        `heldout/flow/QUANTILE` and `heldout/velocity/QUANTILE`, mean squared errors from the data's and from the
        teacher's velocity; and on rank 0, `teacher` and `variant` -> pictures (N, C, H, W) in [-1, 1].
    """
    stream = NoisyStream(recipe, "heldout", _PICTURES, device)
    _, clean = next(iter(stream.clean.take(0, 1)))
    prompts = clean.prompts.to(device, stream.dtype)
    models: dict[str, Velocity] = {"teacher": partial(caller, sharded), "variant": engine.velocity}
    figures: dict[str, float] = {}
    with torch.no_grad():
        levels = sigma_quantiles(recipe.noise, quantiles)
        for number, (quantile, level) in enumerate(zip(quantiles, levels, strict=True)):
            generator = torch.Generator().manual_seed(recipe.seed + number)  # training's is another one
            sigmas = level.expand(len(clean.keys))
            noisy, target = add_noise(clean.latents, sigmas, generator)
            arguments = (noisy.to(device, stream.dtype), prompts, sigmas.to(device))
            true, own = (models[name](*arguments).float() for name in ("teacher", "variant"))
            figures[f"heldout/flow/{quantile:g}"] = mean_squared([own], [target.to(own)])
            figures[f"heldout/velocity/{quantile:g}"] = mean_squared([own], [true])
        noise = torch.randn(clean.latents.shape, generator=torch.Generator().manual_seed(recipe.seed))
        drawn = {
            name: draw(
                velocity,
                noise.to(device, stream.dtype),
                prompts,
                stream.empty.to(device, stream.dtype),
                steps=recipe.evaluate.steps,
                shift=recipe.noise.shift,
                guidance=recipe.evaluate.guidance,
            )
            for name, velocity in models.items()
        }
    if dist.get_rank():
        return figures, {}
    decoder = image_encoder(recipe.data, device)  # only this rank writes
    return figures, {name: decoder.decode(latents.float()).cpu() for name, latents in drawn.items()}
