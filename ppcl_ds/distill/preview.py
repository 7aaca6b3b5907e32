"""A look at the variants while they train: held-out velocity error, and pictures beside the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from itertools import islice

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from ppcl_ds.data.encoders import image_encoder
from ppcl_ds.data.noising import NoisyStream
from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.sampling import draw
from ppcl_ds.teacher.sharded import forget_order
from ppcl_ds.teacher.teacher import Teacher
from ppcl_ds.units.plan import Plan
from ppcl_ds.units.plugging import plugged
from ppcl_ds.units.unit import Unit

_PICTURES = 8
"""Pictures of each model."""


def look(
    recipe: Recipe,
    plan: Plan,
    teacher: Teacher,
    sharded: deepspeed.DeepSpeedEngine,
    units: Mapping[str, Unit],
    owner: Mapping[str, int],
    group: dist.ProcessGroup,
    device: torch.device,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Velocity error and pictures of every variant on held-out data, the same noise for all. Collective over all ranks.

    Args:
        units: the units of this rank's stage.
        owner: unit name -> its stage in `group`, the pipe group.

    Returns:
        `heldout/velocity_mse/VARIANT` -> error, and on rank 0, model -> pictures (N, C, H, W) in [-1, 1].
    """
    stream = NoisyStream(recipe, "heldout", _PICTURES, device)
    [(_, batch)] = islice(stream.take(0, 1), 1)
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(recipe.seed)).to(batch.latents)
    empty = stream.empty.to(device, noise.dtype)
    decoder = image_encoder(recipe.data, device) if dist.get_rank() == 0 else None  # only that rank writes
    errors: dict[str, float] = {}
    pictures: dict[str, Tensor] = {}
    reference: Tensor | None = None
    for name in ["teacher", *plan.variants]:
        inside = plugged(sharded.module, teacher.anatomy, plan, name, units, group, owner)
        with nullcontext() if name == "teacher" else inside, torch.no_grad():
            velocity = teacher.caller(sharded, batch.latents, batch.prompts, batch.sigmas)
            latents = draw(
                partial(teacher.caller, sharded),
                noise,
                batch.prompts,
                empty,
                steps=recipe.evaluate.steps,
                shift=recipe.noise.shift,
                guidance=recipe.evaluate.guidance,
            )
        if reference is None:
            reference = velocity
        else:
            errors[f"heldout/velocity_mse/{name}"] = float((velocity - reference).float().square().mean())
        if decoder is not None:
            pictures[name] = decoder.decode(latents.float()).cpu()
    forget_order(sharded)  # training's forwards end earlier
    return errors, pictures
