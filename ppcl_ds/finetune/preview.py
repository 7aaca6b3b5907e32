"""A look at a variant while it is fine-tuned: held-out losses by noise level, and images beside the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import deepspeed
import torch
from torch import Tensor

from ppcl_ds.finetune.pipeline import VariantEngine
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.heldout import mean_squared
from ppcl_ds.teacher.noising import place_quantiles
from ppcl_ds.teacher.teacher import Teacher, forward
from ppcl_ds.training.delivery import send
from ppcl_ds.training.preview import Preview


def look(
    recipe: Recipe,
    quantiles: Sequence[float],
    teacher: Teacher,
    sharded: deepspeed.DeepSpeedEngine,
    engine: VariantEngine,
    device: torch.device,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Held-out losses and images; the same samples and noise every time. Collective over all ranks.

    Args:
        quantiles: of the noise levels that training draws.

    Returns:
        `heldout/flow/QUANTILE` and `heldout/velocity/QUANTILE`, mean squared errors from the data's and from the
        teacher's velocity, or of captions alone `heldout/velocity/trajectories`; and on rank 0, `teacher` and `variant`
        -> images (N, C, H, W) in [-1, 1].
    """
    preview = Preview(recipe, teacher, device)
    size = preview.clean.size
    figures: dict[str, float] = {}
    images: dict[str, Tensor | None] = {}
    with torch.no_grad():
        if not preview.has_images:
            batch, quantiles = preview.noisy(sharded), ()
            true = teacher.answer(sharded, batch).float()
            own = teacher.call.stepped_by(engine.output(batch.arguments, batch.size), batch.size).float()
            figures["heldout/velocity/trajectories"] = mean_squared([own], [true])
        places = place_quantiles(recipe.noise, quantiles) if quantiles else ()
        for number, (quantile, place) in enumerate(zip(quantiles, places, strict=True)):
            generator = torch.Generator().manual_seed(recipe.seed + number)  # training's is another one
            batch = preview.noiser.noisy(preview.clean, place.expand(len(preview.clean.samples)), generator)
            batch = send(batch, device)
            true = teacher.answer(sharded, batch).float()
            own = teacher.call.stepped_by(engine.output(batch.arguments, size), size).float()
            figures[f"heldout/flow/{quantile:g}"] = mean_squared([own], [batch.target.to(own)])
            figures[f"heldout/velocity/{quantile:g}"] = mean_squared([own], [true])
        images["teacher"] = preview.draw(partial(forward, sharded))
        images["variant"] = preview.draw(partial(engine.output, size=size))
    return figures, {name: drawn for name, drawn in images.items() if drawn is not None}
