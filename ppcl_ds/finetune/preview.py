"""A look at a variant while it is fine-tuned: held-out losses by noise level, and images beside the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import deepspeed
import torch
from torch import Tensor

from ppcl_ds.data.noising import add_noise, sigma_quantiles
from ppcl_ds.finetune.pipeline import VariantEngine
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.call import Caller
from ppcl_ds.teacher.heldout import mean_squared
from ppcl_ds.teacher.sampling import Velocity
from ppcl_ds.training.preview import Preview


def look(
    recipe: Recipe,
    quantiles: Sequence[float],
    caller: Caller,
    sharded: deepspeed.DeepSpeedEngine,
    engine: VariantEngine,
    device: torch.device,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Held-out losses and images; the same samples and noise every time. Collective over all ranks.

    Args:
        quantiles: of the noise levels that training draws.

    Returns:
        `heldout/flow/QUANTILE` and `heldout/velocity/QUANTILE`, mean squared errors from the data's and from the
        teacher's velocity; and on rank 0, `teacher` and `variant` -> images (N, C, H, W) in [-1, 1].
    """
    preview = Preview(recipe, device)
    clean, dtype = preview.clean, preview.noise.dtype
    prompts = clean.prompts.to(device, dtype)
    models: dict[str, Velocity] = {"teacher": partial(caller, sharded), "variant": engine.velocity}
    figures: dict[str, float] = {}
    with torch.no_grad():
        levels = sigma_quantiles(recipe.noise, quantiles)
        for number, (quantile, level) in enumerate(zip(quantiles, levels, strict=True)):
            generator = torch.Generator().manual_seed(recipe.seed + number)  # training's is another one
            sigmas = level.expand(len(clean.keys))
            noisy, target = add_noise(clean.latents, sigmas, generator)
            arguments = (noisy.to(device, dtype), prompts, sigmas.to(device))
            true, own = (models[name](*arguments).float() for name in ("teacher", "variant"))
            figures[f"heldout/flow/{quantile:g}"] = mean_squared([own], [target.to(own)])
            figures[f"heldout/velocity/{quantile:g}"] = mean_squared([own], [true])
        drawn = {name: preview.draw(velocity, prompts) for name, velocity in models.items()}
    return figures, {name: images for name, images in drawn.items() if images is not None}
