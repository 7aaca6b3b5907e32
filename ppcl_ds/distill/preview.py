"""A look at the variants while they train: held-out velocity error, and images beside the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from ppcl_ds.recipe import Recipe
from ppcl_ds.teacher.sharded import forget_order
from ppcl_ds.teacher.teacher import Teacher, forward
from ppcl_ds.training.preview import Preview
from ppcl_ds.units.plan import Plan
from ppcl_ds.units.plugging import plugged
from ppcl_ds.units.unit import Unit


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
    """Velocity error and images of every variant on held-out data, the same noise for all. Collective over all ranks.

    Args:
        units: the units of this rank's stage.
        owner: unit name -> its stage in `group`, the pipe group.

    Returns:
        `heldout/velocity_mse/VARIANT` -> error, and on rank 0, model -> images (N, C, H, W) in [-1, 1].
    """
    preview = Preview(recipe, teacher, device)
    batch = preview.noisy(sharded)
    errors: dict[str, float] = {}
    images: dict[str, Tensor] = {}
    reference: Tensor | None = None
    for name in ["teacher", *plan.variants]:
        inside = plugged(sharded.module, teacher.anatomy, plan, name, units, group, owner)
        with nullcontext() if name == "teacher" else inside, torch.no_grad():
            velocity = teacher.answer(sharded, batch)
            drawn = preview.draw(partial(forward, sharded))
        if reference is None:
            reference = velocity
        else:
            errors[f"heldout/velocity_mse/{name}"] = float((velocity - reference).float().square().mean())
        if drawn is not None:
            images[name] = drawn
    forget_order(sharded)  # training's forwards end earlier
    return errors, images
