"""Units of a checkpoint by the names of a plan."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ppcl_ds.errors import UserError
from ppcl_ds.teacher.sources import Source
from ppcl_ds.training.checkpoint import Checkpoint
from ppcl_ds.units.plan import Plan, UnitPlan


def unit_sources(checkpoint: Checkpoint, trained: Plan, unit: UnitPlan) -> dict[str, Source]:
    """A trained unit's float32 masters by their name inside the unit, each read when it is asked for.

    Args:
        trained: the plan that the checkpoint was trained with.

    Raises:
        UserError: the unit was not trained in that run.
    """
    if unit not in trained.units or unit.name not in checkpoint.contents.units:
        where = checkpoint.folder.parent.parent
        raise UserError(f"unit '{unit.name}' on blocks {list(unit.span)} was not trained in {where}")
    return sources_of(checkpoint, unit.name)


def sources_of(checkpoint: Checkpoint, name: str) -> dict[str, Source]:
    """Everything that was trained under a name, each tensor float32 and read when it is asked for.

    Where there is a moving average of the weights, it is that.
    """
    what = "ema" if "ema" in checkpoint.moments_of(name) else "master"
    sources: dict[str, Source] = {}
    start = 0
    for key, dimensions in checkpoint.contents.units[name].parameters.items():
        shape = torch.Size(dimensions)
        sources[key] = Source(shape, torch.float32, partial(_read, checkpoint, name, what, start, shape))
        start += shape.numel()
    return sources


def _read(checkpoint: Checkpoint, name: str, what: str, start: int, shape: torch.Size) -> Tensor:
    return checkpoint.part(name, what, start, start + shape.numel()).view(shape)
